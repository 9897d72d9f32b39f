"""The newest checkpoint of a training run as a directory that transformers and vLLM open.

python -m krl.hf export WORKDIR OUT [--dtype bfloat16] [--adapters]
"""

import argparse

from krl.configs.flags import one_line_errors
from krl.hf.config import STORED_TYPES
from krl.hf.weights import export


def main() -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m krl.hf", description="Hugging Face checkpoints.")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser("export", help=export.__doc__)
    command.add_argument("workdir", metavar="WORKDIR", help="of a train.py run")
    command.add_argument("out", metavar="OUT", help="a new directory")
    command.add_argument(
        "--dtype", choices=list(STORED_TYPES.values()), help="of the tensors; that of the start if absent"
    )
    command.add_argument(
        "--adapters", action="store_true", help="the adapters alone, for peft; else they are merged into the policy"
    )
    given = parser.parse_args()
    with one_line_errors("krl.hf"):
        step = export(given.workdir, given.out, dtype=given.dtype, adapters=given.adapters)
    print(f"wrote step {step} of {given.workdir} to {given.out}")


if __name__ == "__main__":
    main()
