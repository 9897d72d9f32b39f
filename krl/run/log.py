"""Where the numbers of a run go: JSON lines, the writers of its progress, the screen."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from krl.rewards.pool import FAULTS
from krl.run.processes import is_first
from krl.run.writers import Writer, tensorboard

if TYPE_CHECKING:
    import pyarrow as pa


class MetricsLog(AbstractContextManager):
    """The .jsonl files of a work directory (metrics, groups, evaluations, processes), rollouts/ and TensorBoard events.

    A run that continues from step s drops the rows of later steps, which it will write again. One that has
    taken no step begins anew: it drops its row of step 0 too. Of several processes the first writes.
    """

    def __init__(
        self, workdir: pathlib.Path, *, first_step: int, writers: Iterable[AbstractContextManager[Writer]] = (),
        rollouts_gb: float = 0.0, texts_every: int = 0,
    ):  # fmt: skip
        """Open the files and drop the rows that will be written again.

        Args:
            workdir: of the run.
            first_step: steps that the run has taken.
            writers: further places to watch the run.
            rollouts_gb: see `krl.run.rollouts.write_step`.
            texts_every: steps between sample rollouts for the writers; 0 for never.
        """
        self._files: dict[str, Any] = {}
        self._writers: list[Writer] = []
        self._open = ExitStack()
        self._rollouts, self._rollouts_gb, self._texts_every = workdir / "rollouts", rollouts_gb, texts_every
        if not is_first():
            return
        for name in ("metrics", "groups", "evaluations", *(("processes",) if jax.process_count() > 1 else ())):
            path = workdir / f"{name}.jsonl"
            kept = [row for row in read_rows(path) if first_step and row["step"] <= first_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.replace(path)
            self._files[name] = self._open.enter_context(path.open("a"))
        from krl.run.rollouts import drop_steps, logged_steps  # with Arrow, which only a run needs

        drop_steps(self._rollouts, [step for step in logged_steps(self._rollouts) if step > first_step])
        with self._open:  # a writer that cannot be opened closes the others
            for writer in (tensorboard(workdir / "tensorboard", first_step), *writers):
                self._writers.append(self._open.enter_context(writer))
            self._open = self._open.pop_all()

    def __exit__(self, *exception):
        self._open.__exit__(*exception)

    @property
    def wants_rollouts(self) -> bool:
        """Whether `write_rollouts` has any use for them."""
        return bool(self._rollouts_gb or self._texts_every)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add a row of metrics; numbers that are not finite become null in the JSON."""
        finite = {k: (v if math.isfinite(v) else None) for k, v in metrics.items()}
        self._append("metrics", {"step": step, **finite})
        self._show(step, scalars=metrics)

    def write_groups(self, step: int, groups: dict[str, np.ndarray]) -> None:
        """Add a row with an [M] list for each quantity of the step's groups; the writers get histograms."""
        self._append("groups", {"step": step, **{name: values.tolist() for name, values in groups.items()}})
        scored = groups["scored"] > 0
        rates = groups["successes"][scored] / groups["scored"][scored]
        bars = {"counts": groups["counts"], "belief": groups["belief"], "success_rate": rates}
        finite = {name: values[np.isfinite(values)] for name, values in bars.items()}
        self._show(step, histograms={name: values for name, values in finite.items() if values.size})

    def write_rollouts(self, step: int, table: "pa.Table") -> None:
        """Add the rollouts of a step that this process has to the log, and show some of them now and then."""
        from krl.run.rollouts import show_rollouts, write_step

        write_step(self._rollouts, step, table, self._rollouts_gb)
        if self._writers and self._texts_every and step % self._texts_every == 0 and table.num_rows:
            self._show(step, texts={"rollouts": show_rollouts(table)})

    def write_processes(self, step: int, every: dict[str, list[float]]) -> None:
        """Add a row of what every process has, if there are several; see `krl.run.processes.gather`."""
        self._append("processes", {"step": step, **every})

    def write_evaluation(
        self, step: int, *, rollouts_total: int, samples: int, solved: np.ndarray,
        said: Sequence[tuple[str, float | None]] = (),
    ) -> None:  # fmt: skip
        """Add a row of the held-out prompts: how many of each one's k samples were solved, and what some said.

        Args:
            step: steps taken before the evaluation.
            rollouts_total: rollouts sampled for training until then.
            samples: k.
            solved: one whole number for each held-out prompt, 0 to k.
            said: of the first prompts, a response each and its reward; None for one that could not be computed.
        """
        row = {"step": step, "rollouts_total": rollouts_total, "samples": samples, "solved": solved.tolist()}
        self._append("evaluations", row | {"said": said})

    def _show(self, step: int, **shown: Mapping) -> None:
        for write in self._writers:
            write(step, shown.get("scalars", {}), shown.get("histograms", {}), shown.get("texts", {}))

    def _append(self, name: str, row: dict) -> None:
        if name in self._files:
            self._files[name].write(json.dumps(row) + "\n")
            self._files[name].flush()


def read_rows(path: pathlib.Path) -> list[dict]:
    """The whole rows of a JSON-lines file; [] if it is missing. A row cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def short(mean: float) -> str:
    """A mean reward with three decimals, or with three digits and an exponent where it is large.

    >>> short(0.5), short(-2e300)
    ('0.500', '-2e+300')
    """
    return f"{mean:.3f}" if abs(mean) < 1e9 else f"{mean:.3g}"


def status_line(metrics: dict[str, float], accuracy: float | None) -> str:
    """A step in one line: what it showed, the share of its rollouts without a reward, and the newest accuracy."""
    text = (
        f"reward {short(metrics['reward_mean'])}  effective {metrics['effective_ratio_rollouts']:.2f}  max count "
        f"{metrics['count_max']:.0f}"
    )
    failed = sum(metrics.get(f"verifier/{kind}", 0) for kind in FAULTS)
    text += f"  no reward {100 * failed / metrics['rollouts']:.3g}%" if failed else ""
    text += "" if accuracy is None else f"  accuracy {short(accuracy)}"
    if metrics.get("seconds/behind", 0.0) > 0.2 * metrics["seconds/step"]:
        text += f"  waited {metrics['seconds/behind']:.1f} s for process {metrics['slowest_process']}"
    return text


@contextmanager
def progress(total: int, first: int, label: str) -> Iterator:
    """A function (step, text) that shows how far a run is, with the time it still needs.

    In a terminal it is a progress bar; elsewhere one plain line a call; nothing in any process but the first.
    """
    if not is_first():
        yield lambda step, text: None
    elif sys.stdout.isatty():
        console = Console()
        # The first two are what a narrow terminal has no room for.
        wide = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=20)) if console.width >= 120 else ()
        columns = (MofNCompleteColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
        with Progress(*wide, *columns, console=console) as bar:
            task = bar.add_task(label, total=total, completed=first, text="")
            yield lambda step, text: bar.update(task, completed=step, text=text)
    else:
        began = time.perf_counter()

        def line(step: int, text: str) -> None:
            each = (time.perf_counter() - began) / max(step - first, 1)
            print(f"{label} {step}/{total}  eta {format_seconds(each * (total - step))}  {text}", flush=True)

        yield line


def format_seconds(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
