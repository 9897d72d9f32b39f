"""Reward functions in worker processes: whatever a function does, a step gets its rewards in time.

A reward function may hang, crash, exhaust memory or leave threads and files behind. Each worker is a fresh
Python process with a session of its own, so that an interrupt typed at the terminal does not reach it and
one signal ends it together with what it started. It has a memory limit, sees no accelerator and no credentials in its
environment, and does not import jax. A worker that fails is killed and replaced; its item has no reward, and is counted
with the reason.
"""

import collections
import contextlib
import dataclasses
import math
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from krl.configs.named import name_of
from krl.rewards.functions import (
    Item,
    Part,
    as_float32,
    component_names,
    load_rewards,
    one_line,
    parse_rewards,
    rewards_and_reason,
    weighted,
)
from krl.rewards.worker import OUT_OF_MEMORY

FAULTS = ("timeouts", "crashes", "errors")  # why an item got no reward; see `VerifierPool.finish`
START_SECONDS = 120  # until a new worker has imported the reward's module
RESTART_PAUSE_SECONDS = 0.5  # after a worker that died before it was ready, so that a broken one costs no time
TICK_SECONDS = 0.05  # between looks at whether a busy worker still lives
# What a worker is told of this process's environment, which may hold credentials: this and what the user adds.
KEPT = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "USER")
# One thread for a worker's linear algebra, no accelerator, and the same order of sets in every worker.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}  # fmt: skip


@dataclasses.dataclass
class _Worker:
    """A process, the socket to it and what it is doing."""

    process: subprocess.Popen[bytes]
    channel: socket.socket  # this end of what is its standard input and output
    deadline: float  # of its start, then of its item; infinite while it is idle
    ready: bool = False
    wants_rows: bool = False  # whether a reward takes the row of the data
    row: int | None = None  # of the item it works on
    done: int = 0  # items answered
    unsent: bytes = b""
    received: bytes = b""

    def send(self, message: tuple[object, ...]) -> None:
        """Queue a message and write what the socket takes now."""
        self.unsent += pickle.dumps(message)
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self.unsent:
                self.unsent = self.unsent[self.channel.send(self.unsent) :]

    def receive(self) -> list[str] | None:
        """The whole lines that came, or None at the end of the stream."""
        try:
            data = self.channel.recv(65536)
        except BlockingIOError:
            return []
        except ConnectionError:  # it ended with something unread
            return None
        *lines, self.received = (self.received + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines] if data else None

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)
        self.channel.close()


@dataclasses.dataclass
class _Batch:
    """Items and what is known of them."""

    items: list[Item] = dataclasses.field(default_factory=list)
    waiting: collections.deque[int] = dataclasses.field(default_factory=collections.deque)  # items not yet begun
    rewards: list[list[float]] = dataclasses.field(default_factory=list)  # each part's; NaN where there is none (yet)
    failures: list[tuple[str, str]] = dataclasses.field(
        default_factory=list
    )  # of FAULTS, and why, in one line; or "", ""


