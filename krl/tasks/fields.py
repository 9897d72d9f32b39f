"""The fields of a row to what a task is made of: texts, answers and chats. Nothing is left out without a word."""

import datetime
import decimal
from collections.abc import Collection, Sequence
from typing import Any

from krl.base.answers import Answer
from krl.tasks.files import Literal, spell_numbers

Chat = tuple[dict[str, str], ...]  # {"role", "content"} messages, in their order
_ROLES = ("system", "developer", "user", "assistant")


def find_field(row: dict[str, Any], name: str, at: str) -> object:
    """A field of a row; "reward_model.ground_truth" is one inside another, and "prompt.0.content" one in a list.

    A field whose own name has the dot wins. What lies inside a null is null.

    Args:
        row: as read.
        name: of the field.
        at: the words that name the row in messages.

    Raises:
        ValueError: there is none; names those that the row has.

    >>> find_field({"a": {"b": 1}, "a.c": 2}, "a.b", "row 0"), find_field({"a": {"b": 1}, "a.c": 2}, "a.c", "row 0")
    (1, 2)
    """
    try:
        return _inside(row, name)
    except KeyError:
        raise ValueError(f"{at} has no field {name!r}; its fields are {field_names(row)}") from None


def field_names(row: dict[str, Any]) -> list[str]:
    """The names that `find_field` takes for a row, lists left whole."""
    names: list[str] = []
    for name, value in row.items():
        if isinstance(value, dict) and value:
            names += [f"{name}.{inner}" for inner in field_names(value)]
        else:
            names.append(str(name))
    return names


def further_texts(rows: Sequence[dict[str, Any]], names: Sequence[str], source: str) -> dict[str, tuple[str, ...]]:
    """Further fields of all rows as texts, "" where a row has none.

    Raises:
        ValueError: no row has a field; names it, and those that there are.
    """
    texts: dict[str, tuple[str, ...]] = {}
    for name in names:
        values, missing = [], 0
        for row in rows:
            try:
                value = _inside(row, name)
            except KeyError:
                value, missing = None, missing + 1
            values.append("" if value is None else _as_written(value))
        if missing == len(rows):
            columns = dict.fromkeys(inner for row in rows for inner in field_names(row))
            raise ValueError(f"{source} has no field {name!r}; its fields are {list(columns)}")
        texts[name] = tuple(values)
    return texts


