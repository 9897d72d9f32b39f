"""What a step is measured by, and where the numbers go: JSON lines, TensorBoard, the screen."""

import ctypes
import faulthandler
import hashlib
import json
import math
import os
import pathlib
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from krl.base.masked import divide, masked_sum, segment_sum
from krl.base.types import Rollouts
from krl.budget import Belief
from krl.learn import mixed_groups
from krl.rewards.pool import FAULTS
from krl.run.processes import is_first
from krl.run.writers import Writer, tensorboard

if TYPE_CHECKING:
    import pyarrow as pa

STUCK = 77  # exit code of a run that a phase without an end stopped


@jax.jit
def step_metrics(
    counts: jax.Array, seen: jax.Array, rollouts: Rollouts, rewards: jax.Array, advantages: jax.Array, scored: jax.Array
) -> dict[str, jax.Array]:
    """The metrics of a step that do not depend on the update; docs/metrics.md defines each.

    Args:
        counts: [M] int32.
        seen: [M] bool, prompts sampled in an earlier step.
        rollouts: R rollouts.
        rewards: [R] float32.
        advantages: [R] float32.
        scored: [R] bool, the rollouts that have a reward.

    Returns:
        float32 scalars by name.
    """
    num_prompts, served = counts.shape[0], counts > 0
    index = jnp.where(rollouts.mask, rollouts.prompt_index, num_prompts)
    given = segment_sum(scored.astype(jnp.float32), index, num_prompts)
    wins = segment_sum(jnp.where(scored, rewards, 0.0), index, num_prompts)
    mixed = mixed_groups(rewards, rollouts.prompt_index, scored, num_prompts)
    mixed |= segment_sum((advantages != 0).astype(jnp.float32), index, num_prompts) > 0  # beyond float32's digits
    tokens = jnp.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    share = lambda which: divide((which & served).sum(dtype=jnp.float32), jnp.float32(served.sum()))  # noqa: E731
    return {
        "effective_ratio_rollouts": divide(*masked_sum(advantages != 0, rollouts.mask)),
        "effective_ratio_prompts": share(mixed),
        "prompts_all_solved": share(~mixed & (given > 0) & (wins > 0)),
        "prompts_all_failed": share(~mixed & (given > 0) & (wins <= 0)),
        "prompts_mixed": share(mixed),
        "prompts_unseen": share(~seen),
        "prompts": served.sum(),
        "count_min": jnp.where(served, counts, counts.max()).min(),
        "count_mean": divide(counts.sum(), served.sum()),
        "count_max": counts.max(),
        "count_gini": gini(counts),
        "response_length_mean": divide(*masked_sum(rollouts.lengths, rollouts.mask)),
        "response_length_max": jnp.where(rollouts.mask, rollouts.lengths, 0).max(),
        "truncation_rate": divide(*masked_sum(~rollouts.finished, rollouts.mask)),
        "entropy": divide(*masked_sum(-rollouts.logps, tokens & rollouts.mask[:, None])),
        "rollouts": rollouts.mask.sum(dtype=jnp.float32),
    }


def belief_metrics(belief: Belief, step: int) -> dict[str, float]:
    """What the belief of all training prompts has come to after a step; see docs/metrics.md."""
    fitted = {name: float(getattr(belief, name)) for name in ("discount", "discount_mixed", "fade")}
    return fitted | {"hopeless": float(jax.nn.sigmoid(belief.hopeless))} | staleness(belief.last_step, step)


def staleness(last_step: jax.Array, step: int) -> dict[str, float]:
    """How many steps ago the D training prompts were sampled, on average and at most; before the first time, all steps.

    >>> staleness(jnp.array([5, 3, -1]), 5)
    {'staleness_mean': 2.6666666666666665, 'staleness_max': 6}
    """
    ages = step - np.asarray(last_step)
    return {"staleness_mean": float(ages.mean()), "staleness_max": int(ages.max())}


def gini(counts: jax.Array) -> jax.Array:
    """Gini coefficient of the counts: 0 if all are equal, towards 1 if one prompt takes all.

    >>> round(float(gini(jnp.array([0, 0, 0, 4]))), 3)
    0.75
    """
    ordered = jnp.sort(counts.astype(jnp.float32))
    size = counts.shape[0]
    weights = 2.0 * jnp.arange(1, size + 1) - size - 1
    return divide((weights * ordered).sum(), size * ordered.sum())


