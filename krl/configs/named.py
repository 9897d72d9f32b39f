"""What a text of the config names: one of krl's own, or a user's as "package.module:name"."""

import importlib
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

IN_PYTHON = " given in Python"  # the end of what a config says of a value that has no name to be found by


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
    if name.endswith(IN_PYTHON):
        raise ValueError(
            f"{what}{name!r}: it has no name to be found by; give it to krl.train again, by rule=, prior= or reward="
        )
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


def name_of(value: Any, known: Mapping[str, Any] = MappingProxyType({})) -> str:
    """What the config of a run says of a value that was given in Python: a name that `find` finds it by, if it has one.

    >>> name_of(find)
    'krl.configs.named:find'
    >>> name_of(lambda: 0)
    '<lambda> given in Python'
    """
    for name, one in known.items():
        if one is value:
            return name
    name = getattr(value, "__qualname__", type(value).__name__)
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if module is not None and getattr(module, name, None) is value:
        return f"{module.__name__}:{name}"
    return name.rpartition(".")[2] + IN_PYTHON