def _as_written(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # whole numbers of more than 4300 digits
        return str(spell_numbers(value))


def _inside(value: object, name: str) -> object:
    if value is None:
        return None
    if isinstance(value, dict):
        if name in value:
            return value[name]
        for place in (i for i, letter in enumerate(name) if letter == "."):
            if name[:place] in value:
                return _inside(value[name[:place]], name[place + 1 :])
    if isinstance(value, list):
        first, _, rest = name.partition(".")
        if first.isdecimal() and int(first) < len(value):
            return _inside(value[int(first)], rest) if rest else value[int(first)]
    raise KeyError(name)


def plain_row(row: dict[str, Any], at: str, without: Collection[str] = ()) -> dict[str, object]:
    """A row as reward functions get it, with Python's own floats and without some fields.

    Raises:
        ValueError: its lists and objects are nested hundreds deep.
    """
    try:
        return {name: _plain_value(value) for name, value in row.items() if name not in without}
    except RecursionError:
        raise ValueError(f"{at}: its lists and objects are nested too deeply; remove the row or the field") from None


def _plain_value(value: object) -> object:
    if isinstance(value, str):
        return value
    if isinstance(value, Literal):
        return float(value)
    if isinstance(value, dict):
        return {name: _plain_value(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain_value(inner) for inner in value]
    return value


def plain_text(value: object, field: str, at: str) -> str:
    """A field's text; a number, a truth value or a date is one too.

    Args:
        value: of the field.
        field, at: the field and the row, for messages.

    Raises:
        ValueError: there is no text, or it is of another kind.
    """
    text = "" if value is None else _as_text(value)
    if text is None:
        raise ValueError(f"{at}: {field!r} must be a text, got {type(value).__name__}")
    if not text.strip():
        raise ValueError(f"{at} has no {field!r}; remove the row or fill the field")
    return _checked(text, field, at)


def plain_answer(value: object, field: str, at: str) -> Answer:
    """An answer as text: white space at its ends dropped, whole floats as integers, lists as their distinct texts.

    Numbers keep the digits that stand in the file. True and False are "True" and "False"; dates are as Python
    writes them.

    Args:
        value: of the field: a text, a number, a truth value, a date, or a list of these.
        field, at: the field and the row, for messages.

    Raises:
        ValueError: there is no answer, an answer of a list is empty, or it is of another kind.

    >>> plain_answer(142.0, "answer", "row 0"), plain_answer(["0.01\\n", "0.02\\n", "0.01"], "answer", "row 0")
    ('142', ('0.01', '0.02'))
    """
    several: list[str] = []
    items = value if isinstance(value, list | tuple) else [value]
    empty = False
    for item in items:
        text = "" if item is None else _as_text(item)
        if text is None:
            raise ValueError(f"{at}: {field!r} must be a text, a number or a list of these, got {type(item).__name__}")
        text = _checked(text.strip(), field, at)
        empty = empty or not text
        if text and text not in several:
            several.append(text)
    if not several:
        raise ValueError(f"{at} has no {field!r}; remove the row or fill the field")
    if empty:
        raise ValueError(f"{at}: one of the answers in {field!r} is empty; remove it from the list")
    return several[0] if len(several) == 1 else tuple(several)


def _as_text(value: object) -> str | None:
    """A single value as text, "" for a number that is none, None if it is of another kind."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | datetime.date | datetime.time):
        return str(value)
    if isinstance(value, int | float | decimal.Decimal):
        return _digits(value)
    return None


def _digits(number: int | float | decimal.Decimal) -> str:
    """A number as text: whole ones without a point, unless that would add 40 zeros; "" if it is not finite.

    >>> [_digits(x) for x in (142.0, 0.5, 1e22, -0.0, 1e300, decimal.Decimal("2.50"), 10**30 + 1)]
    ['142', '0.5', '10000000000000000000000', '0', '1e+300', '2.50', '1000000000000000000000000000001']
    """
    if isinstance(number, int) and abs(number) < 10**18:
        return str(number)
    try:
        exact = decimal.Decimal(number if isinstance(number, int) else str(number))
    except decimal.InvalidOperation:  # an exponent of twenty digits
        return str(number)
    if not exact.is_finite():
        return ""
    if exact != exact.to_integral_value() or int(exact.as_tuple().exponent) >= 40:
        return str(number)
    return f"{exact.to_integral_value():f}" if exact else "0"


def _checked(text: str, field: str, at: str) -> str:
    """The text, unless no file and no tokenizer could take it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{at}: {field!r} has half a character (a lone surrogate); mend or remove the row") from None
    return text


# ---------------------------------------------------------------- chats


def plain_chat(value: object, field: str, at: str) -> Chat | None:
    """The messages of a chat, None if a value is no chat.

    A message's content is a text or a list of text parts, which are joined. Fields of a message that are null or empty
    do not count: files of columns have them in every message.

    Args:
        value: of the field.
        field, at: the field and the row, for messages.

    Raises:
        ValueError: a message has something that would be lost: a part that is no text, calls of tools, an unknown role.
    """
    if isinstance(value, dict) and {"role", "content"} <= value.keys() and _equally_long(value.values()):
        # as `datasets` stores a Sequence of objects
        value = [dict(zip(value, message, strict=True)) for message in zip(*value.values(), strict=True)]
    if not (isinstance(value, list) and value and all(isinstance(one, dict) and "role" in one for one in value)):
        return None
    return tuple(_message(one, f"message {number} of {field!r}", at) for number, one in enumerate(value))


def _equally_long(columns: Collection[Any]) -> bool:
    return all(isinstance(column, list) for column in columns) and len({len(column) for column in columns}) == 1


def _message(message: dict[str, Any], which: str, at: str) -> dict[str, str]:
    role, content = message["role"], message.get("content")
    if role not in _ROLES:
        raise ValueError(f"{at}: {which} has the role {role!r}; a chat may have {', '.join(_ROLES)}")
    more = [
        name for name, value in message.items() if name not in ("role", "content") and value not in (None, "", [], {})
    ]
    if more:
        raise ValueError(f"{at}: {which} has {more[0]!r} too, which would be lost; remove it, or the row")
    if isinstance(content, list):
        content = join_parts(content)
        if content is None:
            raise ValueError(f"{at}: {which} has a part that is no text; the policy reads text alone; remove the row")
    if not isinstance(content, str):
        raise ValueError(f"{at}: the content of {which} must be a text, got {type(content).__name__}")
    return {"role": role, "content": _checked(content, which, at)}


def join_parts(parts: Sequence[object]) -> str | None:
    """The text of a message's parts, None if one of them is no text."""
    texts = [_part(part) for part in parts]
    return None if None in texts else "".join(text or "" for text in texts)


def _part(part: object) -> str | None:
    """The text of a part {"type": "text", "text": ...} of a message, None if it is of another kind."""
    if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        return None
    more = [name for name, value in part.items() if name not in ("type", "text") and value not in (None, "", [], {})]
    return None if more else part["text"]


def plain_prompt(value: object, field: str, at: str) -> tuple[str, Chat | None]:
    """A prompt as text, and as a chat if it is more than one message of the user.

    Args:
        value: of the field: a text, or a chat that ends with a message of the user.
        field, at: the field and the row, for messages.

    Returns:
        (the question, None), or (what was said, as "role: ..." with blank lines between, the messages).

    Raises:
        ValueError: there is no question.
    """
    chat = plain_chat(value, field, at)
    if chat is None:
        return plain_text("" if value == [] else value, field, at), None
    if chat[-1]["role"] != "user":
        raise ValueError(
            f"{at}: {field!r} ends with a message of the {chat[-1]['role']}, and a prompt must end with the user's; "
            f"name {field!r} as the completion field too, or remove the message"
        )
    plain_text(chat[-1]["content"], field, at)
    if len(chat) == 1:
        return chat[0]["content"], None
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in chat), chat


def plain_pair(prompt: object, reply: object, fields: tuple[str, str], at: str) -> tuple[str, Chat | None, str]:
    """A prompt as `plain_prompt` has it, and its worked solution: a text, or the assistant's reply.

    Args:
        prompt, reply: the values of the fields. Where both are the same field, its chat's last message is the reply; a
            reply that is a chat may repeat the prompt before it.
        fields: their names.
        at: the row, for messages.

    Returns:
        (prompt, chat, reply).

    Raises:
        ValueError: one is missing, or the reply is a chat of more than that.
    """
    asked: object = prompt
    chat = plain_chat(reply, fields[1], at)
    if chat is None:
        return *plain_prompt(prompt, fields[0], at), plain_text(reply, fields[1], at)
    if chat[-1]["role"] != "assistant":
        raise ValueError(f"{at} has no {fields[1]!r}: its chat must end with a message of the assistant")
    if fields[0] == fields[1]:
        asked = list(chat[:-1])
    text, messages = plain_prompt(asked, fields[0], at)
    if chat[:-1] not in ((), messages or ({"role": "user", "content": text},)):
        raise ValueError(f"{at}: {fields[1]!r} has messages besides the reply that are not those of {fields[0]!r}")
    return text, messages, plain_text(chat[-1]["content"], fields[1], at)
