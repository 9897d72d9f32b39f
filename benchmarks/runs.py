"""What elasticity.py and study.py share: a setting is run once and leaves one row in a file of results.

A row says what was run and what came of it, in a kilobyte or two, so that a comparison can go on elsewhere
from the rows alone. Runs go through train.py, which continues what was cut off.
"""

import argparse
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from krl.configs.check import flatten
from krl.report.history import STATES, Run, found, read_run, spent_to_reach, states
from krl.run.log import format_seconds, read_rows

ROOT = pathlib.Path(__file__).parent.parent
WARM = {
    "steps": 0,
    "eval.every": 0,
    "alloc.rule": "uniform",
    "alloc.prior": "shared",
    "alloc.n_min": 1,
    "loss.average": "prompts",
}  # a run of the warm start alone
ROLLOUTS, TOKENS, SECONDS, ACCURACY = range(4)  # columns of a row's curve


class Job(NamedTuple):
    """A run that is wanted."""

    task: str  # a name in configs/
    name: str  # of the setting, for people
    changes: dict[str, Any]  # config keys and values, "seed" among them

    def key(self) -> str:
        """Equal for equal runs, whatever they are called."""
        return json.dumps([self.task, {k: str(v) for k, v in self.changes.items()}], sort_keys=True)

    def workdir(self, out: pathlib.Path) -> pathlib.Path:
        """Where it runs."""
        digest = hashlib.blake2b(self.key().encode(), digest_size=4).hexdigest()
        return out / f"{self.name}-{self.changes['seed']}-{digest}"


class Interval(NamedTuple):
    """A mean over n values, its standard error, and its 95% t interval; nan where n is too small."""

    mean: float
    error: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """The mean of values, such as the differences of paired runs.

    >>> [round(x, 3) for x in interval([0.01, 0.02, 0.03])]
    [0.02, 0.006, -0.005, 0.045, 3]
    """
    n, mean = len(values), float(np.mean(values)) if len(values) else float("nan")
    error = float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("nan")
    half = float(stats.t.ppf(0.975, n - 1)) * error if n > 1 else float("nan")
    return Interval(mean, error, mean - half, mean + half, n)


def spent_by(row: dict, level: float, column: int = ROLLOUTS) -> float:
    """What a run had spent when its accuracy first reached a level, interpolated; infinite if it never did."""
    curve = np.array(row["curve"], float)
    spent = spent_to_reach(curve[:, column], curve[:, ACCURACY], level)
    return float("inf") if spent is None else spent


# ---------------------------------------------------------------- from a work directory to a row


def row_of(workdir: pathlib.Path) -> dict:
    """The results of a finished run.

    Seconds are those of the steps, without evaluations; a step that compiled counts as the median.

    Raises:
        ValueError: the run is not finished.
    """
    config, metrics = json.loads((workdir / "config.json").read_text()), read_rows(workdir / "metrics.jsonl")
    if not metrics or metrics[-1]["step"] < config["steps"]:
        raise ValueError(f"{workdir} holds an unfinished run; the same command continues it")
    tokens = {row["step"]: sum(row["tokens"]) for row in read_rows(workdir / "groups.jsonl")}
    steps = [row for row in metrics if row["step"] > 0]
    usual = statistics.median(row["seconds/step"] for row in steps)
    curve, spent, seconds, compiles = [], 0, 0.0, 0
    for row in metrics:
        if row["step"] > 0:
            compiled, compiles = row["compiles"] != compiles, row["compiles"]
            spent, seconds = spent + tokens[row["step"]], seconds + (usual if compiled else row["seconds/step"])
        if row.get("eval/accuracy") is not None:
            curve.append([row["rollouts_total"], spent, round(seconds, 4), round(row["eval/accuracy"], 4)])
    effective = [row["effective_ratio_rollouts"] for row in steps]
    first_pass = [row["effective_ratio_rollouts"] for row in steps if row["prompts_unseen"] == 1]
    return {
        "seed": config["seed"],
        "rule": config["alloc.rule"],
        "prior": config["alloc.prior"],
        "rollouts": config["alloc.budget"],
        "learning_rate": config["optim.learning_rate"],
        "decay_steps": config["optim.decay_steps"],
        "steps": config["steps"],
        "accuracy": curve[-1][ACCURACY],
        "effective": round(float(np.mean(effective)), 4),
        "effective_first_pass": round(float(np.mean(first_pass)), 4),
        "seconds": round(seconds, 4),
        **read_held_out(workdir),
        **read_samples(workdir),
        "curve": curve,
    }


