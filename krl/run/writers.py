"""Where a run can be watched while it goes on: TensorBoard, Weights & Biases, MLflow, each behind one function.

A writer is called as write(step, scalars, histograms, texts): floats, [n] arrays and Markdown by name. Of several
processes the first has writers.
"""

import contextlib
import html
import math
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import tensorboardX

from krl.run.processes import say

Writer = Callable[[int, Mapping[str, float], Mapping[str, np.ndarray], Mapping[str, str]], None]


@contextmanager
def tensorboard(directory: pathlib.Path, first_step: int) -> Iterator[Writer]:
    """Event files; what they have of steps after first_step is hidden, for it will be written again."""
    with tensorboardX.SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else 0) as board:

        def write(step, scalars, histograms, texts):
            for name, value in scalars.items():
                board.add_scalar(name, value, step)
            for name, values in histograms.items():
                board.add_histogram(name, values, step)
            for name, text in texts.items():
                board.add_text(name, text, step)
            board.flush()

        yield write


@contextmanager
def wandb(project: str, workdir: pathlib.Path, config: Mapping) -> Iterator[Writer]:
    """A run of a Weights & Biases project, which a continued krl run goes on with; WANDB_MODE=offline keeps it in workdir/wandb.

    Raises:
        ValueError: the library is not installed, or the service refuses.
    """
    library = _import("wandb", "config.log.wandb")
    options = {"project": project, "dir": str(workdir), "name": workdir.name, "config": dict(config)}
    quiet = library.Settings(quiet=True)  # where the run is shown, but no table at the end
    try:
        opened = library.init(id=_identity(workdir), resume="allow", settings=quiet, **options)
    except library.Error as error:
        raise ValueError(
            f"config.log.wandb={project!r}: {_one_line(error)} (WANDB_MODE=offline needs no key)"
        ) from None
    with opened as run:

        def write(step, scalars, histograms, texts):
            shown = {name: library.Html(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()}
            bars = {f"{name}_histogram": library.Histogram(values) for name, values in histograms.items()}
            run.log({**scalars, **bars, **shown}, step=step)

        yield write


@contextmanager
def mlflow(uri: str, workdir: pathlib.Path, config: Mapping) -> Iterator[Writer]:
    """A run of the MLflow experiment "krl", which a continued krl run goes on with; scalars and the config.

    Args:
        uri: of the tracking server or store, such as "http://host:5000" or "sqlite:///mlflow.db".
        workdir, config: of the run.

    Raises:
        ValueError: the library is not installed, or the server cannot be used.
    """
    library = _import("mlflow", "config.log.mlflow")
    refused = library.exceptions.MlflowException
    try:
        client = library.MlflowClient(tracking_uri=uri)
        run = _mlflow_run(client, workdir, config)
    except refused as error:
        raise ValueError(f"config.log.mlflow={uri!r}: {_one_line(error)}") from None
    works = True

    def write(step, scalars, histograms, texts):
        nonlocal works
        now, finite = int(1000 * time.time()), {k: v for k, v in scalars.items() if math.isfinite(v)}
        try:  # a server that is gone must not end the run
            if works:
                client.log_batch(
                    run, [library.entities.Metric(name, float(v), now, step) for name, v in finite.items()]
                )
        except refused as error:
            works = False
            say(f"krl: MLflow gets nothing from step {step} on: {_one_line(error)}")

    try:
        yield write
    finally:
        with contextlib.suppress(refused):
            client.set_terminated(run)


def _mlflow_run(client, workdir: pathlib.Path, config: Mapping) -> str:
    """The id of this run at MLflow, made with the config as its parameters if there is none."""
    identity, experiment = _identity(workdir), client.get_experiment_by_name("krl")
    number = experiment.experiment_id if experiment else client.create_experiment("krl")
    found = client.search_runs([number], f"tags.krl = '{identity}'")
    if found:
        return found[0].info.run_id
    run = client.create_run(number, tags={"krl": identity}, run_name=workdir.name).info.run_id
    for name, value in config.items():
        client.log_param(run, name, str(value)[:500])
    return run


def find_writers(workdir: pathlib.Path, config: Mapping) -> list[AbstractContextManager[Writer]]:
    """The writers that a flat config asks for, besides TensorBoard."""
    asked = {mlflow: config["log.mlflow"], wandb: config["log.wandb"]}
    return [writer(where, workdir, config) for writer, where in asked.items() if where]


def _import(name: str, key: str):
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(f"{key} needs {name}, which is not installed: pip install 'krl[{name}]'") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _identity(workdir: pathlib.Path) -> str:
    """The name under which services know this run, made once for a work directory."""
    path = workdir / "run_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
