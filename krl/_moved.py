"""Old names of modules and programs, for one version."""

import importlib
import runpy
import sys
import warnings


def module(old: str, new: str) -> None:
    """Put a module in the place of one that only calls this, and warn whoever imports the old name."""
    warnings.warn(f"{old} is {new} now; the old name goes with the next version", DeprecationWarning, stacklevel=3)
    sys.modules[old] = importlib.import_module(new)


def program(old: str, new: str) -> None:
    """Run `python -m new` for `python -m old`, and say so."""
    print(f"{old} is {new} now; the old name goes with the next version", file=sys.stderr)
    runpy.run_module(new, run_name="__main__")
