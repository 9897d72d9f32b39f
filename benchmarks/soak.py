"""A run that is killed at random, again and again, against one that is left alone: nothing lost, nothing counted twice.

    python -m benchmarks.soak --kills 200

Trains a tiny policy on the arithmetic ladder with a checkpoint every few steps. Each start of it is killed (SIGKILL) at
a random moment, in its start-up, in a step, in an evaluation or while a checkpoint is written; the last one is left to
end. Every row of metrics.jsonl (but times), groups.jsonl and evaluations.jsonl must be that of the run that was never
killed, and no checkpoint may have been damaged.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = {
    "prompts_per_step": 4, "alloc.budget": 16, "alloc.n_max": 8, "arithmetic.addition": 1,
    "arithmetic.multiplication": 0,
    "arithmetic.num_warm": 40, "arithmetic.num_train": 12, "arithmetic.num_test": 6, "policy.embed_size": 16,
    "policy.num_heads": 2,
    "policy.num_kv_heads": 1, "policy.head_size": 4, "policy.mlp_size": 32, "policy.unroll": 1, "sft.steps": 150,
    "sft.batch_size": 32,
    "sft.learning_rate": 1e-2, "sft.save_every": 20, "optim.micro_tokens": 64, "eval.every": 10, "eval.samples": 2,
    "checkpoint.every": 3, "data.max_prompt_tokens": 8, "sample.max_new_tokens": 4,
}  # fmt: skip
TIMED = ("seconds", "memory", "tokens_per_second", "compiles")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--most-seconds", type=float, default=10.0, help="that a start lives")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = soak(pathlib.Path(directory), options)
    print(json.dumps({"key": "soak", **found}))
    sys.exit(bool(found["rows_that_differ"]) or found["damaged_checkpoints"] > 0)


def soak(place: pathlib.Path, options) -> dict:
    """Run both, and compare them."""
    alone, killed = place / "alone", place / "killed"
    began = time.monotonic()
    start(alone, options).wait()
    uninterrupted, rng = time.monotonic() - began, random.Random(options.seed)
    at, kills = collections.Counter(), 0
    while kills < options.kills:
        process = start(killed, options)
        try:
            process.wait(timeout=rng.uniform(0, options.most_seconds))
            break  # it came to its end
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            at[state(killed)] += 1
    code = start(killed, options).wait()
    return {
        "kills": kills,
        "killed_in": dict(at),
        "last_exit_code": code,
        "steps": options.steps,
        "rows_that_differ": {
            name: differing(alone, killed, name)
            for name in ("metrics", "groups", "evaluations")
            if differing(alone, killed, name)
        },
        "damaged_checkpoints": len(list((killed / "damaged").glob("*"))),
        "seconds_uninterrupted": round(uninterrupted),
    }


def start(workdir: pathlib.Path, options) -> subprocess.Popen:
    """A start of the run, in a process of its own."""
    keys = [f"--config.{key}={value}" for key, value in (CONFIG | {"steps": options.steps}).items()]
    return subprocess.Popen(
        [sys.executable, "train.py", "--config", "configs/arithmetic.py", "--workdir", str(workdir), *keys], cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def state(workdir: pathlib.Path) -> str:
    """Where a kill met the run, as far as what it left tells."""
    if not (workdir / "config.json").exists():
        return "before the directory was its own"
    if not (workdir / "metrics.jsonl").exists():
        return "fine-tuning"
    return "a checkpoint being written" if list((workdir / "checkpoints").glob("*tmp*")) else "starting or a step"


def differing(alone: pathlib.Path, killed: pathlib.Path, name: str) -> int:
    """How many rows of a file are not the same in both, times apart."""

    def rows(workdir):
        lines = (workdir / f"{name}.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)} for line in lines]

    first, second = rows(alone), rows(killed)
    return sum(a != b for a, b in zip(first, second, strict=False)) + abs(len(first) - len(second))


if __name__ == "__main__":
    main()
