"""Undoing steps whose loss, ratio or divergence is beyond config.guard: back to the last checkpoint."""

import json
import os
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from krl.base.types import TrainState
from krl.run.log import read_rows
from krl.run.optimizer import skipped_updates
from krl.run.processes import is_first, say

LIMITS = {"loss": "loss", "ratio": "ratio_max", "kl": "kl"}  # key of config.guard -> metric of a step
_FILE = "rollbacks.jsonl"


def read_rollbacks(workdir: pathlib.Path) -> list[dict]:
    """The rollbacks of a run before this start: {"step" of the spike, checkpoint "to" go on from, "reason"} each."""
    return read_rows(workdir / _FILE)


def find_spike(metrics: dict[str, float], guard: ConfigDict) -> str:
    """Which metric of a step is beyond its limit, in words; "" if none is.

    Args:
        metrics: of the step.
        guard: `loss`, `ratio` and `kl`, the largest sizes allowed; 0 for any.
    """
    for key, name in LIMITS.items():
        if guard[key] and abs(metrics.get(name, 0.0)) > guard[key]:
            return f"{name} {metrics[name]:.4g} is beyond config.guard.{key}={guard[key]:g}"
    return ""


def draws_before(rollbacks: Sequence[dict], step: int) -> int:
    """How many rollbacks a step, given by the steps taken before it, comes after: its random numbers depend on it."""
    return sum(row["to"] <= step for row in rollbacks)


def go_back(workdir: pathlib.Path, rollbacks: list[dict], step: int, to: int, reason: str, *, most: int) -> None:
    """Write down that the run goes on from an earlier checkpoint, before it does, so that a kill changes nothing.

    Args:
        workdir: of the run.
        rollbacks: until now, the same in every process; this one is added.
        step: that showed the spike.
        to: steps of the checkpoint.
        reason: from `find_spike`.
        most: rollbacks that a run may have.

    Raises:
        FloatingPointError: the run has had them.
    """
    if len(rollbacks) >= most:
        raise FloatingPointError(
            f"step {step}: {reason}, after {len(rollbacks)} rollbacks (config.guard.rollbacks={most}); "
            "lower config.optim.learning_rate, or raise the limit if it is too strict"
        )
    rollbacks.append({"step": step, "to": to, "reason": reason})
    say(f"krl: step {step}: {reason}; going back to step {to} for other rollouts, time {len(rollbacks)} of {most}")
    if is_first():
        with (workdir / _FILE).open("a") as file:
            file.write(json.dumps(rollbacks[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())


def refuse_bad_updates(state: TrainState, most: int) -> None:
    """Raise FloatingPointError once `most` updates in a row were skipped because they were not finite."""
    in_a_row, _ = skipped_updates(state)
    if in_a_row >= most:
        raise FloatingPointError(
            f"{in_a_row} updates in a row had a loss or gradient that was not finite and were skipped; "
            "lower config.optim.learning_rate, or look at metrics.jsonl for when it began"
        )
