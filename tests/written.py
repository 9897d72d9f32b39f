"""A work directory like that of a finished run, without the run."""

import json
import pathlib

import numpy as np
import pyarrow as pa

from krl.configs import default
from krl.configs.check import flatten
from krl.run.rollouts import SCHEMA, write_step


def write_whole_run(
    path: pathlib.Path, *, steps: int, prompts: int = 8, rule: str = "knapsack", seed: int = 0, response: str = "42", log_every: int = 1,
) -> pathlib.Path:  # fmt: skip
    """Everything that the report reads: eight rollouts a prompt on average, eleven evaluations of 40 held-out prompts."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    settings = flatten(default.get_config())
    settings |= {
        "alloc.rule": rule,
        "alloc.budget": 8 * prompts,
        "alloc.n_min": 2,
        "prompts_per_step": prompts,
        "steps": steps,
        "seed": seed,
    }
    (path / "config.json").write_text(json.dumps(settings))
    (path / "held_out.json").write_text(json.dumps({"prompts": [f"q{n}" for n in range(40)], "fields": {}}))
    metrics, groups, evaluations = [], [], []
    every = max(steps // 10, 1)
    for step in range(steps + 1):
        row: dict = {"step": step, "rollouts_total": 8 * prompts * step}
        if step:
            row |= _metrics(rng, step)
            groups.append(_groups(rng, step, prompts))
            if step % log_every == 0:
                write_step(path / "rollouts", step, _log(rng, groups[-1], response), most_gb=1.0)
        if step % every == 0:
            solved = rng.binomial(4, rng.beta(0.5, 1.0 + 1.0 / (step + 1), 40))
            row["eval/accuracy"] = float(solved.mean() / 4)
            evaluations.append(
                {"step": step, "rollouts_total": row["rollouts_total"], "samples": 4, "solved": solved.tolist()}
            )
        metrics.append(row)
    for name, rows in (("metrics", metrics), ("groups", groups), ("evaluations", evaluations)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _metrics(rng: np.random.Generator, step: int) -> dict:
    seconds = {
        f"seconds/{name}": float(rng.uniform(0.01, 0.1)) for name in ("budget", "rollout", "verify", "wait", "update")
    }
    return seconds | {
        "effective_ratio_rollouts": float(rng.uniform(0.2, 0.6)), "effective_ratio_prompts": float(rng.uniform(0.1, 0.4)),
        "price": float(rng.normal(-5.0, 0.3)), "count_max": float(rng.integers(8, 40)), "seconds/step": sum(seconds.values()),
        "tokens_per_second": 1000.0, "response_length_mean": 100.0 + step / 7, "response_length_max": 512.0,
        "truncation_rate": float(rng.uniform(0, 0.1)), "mismatch": 1e-3 * float(rng.uniform(0.5, 2)), "mismatch_max": 0.02,
        "staleness_mean": step / 3, "staleness_max": float(step),
    }  # fmt: skip


def _groups(rng: np.random.Generator, step: int, prompts: int) -> dict:
    belief = rng.beta(0.6, 0.8, prompts)
    counts = 2 + rng.multinomial(6 * prompts, np.full(prompts, 1 / prompts))
    return {
        "step": step, "task_ids": rng.integers(0, 1000, prompts).tolist(), "counts": counts.tolist(),
        "successes": rng.binomial(counts, belief).astype(float).tolist(), "tokens": (100 * counts).tolist(),
        "belief": belief.tolist(), "prior": np.clip(belief + rng.normal(0, 0.1, prompts), 0.01, 0.99).tolist(),
    }  # fmt: skip


def _log(rng: np.random.Generator, groups: dict, response: str) -> pa.Table:
    """Solved ones first; of the others one in four is cut off and one in eight a fault."""
    rows = []
    columns = zip(
        groups["task_ids"], groups["counts"], groups["successes"], groups["belief"], groups["prior"], strict=True
    )
    for task, count, wins, belief, prior in columns:
        for sample in range(count):
            kind = "solved" if sample < wins else rng.choice(["failed", "cut off", "timeouts"], p=[0.625, 0.25, 0.125])
            rows.append(
                {
                    "step": groups["step"], "prompt_id": task, "sample": sample, "prompt": f"What is {task} + 1?", "answer": str(task + 1),
                    "response": response, "reward": float(kind == "solved"), "advantage": float(kind == "solved") - wins / count,
                    "log_prob": -12.5, "length": 100, "finished": kind != "cut off", "count": count, "belief": belief, "prior": prior,
                    "fault": kind if kind == "timeouts" else "",
                }
            )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)
