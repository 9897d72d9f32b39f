"""What a text of the config names: one of krl's own, or a user's as "package.module:name"."""

import importlib
from collections.abc import Mapping
from typing import Any


def find(name: str, known: Mapping[str, Any], what: str) -> Any:
    """The value of a name.

    Args:
        name: a key of `known`, or "package.module:name" of anything that this process can import.
        known: krl's own.
        what: the words before the name in a message, such as "reward ".

    Raises:
        ValueError: the module cannot be imported, has no such name, or the text is of neither kind; in one line.
    """
    if name in known:
        return known[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{what}{name!r} must be one of {sorted(known)} or look like package.module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ValueError(
            f"{what}{name!r}: cannot import {module_name}: {type(error).__name__}: {reason}; "
            "put the module next to train.py or install it"
        ) from None
    found = getattr(module, attribute, None)
    if found is None:
        raise ValueError(f"{what}{name!r}: {module_name} has no {attribute}; check the name after the colon")
    return found


def name_of(value: Any) -> str:
    """What the config of a run says of a value that was given in Python: where it is defined, if that can be said.

    >>> name_of(find)
    'krl.configs.named:find'
    """
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}:{name.rpartition('.')[2]}" if name else f"a {type(value).__name__} given in Python"
