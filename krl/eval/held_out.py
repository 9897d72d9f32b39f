"""The held-out prompts during a run."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from krl.eval.sample import evaluate, first_reward, score_rollouts
from krl.run.checkpoint import write_json
from krl.run.learner import Learner
from krl.run.metrics import MetricsLog, PhaseClock
from krl.run.processes import is_first, place_whole
from krl.run.scoring import FaultWatch
from krl.run.setup import Setup
from krl.run.spend import generate
from krl.tasks import TaskSet


def write_held_out(workdir: pathlib.Path, tasks: TaskSet) -> None:
    """Write held_out.json, the prompts that a run's evaluations are about."""
    if is_first():
        write_json(workdir / "held_out.json", {"prompts": tasks.prompts, "fields": dict(tasks.fields)})


def measure(
    config: ConfigDict, parts: Setup, params: dict[str, Any], hear: FaultWatch
) -> tuple[dict[str, float], np.ndarray]:
    """What `krl.eval.sample.evaluate` finds on the held-out prompts."""
    sample = functools.partial(generate, config, parts, temperature=config.eval.temperature, top_p=config.eval.top_p)
    return evaluate(
        sample, functools.partial(score_rollouts, parts.ends, first_reward(parts.verifiers)), params, parts.test,
        jax.random.key(config.seed + 1), samples=config.eval.samples, num_rollouts=config.alloc.budget,
        place=functools.partial(place_whole, parts.mesh), hear=hear,
    )  # fmt: skip


def evaluate_held_out(
    config: ConfigDict, parts: Setup, learner: Learner, log: MetricsLog, step: int, hear: FaultWatch
) -> dict[str, float]:
    """The metrics of the held-out prompts after some steps; the solved samples of each prompt go to the log."""
    with PhaseClock(config.stuck_seconds).phase("evaluation"):
        measured, solved = measure(config, parts, learner.state.params, hear)
    spent = step * config.alloc.budget
    log.write_evaluation(step, rollouts_total=spent, samples=config.eval.samples, solved=solved)
    return {f"eval/{name}": value for name, value in measured.items()}
