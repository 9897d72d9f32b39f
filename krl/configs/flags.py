"""The command line that train.py and eval.py share: --config FILE, --config.key=value and --workdir DIR."""

import contextlib
import dis
import errno
import io
import itertools
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Iterator

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from krl.configs.check import KINDS, check_keys, did_you_mean, no_such_key
from krl.configs.default import KEYS

HERE = pathlib.Path(__file__).parent
_HELP = "the configuration: a .py file, or the name of one of krl's own"


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define --workdir; a script does it when it is run, so that importing it needs no flags."""
    flags.DEFINE_string("workdir", "runs/default", "where the run keeps everything it writes", flag_values=values)


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse the command line; for absl.app.run(main, flags_parser=parse_flags).

    Args:
        argv: the script and what follows it.
        values: where the flags go; `values.config` is the configuration with every --config.key=value in it.

    Raises:
        SystemExit: an unknown key or flag, a value of the wrong type, or a config file that fails; one line.
    """
    try:
        name, rest = _take_config(values.read_flags_from_files(argv, force_gnu=False))
        if name is None:
            flags.DEFINE_string("config", None, _HELP, flag_values=values)
            values(rest)  # which may ask for help
            raise ValueError(f"--config is missing; give a file or one of krl's own: {', '.join(own_configs())}")
        config = load_config(name)
        _check_overrides(rest)
        config_flags.DEFINE_config_dict("config", config, _HELP, flag_values=values, sys_argv=rest)
        left = values(rest)
        if len(left) > 1:
            raise ValueError(f"{left[1]!r} is not a flag; keys are changed with --config.key=value")
        return left
    except flags.UnrecognizedFlagError as error:
        line = _no_such_flag(error.flagname, values)
    except flags.IllegalFlagValueError as error:
        line = _wrong_value(error, values)
    except (flags.Error, ValueError) as error:
        line = " ".join(str(error).removeprefix("ERROR:: ").split())
    raise SystemExit(f"{pathlib.Path(argv[0]).name}: {line}")


def own_configs() -> list[str]:
    """The names of the configs that krl has: krl/configs/NAME.py."""
    return sorted(file.stem for file in HERE.glob("*.py") if "\ndef get_config(" in file.read_text())


def load_config(name: str) -> ConfigDict:
    """What get_config() of a file returns.

    Args:
        name: a file; where there is none, NAME or configs/NAME.py is one of krl's own.

    Raises:
        ValueError: there is no such file, it fails, or it has not the keys of krl/configs/default.py.
    """
    file = pathlib.Path(name)
    inside = str(file.parent) in (".", "configs", "krl/configs") and file.suffix in ("", ".py")
    if not file.is_file() and inside and file.stem in own_configs():
        file = HERE / f"{file.stem}.py"
    if file.is_dir():
        raise ValueError(f"the config {name} is a directory; name a .py file in it")
    if not file.exists():
        raise ValueError(f"there is no config file {name}; krl has {', '.join(own_configs())}")
    try:
        found = runpy.run_path(str(file), run_name="config_file")
        config = found["get_config"]() if "get_config" in found else None
    except (Exception, SystemExit) as error:  # a config file may raise anything
        raise ValueError(f"the config file {name} {_why_it_failed(error, str(file))}") from None
    if not isinstance(config, ConfigDict):
        raise ValueError(f"the config file {name} must have a function get_config() that returns a ConfigDict")
    try:
        check_keys(config)
    except ValueError as error:
        raise ValueError(f"the config file {name}: {error}") from None
    return config


