"""One run, one directory: a sign of life that a crash cannot leave behind, also where file systems know no locks.

A lock is a directory with one file, whose name says which process holds it and whose content is its heartbeat. Both
ways to get it are a single rename that the file system makes for one process alone: a directory with one's own file
takes the place of nothing (of a directory with a file in it, it cannot), or one's own name takes the place of the name
of a process that is gone, which can be renamed only once.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from krl.run.checkpoint import make_workdir
from krl.run.processes import any_process, is_first, say

BEAT_SECONDS = 5.0  # between two signs of life


@contextlib.contextmanager
def hold_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Keep a work directory, made if missing, for this process: `running/` in it says whose it is.

    A lock whose process is gone is taken over: at once on its own machine, and elsewhere after it has not changed for
    three beats. A process that lost its directory that way, since it was halted, ends when it notices.

    Raises:
        ValueError: another run lives in the directory, of which nothing was changed then; or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        holder = _try_to_hold(workdir / "running", held, lambda: make_workdir(workdir))
        if holder:
            raise ValueError(f"{workdir} is in use by {holder}; stop that run or choose another --workdir")
        yield


@contextlib.contextmanager
def wait_for(place: pathlib.Path, what: str, should_stop: Callable[[], bool]) -> Iterator[bool]:
    """Keep something that several runs share for this one, once no other run does; all processes of a run call it.

    Args:
        place: of the lock, a directory that nothing else is in; its parent exists.
        what: is kept, in words.
        should_stop: whether to wait no longer, asked again and again; the same in every process.

    Yields:
        Whether it is this run's now; False only if it should stop.
    """
    with contextlib.ExitStack() as held:
        told = False
        while True:
            holder = _try_to_hold(place, held) if is_first() else ""
            if not any_process(bool(holder)):
                break
            if not told:
                say(f"krl: waiting for {holder}, which has {what}")
            told = True
            if should_stop():
                yield False
                return
            time.sleep(BEAT_SECONDS / 5)
        yield True


def _try_to_hold(place: pathlib.Path, held: contextlib.ExitStack, prepare: Callable[[], None] = lambda: None) -> str:
    """Hold the lock until the end of a context, unless a process that lives does: then that process, in words."""
    # Process, its birth, where that number means it, a number of this lock, and the host.
    me = "_".join([str(os.getpid()), _born(os.getpid()), _place(), uuid.uuid4().hex[:8], socket.gethostname()])
    fresh = place.with_name(f"{place.name}.{me}")
    held.callback(shutil.rmtree, fresh, ignore_errors=True)
    while True:
        for other in _names(place):
            if _lives(place / other):
                return f"process {other.partition('_')[0]} on {other.split('_', 4)[-1]}"
            with contextlib.suppress(FileNotFoundError):  # a third process was faster
                (place / other).rename(place / me)
                held.enter_context(_beats(place / me))
                return ""
        if not fresh.exists():
            prepare()
            fresh.mkdir()
            (fresh / me).write_text("0")
        try:
            fresh.rename(place)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            time.sleep(0.01)  # whose it is will be seen in a moment
        else:
            held.enter_context(_beats(place / me))
            return ""


@contextlib.contextmanager
def _beats(mine: pathlib.Path) -> Iterator[None]:
    """Show that this process lives, and give the lock back at the end."""
    over = threading.Event()

    def live() -> None:
        beat = 0
        while not over.wait(BEAT_SECONDS):
            beat += 1
            try:
                with mine.open("r+") as file:  # which makes none: another process may have taken it over
                    file.write(str(beat))
            except FileNotFoundError:
                if not over.is_set():
                    told = f"krl: {mine} is gone: this process was halted and another has taken over; it ends"
                    print(told, file=sys.stderr, flush=True)
                    os._exit(1)
            except OSError:  # a full disk must not end the thread; the run will tell of it
                continue

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        mine.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process may hold it already
            mine.parent.rmdir()


def _names(place: pathlib.Path) -> list[str]:
    """Of the processes that hold a lock: one, or none."""
    try:
        return os.listdir(place)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _lives(file: pathlib.Path) -> bool:
    """Whether the process that a lock's file is named after lives, and the file is still there."""
    process, born, place = (*file.name.split("_"), "", "")[:3]
    if place == _place():
        return _born(int(process)) == born
    before, end = _read(file), time.monotonic() + 3 * BEAT_SECONDS
    while before is not None and time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 10)
        now = _read(file)
        if now != before:
            return now is not None
    return False


def _read(file: pathlib.Path) -> str | None:
    try:
        return file.read_text()
    except FileNotFoundError:
        return None


def _place() -> str:
    """Where process numbers mean the same: a digest of a machine's boot, and of the container."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        place = socket.gethostname()
    return hashlib.blake2b(place.encode(), digest_size=6).hexdigest()


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
