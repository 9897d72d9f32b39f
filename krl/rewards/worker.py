"""The program of a reward worker: `krl.rewards.pool` starts it and talks to it through a socket.

The parent writes pickles: first (reward, memory_gb, parent), then (number, item) for each item, with the item's row
only where a reward takes it. The worker writes lines: "ready", "ready row" (rows are wanted) or "refused why", then for
each item "number value" (with several rewards as many values), and " error why" after it where one of them is nan or
their sum is no number. Nothing the worker says is unpickled. The user's function sees an empty standard input, and what
it prints goes to standard error.
"""

import ctypes
import errno
import importlib
import os
import pickle
import signal
import sys
from typing import BinaryIO

from krl.rewards.functions import load_rewards, reward_or_error, rewards_and_reason

__all__ = ["OUT_OF_MEMORY", "main", "reward_or_error"]

PR_SET_PDEATHSIG = 1  # of prctl(2)
OUT_OF_MEMORY = errno.ENOMEM  # exit code of a worker whose function ran into its limit


def main() -> None:
    """Answer items until the parent closes the socket; never returns."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    code = 1
    try:
        _serve(requests, replies)
        code = 0
    except MemoryError:
        code = OUT_OF_MEMORY
    finally:
        # Without the interpreter's farewell, which would wait for threads that a reward function left behind.
        os._exit(code)


def _serve(requests: BinaryIO, replies: int) -> None:
    text, memory_gb, parent = pickle.load(requests)
    _die_with(parent)
    _limit_memory(memory_gb)
    importlib.import_module("krl.rewards.algebra")  # slow, so before the first item's time begins
    try:
        parts = load_rewards(text)
    except ValueError as error:
        os.write(replies, f"refused {error}\n".encode("utf-8", "replace"))
        return
    os.write(replies, b"ready row\n" if any(part.takes_row for part in parts) else b"ready\n")
    while True:
        try:
            number, item = pickle.load(requests)
        except EOFError:
            return
        values, reason = rewards_and_reason(parts, item)
        said = " ".join(map(repr, values)) + (f" error {reason}" if reason else "")
        os.write(replies, f"{number} {said}\n".encode("utf-8", "replace"))


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends, however it ends; elsewhere the closed socket must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)


def _limit_memory(gigabytes: float) -> None:
    try:
        import resource  # POSIX only

        # Of address space, which is a little more than the memory in use; and no core files of those that hit it.
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # macOS refuses the first
        return