def mean_of(values: np.ndarray, mask: np.ndarray) -> float:
    """The mean of the finite float64 under a mask, on the host, whatever their size; NaN if there are none.

    >>> mean_of(np.array([1e308, 1.5e308, 7.0]), np.array([True, True, False]))
    1.25e+308
    """
    kept = values[mask]
    if not kept.size:
        return math.nan
    largest = np.abs(kept).max()
    unit = 2.0 ** max(0, math.frexp(largest)[1] - 900)  # 1 for most; a power of two changes no digit
    return unit * float((kept / unit).mean().clip(-largest / unit, largest / unit))


class CompileCounter:
    """Counts the XLA compilations of this process from its creation on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


class PhaseClock:
    """Wall time of each phase of a step, in seconds.

    A phase that takes longer than `stuck_seconds` ends the process with STUCK, after its name and all stacks; 0 lets it
    wait.
    """

    def __init__(self, stuck_seconds: float = 0.0):
        self.seconds: dict[str, float] = {}
        self._stuck_seconds = stuck_seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the statements inside; they must wait for their own results."""
        began = time.perf_counter()
        with ExitStack() as inside:
            if self._stuck_seconds:
                watchdog = threading.Timer(self._stuck_seconds, self._give_up, (name,))
                watchdog.daemon = True
                watchdog.start()
                inside.callback(watchdog.cancel)
            inside.enter_context(jax.profiler.TraceAnnotation(name))
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def _give_up(self, name: str) -> None:
        print(
            f"krl: the phase {name} has taken {self._stuck_seconds:g} s (config.stuck_seconds) and the run ends; where "
            "it is:", file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(all_threads=True)
        os._exit(STUCK)


def memory_used() -> dict[str, float]:
    """The most memory that this process has had until now, GB: of the host, and of a device where the backend tells."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    used = {"memory/host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    return used | ({"memory/device_gb": max(peaks) / 1e9} if peaks else {})


LARGE = 100_000_000  # parameters from which on giving memory back takes no time beside a step


def give_back_memory(params: dict[str, Any]) -> None:
    """Return what malloc holds free to the system, where a large policy computes on CPUs.

    Arrays of a layer lie among others in memory that malloc cuts up, and glibc's keeps that when they are gone: a
    gigabyte after the rollouts of 135M parameters.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim and jax.default_backend() == "cpu" and sum(leaf.size for leaf in jax.tree.leaves(params)) >= LARGE:
        trim(0)


def over_processes(every: dict[str, list[float]]) -> dict[str, float]:
    """The metrics that follow from what every process has, see `krl.run.processes.gather`.

    `memory/*` are the largest. Of several processes `slowest_process` is the number of the one that the others waited
    for when rewards were exchanged, and `seconds/behind` how long.
    """
    shown = {name: max(values) for name, values in every.items() if name.startswith("memory/")}
    waited = every["seconds/wait"]
    if len(waited) > 1:
        shown |= {"slowest_process": int(np.argmin(waited)), "seconds/behind": max(waited) - min(waited)}
    return shown


@contextmanager
def profile(directory: pathlib.Path, *, begin: int, steps: int) -> Iterator[Callable[[int], None]]:
    """A function to be called before each step, with the steps taken, that has JAX's profiler record some of them.

    The trace is for TensorBoard or ui.perfetto.dev; the phases of a step are named in it.

    Args:
        directory: where the trace goes.
        begin: steps taken before the first one that is recorded.
        steps: how many are; 0 for none.
    """
    with ExitStack() as recording:

        def before(step: int) -> None:
            if step >= begin + steps:
                recording.close()
            elif step == begin:
                recording.enter_context(jax.profiler.trace(directory, create_perfetto_trace=True))

        yield before


def keep_compilations() -> None:
    """Keep what XLA compiles on disk, for the next start, unless JAX was told where or not to.

    In $XDG_CACHE_HOME/krl, or else ~/.cache/krl, apart for each kind of processor: home directories are shared by
    machines that do not have the same instructions.
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    told = [line for line in lines if line.startswith(("flags", "Features", "model name"))] or lines
    kind = hashlib.blake2b("".join(sorted(set(told))).encode(), digest_size=6).hexdigest()
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "krl" / "compiled" / kind))


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
