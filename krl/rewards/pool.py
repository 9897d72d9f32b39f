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
import os
import pickle
import selectors
import signal
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
    """A process, its pipes and what it is doing."""

    process: subprocess.Popen[bytes]
    requests: int  # the file descriptor to write to
    replies: int  # the file descriptor to read from
    started: float
    ready: bool = False
    wants_rows: bool = False  # whether a reward takes the row of the data
    row: int | None = None  # of the item it works on
    deadline: float = 0.0  # of that item
    done: int = 0  # items answered
    unsent: bytes = b""
    received: bytes = b""

    def send(self, message: tuple[object, ...]) -> None:
        """Queue a message and write what the pipe takes now."""
        self.unsent += pickle.dumps(message)
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self.unsent:
                self.unsent = self.unsent[os.write(self.requests, self.unsent) :]

    def receive(self) -> list[str] | None:
        """The whole lines that came, or None at the end of the pipe."""
        try:
            data = os.read(self.replies, 65536)
        except BlockingIOError:
            return []
        *lines, self.received = (self.received + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines] if data else None

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)
        os.close(self.requests)
        os.close(self.replies)


@dataclasses.dataclass
class _Batch:
    """Items and what is known of them."""

    items: list[Item] = dataclasses.field(default_factory=list)
    waiting: collections.deque[int] = dataclasses.field(default_factory=collections.deque)  # items not yet begun
    rewards: list[list[float]] = dataclasses.field(default_factory=list)  # each part's; NaN where there is none (yet)
    faults: list[str] = dataclasses.field(default_factory=list)  # of FAULTS; "" for an item that did not fail
    reasons: list[str] = dataclasses.field(default_factory=list)  # why it failed, in one line


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
        self._workers: list[_Worker] = []
        self._owed: list[float] = []  # when to start again the workers that died before they were ready
        self._batch = _Batch()
        self._closed = False
        try:
            for _ in range(workers):
                self._start()
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
        self._batch = _Batch()

    def add(self, items: Sequence[Item]) -> None:
        """Add items to the batch; idle workers begin with them at once."""
        batch = self._batch
        batch.waiting.extend(range(len(batch.items), len(batch.items) + len(items)))
        batch.items.extend(items)
        batch.rewards.extend([[np.nan] * len(self._weights) for _ in items])
        batch.faults.extend([""] * len(items))
        batch.reasons.extend([""] * len(items))
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
                self._wait(time.monotonic() + look_seconds)
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
        self.last_faults, self.last_reasons = batch.faults, batch.reasons
        scored = np.array(batch.faults, str) == ""
        self.last_rewards = weighted(self._weights, list(np.where(scored[:, None], rewards, 0.0).T))
        self.last_parts = rewards[:, : len(self.names)]
        every = [row for row, reason in enumerate(batch.reasons) if reason]
        if every:  # rather one whose first reward failed, which alone evaluations go by
            failed = min(every, key=lambda row: np.isfinite(rewards[row, 0]))
            prompt, response = (repr(one_line(text, 80)) for text in batch.items[failed][:2])
            self.last_failure = f"{batch.reasons[failed]} (prompt {prompt}, response {response})"
        return as_float32(self.last_rewards), {kind: batch.faults.count(kind) for kind in FAULTS}

    def _give_up(self) -> None:
        """Leave the batch as it is; what was not done has timed out."""
        batch, unfinished = self._batch, self._busy()
        for row in [*(worker.row for worker in unfinished if worker.row is not None), *batch.waiting]:
            self._fail(
                row,
                "timeouts",
                f"it was not done {self._batch_seconds:g} s after the last response (verify.batch_seconds)",
            )
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
            self._fail(row, "errors", reason)
            self.last_error = reason

    def _fail(self, row: int, kind: str, reason: str) -> None:
        self._batch.faults[row], self._batch.reasons[row] = kind, reason

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.row is not None]

    def _start(self) -> None:
        # -P: the worker finds modules where this process does, not also in the current directory.
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from krl.rewards.worker import main; main()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=self._environment, start_new_session=True,
        )  # fmt: skip
        assert process.stdin
        assert process.stdout
        worker = _Worker(process, os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno()), time.monotonic())
        process.stdin.close()
        process.stdout.close()
        os.set_blocking(worker.requests, False)
        os.set_blocking(worker.replies, False)
        self._workers.append(worker)
        worker.send(self._first_message)

    def _replace(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()
        if worker.ready:
            self._start()
        else:
            self._owed.append(time.monotonic() + RESTART_PAUSE_SECONDS)

    def _await_first(self, reward: str) -> None:
        """Until one worker is ready; the others follow while that one works."""
        while not any(worker.ready for worker in self._workers):
            self._wait(time.monotonic() + TICK_SECONDS)
            for worker in self._workers:
                lines = worker.receive()
                for line in lines or []:
                    if line.startswith("refused "):
                        raise ValueError(line.removeprefix("refused "))
                    self._note_ready(worker, line)
                if lines is None or time.monotonic() > worker.started + START_SECONDS:
                    raise ValueError(
                        f"reward {reward!r}: a worker ended or hung while it imported the function; "
                        f"see its messages, and whether {self._first_message[1]} GiB are enough for the import"
                    )

    def _hand_out(self) -> None:
        """Start what is owed, and give each idle worker an item."""
        batch, now = self._batch, time.monotonic()
        due = [moment for moment in self._owed if moment <= now]
        self._owed = [moment for moment in self._owed if moment > now]
        for _ in due:
            self._start()
        for worker in list(self._workers):
            if batch.waiting and worker.ready and worker.row is None:
                if worker.process.poll() is not None:  # it died while idle, which costs no item
                    self._replace(worker)
                    continue
                worker.row, worker.deadline = batch.waiting.popleft(), now + self._item_seconds
                item = batch.items[worker.row]
                worker.send((worker.row, item if worker.wants_rows else item[:3]))

    def _wait(self, end: float) -> None:
        """Sleep until a worker says something or a deadline may have passed."""
        now = time.monotonic()
        moment = min([end, now + TICK_SECONDS, *(worker.deadline for worker in self._busy())])
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.replies, selectors.EVENT_READ)
                if worker.unsent:
                    selector.register(worker.requests, selectors.EVENT_WRITE)
            selector.select(max(0.0, moment - now))

    def _look_after(self) -> None:
        """Take the answers that came; replace workers that died, are late or have done enough."""
        for worker in list(self._workers):
            worker.flush()
            lines = worker.receive()
            for line in lines or []:
                self._take(worker, line)
            now = time.monotonic()
            if lines is None or worker.process.poll() is not None:
                if worker.row is not None:
                    self._fail(worker.row, "crashes", self._how_it_died(worker))
                self._replace(worker)
            elif worker.row is not None and now > worker.deadline:
                self._fail(
                    worker.row, "timeouts", f"it took longer than {self._item_seconds:g} s (verify.item_seconds)"
                )
                self._replace(worker)
            elif worker.done >= self._items_per_worker or (not worker.ready and now > worker.started + START_SECONDS):
                self._replace(worker)

    def _how_it_died(self, worker: _Worker) -> str:
        """Why a worker's item has no reward, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe may close a moment before it ends
            worker.process.wait(timeout=0.2)
        code = worker.process.returncode
        if code == OUT_OF_MEMORY:
            return f"it ran out of memory, beyond {self._first_message[1]:g} GiB (verify.memory_gb)"
        if code is None:
            return "its process closed the pipe to this one"
        return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"

    def _note_ready(self, worker: _Worker, line: str) -> None:
        worker.ready = worker.ready or line in ("ready", "ready row")
        worker.wants_rows = worker.wants_rows or line == "ready row"

    def _take(self, worker: _Worker, line: str) -> None:
        """One line of a worker; what it should not say is no answer, and the item's deadline sees to it."""
        if worker.row is None:
            self._note_ready(worker, line)
        number, _, said = line.partition(" ")
        if worker.row is None or number != str(worker.row):
            return
        with contextlib.suppress(ValueError):
            numbers, _, reason = said.partition(" error ")
            values = [float(each) for each in numbers.split()]
            if len(values) == len(self._weights) and (reason or np.isfinite(values).all()):
                self._record(worker.row, values, reason)
                worker.row, worker.done = None, worker.done + 1