def read_held_out(workdir: pathlib.Path) -> dict:
    """Which held-out prompts became solved: counts from first to last state, and shares of a field's values.

    "found" is as `krl.report.history.found` defines it, "dead" the share of the first field's values, such as
    operators, that are solved in less than 5% of the samples at the end. {} without evaluations, no shares without a
    field.
    """
    run = read_run(workdir)
    counts = transitions(run)
    if counts is None:
        return {}
    result: dict[str, Any] = {"transitions": counts.tolist()}
    for values in run["held_out"]["fields"].values():
        _, index = np.unique(values, return_inverse=True)
        last = run["evaluations"][-1]
        rates = np.bincount(index, np.array(last["solved"]) / last["samples"]) / np.bincount(index)
        result |= {"found": round(found(run), 4), "dead": round(float((rates < 0.05).mean()), 4)}
        break  # the first field
    return result


def transitions(run: Run) -> np.ndarray | None:
    """Held-out prompts by their state at the first evaluation (rows) and at the last: int [5, 5].

    None if fewer than two evaluations were recorded.
    """
    if len(run["evaluations"]) < 2:
        return None
    table = np.zeros((len(STATES), len(STATES)), int)
    np.add.at(table, (states(run["evaluations"][0]), states(run["evaluations"][-1])), 1)
    return table


def read_samples(workdir: pathlib.Path) -> dict:
    """{"pass": pass@1, pass@2, pass@4, ... of the held-out prompts} where eval.py has measured the run; else {}."""
    file = workdir / "results.json"
    if not file.exists():
        return {}
    measured = json.loads(file.read_text())["sets"]["held_out"]
    return {"pass": [round(found["value"], 4) for name, found in measured.items() if name.startswith("pass@")]}


@functools.cache
def machine() -> dict:
    """The versions and the processor of this process."""
    info = pathlib.Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    return {
        "versions": versions | {"python": platform.python_version()},
        "processor": f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}",
    }


def read_results(file: pathlib.Path) -> dict[str, dict]:
    """The rows of a file of results by `Job.key`."""
    return {Job(row["task"], row["name"], row["changes"]).key(): row for row in read_rows(file)}


# ---------------------------------------------------------------- runs


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments, with those of both benchmarks, and {"section.key": value} of all --config.section.key=value."""
    parser.add_argument("--out", type=pathlib.Path, required=True, help="work directories, warm starts, tables")
    parser.add_argument("--results", type=pathlib.Path, help="the rows, JSON lines")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    parser.add_argument("--keep", action="store_true", help="keep the work directories of finished runs")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="then start no more runs")
    options, more = parser.parse_known_args()
    for text in more:
        if not text.startswith("--config.") or "=" not in text:
            parser.error(f"unknown argument {text}; a key of the config is --config.key=value")
    options.out.mkdir(parents=True, exist_ok=True)
    options.samples = 0  # of each held-out prompt after a run, for pass@k
    options.warm = set()  # seeds whose warm start this process has made
    options.until = time.monotonic() + 60 * options.budget_minutes
    return options, dict(text.removeprefix("--config.").split("=", 1) for text in more)


def read_config(task: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Every key of configs/{task}.py, flat, with changes."""
    if not (ROOT / "configs" / f"{task}.py").exists():
        raise SystemExit(f"there is no configs/{task}.py; name a file of configs/, such as operators")
    return flatten(importlib.import_module(f"krl.configs.{task}").get_config()) | changes


