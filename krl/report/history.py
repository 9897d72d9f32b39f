"""What runs left in their work directories, and the numbers that comparisons of them are made of."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from krl.rewards.functions import SOLVED
from krl.run.log import read_rows

STATES = ("never", "rarely", "sometimes", "mostly", "always")  # how often a held-out prompt is solved
FIELD_VALUES = (2, 200)  # fewest and most values of a field that prompts are grouped by


class Run(TypedDict):
    """What a work directory holds; docs/metrics.md defines the rows."""

    workdir: pathlib.Path
    name: str  # its rule, and its directory where two runs are else the same
    label: str  # the name, and the rollouts a step where runs differ in them
    config: dict
    metrics: list[dict]
    groups: list[dict]
    evaluations: list[dict]  # [] of a run that kept none
    held_out: dict  # "prompts" and "fields"; {} of a run that kept none


def read_run(workdir: pathlib.Path) -> Run:
    """The rows and the config that a run left in its work directory.

    Raises:
        ValueError: the directory holds no run.
    """
    metrics = read_rows(workdir / "metrics.jsonl")
    if not metrics or not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} holds no run; give the --workdir of a run that has taken a step")
    config, held_out = json.loads((workdir / "config.json").read_text()), workdir / "held_out.json"
    return {
        "workdir": workdir, "name": config["alloc.rule"], "label": config["alloc.rule"], "config": config,
        "metrics": metrics, "groups": read_rows(workdir / "groups.jsonl"),
        "evaluations": read_rows(workdir / "evaluations.jsonl"),
        "held_out": json.loads(held_out.read_text()) if held_out.exists() else {},
    }  # fmt: skip


def read_runs(workdirs: Sequence[pathlib.Path]) -> list[Run]:
    """Runs to compare, with names and labels that tell them apart.

    Raises:
        ValueError: a directory holds no run.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    settings = [(run["name"], run["config"]["alloc.budget"]) for run in runs]
    uneven = len({rollouts for _, rollouts in settings}) > 1
    directories = [workdir.name for workdir in workdirs]
    for run, workdir, setting in zip(runs, workdirs, settings, strict=True):
        if settings.count(setting) > 1:
            run["name"] += f" ({workdir.name if directories.count(workdir.name) == 1 else workdir})"
        run["label"] = f"{run['name']}, {setting[1]:,} a step" if uneven else run["name"]
    return runs


