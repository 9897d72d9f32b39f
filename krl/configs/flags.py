"""The command line that train.py and eval.py share: --config FILE, --config.key=value and --workdir DIR."""

import contextlib
from collections.abc import Iterator

from absl import flags, logging
from ml_collections import config_flags


def define_flags() -> None:
    """Define --config and --workdir; a script does it when it is run, so that importing it needs no flags."""
    config_flags.DEFINE_config_file("config", None, "the configuration file", lock_config=True)
    flags.DEFINE_string("workdir", "runs/default", "where the run keeps everything it writes")


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; for absl.app.run(main, flags_parser=parse_flags).

    Raises:
        SystemExit: an unknown key or flag, a value of the wrong type, or a config file that fails.
    """
    try:
        left = flags.FLAGS(argv)
        config = flags.FLAGS["config"].value
        if config is None:
            raise ValueError("--config is missing; try --config configs/arithmetic.py")
        dict(config)
    except Exception as error:  # flags and config files raise many types; each ends in one line
        raise SystemExit(f"{argv[0]}: {_one_line(error)}") from None
    return left


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).replace("\\'", "'").replace("\\n", " ").replace('"', "").replace("''", "'").split())
    return f"unknown config key {text}" if isinstance(error, AttributeError) else text


@contextlib.contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """End what a user can mend in one line: a ValueError, a FloatingPointError, or an OSError such as a full disk.

    With --verbosity=1 the traceback comes before it. Otherwise only warnings are logged: Orbax tells every write.

    Raises:
        SystemExit: with the script's name and the error's message.
    """
    verbose = logging.get_verbosity() >= logging.DEBUG
    logging.set_verbosity(logging.DEBUG if verbose else logging.WARNING)
    try:
        yield
    except (ValueError, FloatingPointError, OSError) as error:
        logging.debug("%s failed", script, exc_info=True)
        raise SystemExit(f"{script}: {error}") from None
