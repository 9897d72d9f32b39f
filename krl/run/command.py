"""The program behind train.py and eval.py: a config and a work directory from the command line, and how it ends."""

import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from krl.configs.flags import define_flags, one_line_errors, parse_flags
from krl.run.checkpoint import keep_from_others
from krl.run.clock import keep_compilations
from krl.run.processes import STOPPED, join_processes, stay_together


def run_program(program: Callable[[ConfigDict, str], Any], doc: str | None) -> None:
    """Run a program of --config and --workdir, in this process and the others of its cluster.

    Args:
        program: (config, workdir) -> what it found; None if a signal stopped it, and then the exit code is STOPPED.
        doc: what --help shows of an installed command; a script has its own.

    Raises:
        SystemExit: in the end, with 0 or STOPPED, or with the line that says what failed.
    """
    main_module = sys.modules["__main__"]
    main_module.__doc__ = main_module.__doc__ or doc
    define_flags()
    app.run(functools.partial(_main, program), flags_parser=parse_flags)


def _main(program: Callable[[ConfigDict, str], Any], argv: list[str]) -> None:
    script, given = pathlib.Path(argv[0]).name, flags.FLAGS
    with one_line_errors(script):
        join_processes(given.config.distributed)
    file = pathlib.Path(given.workdir, f"error{jax.process_index() or ''}.txt")
    with stay_together(), one_line_errors(script, file):
        keep_from_others()
        keep_compilations()
        found = program(given.config, given.workdir)
    if found is None:
        raise SystemExit(STOPPED)
