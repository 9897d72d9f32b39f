"""What a process takes: the time of each phase of a step, memory, compilations."""

import ctypes
import faulthandler
import hashlib
import os
import pathlib
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

STUCK = 77  # exit code of a run that a phase without an end stopped


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