def run_all(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Run every job that has no row yet, in their order, options.jobs at a time.

    The warm start of a seed is made once, by a run of no steps, before other runs of that seed begin; so jobs may
    differ in nothing that it depends on but the seed. A run that fails leaves no row and the others go on.

    Args:
        jobs: what is wanted.
        options: from `parse`.

    Returns:
        How many rows were added.
    """
    rows = read_results(options.results)
    queue = list({job.key(): job for job in jobs if job.key() not in rows}.values())
    running: dict[int, tuple[subprocess.Popen, Job]] = {}
    added = 0
    interrupt = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while queue or running:
            if time.monotonic() >= options.until:
                queue.clear()
            for slot in set(range(options.jobs)) - set(running):
                job = _next(queue, options.warm, [job for _, job in running.values()])
                if job is not None:
                    running[slot] = (_start(job, options, slot), job)
            time.sleep(0.1)
            for slot, (process, job) in list(running.items()):
                if process.poll() is not None and _is_to_measure(process, job, options):
                    running[slot] = (_start(job, options, slot, "eval.py"), job)
                elif process.poll() is not None:
                    del running[slot]
                    done = _finish(process, job, options, left=len(queue) + len(running))
                    if job.name == "warm" and done:
                        options.warm.add(job.changes["seed"])
                    elif job.name == "warm":
                        queue = [other for other in queue if other.changes["seed"] != job.changes["seed"]]
                    added += done and job.name != "warm"
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
    finally:  # whoever ends this process ends the runs, which save themselves
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, interrupt)
    return added


def _next(queue: list[Job], warm: set, running: list[Job]) -> Job | None:
    """The first job whose warm start is there, or a warm start that nobody makes yet."""
    warming = {job.changes["seed"] for job in running if job.name == "warm"}
    for job in queue:
        if job.changes["seed"] in warm:
            queue.remove(job)
            return job
        if job.changes["seed"] not in warming:
            return Job(job.task, "warm", job.changes | WARM)
    return None


def _is_to_measure(process: subprocess.Popen, job: Job, options: argparse.Namespace) -> bool:
    """Whether a run that ended well still needs the samples that its pass@k are from."""
    return bool(
        not process.returncode and options.samples and job.name != "warm"
        and not (job.workdir(options.out) / "results.json").exists()
    )  # fmt: skip


def _start(job: Job, options: argparse.Namespace, slot: int, script: str = "train.py") -> subprocess.Popen:
    """Start a program on the slot's share of the cores, where the platform can say so."""
    workdir, out = job.workdir(options.out), options.out.absolute()
    changes = (
        job.changes | {"sft.dir": out / "sft"} | ({"eval.samples": options.samples} if script == "eval.py" else {})
    )
    command = [
        sys.executable, str(ROOT / script), "--config", str(ROOT / "configs" / f"{job.task}.py"),
        "--workdir", str(workdir), *(f"--config.{key}={value}" for key, value in changes.items()),
    ]  # fmt: skip
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    with workdir.with_name(f"{workdir.name}.log").open("a") as log:
        if cores:  # a new process has the cores of the one that starts it
            os.sched_setaffinity(0, cores[slot % len(cores) :: options.jobs])
        try:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | cache)
        finally:
            if cores:
                os.sched_setaffinity(0, cores)


def _finish(process: subprocess.Popen, job: Job, options: argparse.Namespace, left: int) -> bool:
    """Append the row of a run that ended; False if it has none."""
    workdir = job.workdir(options.out)
    log = workdir.with_name(f"{workdir.name}.log")
    label = f"{job.name}, seed {job.changes['seed']}"
    try:
        if process.returncode:
            raise ValueError(f"{log}: {(log.read_text().strip().splitlines() or ['nothing'])[-1]}")
        if job.name != "warm":
            row = job._asdict() | row_of(workdir) | machine()
            options.results.parent.mkdir(parents=True, exist_ok=True)
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{label}: {row['accuracy']:.3f} in {format_seconds(row['seconds'])}, {left} left", flush=True)
    except ValueError as error:
        print(f"{label} failed: {error}", file=sys.stderr, flush=True)
        return False
    if not options.keep:
        shutil.rmtree(workdir)
        log.unlink()
    return True
