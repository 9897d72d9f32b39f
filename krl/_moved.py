"""Old names of modules and programs, for one version."""

import importlib
import runpy
import sys
import warnings
from collections.abc import Callable
from typing import Any


def attributes(old: str, new: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that moved; whoever imports its old name is warned."""
    warnings.warn(f"{old} is {new} now; the old name goes with the next version", DeprecationWarning, stacklevel=3)

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        return getattr(importlib.import_module(new), name)

    return find


def program(old: str, new: str) -> None:
    """Run `python -m new` for `python -m old`, and say so."""
    print(f"{old} is {new} now; the old name goes with the next version", file=sys.stderr)
    runpy.run_module(new, run_name="__main__")