class VerifierPool:
    """Scores batches of items with a reward function in worker processes; a context manager.

    Not to be used by two threads at once. On Linux a worker also ends with the thread that started it.

    Args:
        reward: a name in `krl.rewards.verify.REWARDS`, or "package.module:function" of a function
            (prompt, response, answer) -> float, or (prompt, response, answer, row) -> float; modules are found where
            this process finds them. Or several with weights, see `krl.rewards.functions.parse_rewards`. Or a function.
        workers: processes; with 0, which a function needs, it is called in this process, without limits.
        item_seconds: for one item; the worker is killed when it takes longer.
        batch_seconds: for a batch, once all its items are there; what is unfinished then has no reward.
        items_per_worker: a worker is replaced after so many items, whatever it has piled up.
        memory_gb: address space of each worker in GiB.
        environment: further variables that workers see beside KEPT and ENVIRONMENT.

    Attributes:
        names: of the rewards that are added up, in the config's order; () where one reward is all there is.
        last_error: why the latest item counted under "errors" failed, in one line; "" if none did.
        last_failure: why the first failed item of the latest batch with one failed (of several rewards rather one whose
            first failed), with its prompt and response, both shortened, in one line; "" if none did.
        last_faults: for each item of the last finished batch the kind of its failure, as in `finish`; "" if it has a
            reward.
        last_reasons: for each of them why it failed, in one line; "" if it has a reward.
        last_rewards: [n] float64, their rewards as the function gave them, 0 for those that failed.
        last_parts: [n, C] float64, what each of `names` gave, also where another one failed; NaN where it failed.

    Raises:
        ValueError: the reward cannot be found, a number is out of range, or no worker starts; in one line.
    """

    def __init__(
        self,
        reward: str | Callable[..., object],
        *,
        workers: int,
        item_seconds: float,
        batch_seconds: float,
        items_per_worker: int,
        memory_gb: float,
        environment: Sequence[str] = (),
    ):
        if workers < 0 or min(item_seconds, batch_seconds, items_per_worker, memory_gb) <= 0:
            raise ValueError(
                f"a verifier pool needs workers >= 0 and positive limits, got {workers=}, {item_seconds=}, "
                f"{batch_seconds=}, {items_per_worker=}, {memory_gb=}"
            )
        if workers and not isinstance(reward, str):
            raise ValueError("a reward that is a function is called in this process, with workers=0; name it instead")
        text = reward if isinstance(reward, str) else name_of(reward)
        self.names = component_names(text)
        self.last_error = self.last_failure = ""
        self.last_faults: list[str] = []
        self.last_reasons: list[str] = []
        self.last_rewards, self.last_parts = np.zeros(0), np.zeros((0, len(self.names)))
        self._first_message = (text, memory_gb, os.getpid())
        self._item_seconds, self._batch_seconds, self._items_per_worker = item_seconds, batch_seconds, items_per_worker
        self._weights = tuple(parse_rewards(text).values())
        self._parts = None if workers else load_rewards(reward)
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        told = {name: os.environ[name] for name in (*KEPT, *environment) if name in os.environ}
        self._environment = told | ENVIRONMENT | {"PYTHONPATH": paths}
        self._size = workers
        self._workers: list[_Worker] = []
        self._pause_ends = 0.0  # after one died before it was ready
        self._batch = _Batch()
        self._closed = False
        try:
            self._start_missing()
            if workers:
                self._await_first(text)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers and what they started; a second call does nothing."""
        self._closed = True
        while self._workers:
            self._workers.pop().kill()

    def score(self, items: Sequence[Item]) -> tuple[np.ndarray, dict[str, int]]:
        """Rewards of a batch, within `batch_seconds` and a moment: `begin`, `add` and `finish` in one.

        Args:
            items: n of (prompt, response, answer) or (prompt, response, answer, row): an answer is one gold answer or
                several accepted ones, a row the other fields of the data's row, for functions that take it.

        Returns, Raises:
            As `finish`.
        """
        self.begin()
        self.add(items)
        return self.finish()

    def begin(self) -> None:
        """Begin a batch; what an earlier one left is forgotten.

        Raises:
            ValueError: the pool is closed.
        """
        if self._closed:
            raise ValueError("the verifier pool is closed; score inside its with block")
        self._give_up()

    def add(self, items: Sequence[Item]) -> None:
        """Add items to the batch; idle workers begin with them at once."""
        batch = self._batch
        batch.waiting.extend(range(len(batch.items), len(batch.items) + len(items)))
        batch.items.extend(items)
        batch.rewards.extend([[np.nan] * len(self._weights)] * len(items))
        batch.failures.extend([("", "")] * len(items))
        if self._parts is None:
            self._hand_out()

    def work(self, until: Callable[[], bool], look_seconds: float = TICK_SECONDS) -> None:
        """Keep the workers busy until a moment comes or all items are done, whichever is first.

        Args:
            until: whether it has come.
            look_seconds: how often that is asked.
        """
        while (self._batch.waiting or self._busy()) and not until():
            if self._parts is not None:
                self._score_here(self._parts, self._batch.waiting.popleft())
            else:
                self._hand_out()
                self._wait(look_seconds)
                self._look_after()

    def finish(self) -> tuple[np.ndarray, dict[str, int]]:
        """The rewards of the batch, within `batch_seconds` from now and a moment.

        Returns:
            Rewards float32 [n] in the order of the items, the nearest ones that float32 has (`last_rewards` are exact),
            and how many of them are 0 because there is none: for "timeouts" (of the item or the batch), "crashes" (the
            worker died, also for want of memory) and "errors" (the function raised, or returned something that is not a
            finite number).
        """
        batch, end = self._batch, time.monotonic() + self._batch_seconds
        try:
            self.work(lambda: self._parts is None and time.monotonic() >= end)
        finally:  # also when the caller is interrupted: no later batch may get this one's answers
            self._give_up()
        rewards = np.array(batch.rewards, np.float64).reshape(len(batch.items), len(self._weights))
        self.last_faults, self.last_reasons = ([failure[k] for failure in batch.failures] for k in (0, 1))
        scored = np.array(self.last_faults, str) == ""
        self.last_rewards = weighted(self._weights, list(np.where(scored[:, None], rewards, 0.0).T))
        self.last_parts = rewards[:, : len(self.names)]
        if not scored.all():  # rather one whose first reward failed, which alone evaluations go by
            failed = min(np.flatnonzero(~scored), key=lambda row: np.isfinite(rewards[row, 0]))
            prompt, response = (repr(one_line(text, 80)) for text in batch.items[failed][:2])
            self.last_failure = f"{self.last_reasons[failed]} (prompt {prompt}, response {response})"
        return as_float32(self.last_rewards), {kind: self.last_faults.count(kind) for kind in FAULTS}

    def _give_up(self) -> None:
        """Leave the batch as it is; what was not done has timed out."""
        batch, unfinished = self._batch, self._busy()
        reason = f"it was not done {self._batch_seconds:g} s after the last response (verify.batch_seconds)"
        for row in [*(worker.row for worker in unfinished if worker.row is not None), *batch.waiting]:
            batch.failures[row] = "timeouts", reason
        for worker in unfinished:
            self._replace(worker)
        self._batch = _Batch()

    def _score_here(self, parts: Sequence[Part], row: int) -> None:
        try:
            self._record(row, *rewards_and_reason(parts, self._batch.items[row]))
        except MemoryError:
            self._record(row, [np.nan] * len(parts), "it ran out of memory")

    def _record(self, row: int, values: list[float], reason: str) -> None:
        self._batch.rewards[row] = values
        if reason:
            self._batch.failures[row] = "errors", reason
            self.last_error = reason

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.row is not None]

    def _start_missing(self) -> None:
        while len(self._workers) < self._size and time.monotonic() >= self._pause_ends:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            # -P: the worker finds modules where this process does, not also in the current directory.
            command = [sys.executable, "-P", "-c", "from krl.rewards.worker import main; main()"]
            with theirs:
                process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    env=self._environment,
                    start_new_session=True,
                )
            self._workers.append(_Worker(process, ours, time.monotonic() + START_SECONDS))
            self._workers[-1].send(self._first_message)

    def _replace(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()
        if not worker.ready:
            self._pause_ends = time.monotonic() + RESTART_PAUSE_SECONDS
        self._start_missing()

    def _await_first(self, reward: str) -> None:
        """Until one worker is ready; the others follow while that one works."""
        while not any(worker.ready for worker in self._workers):
            self._wait(TICK_SECONDS)
            for worker in self._workers:
                lines = worker.receive()
                for line in lines or []:
                    if line.startswith("refused "):
                        raise ValueError(line.removeprefix("refused "))
                    self._take(worker, line)
                if lines is None or time.monotonic() > worker.deadline:
                    raise ValueError(
                        f"reward {reward!r}: a worker ended or hung while it imported the function; "
                        f"see its messages, and whether {self._first_message[1]} GiB are enough for the import"
                    )

    def _hand_out(self) -> None:
        """Give each idle worker an item."""
        self._start_missing()
        batch = self._batch
        for worker in list(self._workers):
            if batch.waiting and worker.ready and worker.row is None:
                if worker.process.poll() is not None:  # it died while idle, which costs no item
                    self._replace(worker)
                    continue
                worker.row, worker.deadline = batch.waiting.popleft(), time.monotonic() + self._item_seconds
                item = batch.items[worker.row]
                worker.send((worker.row, item if worker.wants_rows else item[:3]))

    def _wait(self, seconds: float) -> None:
        """Sleep until a worker says something or a deadline may have passed, no longer than this or a tick."""
        moment = min([time.monotonic() + min(seconds, TICK_SECONDS), *(worker.deadline for worker in self._workers)])
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                writes = selectors.EVENT_WRITE if worker.unsent else 0
                selector.register(worker.channel, selectors.EVENT_READ | writes)
            selector.select(max(0.0, moment - time.monotonic()))

    def _look_after(self) -> None:
        """Take the answers that came; replace workers that died, are late or have done enough."""
        for worker in list(self._workers):
            worker.flush()
            lines = worker.receive()
            for line in lines or []:
                self._take(worker, line)
            died, late = lines is None or worker.process.poll() is not None, time.monotonic() > worker.deadline
            if worker.row is not None and died:
                self._batch.failures[worker.row] = "crashes", self._how_it_died(worker)
            elif worker.row is not None and late:
                reason = f"it took longer than {self._item_seconds:g} s (verify.item_seconds)"
                self._batch.failures[worker.row] = "timeouts", reason
            if died or late or worker.done >= self._items_per_worker:
                self._replace(worker)

    def _how_it_died(self, worker: _Worker) -> str:
        """Why a worker's item has no reward, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # its socket may close a moment before it ends
            worker.process.wait(timeout=0.2)
        code = worker.process.returncode
        if code == OUT_OF_MEMORY:
            return f"it ran out of memory, beyond {self._first_message[1]:g} GiB (verify.memory_gb)"
        if code is None:
            return "its process closed the pipe to this one"
        return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"

    def _take(self, worker: _Worker, line: str) -> None:
        """One line of a worker; what it should not say is no answer, and the item's deadline sees to it."""
        if worker.row is None and line in ("ready", "ready row"):
            worker.ready, worker.deadline = True, math.inf
            worker.wants_rows |= line == "ready row"
        number, _, said = line.partition(" ")
        if worker.row is None or number != str(worker.row):
            return
        with contextlib.suppress(ValueError):
            numbers, _, reason = said.partition(" error ")
            values = [float(each) for each in numbers.split()]
            if len(values) == len(self._weights) and (reason or np.isfinite(values).all()):
                self._record(worker.row, values, reason)
                worker.row, worker.deadline, worker.done = None, math.inf, worker.done + 1
