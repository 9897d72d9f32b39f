"""One run, one directory: a sign of life that a crash cannot leave behind, also where file systems know no locks."""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

from krl.run.checkpoint import write_json

BEAT_SECONDS = 5.0  # between two signs of life


@contextlib.contextmanager
def hold_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Keep a work directory for this process; the file `running.json` in it says whose it is, and changes while that lives.

    A file whose process is gone is taken over: at once on its own machine, and elsewhere after it has not changed for three
    beats.

    Raises:
        ValueError: another run lives in the directory; the message says where.
    """
    path = workdir / "running.json"
    other = _read(path)
    if other and _lives(other, path):
        raise ValueError(
            f"{workdir} is in use by process {other['process']} on {other['host']}; stop that run or choose another --workdir"
        )
    me = {"host": socket.gethostname(), "place": _place(), "process": os.getpid(), "born": _born(os.getpid())}
    over = threading.Event()

    def live() -> None:
        beat = 0
        while not over.wait(BEAT_SECONDS):
            beat += 1
            with contextlib.suppress(OSError):  # a full disk must not end the thread; the run will tell of it
                write_json(path, me | {"beat": beat})

    write_json(path, me | {"beat": 0})
    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        path.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> dict | None:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if {"host", "place", "process", "born"} <= found.keys() else None


def _lives(other: dict, path: pathlib.Path) -> bool:
    if other["place"] == _place():
        return _born(other["process"]) == other["born"]
    end = time.monotonic() + 3 * BEAT_SECONDS
    while time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 10)
        if _read(path) != other:
            return path.exists()
    return False


def _place() -> str:
    """Where process numbers mean the same: a boot of a machine, and the container."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(process: int) -> str:
    """What tells a process of this place from a later one of the same number; "gone" if it is."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:  # another user's
        pass
    try:
        said = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no Linux: it lives, and more cannot be known
        return "alive"
    return "gone" if said[0] in "ZX" else said[19]
