"""Checkpoints out of training runs, and what can be said of one before a run.

python -m krl.hf export WORKDIR OUT [--dtype bfloat16] [--adapters]
python -m krl.hf check DIR
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from krl.configs.flags import one_line_errors
from krl.hf.config import STORED_TYPES
from krl.hf.summary import describe
from krl.hf.weights import export


def _first(function: Callable[..., Any]) -> str:
    """The first line of its docstring."""
    return (function.__doc__ or "").splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m krl.hf", description="Hugging Face checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    commands.add_parser("check", help=_first(describe)).add_argument("path", metavar="DIR", help="with a config.json")
    command = commands.add_parser("export", help=_first(export))
    command.add_argument("workdir", metavar="WORKDIR", help="of a train.py run")
    command.add_argument("out", metavar="OUT", help="a new directory")
    command.add_argument(
        "--dtype", choices=list(STORED_TYPES.values()), help="of the tensors; that of the start if absent"
    )
    command.add_argument(
        "--adapters", action="store_true", help="the adapters alone, for peft; else they are merged into the policy"
    )
    given = parser.parse_args(arguments)
    with one_line_errors("krl.hf"):
        if given.command == "check":
            print(describe(given.path))
            return
        step = export(given.workdir, given.out, dtype=given.dtype, adapters=given.adapters)
    print(f"wrote step {step} of {given.workdir} to {given.out}")


if __name__ == "__main__":
    main()