def _why_it_failed(error: BaseException, file: str) -> str:
    if isinstance(error, SyntaxError):
        where = "" if error.filename in (file, None) else f"{error.filename}, "
        return f"is not Python: {where}line {error.lineno or 1}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" in line {lines[-1]}" if lines else ""
    return f"failed{where}: {type(error).__name__}: {' '.join(str(error).split())}"


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, None without one, and the other arguments."""
    for flag, after in itertools.pairwise([*argv, "--"]):
        example = {"config": "arithmetic", "config=": "arithmetic", "workdir": "runs/first"}.get(flag.lstrip("-"))
        if example and flag.startswith("-") and (flag.endswith("=") or after.startswith("--")):
            raise ValueError(f"{flag.removesuffix('=')} needs a value, such as {flag.removesuffix('=')}={example}")
    found = flags.FlagValues()  # type: ignore[no-untyped-call]
    found.set_gnu_getopt()
    flags.DEFINE_string("config", None, _HELP, flag_values=found)
    rest = found(argv, known_only=True)
    return found.config, rest


def _check_overrides(argv: list[str]) -> None:
    """Refuse a --config.key that is none, that is a section, or that lacks its value."""
    for flag, after in itertools.pairwise([*argv, "--"]):
        found = re.match(r"--?(?:no)?config\.([^=]*)(=?)", flag)
        if not found:
            continue
        key, given = found.groups()
        inside = [name for name in sorted(KEYS) if name.startswith(f"{key}.")]
        if inside:
            raise ValueError(f"config.{key} is a section; change its keys, such as --config.{inside[0]}=value")
        if key not in KEYS:
            raise ValueError(no_such_key(key))
        if not given and type(KEYS[key].default) is not bool and after.startswith("--"):
            raise ValueError(f"config.{key} needs a value: --config.{key}=value")


def _no_such_flag(name: str, values: flags.FlagValues) -> str:
    known = [*(flag for flag in values if "." not in flag), *(f"config.{key}" for key in KEYS)]
    return f"there is no flag --{name}{did_you_mean(name, known, '--')}"


def _wrong_value(error: flags.IllegalFlagValueError, values: flags.FlagValues) -> str:
    """In words of one's own, what absl says as `flag --NAME=VALUE: REASON`."""
    found = re.match(r"flag --([\w.]+)=", str(error))
    if not found:
        return " ".join(str(error).split())
    name, value = found[1], str(error)[found.end() :].removesuffix(f": {error.__context__}")
    now = KEYS[name.removeprefix("config.")].default if "." in name else values[name].default
    must = KINDS.get(type(now), "a value of another kind")
    return f"{name if '.' in name else f'--{name}'}={value!r} must be {must}"


@contextlib.contextmanager
def one_line_errors(script: str, file: pathlib.Path | None = None) -> Iterator[None]:
    """End a program that fails in one line; where a user cannot mend it, the traceback comes before and goes to a file.

    With --verbosity=1 it comes before every line. Otherwise only warnings are logged: Orbax tells every write. What the
    terminal's encoding lacks, of what a model wrote, is printed as "?".

    Args:
        script: begins the line.
        file: for the traceback; its directory is not made.

    Raises:
        SystemExit: with the line.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    verbose = logging.get_verbosity() >= logging.DEBUG
    logging.set_verbosity(logging.DEBUG if verbose else logging.WARNING)
    try:
        yield
    except Exception as error:
        if _is_for_the_user(error):
            logging.debug("%s failed", script, exc_info=True)
            raise SystemExit(f"{script}: {error}") from None
        told, places = "".join(traceback.format_exception(error)), ["above"]
        print(told, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            if file:
                file.write_text(told)
                places.append(f"in {file}")
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise SystemExit(f"{script}: {line} (the traceback is {' and '.join(places)})") from None


def _is_for_the_user(error: Exception) -> bool:
    """Whether an error is something to mend outside of the code: the message then says how.

    That is what a `raise` in krl says with a ValueError or a FloatingPointError. What JAX, NumPy, Python itself or a
    function of the user's raises has the same types and says nothing of what to do; so the instruction that raised it
    decides, and callers of the library go on catching plain ValueErrors. (The frame alone would not do: functions
    written in C have none, and JAX takes its own out.) Of the system's errors it is a full or forbidden place.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
    last = error.__traceback__
    while last and last.tb_next:
        last = last.tb_next
    if last is None or not isinstance(error, ValueError | FloatingPointError):
        return False
    code = last.tb_frame.f_code
    ours = pathlib.Path(code.co_filename).is_relative_to(HERE.parent)
    return ours and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
