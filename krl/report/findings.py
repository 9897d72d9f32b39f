"""Numbers that the report draws: where budgets went, how good beliefs were, how prompts changed, runs in pairs."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np

from krl.configs.check import FREE_KEYS
from krl.report.history import STATES, Run, smooth, spread, states
from krl.rewards.pool import FAULTS
from krl.run.rollouts import count_reasons

NORMAL = 1.959964  # standard errors to both sides of a normal 95% interval
BINS = 12  # of a success rate, in equal steps of its arcsine: narrower towards 0 and 1
FEWEST_GROUPS = 10  # that a bin of the calibration is shown for
# Of several steps together the largest of these is kept, else the mean.
MAXIMA = ("response_length_max", "mismatch_max", "staleness_max")
# What may differ between seeds of one setting.
NO_SETTINGS = {"seed", "checkpoint.dir", *FREE_KEYS} - {"steps", "eval.every"}


class Difference(TypedDict):
    """A mean of paired differences with its 95% interval."""

    mean: float
    low: float
    high: float
    pairs: int


def bin_edges(bins: int = BINS) -> np.ndarray:
    """The bounds of the bins of a success rate, float64 [bins + 1].

    >>> bin_edges(4).round(3).tolist()
    [0.0, 0.146, 0.5, 0.854, 1.0]
    """
    return np.sin(np.linspace(0, np.pi / 2, bins + 1)) ** 2


def which_bin(rates: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin of each success rate, int of the same shape.

    >>> which_bin(np.array([0.0, 0.1, 0.5, 1.0]), 4).tolist()
    [0, 0, 2, 3]
    """
    return np.clip(np.searchsorted(bin_edges(bins), rates + 1e-9, side="right") - 1, 0, bins - 1)


def _parts(rows: Sequence[dict], most: int) -> list[list[dict]]:
    """Rows cut into at most so many parts of about the same length."""
    bounds = np.array_split(np.arange(len(rows)), min(most, len(rows))) if rows else []
    return [[rows[number] for number in part] for part in bounds]


def thin(run: Run, most: int = 200) -> list[dict]:
    """The metrics of a run's steps, at most so many rows: means over runs of consecutive steps.

    A row has `step` and `until`, the first step of its part and the first after it; every metric that is a number; and
    `smoothed`, the effective share of rollouts as a moving mean over a tenth of all steps.
    """
    rows = [dict(row) for row in run["metrics"] if row["step"] > 0]
    effective = [row for row in rows if row.get("effective_ratio_rollouts") is not None]
    if effective:
        shares = np.array([row["effective_ratio_rollouts"] for row in effective], float)
        window = len(effective) // 10 // 2 * 2 + 1  # odd
        for row, value in zip(effective, smooth(shares, window).tolist(), strict=True):
            row["smoothed"] = value
    thinned = []
    for mine in _parts(rows, most):
        merged: dict = {"step": mine[0]["step"], "until": mine[-1]["step"] + 1}
        for name in sorted(set().union(*mine) - {"step"}):
            values = [row[name] for row in mine if row.get(name) is not None]
            if values:
                merged[name] = max(values) if name in MAXIMA else float(np.mean(values))
        thinned.append(merged)
    return thinned


def spending(run: Run) -> list[dict]:
    """What was spent at each evaluation: `accuracy`, `step`, `rollouts`, and `tokens`, `seconds` where recorded."""
    rows, tokens, seconds = [], 0.0, 0.0
    timed = all("seconds/step" in row for row in run["metrics"] if row["step"])
    counted = timed and all("tokens_per_second" in row for row in run["metrics"] if row["step"])
    for row in run["metrics"]:
        spent = row.get("seconds/step") or 0.0
        seconds += spent
        tokens += spent * (row.get("tokens_per_second") or 0.0)
        if row.get("eval/accuracy") is not None:
            point = {"accuracy": row["eval/accuracy"], "step": row["step"], "rollouts": row["rollouts_total"]}
            point |= {"tokens": tokens} if counted else {}
            rows.append(point | ({"seconds": seconds} if timed else {}))
    return rows


def budget_map(groups: Sequence[dict], most: int = 80) -> list[dict]:
    """Where rollouts went: shares of the rollouts of some consecutive steps by the bin of the believed success rate.

    Args:
        groups: rows of groups.jsonl.
        most: parts that the steps are cut into.

    Returns:
        Rows of `step` and `until` (the part's first step and the first after it), `bin` (0 to BINS - 1), `share`,
        `prompts` and `rollouts`, for the bins that had any.
    """
    rows = []
    for mine in _parts(groups, most):
        counts = np.concatenate([row["counts"] for row in mine]).astype(float)
        bins = which_bin(np.concatenate([row["belief"] for row in mine]))
        given, prompts = np.bincount(bins, counts, BINS), np.bincount(bins, minlength=BINS)
        rows += [
            {
                "step": mine[0]["step"], "until": mine[-1]["step"] + 1, "bin": int(number),
                "share": float(given[number] / max(counts.sum(), 1)),
                "prompts": int(prompts[number]), "rollouts": int(given[number]),
            }
            for number in np.flatnonzero(prompts)
        ]  # fmt: skip
    return rows


