"""The held-out prompts during a run."""

import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from krl.base.types import Rollouts
from krl.eval.sample import evaluate, first_reward, score_rollouts
from krl.run.checkpoint import write_json
from krl.run.clock import PhaseClock
from krl.run.log import MetricsLog
from krl.run.processes import is_first, place_whole
from krl.run.scoring import FaultWatch, decode_rollouts
from krl.run.setup import Setup
from krl.run.spend import generate
from krl.tasks import TaskSet

SAID = 3  # held-out prompts, the first ones, whose first response every evaluation writes down


def write_held_out(workdir: pathlib.Path, tasks: TaskSet) -> None:
    """Write held_out.json, the prompts that a run's evaluations are about."""
    if is_first():
        write_json(workdir / "held_out.json", {"prompts": tasks.prompts, "fields": dict(tasks.fields)})


def measure_held_out(
    config: ConfigDict, parts: Setup, params: dict[str, Any], hear: FaultWatch
) -> tuple[dict[str, float], np.ndarray, list[tuple[str, float | None]]]:
    """What `evaluate` finds on the held-out prompts, and (response, reward or None) of the first SAID of them."""
    said: list[tuple[str, float | None]] = []

    def reward(rollouts: Rollouts, tasks: TaskSet) -> tuple[np.ndarray, dict[str, int]]:
        rewards, faults = score_rollouts(parts.ends, first_reward(parts.verifiers), rollouts, tasks)
        first = slice(0, (SAID - len(said)) * config.eval.samples, config.eval.samples)
        texts = decode_rollouts(parts.ends, jax.tree.map(lambda leaf: leaf[first], rollouts))
        worth = [float(value) if math.isfinite(value) else None for value in rewards[first]]
        said.extend(zip(texts, worth, strict=True))
        return rewards, faults

    sample = functools.partial(generate, config, parts, temperature=config.eval.temperature, top_p=config.eval.top_p)
    measured, solved = evaluate(
        sample, reward, params, parts.test, jax.random.key(config.seed + 1), samples=config.eval.samples,
        num_rollouts=config.alloc.budget, place=functools.partial(place_whole, parts.mesh), hear=hear,
    )  # fmt: skip
    return measured, solved, said


def evaluate_held_out(
    config: ConfigDict, parts: Setup, params: dict[str, Any], log: MetricsLog, step: int, hear: FaultWatch
) -> dict[str, float]:
    """The metrics of the held-out prompts after some steps; what is known of single ones goes to the log."""
    with PhaseClock(config.stuck_seconds).phase("evaluation"):
        measured, solved, said = measure_held_out(config, parts, params, hear)
    spent = step * config.alloc.budget
    log.write_evaluation(step, rollouts_total=spent, samples=config.eval.samples, solved=solved, said=said)
    return {f"eval/{name}": value for name, value in measured.items()}
