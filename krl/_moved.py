"""Old names of modules and programs, found for one version and warned about."""

import importlib
import importlib.abc
import importlib.machinery
import runpy
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

MODULES = {
    **{f"krl.{name}": f"krl.base.{name}" for name in ("types", "masked", "sharding")},
    **{f"krl.tasks.{name}": f"krl.rewards.{name}" for name in ("verify", "notation", "units", "algebra")},
    **{f"krl.tasks.{name}": f"krl.rewards.{name}" for name in ("pool", "worker")},
    "krl.tasks.rewards": "krl.rewards.functions",
    "krl.tasks.extract": "krl.base.answers",
    "krl.policy.hf": "krl.hf.weights",
    "krl.policy.hf_config": "krl.hf.config",
    "krl.policy.tokenizer": "krl.hf.tokenizer",
    "krl.run.plan": "krl.plan.command",
    "krl.run.report": "krl.report.command",
}  # fmt: skip
NAMES = {"krl.run.metrics.read_rows": "krl.run.log", "krl.run.metrics.keep_compilations": "krl.run.clock"}
PROGRAMS = {"krl.policy.hf": "krl.hf", "krl.run.plan": "krl.plan", "krl.run.report": "krl.report"}  # of `python -m`


class Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds what MODULES names: an import of an old name gives the module itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MODULES else None

    def exec_module(self, module: types.ModuleType) -> None:
        old, new = module.__name__, MODULES[module.__name__]
        warnings.warn(f"{old} is {new} now; the old name goes with the next version", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)

    def get_source(self, fullname: str) -> str:
        """What `python -m` of an old name runs."""
        return f"from krl import _moved\n_moved.run({fullname!r})\n"


def run(old: str) -> None:
    """Run a program for its old name, and say so."""
    new = PROGRAMS.get(old, MODULES[old])
    print(f"{old} is {new} now; the old name goes with the next version", file=sys.stderr)
    runpy.run_module(new, run_name="__main__", alter_sys=True)


def attribute(package: str, name: str) -> Any:
    """What stood in a package or module under a name.

    Raises:
        AttributeError: nothing did.
    """
    old = f"{package}.{name}"
    if old in MODULES:
        return importlib.import_module(old)
    if old in NAMES:
        told = f"{old} is in {NAMES[old]} now; the old name goes with the next version"
        warnings.warn(told, DeprecationWarning, stacklevel=3)
        return getattr(importlib.import_module(NAMES[old]), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


sys.meta_path.insert(0, Finder())