def counts_at(groups: Sequence[dict], steps: Sequence[int]) -> list[dict]:
    """Counts of chosen steps by believed success rate, to 0.01: `step`, `belief`, `count`, how many `prompts`."""
    rows = []
    for row in groups:
        if row["step"] in steps:
            pairs = Counter(zip(np.round(row["belief"], 2).tolist(), row["counts"], strict=True))
            for (belief, count), prompts in sorted(pairs.items()):
                rows.append({"step": row["step"], "belief": belief, "count": int(count), "prompts": prompts})
    return rows


def calibration(groups: Sequence[dict], column: str = "belief") -> tuple[list[dict], float]:
    """Believed against observed success rates, over all rollouts with a reward that were given for a belief.

    A bin's rates are means over its rollouts. Rollouts of a group have their prompt in common, so the interval is
    Wilson's for as many rollouts as would vary by themselves like the groups do: p (1 - p) / v, v being the variance
    of a ratio of sums over groups; no more than the rollouts, and where all outcomes were equal the groups.

    Args:
        groups: rows of groups.jsonl; those without the column are left out.
        column: of the expected success rates, "belief" or "prior".

    Returns:
        (rows of `bin`, `believed`, `observed`, `low`, `high` (95%), `groups`, `rollouts`, for bins with FEWEST_GROUPS
        or more; the expected calibration error: mean distance of believed and observed rate of a bin, over all bins
        weighted by their rollouts, NaN without any)

    References:
        Wilson 1927, Probable inference; Naeini et al. 2015, Obtaining well calibrated probabilities, AAAI.
    """
    known = [row for row in groups if column in row]
    if not known:
        return [], math.nan
    believed = np.concatenate([row[column] for row in known])
    counts = np.concatenate([row.get("scored", row["counts"]) for row in known]).astype(float)  # that have a reward
    wins = np.clip(np.concatenate([row["successes"] for row in known]).astype(float), 0, counts)  # older logs: any sums
    bins, rows, error = which_bin(believed), [], 0.0
    for number in np.unique(bins[counts > 0]):
        mine = (bins == number) & (counts > 0)
        given, size = counts[mine].sum(), int(mine.sum())
        rate, belief = float(wins[mine].sum() / given), float((believed[mine] * counts[mine]).sum() / given)
        error += given * abs(rate - belief)
        if size >= FEWEST_GROUPS:
            variance = ((wins[mine] - rate * counts[mine]) ** 2).sum() / given**2
            alone = min(rate * (1 - rate) / variance, given) if variance > 0 and 0 < rate < 1 else size
            low, high = wilson(rate, alone)
            rows.append({
                "bin": int(number), "believed": belief, "observed": rate, "low": low, "high": high, "groups": size,
                "rollouts": int(given),
            })  # fmt: skip
    return rows, error / max(counts.sum(), 1.0)


