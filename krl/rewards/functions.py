"""From the config's text to reward functions: one, or several with weights; and what of a returned value is a number.

`config.data.reward` is a name or a list: "math*1.0, mine:format*0.1" is the sum of two rewards with these weights. A
function takes (prompt, response, answer); one with a parameter `row` also gets the other fields of the data's row.
"""

import copy
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from krl.base.answers import Answer
from krl.configs.named import name_of
from krl.rewards.verify import find_reward

SOLVED = 1.0  # the reward from which a response counts as solved
Row = Mapping[str, Any]  # the other fields of a row of the data
Item = tuple[str, str, Answer] | tuple[str, str, Answer, Row]  # prompt, response, gold answer or answers, row


class Part(NamedTuple):
    """One of the rewards that a response's reward is the sum of."""

    name: str  # as the config has it
    weight: float
    function: Callable[..., object]  # (prompt, response, answer), and row=... where it takes one
    takes_row: bool


def parse_rewards(text: str) -> dict[str, float]:
    """The names of a list of rewards and their weights, 1 where none is given; in the list's order.

    Raises:
        ValueError: a part without a name or with a weight that is no finite number, or a reward that is named twice.

    >>> parse_rewards("math, mine:format * 0.1")
    {'math': 1.0, 'mine:format': 0.1}
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, star, given = (piece.strip() for piece in part.partition("*"))
        if not name:
            raise ValueError(f"reward {text!r} has a part without a name; write it as math*1.0,mine:format*0.1")
        if name in weights:
            raise ValueError(f"reward {text!r} names {name} twice; give it once, with the sum of the weights")
        try:
            weights[name] = float(given) if star else 1.0
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ValueError(f"reward {text!r}: the weight of {name} is {given!r}; it must be a finite number")
    return weights


def component_names(text: str) -> tuple[str, ...]:
    """The names of the rewards that are logged one by one: those of a list; () where one reward is all there is."""
    weights = parse_rewards(text)
    return () if list(weights.values()) == [1.0] else tuple(weights)


def load_rewards(text: str | Callable[..., object]) -> tuple[Part, ...]:
    """The functions of a reward, or of a list of them.

    Args:
        text: a function, or the text of the config: names in `krl.rewards.verify.REWARDS` or "package.module:function",
            each with "*weight" or without, separated by commas.

    Raises:
        ValueError: as for `parse_rewards` and `find_reward`, or a function that cannot be called with a prompt, a
            response and an answer; in one line.
    """
    if callable(text):
        return (_part(name_of(text), 1.0, text),)
    return tuple(_part(name, weight, find_reward(name)) for name, weight in parse_rewards(text).items())


def _part(name: str, weight: float, function: Callable[..., object]) -> Part:
    """A function as `Part` has it; refuses one whose signature is of another form."""
    if _never_returns_a_number(function):
        raise ValueError(f"reward {name!r} must return a number; an async function or a generator returns none")
    try:
        own = signature = inspect.signature(function, follow_wrapped=False)
        if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in own.parameters.values()):
            signature = inspect.signature(function)  # a wrapper that passes on what it gets, to the function it wraps
    except (TypeError, ValueError):  # some that are written in C have none
        return Part(name, weight, function, takes_row=False)
    kinds = {each.name: each.kind for each in signature.parameters.values()}
    by_place = [each for each, kind in kinds.items() if kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD)]
    takes_row = "row" in by_place[3:] or kinds.get("row") is inspect.Parameter.KEYWORD_ONLY
    error = _misfit(own, signature, **({"row": {}} if takes_row else {}))
    if error and by_place[3:4] == ["row"] and not _misfit(own, signature, {}):
        return Part(name, weight, lambda prompt, response, answer, row: function(prompt, response, answer, row), True)
    if error:
        raise ValueError(
            f"reward {name!r}: its parameters are {one_line(str(signature))}, and {error} when it is called with a "
            "prompt, a response and an answer; write it as (prompt, response, answer) or (prompt, response, answer, "
            "row)"
        )
    return Part(name, weight, function, takes_row)


def _misfit(own: inspect.Signature, signature: inspect.Signature, *more: Row, **row: Row) -> str:
    """Why a prompt, a response, an answer and more cannot be given to both signatures; "" if they can."""
    try:
        signature.bind("", "", "", *more, **row)
        own.bind("", "", "", *more, **row)
    except TypeError as error:
        return str(error)
    return ""


def _never_returns_a_number(function: Callable[..., object]) -> bool:
    """Whether a function, or the call of an object, is async or a generator."""
    while isinstance(function, functools.partial):
        function = function.func
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(is_kind(each) for is_kind in kinds for each in (function, type(function).__call__))


def rewards_and_reason(parts: Sequence[Part], item: Item) -> tuple[list[float], str]:
    """The reward of each part for an item, NaN for those that failed, and one line that says why the sum has no value.

    The line is that of the first part that failed, and "" where the sum is finite.

    Raises:
        MemoryError: a function raised it; what else it left behind is unknown.
    """
    values, reason = [], ""
    for name, _, function, takes_row in parts:
        # A copy, as a worker process has one: what a function does to its row is not for the next to see.
        row: dict[str, Any] = {"row": copy.deepcopy(dict(*item[3:]))} if takes_row else {}
        value = reward_or_error(function, *item[:3], **row)
        if isinstance(value, str):
            reason = reason or (value if len(parts) == 1 else f"{name}: {value}")
            value = math.nan
        values.append(value)
    if not reason and not math.isfinite(weighted([part.weight for part in parts], values)):
        reason = "the sum of its rewards is no finite number"
    return values, reason


def weighted(weights: Sequence[float], values: Sequence[Any]) -> Any:
    """The sum of the values of each reward, numbers or arrays, times its weight."""
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def reward_or_error(
    function: Callable[..., object], prompt: str, response: str, answer: Answer, **row: Any
) -> float | str:
    """The reward of one item, finite; one line that says why if the function raised or returned no such number.

    Raises:
        MemoryError: the function raised it; what else it left behind is unknown.
    """
    try:
        value = function(prompt, response, answer, **row)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        return one_line(f"it raised {type(error).__name__}: {_shown(str, error)}")
    number = as_number(value)
    return one_line(f"it returned {_shown(repr, value)[:60]}, not a finite number") if number is None else number


def as_number(value: Any) -> float | None:
    """A finite number that `float` takes, also in an array of one entry; None for all else, text and masked entries.

    >>> import decimal
    >>> [as_number(value) for value in (True, decimal.Decimal("0.5"), "1.0", None, 1j, float("nan"))]
    [1.0, 0.5, None, None, None, None]
    """
    try:
        # Arrays of NumPy, JAX and PyTorch, whatever their number of axes.
        plain = value.item() if hasattr(value, "item") else value
        is_number = hasattr(type(plain), "__float__") or hasattr(type(plain), "__index__")
        is_number = is_number and not isinstance(plain, str | bytes) and not np.ma.is_masked(value)
        number = float(plain) if is_number else math.nan
    except MemoryError:
        raise
    except Exception:
        return None
    return number if math.isfinite(number) else None


def as_float32(rewards: np.ndarray) -> np.ndarray:
    """The nearest finite float32 of finite float64."""
    most = np.finfo(np.float32).max
    return rewards.clip(-most, most).astype(np.float32)


def _shown(show: Callable[[Any], str], value: Any) -> str:
    """What `str` or `repr` makes of a user's value, which may fail too."""
    try:
        return re.sub(r" at 0x[0-9a-fA-F]+", "", show(value))  # addresses, which would make every reason another one
    except Exception:
        return f"a {type(value).__name__}"


def one_line(text: str, longest: int = 200) -> str:
    """A text that can stand in a line of any log: no line ends, nothing that cannot be printed, at most so long."""
    words = " ".join(text.split())
    kept = "".join(character if character.isprintable() else "?" for character in words[:longest])
    return kept if len(words) <= longest else kept[:-3] + "..."
