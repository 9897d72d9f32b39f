"""Where a run can be watched while it goes on: TensorBoard, Weights & Biases, MLflow, each behind one function.

A writer is called as write(step, scalars, histograms, texts): floats, [n] arrays and Markdown by name. Of several
processes the first has writers.
"""

import contextlib
import html
import importlib
import importlib.util
import math
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from krl.run.processes import say

Writer = Callable[[int, Mapping[str, float], Mapping[str, np.ndarray], Mapping[str, str]], None]


@contextmanager
def tensorboard(directory: pathlib.Path, first_step: int) -> Iterator[Writer]:
    """Event files; what they have of steps after first_step is hidden, for it will be written again.

    A number that is not finite is not written: the library would warn of each on the console. Where tensorboardX is
    missing this is said, and nothing is written.
    """
    try:
        import tensorboardX  # slow to import, and only a run needs it
    except ImportError as error:
        say(f"krl: no TensorBoard events are written ({_one_line(error)}): pip install tensorboardX")
        yield lambda step, scalars, histograms, texts: None
        return
    with tensorboardX.SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else 0) as board:

        def write(step, scalars, histograms, texts):
            for name, value in scalars.items():
                if math.isfinite(value):
                    board.add_scalar(name, value, step)
            for name, values in histograms.items():
                board.add_histogram(name, values, step)
            for name, text in texts.items():
                board.add_text(name, text, step)
            board.flush()

        yield write


@contextmanager
def wandb(project: str, workdir: pathlib.Path, config: Mapping) -> Iterator[Writer]:
    """A run of a Weights & Biases project, continued with krl's; WANDB_MODE=offline keeps it in workdir/wandb.

    Raises:
        ValueError: the service refuses.
    """
    library: Any = importlib.import_module("wandb")
    options = {"project": project, "dir": str(workdir), "name": workdir.name, "config": dict(config)}
    quiet = library.Settings(quiet=True)  # where the run is shown, but no table at the end
    try:
        opened = library.init(id=_identity(workdir), resume="allow", settings=quiet, **options)
    except library.Error as error:
        reason = f"{_one_line(error)} (WANDB_MODE=offline needs no key)"
        raise ValueError(f"config.log.wandb={project!r}: {reason}") from None
    # W&B's own count would leave out what is taken again after a rollback.
    opened.define_metric("*", step_metric="step")

    def write(step, scalars, histograms, texts):
        shown = {name: library.Html(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()}
        bars = {f"{name}_histogram": library.Histogram(values) for name, values in histograms.items()}
        opened.log({"step": step, **scalars, **bars, **shown})

    failed = True
    try:
        yield write
        failed = False
    finally:
        opened.finish(exit_code=int(failed))


@contextmanager
def mlflow(uri: str, workdir: pathlib.Path, config: Mapping) -> Iterator[Writer]:
    """A run of the MLflow experiment "krl", which a continued krl run goes on with; scalars and the config.

    Args:
        uri: of the tracking server, such as "http://host:5000".
        workdir, config: of the run.

    Raises:
        ValueError: the server cannot be used.
    """
    library: Any = importlib.import_module("mlflow")
    refused = library.exceptions.MlflowException
    try:
        client = library.MlflowClient(tracking_uri=uri)
        run = _mlflow_run(client, workdir, config)
    except refused as error:
        raise ValueError(f"config.log.mlflow={uri!r}: {_one_line(error)}") from None
    works = True

    def write(step, scalars, histograms, texts):
        nonlocal works
        now, metric = int(1000 * time.time()), library.entities.Metric
        batch = [metric(name, float(value), now, step) for name, value in scalars.items() if math.isfinite(value)]
        try:  # a server that is gone must not end the run
            if works:
                client.log_batch(run, batch)
        except refused as error:
            works = False
            say(f"krl: MLflow gets nothing from step {step} on: {_one_line(error)}")

    status = "FAILED"
    try:
        yield write
        status = "FINISHED"
    finally:
        with contextlib.suppress(refused):
            client.set_terminated(run, status)


def _mlflow_run(client, workdir: pathlib.Path, config: Mapping) -> str:
    """The id of this run at MLflow, made with the config as its parameters if there is none."""
    identity, experiment = _identity(workdir), client.get_experiment_by_name("krl")
    number = experiment.experiment_id if experiment else client.create_experiment("krl")
    found = client.search_runs([number], f"tags.krl = '{identity}'")
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0].info.run_id
    run = client.create_run(number, tags={"krl": identity}, run_name=workdir.name).info.run_id
    for name, value in config.items():
        client.log_param(run, name, str(value)[:500])
    return run


def find_writers(workdir: pathlib.Path, config: Mapping) -> list[AbstractContextManager[Writer]]:
    """The writers that a flat config asks for, besides TensorBoard."""
    asked = {mlflow: config["log.mlflow"], wandb: config["log.wandb"]}
    return [writer(where, workdir, config) for writer, where in asked.items() if where]


def check_writers(config: Mapping) -> None:
    """Check that what a flat config asks for is installed.

    Raises:
        ValueError: it is not; with what to install.
    """
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        if config[f"log.{name}"] and importlib.util.find_spec(name) is None:
            raise ValueError(f"config.log.{name} needs {package}, which is not installed: pip install {package}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _identity(workdir: pathlib.Path) -> str:
    """The name under which services know this run, made once for a work directory."""
    path = workdir / "run_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