def sample_rollouts(workdir: pathlib.Path, most: int, steps: int = 16) -> list[dict]:
    """Some rollouts of the log, spread over steps and, within a step, over outcomes and believed success rates.

    Args:
        workdir: of a run; one without a log has none.
        most: rollouts in all.
        steps: most steps that are read.

    Returns:
        A row a rollout with the log's columns, see `krl.run.rollouts`, by step.
    """
    from krl.run.rollouts import logged_steps, read_rollouts  # with Arrow, which nothing else here needs

    log = workdir / "rollouts"
    logged = logged_steps(log)
    places = np.linspace(0, len(logged) - 1, min(steps, len(logged), most)).astype(int)
    chosen, rows = [logged[place] for place in np.unique(places)], []
    for step in chosen:
        table = read_rollouts(log, [step])
        believed = np.nan_to_num(np.array(table["belief"], float))
        rewards = np.nan_to_num(np.array(table["reward"], float))  # null where there is none
        outcome = 2 * (rewards > 0) + np.array(table["finished"]) + 4 * (np.array(table["fault"]) != "")
        kinds = outcome * 8 + np.digitize(believed, (0.1, 0.5, 0.9))
        order = np.random.default_rng(step).permutation(table.num_rows)
        turn = np.zeros(table.num_rows, int)  # the how manyth of its kind a rollout is: kinds take turns
        for kind in np.unique(kinds):
            mine = order[kinds[order] == kind]
            turn[mine] = np.arange(len(mine))
        picked = order[np.argsort(turn[order], kind="stable")][: most // len(chosen)]
        rows += table.take(np.sort(picked)).to_pylist()
    return rows


def series(run: Run, name: str, over: str = "rollouts_total") -> tuple[np.ndarray, np.ndarray]:
    """(rollouts spent or another metric, value) at the steps that have a metric, both float64."""
    rows = [(row[over], row[name]) for row in run["metrics"] if row.get(name) is not None]
    return np.array([r[0] for r in rows], float), np.array([r[1] for r in rows], float)


def rollouts_to_reach(run: Run, accuracy: float) -> float | None:
    """Rollouts after which the run's evaluation accuracy reached a level, interpolated; None if never."""
    return spent_to_reach(*series(run, "eval/accuracy"), accuracy)


def spent_to_reach(spent: np.ndarray, reached: np.ndarray, level: float) -> float | None:
    """What had been spent when a curve first reached a level, interpolated between its points; None if it never did.

    >>> spent_to_reach(np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.4, 0.2]), 0.3)
    7.5
    """
    above = np.flatnonzero(reached >= level)
    if not len(above):
        return None
    last = slice(max(above[0] - 1, 0), above[0] + 1)
    return float(np.interp(level, reached[last], spent[last]))


def summary(run: Run) -> dict[str, float]:
    """The numbers of the table: means over all steps, and the last evaluation; NaN for what is not there."""
    numbers = {}
    for name in ("effective_ratio_rollouts", "effective_ratio_prompts"):
        _, shares = series(run, name)
        numbers[name] = float(shares.mean()) if shares.size else math.nan
    _, accuracy = series(run, "eval/accuracy")
    numbers["first_accuracy"], numbers["final_accuracy"] = (
        accuracy[[0, -1]].tolist() if accuracy.size else [math.nan] * 2
    )
    numbers["found"] = found(run)
    numbers["rollouts"] = float(max(row["rollouts_total"] for row in run["metrics"]))
    numbers["seconds"] = float(series(run, "seconds/step")[1].sum())
    return numbers


def found(run: Run) -> float:
    """Share of a field's values whose held-out prompts were solved more than half of the time at the end.

    The field is the first that groups the prompts: FIELD_VALUES different values, and fewer than there are
    prompts. NaN if there is none, or no record of the evaluations.
    """
    fewest, most = FIELD_VALUES
    for values in run["held_out"].get("fields", {}).values() if run["evaluations"] else ():
        names, which = np.unique(values, return_inverse=True)
        if fewest <= len(names) <= most and len(names) < len(values):
            last = run["evaluations"][-1]
            wins = np.bincount(which, weights=last["solved"])
            return float(np.mean(2 * wins > last["samples"] * np.bincount(which)))
    return math.nan


def states(evaluation: dict) -> np.ndarray:
    """The state of each held-out prompt at an evaluation: its number in STATES, int [prompts].

    Never is a rate of 0, rarely at most 1/4, sometimes at most 3/4, mostly below 1.
    """
    solved, samples = np.array(evaluation["solved"], int), evaluation["samples"]
    bounds = [solved == 0, 4 * solved <= samples, 4 * solved <= 3 * samples, solved < samples]
    return np.select(bounds, range(4), default=4)


def before_and_after(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the run said to the first held-out prompts at its first and its last evaluation.

    Returns:
        (prompt, two of (what it was worth, response)); [] if there are not two evaluations, or one wrote nothing down.
    """
    ends = [run["evaluations"][place].get("said", []) for place in (0, -1)] if len(run["evaluations"]) > 1 else [[]]
    pairs = zip(run["held_out"].get("prompts", ()), *ends, strict=False)
    return [(prompt, [(_verdict(reward), text) for text, reward in both]) for prompt, *both in pairs]


def _verdict(reward: float | None) -> str:
    if reward is None:
        return "no reward"
    return "right" if np.float32(reward) >= SOLVED else "wrong" if reward <= 0 else f"reward {reward:.2g}"


def spread(number: int, most: int) -> list[int]:
    """At most so many of the numbers below `number`, evenly from the first to the last.

    >>> spread(9, 3), spread(2, 5)
    ([0, 4, 8], [0, 1])
    """
    return np.unique(np.linspace(0, number - 1, min(most, number)).round().astype(int)).tolist()


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and its neighbours, as many as there are within an odd window.

    >>> smooth(np.array([0.0, 3.0, 6.0, 3.0]), 3).tolist()
    [1.5, 3.0, 4.0, 4.5]
    """
    near = np.convolve(np.ones(len(values)), np.ones(window))
    summed = np.convolve(values, np.ones(window))
    inside = slice(window // 2, window // 2 + len(values))
    return summed[inside] / near[inside]
