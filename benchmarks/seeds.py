"""Uniform against knapsack budgets over several seeds, at equal rollouts and from equal warm starts.

    python -m benchmarks.seeds --out runs/seeds [--seeds 0 1 2] [--config.key=value ...]

Runs train.py for every seed and rule (a finished run is not repeated), prints one table and writes
seeds.json. Further arguments go to train.py. docs/results.md quotes its output.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

from krl.run.history import read_run, rollouts_to_reach, summary

RULES = ("uniform", "knapsack")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, more = parser.parse_known_args()
    rows = [measure(options.out, seed, more) for seed in options.seeds]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    (options.out / "seeds.json").write_text(
        json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n"
    )
    print(f"{machine}, {', '.join(f'{k} {v}' for k, v in versions.items())}\n")
    print(
        "| seed | effective uniform | knapsack | difference | accuracy before | uniform | knapsack | rollouts to match |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(line(str(row["seed"]), row))
    keys = [key for key in rows[0] if key != "seed"]
    means = {
        k: statistics.mean(row[k] for row in rows) if all(row[k] is not None for row in rows) else None for k in keys
    }
    print(line("mean", means))


def measure(out: pathlib.Path, seed: int, more: list[str]) -> dict:
    """Train both rules with a seed and compare them."""
    runs = {}
    for rule in RULES:
        workdir = out / f"{rule}-{seed}"
        command = [
            sys.executable, "train.py", "--config", "configs/arithmetic.py", "--workdir", str(workdir),
            f"--config.seed={seed}", f"--config.alloc.rule={rule}", f"--config.sft.dir={out / 'sft'}", *more,
        ]  # fmt: skip
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled")}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | compiled)
        runs[rule] = read_run(workdir)
    uniform, knapsack = summary(runs["uniform"]), summary(runs["knapsack"])
    needed = rollouts_to_reach(runs["knapsack"], uniform["final_accuracy"])
    return {
        "seed": seed,
        "effective_uniform": uniform["effective_ratio_rollouts"],
        "effective_knapsack": knapsack["effective_ratio_rollouts"],
        "effective_difference": knapsack["effective_ratio_rollouts"] - uniform["effective_ratio_rollouts"],
        "accuracy_before": uniform["first_accuracy"],
        "accuracy_uniform": uniform["final_accuracy"],
        "accuracy_knapsack": knapsack["final_accuracy"],
        "rollouts_to_match": needed / uniform["rollouts"] if needed is not None else None,
    }


def line(name: str, row: dict) -> str:
    cells = [f"{value:.3f}" if value is not None else "never" for key, value in row.items() if key != "seed"]
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