def wilson(rate: float, number: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share seen among a number of independent trials.

    >>> [round(bound, 4) for bound in wilson(0.5, 10)]
    [0.2366, 0.7634]
    """
    rate, square = min(max(rate, 0.0), 1.0), NORMAL**2 / number  # mean rewards may lie outside
    middle = (rate + square / 2) / (1 + square)
    half = math.sqrt(square * (rate * (1 - rate) + square / 4)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def faults(run: Run, most: int = 5) -> tuple[str, list[str]] | None:
    """What a run says of the rewards that could not be computed: a sentence, and the most common reasons in its log.

    None where all could be computed.
    """
    metrics = run["metrics"]
    kinds = {kind: sum(row.get(f"verifier/{kind}") or 0 for row in metrics) for kind in FAULTS}
    failed, rollouts = sum(kinds.values()), sum(row.get("rollouts") or 0 for row in metrics)
    judged = sum(row.get("eval/verifier_faults") or 0 for row in metrics)
    if not failed and not judged:
        return None
    counted = ", ".join(f"{kind} {number:,}" for kind, number in kinds.items() if number)
    parts = [f"{failed:,} of {rollouts:,.0f} rollouts have no reward ({counted}) and were left out"] if failed else []
    parts += [f"{judged:,.0f} samples of evaluations could not be judged and count as failures"] if judged else []
    reasons = count_reasons(run["workdir"] / "rollouts").most_common(most)
    return "; ".join(parts), [f"{number:,} x {reason}" for reason, number in reasons]


def flow(run: Run, most: int = 7) -> tuple[list[dict], list[dict]]:
    """How the held-out prompts moved between the states of `krl.report.history.STATES`, over some evaluations.

    Returns:
        (bars: `at` (number of the evaluation among those shown), `step`, `state`, `prompts` and its place between
        `low` and `high`, shares with "always" at the bottom;
        ribbons: `at`, `before` and `after` (states), `prompts`, and `low`, `high` at the evaluation and `low_after`,
        `high_after` at the next one shown). Both [] with fewer than two evaluations.
    """
    evaluations = run["evaluations"]
    if len(evaluations) < 2:
        return [], []
    shown = [evaluations[number] for number in spread(len(evaluations), most)]
    names = STATES[::-1]  # always first, at the bottom
    size, bars, ribbons = len(names), [], []
    where = [size - 1 - states(evaluation) for evaluation in shown]
    total = len(where[0])
    for at, (evaluation, mine) in enumerate(zip(shown, where, strict=True)):
        amounts = np.bincount(mine, minlength=size)
        tops = np.cumsum(amounts)
        bars += [
            {
                "at": at, "step": evaluation["step"], "state": names[state], "prompts": int(amounts[state]),
                "low": (tops[state] - amounts[state]) / total, "high": tops[state] / total,
            }
            for state in np.flatnonzero(amounts)
        ]  # fmt: skip
    for at, (before, after) in enumerate(pairwise(where)):
        table = np.zeros((size, size), int)
        np.add.at(table, (before, after), 1)
        left = np.cumsum(table.ravel()).reshape(size, size)
        right = np.cumsum(table.T.ravel()).reshape(size, size).T
        ribbons += [
            {
                "at": at, "before": names[a], "after": names[b], "prompts": int(table[a, b]),
                "low": (left[a, b] - table[a, b]) / total, "high": left[a, b] / total,
                "low_after": (right[a, b] - table[a, b]) / total, "high_after": right[a, b] / total,
            }
            for a, b in zip(*np.nonzero(table), strict=True)
        ]  # fmt: skip
    return bars, ribbons


def interval(differences: np.ndarray, quantile: float) -> Difference:
    """The mean of paired differences, and so many standard errors to both sides; NaN to both for a single pair."""
    half = quantile * differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    mean = float(differences.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": len(differences)}


def _paired(sides: Sequence[Mapping[Any, float]]) -> np.ndarray:
    """The second side less the first, for the keys that both have, in the order of the first; float64."""
    first, second = sides
    return np.array([second[key] - value for key, value in first.items() if key in second], float)


def over_prompts(first: Run, other: Run) -> Difference | None:
    """How much more of each held-out prompt's samples the other run solved at the runs' last evaluations.

    Prompts are paired by their text (the n-th with it, where several have the same); None if the runs share none, or
    one kept no evaluations. The interval is a normal one, over prompts.
    """
    sides = []
    for run in (first, other):
        if not run["evaluations"] or not run["held_out"]:
            return None
        last = run["evaluations"][-1]
        seen: Counter[str] = Counter()
        rates: dict[tuple[str, int], float] = {}
        for prompt, solved in zip(run["held_out"]["prompts"], last["solved"], strict=False):
            seen[prompt] += 1
            rates[prompt, seen[prompt]] = solved / last["samples"]
        sides.append(rates)
    differences = _paired(sides)
    return interval(differences, NORMAL) if len(differences) else None


def by_settings(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in lists of equal settings: of the same config but for the seed and what changes no result."""
    lists: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run["config"].items() if key not in NO_SETTINGS}
        lists.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    return list(lists.values())


def over_seeds(first: Sequence[Run], others: Sequence[Run]) -> Difference | None:
    """How much higher the last accuracy of some settings is than that of the first, in pairs of the same seed.

    Args:
        first, others: runs of two settings, see `by_settings`.

    Returns:
        The mean with Student's 95% interval over seeds; None if fewer than two seeds are in both.
    """
    sides = []
    for runs in (first, others):
        ends = {run["config"].get("seed"): spending(run)[-1:] for run in runs}
        sides.append({seed: end[0]["accuracy"] for seed, end in ends.items() if end})
    differences = _paired(sides)
    if len(differences) < 2:
        return None
    from scipy import stats  # slow to import; jax itself needs scipy

    return interval(differences, float(stats.t.ppf(0.975, len(differences) - 1)))
