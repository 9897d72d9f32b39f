"""Whether a change of the code changes what runs compute, to the last bit: twenty steps each of eight small runs.

    python -m tests.frozen run OUT [--code DIR]     the runs, by the checkout in DIR (this one unless it is named)
    python -m tests.frozen compare OUT OTHER        what differs between two such directories; exit status 1 if anything does

The runs of two checkouts are to be made on the same machine with the same packages. What is compared is all that a run
measured and sampled: metrics without times, groups, evaluations and the text of every rollout.
"""

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys

from tests.command_line import learnt, rollouts, rows

SMALL = {
    "steps": 20, "sft.steps": 200, "alloc.budget": 32, "alloc.candidates": 16, "prompts_per_step": 8, "alloc.n_max": 16, "eval.every": 10, "eval.prompts": 32,
    "eval.samples": 2, "checkpoint.every": 10, "policy.embed_size": 32, "policy.head_size": 8, "policy.mlp_size": 64,
}  # fmt: skip
OPERATORS = {
    "operators.num_train": 96,
    "operators.num_operators": 7,
    "operators.num_test": 32,
    "operators.num_warm": 2000,
}
FIXED = {"alloc.n_min": 2}
DEVICES = {"mesh.shape": "(4,2)", "mesh.axis_names": "('data','model')"}
RUNS: dict[str, tuple[str, dict]] = {  # a config, and what is changed in it
    "reach": ("operators", {}),
    "knapsack": ("operators", FIXED | {"alloc.rule": "knapsack", "alloc.prior": "groups", "alloc.prior_field": "operator"}),
    "uniform": ("operators", FIXED | {"alloc.rule": "uniform", "alloc.prior": "shared", "alloc.fit_discounts": False}),
    "rounds": ("operators", FIXED | {"alloc.rule": "two_round", "loss.scale": "none", "loss.average": "tokens"}),
    "chosen": ("operators", {"alloc.rule": "knapsack_log", "loss.surrogate": "cispo", "loss.importance_cap": 2.0}),
    "eight": ("operators", DEVICES),
    "two": ("operators", {"mesh.shape": "(2,)", "distributed.processes": 2}),
    "dataset": ("gsm8k", {"data.max_train": 64}),
}  # fmt: skip
DATASET = {  # a policy from scratch on a file of sums, verified by workers
    "data.name": "", "data.prompt_field": "question", "data.answer_field": "answer", "data.completion_field": "solution", "data.template": "Q: {prompt}\nA:",
    "data.reward": "math_or_number", "sft.steps": 600, "sft.learning_rate": 1e-2, "data.max_prompt_tokens": 24, "sample.max_new_tokens": 12, "sample.stop": "('!',)", "sample.slots": 8,
    "tokenizer.path": "", "tokenizer.vocab_size": 64, "tokenizer.byte_fallback": False, "policy.path": "", "verify.workers": 1, "optim.micro_tokens": 512, "alloc.group": 4, "eval.sets": "",
    "policy.num_layers": 2, "policy.num_heads": 4, "policy.num_kv_heads": 2, "policy.dtype": "float32", "policy.tie_embeddings": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "compare"))
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("other", type=pathlib.Path, nargs="?")
    parser.add_argument("--code", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    options = parser.parse_args()
    if options.what == "run":
        for name in options.only:
            run(name, options.out.resolve(), options.code.resolve())
            print(f"{name}: {learnt(options.out / name)[-1].get('eval/accuracy')}", flush=True)
    else:
        told = [line for name in options.only for line in differences(options.out / name, options.other / name)]
        print("\n".join(told) or f"{len(options.only)} runs are equal to the last bit")
        raise SystemExit(bool(told))


def run(name: str, out: pathlib.Path, code: pathlib.Path) -> None:
    """One of RUNS in OUT/name, by the code of a checkout."""
    out.mkdir(parents=True, exist_ok=True)
    config, changes = RUNS[name]
    changes = SMALL | (OPERATORS if config == "operators" else DATASET) | changes | {"sft.dir": out / "sft"}
    if config == "gsm8k":
        changes["data.path"] = write_sums(out / "sums.jsonl")
    devices = 8 if name == "eight" else 1
    command = [sys.executable, "train.py", "--config", f"configs/{config}.py", "--workdir", str(out / name)]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    processes = changes.get("distributed.processes", 1)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "PYTHONPATH": str(code),
    }  # fmt: skip
    group = ["--config.distributed.coordinator=127.0.0.1:9879"] if processes > 1 else []
    logs = [(out / f"{name}-{process}.log").open("w") for process in range(processes)]
    started = [
        subprocess.Popen(
            [*command, *group, *([f"--config.distributed.process={process}"] if group else [])],
            cwd=code, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )
        for process, log in enumerate(logs)
    ]  # fmt: skip
    ended = [process.wait() for process in started]
    if any(ended):
        raise SystemExit(f"{name} failed: see {logs[0].name}")


def write_sums(path: pathlib.Path) -> pathlib.Path:
    """A data set of sums whose answers are marked, with the way to them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = [(a, b) for a in range(10) for b in range(10)]
    made = [{"question": f"{a}+{b}?", "answer": str(a + b), "solution": f"{a + b}!"} for a, b in sums]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """A line for each kind of row in which two runs differ."""
    kinds = {"metrics": lambda workdir: [row | {"slowest_process": 0} for row in learnt(workdir)], "rollouts": rollouts}
    kinds |= {kind: lambda workdir, kind=kind: rows(workdir, kind) for kind in ("groups", "evaluations")}
    told = []
    for kind, read in kinds.items():
        mine, theirs = read(one), read(other)
        if mine == theirs:
            continue
        pairs = zip(mine, theirs, strict=False)
        where = next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(theirs)))
        keys = collections.Counter(
            key for a, b in zip(mine, theirs, strict=False) for key in a.keys() | b.keys() if a.get(key) != b.get(key)
        )
        told.append(f"{one.name}: {kind} differ from row {where} on ({len(mine)} and {len(theirs)} rows): {dict(keys)}")
    return told


if __name__ == "__main__":
    main()
