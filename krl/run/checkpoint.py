"""Checkpoints by Orbax: everything a run needs to continue, written whole or not at all."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import jax
from etils import epath, epy

from krl.base.types import Tokenizer
from krl.hf.tokenizer import save_end_ids
from krl.run.processes import any_process, is_first, say

with epy.lazy_imports():  # Orbax takes most of a second, for which help and refusals need not wait
    import orbax.checkpoint as ocp

_ABOUT = "about"  # the item of a checkpoint that is no tree of arrays
_PAUSES = (1.0, 5.0, 25.0)  # seconds before a place that did not answer is asked again
# What is raised for a file that is missing or cannot be understood; all else is about the way to it.
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, EOFError, FileNotFoundError, NotADirectoryError,
    IsADirectoryError,
)  # fmt: skip
# How TensorStore, which reads the arrays, begins its ValueErrors about the way.
_NO_ANSWER = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED)\b"
)


class Checkpoints(contextlib.AbstractContextManager):
    """The numbered checkpoints of one directory; use it as a context so that writes finish."""

    def __init__(self, directory: epath.PathLike, *, keep: int):
        """Open or create a directory, which may be in object storage, that keeps its newest `keep` checkpoints."""
        local = "://" not in str(directory)
        self.directory = epath.Path(directory).absolute() if local else epath.Path(directory)
        # Processes wait for each other by name, and two directories may be written at a time.
        apart = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.directory.name)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True, multiprocessing_options=apart
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except (OSError, ImportError) as error:  # object storage needs packages of its own
            raise ValueError(f"cannot write checkpoints to {directory}: {error}; choose another directory") from None

    def __exit__(self, *_):
        self._finish()
        self._manager.close()

    def _finish(self) -> None:
        """Wait for what is being written."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    def save(self, step: int, trees: dict, about: dict | None = None, *, again: bool = False) -> None:
        """Write pytrees of arrays, and JSON about them, under a step; returns once they are copied from the devices.

        Checkpoints of later steps, which have been undone, are deleted first. One of this step stays as it is, unless
        it is written `again`.

        Raises:
            ValueError: this one or the one before, whose writing ends meanwhile, found no space on the disk.
        """
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        if about:
            arguments[_ABOUT] = ocp.args.JsonSave(about)
        undone = [later for later in self._manager.all_steps() if later > step or (again and later == step)]
        if undone:
            self._finish()
        for later in undone:
            self._manager.delete(later)
        with self._disk_errors():
            if step not in self._manager.all_steps():
                self._manager.save(step, args=ocp.args.Composite(**arguments))

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            if "No space left" not in str(error):
                raise
            raise ValueError(
                f"no space left to write a checkpoint in {self.directory}; those that are there are whole: "
                "free some space and give the same command again"
            ) from None

    def about_newest(self) -> dict:
        """What was saved about the newest checkpoint; {} if nothing was, or there is none."""
        self._finish()
        step = self.latest_step()
        if step is None or not (self.directory / str(step) / _ABOUT).exists():
            return {}
        return self._manager.restore(step, args=ocp.args.Composite(**{_ABOUT: ocp.args.JsonRestore()}))[_ABOUT]

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def restore(self, like: dict, *, move_aside: bool = True) -> tuple[int, dict] | None:
        """The newest checkpoint that every process can read, placed like the given trees, or None if there is none.

        What was saved about it, {} if nothing, is under "about".

        Newer ones that cannot be read are said to be damaged, and moved to the directory's sibling `damaged` unless
        move_aside is False.

        Raises:
            ValueError: no checkpoint can be read, or its arrays are not those of `like`; or what a checkpoint is kept
                in does not answer, and then nothing is moved. The message names the directory.
        """
        self._finish()
        abstract, problems = jax.tree.map(ocp.utils.to_shape_dtype_struct, like), {}
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        for step in sorted(self._manager.all_steps(), reverse=True):
            found, problem = self._read(step, arguments)
            if any_process(not found):
                problems[step] = problem
                continue
            for damaged, problem in problems.items():
                say(f"krl: checkpoint {damaged} cannot be read ({problem}); going on from the one before it, {step}")
            if problems and move_aside:
                self._move_aside(list(problems))
            return step, found
        if problems:
            step = max(problems)
            raise ValueError(
                f"cannot read checkpoint {self.directory / str(step)}: {problems[step]}; remove it or take another "
                "--workdir"
            )
        return None

    def _read(self, step: int, arguments: dict) -> tuple[dict, str]:
        """(what a checkpoint holds, "about" too; why it is damaged): {} if it is, here or for another process.

        A place that does not answer says nothing of the checkpoint: it is asked again, by all processes.
        """
        for pause in (*_PAUSES, None):
            problem, found, unreachable = "another process could not", {}, False
            try:
                told = {_ABOUT: ocp.args.JsonRestore()} if (self.directory / str(step) / _ABOUT).exists() else {}
                restored = self._manager.restore(step, args=ocp.args.Composite(**arguments, **told))
                found = {name: restored[name] for name in (*arguments, *told)}
            except Exception as error:  # Orbax raises a plain one for damaged arrays
                cause = _first_cause(error)
                problem, unreachable = " ".join(str(cause).strip().splitlines()[:1]), not _is_damage(cause)
            if not any_process(unreachable):
                return ({_ABOUT: {}} | found if found else {}), problem
            if pause is not None:
                say(f"krl: checkpoint {step} does not answer ({problem}); asking again in {pause:g} s")
                time.sleep(pause)
        raise ValueError(
            f"cannot reach checkpoint {self.directory / str(step)}: {problem}; it was left as it is: give the same "
            "command again when it can be read, or remove it to go on from the one before"
        )

    def _move_aside(self, steps: Sequence[int]) -> None:
        if is_first():
            aside = self.directory.parent / "damaged"
            aside.mkdir(exist_ok=True)
            for step in steps:
                (self.directory / str(step)).rename(aside / f"{step}_{time.time_ns()}")
        any_process(False)  # all wait until they are gone
        self._manager.reload()


