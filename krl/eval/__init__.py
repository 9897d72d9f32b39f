"""How well a policy does: samples of each task, their statistics, the command; `measure` is a measurement."""

from typing import Any

__all__ = ["measure"]


def __getattr__(name: str) -> Any:
    if name == "measure":  # on first use: training needs the samples and not the command
        from krl.eval import command

        return command.measure
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
