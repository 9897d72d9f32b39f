"""Statistics of repeated samples: avg@k, pass@k and maj@k with their intervals, and their table.

A response is solved if its reward is at least 1, so that partial credit, such as a bonus for the form
of an answer, raises the mean reward but neither pass@k nor maj@k.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from krl.rewards.functions import SOLVED, as_float32

NUM_RESAMPLES = 10_000  # of a bootstrap interval


def summarize(
    rewards: np.ndarray, lengths: np.ndarray, finished: np.ndarray, keys: Sequence[Sequence[str | None]]
) -> dict[str, Any]:
    """The statistics of k samples of each of D tasks.

    Args:
        rewards: [D, k] float.
        lengths: [D, k] int, response tokens.
        finished: [D, k] bool, False where the response was cut.
        keys: D lists of k normal forms of final answers; None where a response has none.

    Returns:
        `tasks` (D), `samples` (k), `response_length` (mean), `truncation_rate`, and by name the estimates
        `avg@k` (mean reward), `pass@j` for j = 1, 2, 4, ... and k, and `maj@k`. An estimate is
        {"value", "low", "high"}: the mean over the tasks and its 95% interval, see `bootstrap`.

    Raises:
        ValueError: there is no sample, or the shapes differ.

    >>> result = summarize(np.array([[1.0, 0.0]]), np.ones((1, 2)), np.ones((1, 2), bool), [["7", "8"]])
    >>> [result[name]["value"] for name in ("avg@2", "pass@1", "pass@2", "maj@2")]
    [0.5, 0.5, 1.0, 1.0]
    """
    shapes = (rewards.shape, lengths.shape, finished.shape, (len(keys), *{len(row) for row in keys}))
    if rewards.ndim != 2 or not rewards.size or len(set(shapes)) > 1:
        raise ValueError(f"rewards, lengths, finished and keys must all be [D, k] with D, k >= 1, got {shapes}")
    num_tasks, samples = rewards.shape
    solved = as_float32(np.asarray(rewards)) >= SOLVED
    sizes = sorted({2**i for i in range(samples.bit_length())} | {samples})
    by_task = {f"avg@{samples}": rewards.mean(axis=1, dtype=np.float64)}
    by_task |= {f"pass@{size}": pass_at(size, solved.sum(axis=1), samples) for size in sizes}
    by_task[f"maj@{samples}"] = solved[np.arange(num_tasks), [winner(row) for row in keys]].astype(np.float64)
    values = np.stack(list(by_task.values()), axis=1)
    low, high = bootstrap(values)
    columns = zip(by_task, values.mean(axis=0).tolist(), low.tolist(), high.tolist(), strict=True)
    return {
        "tasks": num_tasks,
        "samples": samples,
        **{name: {"value": value, "low": least, "high": most} for name, value, least, most in columns},
        "response_length": float(lengths.mean()),
        "truncation_rate": float((~finished).mean()),
    }


def pass_at(size: int, solved: np.ndarray, samples: int) -> np.ndarray:
    """The probability that some of `size` samples, drawn from the k without replacement, is solved.

        pass@j = 1 - C(k - c, j) / C(k, j) = 1 - prod over i < j of (k - c - i) / (k - i)

    which is unbiased for the probability that one of j fresh samples is solved. The product needs no
    large binomials.

    Args:
        size: j, 1 to k.
        solved: [D] int, c, the solved samples of each task.
        samples: k.

    Returns:
        [D] float64.

    References:
        Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv 2107.03374, equation 1.

    >>> pass_at(2, np.array([0, 1, 3, 4]), 4).tolist()
    [0.0, 0.5, 1.0, 1.0]
    """
    drawn = np.arange(size)
    failed = samples - np.arange(samples + 1)[:, None]  # of every c from 0 to k
    none = ((failed - drawn) / (samples - drawn)).prod(axis=1)  # a factor is 0 where j exceeds k - c
    return 1.0 - none[solved]


def winner(keys: Sequence[str | None]) -> int:
    """The first sample with the most frequent answer.

    Ties go to the answer that was given first. Samples without an answer do not vote; if none has one, the
    first sample wins.

    >>> winner([None, "8", "7", None, "7", "8", None])
    1
    """
    votes = Counter(key for key in keys if key is not None)
    return keys.index(votes.most_common(1)[0][0]) if votes else 0  # the counter keeps the order of first votes


def bootstrap(values: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile intervals of means over tasks, from resampled tasks.

    Tasks are drawn anew, not their samples, so an interval is about other tasks of the same kind, and the
    chance in the samples of a task is part of it. All columns share their resamples. One task has an
    interval of no width.

    Args:
        values: [D, C] float64, C statistics of D tasks.
        seed: of the resamples.

    Returns:
        (low [C], high [C]), float64.

    References:
        Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    num_tasks = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((NUM_RESAMPLES, values.shape[1]))
    rows = max(1, 1_000_000 // num_tasks)  # resamples at once, to bound memory
    for begin in range(0, NUM_RESAMPLES, rows):
        part = means[begin : begin + rows]
        chosen = rng.integers(num_tasks, size=(len(part), num_tasks)) + num_tasks * np.arange(len(part))[:, None]
        times = np.bincount(chosen.ravel(), minlength=len(part) * num_tasks).reshape(len(part), num_tasks)
        part[:] = times @ values / num_tasks
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return low, high


def average(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The unweighted mean over sets of their avg@k, pass@k, maj@k, response length and truncation rate.

    Args:
        results: a summary by name of its set; see `summarize`. Each set's own k counts.

    Returns:
        `avg@k`, `pass@k`, `maj@k`, `response_length` and `truncation_rate`.
    """
    rows = [_headline(summary) for summary in results.values()]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _headline(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of a set's row in the table."""
    k = summary["samples"]
    estimates = {f"{name}@k": summary[f"{name}@{k}"]["value"] for name in ("avg", "pass", "maj")}
    return estimates | {name: summary[name] for name in ("response_length", "truncation_rate")}


def table(results: dict[str, dict[str, Any]]) -> Table:
    """One row a set and, under several, their average; rates in percent, intervals of 95%.

    Args:
        results: a summary by name of its set; see `summarize`.
    """
    sizes = {summary["samples"] for summary in results.values()}
    k = str(sizes.pop()) if len(sizes) == 1 else "k"
    grid = Table("set", box=SIMPLE, pad_edge=False)  # a line of 80 columns holds it
    for heading in ("tasks", "k", f"avg@{k}", "95%", f"pass@{k}", f"maj@{k}", "tokens", "cut"):
        grid.add_column(heading, justify="right")

    def add(name: str, tasks: str, samples: str, shown: dict[str, float], interval: str) -> None:
        avg, passed, voted, cut = (f"{100 * shown[x]:.1f}" for x in ("avg@k", "pass@k", "maj@k", "truncation_rate"))
        tokens = f"{shown['response_length']:.0f}"
        grid.add_row(escape(name), tasks, samples, avg, interval, passed, voted, tokens, cut)

    for name, summary in results.items():
        estimate = summary[f"avg@{summary['samples']}"]
        interval = f"{100 * estimate['low']:.1f}-{100 * estimate['high']:.1f}"
        add(name, str(summary["tasks"]), str(summary["samples"]), _headline(summary), interval)
    if len(results) > 1:
        grid.add_section()
        add("average", "", "", average(results), "")
    return grid
