"""Are rollouts the bottleneck of a setting? Only there can it matter who gets them.

    python -m benchmarks.elasticity operators --out runs/elasticity [--seeds 0 1 2] [--jobs 2] [--config.key=value ...]

Uniform budgets with half, once, twice and four times the rollouts of a config, with equal steps and all else
equal, from the same warm starts. The elasticity is what the second R rollouts of a step add to final accuracy.
"""

import argparse
import pathlib
from collections.abc import Mapping

from benchmarks.runs import Interval, Job, interval, parse, read_config, read_results, run_all


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of configs/, such as operators")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, changes = parse(parser)
    options.results = options.results or options.out / "results.jsonl"
    task = pathlib.Path(options.config).stem
    config = read_config(task, changes)
    rollouts = int(config["alloc.budget"])
    budgets = [rollouts // 2, rollouts, 2 * rollouts, 4 * rollouts]
    jobs = {(seed, budget): job(task, changes, seed, budget) for seed in options.seeds for budget in budgets}
    run_all(list(jobs.values()), options)
    rows = read_results(options.results)
    print(report({at: rows[job.key()]["accuracy"] for at, job in jobs.items() if job.key() in rows}, budgets))


def job(task: str, changes: dict, seed: int, budget: int) -> Job:
    """A run with uniform budgets, of config.prompts_per_step prompts."""
    uniform = {"alloc.rule": "uniform", "alloc.prior": "shared", "alloc.n_min": 1, "alloc.budget": budget}
    return Job(task, f"uniform_{budget}", changes | uniform | {"seed": seed})


def report(accuracy: Mapping[tuple[int, int], float], budgets: list[int]) -> str:
    """The table and the verdict.

    Args:
        accuracy: final accuracy by (seed, rollouts a step).
        budgets: R/2, R, 2R and 4R.
    """
    lines = ["| rollouts a step | seeds | final accuracy | gain over half of them |", "|---" * 4 + "|"]
    gains: dict[int, Interval] = {}
    for budget in budgets:
        mine = {seed: got for (seed, spent), got in accuracy.items() if spent == budget}
        half = {seed: accuracy[seed, budget // 2] for seed in mine if (seed, budget // 2) in accuracy}
        gains[budget] = interval([mine[seed] - half[seed] for seed in half])
        lines.append(
            f"| {budget} | {len(mine)} | {_show(interval(list(mine.values())))} | {_show(gains[budget], '+')} |"
        )
    gain = gains[budgets[2]]
    if gain.n < 2:
        return "\n".join([*lines, "", "two seeds at least say whether allocation can matter here"])
    verdict = "allocation can matter here" if gain.mean > 2 * gain.error else "no sign that allocation can matter here"
    change = f"{_show(gain, '+')} in final accuracy from {budgets[1]} to {budgets[2]} rollouts a step"
    return "\n".join([*lines, "", f"{verdict}: {change} (standard error over {gain.n} seeds)"])


def _show(got: Interval, sign: str = "") -> str:
    error = f" ± {got.error:.3f}" if got.n > 1 else ""
    return f"{got.mean:{sign}.3f}{error}" if got.n else ""


if __name__ == "__main__":
    main()