def _first_cause(error: BaseException) -> BaseException:
    """The error that others were raised for."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return _first_cause(cause) if cause else error


def _is_damage(error: BaseException) -> bool:
    """Whether an error is about what a checkpoint's files hold, and not about the way to them."""
    return isinstance(error, _DAMAGE) and not _NO_ANSWER.search(str(error))


def keep_from_others() -> None:
    """Let nobody but this user and, where the umask says so, the group change what this process writes from now on."""
    os.umask(os.umask(0o077) | 0o002)


def make_workdir(workdir: pathlib.Path) -> None:
    """Make a directory if it is missing, and try whether it can be written.

    Raises:
        ValueError: it cannot; the message says why.
    """
    probe = workdir / ".writable"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another start may look too
    except OSError as error:
        reason = "it is a file" if workdir.is_file() else error
        raise ValueError(f"cannot write the work directory {workdir}: {reason}; choose another --workdir") from None


def open_workdir(workdir: pathlib.Path, config: dict, free: Sequence[str]) -> None:
    """Make a work directory, or check that the run in it has this config.

    Args:
        workdir: created if missing.
        config: flat dictionary of every config key, JSON values.
        free: keys that may change when a run continues.

    Raises:
        ValueError: the directory cannot be written, or belongs to a run with another config.
    """
    make_workdir(workdir)
    if (workdir / "config.json").exists():
        check_workdir(workdir, config, free)


def claim_workdir(workdir: pathlib.Path, config: dict, policy_json: str, tokenizer: Tokenizer) -> None:
    """Write config.json, which makes a directory a run's own, after the run's folder `policy`.

    Args:
        workdir: from `open_workdir`.
        config: flat dictionary of every config key, JSON values.
        policy_json: the policy's own config.json, see `krl.hf.config.config_json`.
        tokenizer: is copied; its end tokens are written beside it, whichever file named them.
    """
    if (workdir / "config.json").exists():
        return
    (workdir / "policy").mkdir(exist_ok=True)
    (workdir / "policy" / "config.json").write_text(policy_json)
    for file in tokenizer.files:
        shutil.copy(file, workdir / "policy" / ("tokenizer.model" if file.suffix == ".model" else file.name))
    save_end_ids(workdir / "policy", tokenizer.eos_ids)
    write_json(workdir / "config.json", dict(sorted(config.items())))


def write_json(path: pathlib.Path, value: dict) -> None:
    """Write a value as JSON; the file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def check_workdir(workdir: pathlib.Path, config: dict, free: Sequence[str]) -> None:
    """Check that a work directory belongs to a run with this config.

    Args:
        workdir: of a run.
        config: flat dictionary of every config key, JSON values.
        free: keys that may differ.

    Raises:
        ValueError: there is no run, or its config differs; the message names the first key that does.
    """
    file = workdir / "config.json"
    try:
        earlier = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{workdir} holds no run; choose another --workdir") from None
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{workdir} holds no run that can be read ({error}); choose another --workdir") from None
    config = json.loads(json.dumps(config))
    bound, bound_earlier = config.keys() - set(free), earlier.keys() - set(free)
    if bound != bound_earlier:
        key = min(bound ^ bound_earlier)
        raise ValueError(f"{workdir} is from a version with other keys (config.{key}); choose another --workdir")
    for key in sorted(bound):
        if config[key] != earlier[key]:
            raise ValueError(
                f"{workdir} belongs to a run with config.{key}={earlier[key]!r}, not {config[key]!r}; "
                "give that value or choose another --workdir"
            )


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM inside sets; a second one ends the process at once.

    Only the main thread can handle signals, so elsewhere nothing sets the event. Earlier handlers come back at the end.
    """
    stop = threading.Event()

    def request(number, _frame):
        stop.set()
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)

    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None is a handler that Python did not install
