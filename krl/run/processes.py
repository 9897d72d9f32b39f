"""Several processes that train one policy: the few things that they tell each other beside what JAX does.

The engine is JAX's own (multi-controller SPMD): every process runs the same program over one mesh of all their devices.
Each decodes and verifies the rollouts of its own devices; rewards travel, and whether to stop. Process 0 writes the
logs.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from krl.base.sharding import named_sharding

SETUP_SECONDS = 3600  # that the others wait while process 0 prepares data and tokenizer
SILENCE_SECONDS = 30  # after which a process that says nothing is taken for dead, and all end
BEAT_SECONDS = 1.0  # between two signs of life
LEAVE_SECONDS = 20  # most that process 0 waits for the others before it ends
ENDED_BY_ANOTHER = 76  # exit code of a process that ends because another one has
STOPPED = 75  # exit code of a run that a signal stopped: it was saved, and the same command continues it
_GO_ON = "the same command continues from the last checkpoint"
_CLUSTERS = ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")


def join_processes(distributed: ConfigDict) -> None:
    """Join the other processes of the run, before JAX is used for anything else; alone, nothing happens.

    Args:
        distributed: `coordinator` ("host:port" of process 0), `processes` and `process` (this one's number from 0).
            With processes = 0 JAX is asked for them where the environment is that of a SLURM step or a TPU slice of
            several hosts, with -1 in any case.

    Raises:
        ValueError: the three do not fit together, or there is no cluster to ask.
    """
    named, count, index = distributed.coordinator, distributed.processes, distributed.process
    if count > 1 and not (named and 0 <= index < count):
        raise ValueError(
            f"config.distributed.processes={count} needs config.distributed.coordinator, host:port of process 0, and "
            f"config.distributed.process in 0..{count - 1}; got {named!r} and {index}"
        )
    if count > 1 and not index:
        _refuse_taken_port(named)
    in_cluster = count < 0 or (not count and any(_several(os.environ.get(name, "")) for name in _CLUSTERS))
    if count > 1 or in_cluster:
        known = {} if in_cluster else {"coordinator_address": named, "num_processes": count, "process_id": index}
        try:
            jax.distributed.initialize(
                **known, heartbeat_timeout_seconds=2 * SILENCE_SECONDS, shutdown_timeout_seconds=SILENCE_SECONDS
            )
        except ValueError as error:
            raise ValueError(
                f"JAX found no cluster to ask ({error}); give config.distributed.coordinator, .processes and .process"
            ) from None


def _refuse_taken_port(coordinator: str) -> None:
    """Process 0 is to listen there; JAX would crash where another program does."""
    port = coordinator.rpartition(":")[2]
    if not (port.isdigit() and int(port) < 1 << 16):
        raise ValueError(f"config.distributed.coordinator={coordinator!r} must be host:port, such as 127.0.0.1:9876")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            reason = f"cannot listen on port {port} ({error.strerror})"
            raise ValueError(f"config.distributed.coordinator={coordinator!r}: {reason}; choose another port") from None


def _several(said: str) -> bool:
    """Whether a cluster's variable is about more than one process: a list of hosts, an address, or a number above 1."""
    return int(said) > 1 if said.isdigit() else any(mark in said for mark in ",:")


@contextlib.contextmanager
def stay_together() -> Iterator[None]:
    """Inside, this process ends when another one has ended or is silent, and tells the others when it fails itself.

    Without it the others would wait in a collective for the one that is gone. The process ends with ENDED_BY_ANOTHER or
    1, at once: the interpreter's farewell would wait for the others too.
    """
    if jax.process_count() == 1:
        yield
        return
    import orbax.checkpoint as ocp  # slow to import

    client = ocp.multihost.get_jax_distributed_client()
    over = threading.Event()
    heard = {f"krl/alive/{index}": Sign(0, 0) for index in range(jax.process_count())}
    threading.Thread(target=_listen, args=(client, over, heard), daemon=True).start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        # A collective also fails here when another process is gone: if one is, `_listen` ends this process meanwhile.
        before = dict(heard)
        while not all(heard[name].said >= sign.said + 3 for name, sign in before.items()):
            time.sleep(BEAT_SECONDS / 4)
        over.set()
        _leave(f"process {jax.process_index()} ends: {reason}", 1, client)  # what to do is for the reason to say
    finally:
        over.set()


class Sign(NamedTuple):
    """The last sign of life of a process."""

    said: int  # its own number of it
    beat: int  # of the process that heard it, when it did


def _listen(client, over: threading.Event, heard: dict[str, Sign]) -> None:
    """Say that this process lives, and hear whether the others do; `heard` has the last sign of each."""
    beat = 0
    while not over.wait(BEAT_SECONDS):
        beat += 1
        try:
            client.key_value_set(f"krl/alive/{jax.process_index()}", str(beat), allow_overwrite=True)
            said = dict(client.key_value_dir_get("krl/"))
        except jax.errors.JaxRuntimeError:
            _leave(f"process 0, which the others meet at, is gone; {_GO_ON}", ENDED_BY_ANOTHER)
        if "krl/ended" in said:
            _leave(said["krl/ended"], ENDED_BY_ANOTHER, client)
        for name, last in heard.items():
            number = int(said.get(name, 0))
            if number != last.said:
                heard[name] = Sign(number, beat)
            elif (beat - last.beat) * BEAT_SECONDS > SILENCE_SECONDS:
                lost = name.rpartition("/")[2]
                _leave(f"process {lost} has been silent for {SILENCE_SECONDS} s; {_GO_ON}", ENDED_BY_ANOTHER)


def _leave(reason: str, code: int, client=None) -> None:
    """End this process at once; with a client after the others were told why, process 0, which answers them, last."""
    print(f"krl: {reason}", file=sys.stderr, flush=True)
    if client is not None:
        end = time.monotonic() + LEAVE_SECONDS
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set("krl/ended", reason, allow_overwrite=True)
            if code != ENDED_BY_ANOTHER:
                time.sleep(3 * BEAT_SECONDS)  # else a collective fails in the others before they know why
            # Said last: JAX aborts a process whose coordinator has gone, and process 0 goes when all have said this.
            client.key_value_set(f"krl/left/{jax.process_index()}", reason, allow_overwrite=True)
            while is_first() and time.monotonic() < end and _still_here(client):
                time.sleep(BEAT_SECONDS / 4)
    os._exit(code)


def _still_here(client) -> bool:
    """Whether a process has not left yet."""
    return len(client.key_value_dir_get("krl/left/")) < jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes what one process must write."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if is_first():
        print(line, flush=True)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Process 0 goes through the block, then all others do; the name is used once in a run."""
    if jax.process_count() == 1:
        yield
        return
    import orbax.checkpoint as ocp  # slow to import

    wait = ocp.multihost.get_barrier_sync_fn()
    assert wait is not None  # only a single process has none
    if not is_first():
        wait(key=name, timeout_ms=SETUP_SECONDS * 1000)
    yield
    if is_first():
        wait(key=name, timeout_ms=SETUP_SECONDS * 1000)


def place_whole(mesh: Mesh, tree):
    """Host arrays, the same in every process, on every device of the mesh."""
    return jax.make_array_from_process_local_data(named_sharding(mesh), jax.tree.map(np.asarray, tree))


def to_host(tree: Any) -> Any:
    """Arrays of all devices as whole host arrays, in every process."""
    return multihost_utils.process_allgather(tree, tiled=True)


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of an array that every process has one of, of equal shapes, in numbers of 32 or 64 bits."""
    if jax.process_count() == 1:
        return values
    words = np.ascontiguousarray(values).reshape(-1).view(np.uint32)  # JAX would round a number of 64 bits
    every = np.asarray(multihost_utils.process_allgather(words)).view(values.dtype)
    return every.sum(axis=0, dtype=values.dtype).reshape(values.shape)


def first_text(text: str) -> str:
    """The text of the first process that has one, at most 1,000 bytes; "" if none has. All ask at the same point."""
    if jax.process_count() == 1:
        return text
    mine = np.frombuffer(text.encode("utf-8", "replace")[:1000].ljust(1000, b"\0"), np.uint8)
    every = [bytes(row).rstrip(b"\0").decode("utf-8", "ignore") for row in multihost_utils.process_allgather(mine)]
    return next(filter(None, every), "")


def gather(values: dict[str, float]) -> dict[str, list[float]]:
    """What every process has under each name, in the order of the processes; all have the same names."""
    if jax.process_count() == 1:
        return {name: [value] for name, value in values.items()}
    found = multihost_utils.process_allgather(np.array(list(values.values()), np.float32))
    return dict(zip(values, found.T.tolist(), strict=True))


def check_agreement(*arrays: jax.Array | np.ndarray) -> None:
    """End the run if processes that must know the same do not.

    Raises:
        RuntimeError: they differ; the message says which.
    """
    _compare("counts, rewards or belief", arrays, "; do they run the same code, data and versions?")


def check_copies(tree: Any) -> None:
    """End the run if processes hold other bits of the same part of an array: a device may compute wrongly.

    Args:
        tree: arrays on the mesh; of each process the parts of its first device are compared.

    Raises:
        RuntimeError: they differ; the message says which.
    """
    shards = [leaf.addressable_shards[0] for leaf in jax.tree.leaves(tree)]
    part = zlib.crc32(repr([shard.index for shard in shards]).encode())
    why = ", which holds the same part of them: does a device compute wrongly?"
    _compare("parameters", [shard.data for shard in shards], why, part)


def _compare(what: str, arrays: Sequence[jax.Array | np.ndarray], why: str, part: int = 0) -> None:
    """End the run if processes that have the same part of arrays have other bits of it."""
    if jax.process_count() == 1:
        return
    digests = [zlib.crc32(np.asarray(array).tobytes()) for array in arrays]
    found = multihost_utils.process_allgather(np.array([part, *digests], np.uint32))
    for part in np.unique(found[:, 0]):
        (same,) = np.nonzero(found[:, 0] == part)
        odd = same[(found[same] != found[same[0]]).any(axis=1)]
        if len(odd):
            raise RuntimeError(
                f"{what} of processes {odd.tolist()} differ from those of process {same[0]}{why} "
                "The last checkpoint is whole"
            )


def any_process(flag: bool) -> bool:
    """Whether a flag is up in any process; all must ask at the same points of the program."""
    return bool(sum_over_processes(np.array([flag], np.int32))[0])
