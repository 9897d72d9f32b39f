"""What ends a response: end tokens, and strings.

A string that is no single token ends a response with the token with which the decoded text first holds it. Which token
that is depends on the tokens before it, so the sampler needs a memory of them: a table, made here, with a row for each
beginning of a string that the text may end with (the automaton of Aho and Corasick, Communications of the ACM 18(6),
1975, over bytes), and a column for each token. Following it costs a gather a token and never leaves the device.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np

from krl.base.types import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNKNOWN = "\ufffd"  # what bytes are decoded to that are no character
_RUN = 256  # symbols from here on are bytes that are decoded together with the byte tokens beside them, or not at all
_MOST_BYTES = 2000  # of all stop strings: the table has a row for each
_NO_RUN: tuple[int, ...] = ()
_BAD_RUN: tuple[int, ...] = (-1,)


@dataclasses.dataclass(frozen=True)
class Ends:
    """What ends a response of a run, and the text that is left of it."""

    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]  # the tokenizer's, then the tokens among config.sample.stop
    strings: tuple[str, ...]  # the others
    table: np.ndarray | None  # [states, V] int16 or int32, see `make_table`; None without strings

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response up to the end of the first stop string; what its last token has beyond is left out."""
        text = self.tokenizer.decode(ids)
        ends = [text.find(string) + len(string) for string in self.strings if string in text]
        return text[: min(ends)] if ends else text


def find_ends(tokenizer: Tokenizer, stop: Sequence[str], vocab_size: int) -> Ends:
    """What ends a response of a run.

    Args:
        tokenizer: of the run.
        stop: texts; one that is a special or added token is an end token, and one whose token adds to the text, or that
            is no token, is a stop string.
        vocab_size: V of the model, at least the tokenizer's.

    Raises:
        ValueError: a text is empty, too long or no Unicode, is a token for which the model has no row or holds one that
            adds nothing to a text, or the tokenizer is one whose tokens' texts depend on their neighbours.
    """
    for text in stop:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"config.sample.stop has {text!r}, with half a character (a lone surrogate); remove it")
    named = {text: tokenizer.added_id(text) for text in stop}
    if "" in named:
        raise ValueError("config.sample.stop has an empty text, which every response holds; remove it")
    for text, number in named.items():
        if number is not None and number >= vocab_size:
            raise ValueError(
                f"config.sample.stop has {text!r}, which is token {number}, and the model's vocab_size is "
                f"{vocab_size}: no response can hold it; remove it"
            )
    tokens = [number for number in named.values() if number is not None]
    strings = tuple(text for text, number in named.items() if number is None or tokenizer.decode([number]))
    _check_strings(tokenizer, strings)
    table = make_table(tokenizer, strings, vocab_size) if strings else None
    return Ends(tokenizer, tuple(dict.fromkeys([*tokenizer.eos_ids, *tokens])), strings, table)


def _check_strings(tokenizer: Tokenizer, strings: Sequence[str]) -> None:
    """Refuse strings that make too large a table, and those that no response can hold."""
    size = sum(len(string.encode()) for string in strings)
    if size > _MOST_BYTES:
        raise ValueError(
            f"config.sample.stop has {size} bytes of stop strings, and may have {_MOST_BYTES} in all; "
            "shorten or remove some"
        )
    for number in range(tokenizer.vocab_size) if strings else ():
        token = tokenizer.token(number)
        inside = next((string for string in strings if token and token in string), None)
        if inside is not None and tokenizer.added_id(token) == number and not tokenizer.decode([number]):
            raise ValueError(
                f"config.sample.stop has {inside!r}, which no response can hold: the special token {token!r} in it "
                f"adds nothing to a text; name {token!r} alone"
            )


def describe_ends(ends: Ends) -> str:
    """In words, tokens with their numbers."""
    tokens = [f"{ends.tokenizer.token(number)} ({number})" for number in ends.eos_ids]
    return "responses end with " + " or ".join([*tokens, *(f"the text {string!r}" for string in ends.strings)])


def missing_end(ends: Ends, prompt_tokens: np.ndarray, *, chat: bool) -> str:
    """A warning that the chat template's own end of a turn ends no response; "" if it does, or prompts have no turns.

    Args:
        ends: of the run.
        prompt_tokens: ids, those of all prompts.
        chat: whether prompts are in the chat template; those that hold its end of a turn have turns in any case.
    """
    turn_end = ends.tokenizer.turn_end()
    if turn_end is None or turn_end in ends.eos_ids or not (chat or turn_end in prompt_tokens):
        return ""
    token = ends.tokenizer.token(turn_end)
    return (
        f"warning: the chat template ends a turn with {token} ({turn_end}), which ends no response; "
        f"""if the policy writes it, give --config.sample.stop="('{token}',)\""""
    )


# ---------------------------------------------------------------- the table


def make_table(tokenizer: Tokenizer, strings: Sequence[str], vocab_size: int) -> np.ndarray:
    """Where each token leads from each state of a response's text.

    Args:
        tokenizer: whose `decode` makes the text.
        strings: none of them empty.
        vocab_size: V.

    Returns:
        [states, V] int16, or int32 where that is too small. A response begins in state 0, and is in the last state once
        its decoded text holds one of the strings.

    Raises:
        ValueError: what the tokenizer's tokens add to a text depends on the tokens beside them.
    """
    step = _automaton([string.encode() for string in strings])
    first, later, stays = _symbols(tokenizer, vocab_size)
    _check_symbols(tokenizer, first, later, stays)
    inside = _follow(step, np.arange(len(step)), later)
    # What a tokenizer puts in front of a text, it takes from there when it decodes: so the first token is another case.
    begin = np.where(stays, -1, _follow(step, np.zeros(1, int), first)[0])
    table = 1 + np.concatenate([begin[None], inside])
    return table.astype(np.int16 if len(table) < 1 << 15 else np.int32)


def _automaton(strings: list[bytes]) -> np.ndarray:
    """[states, 512], the state after each symbol: a text is in state 0 at first, in the last once it holds a string.

    A state is the longest beginning of a string that the text ends with, and what stands open of a run of byte tokens.
    """
    after = _beginnings(strings).tolist()

    def follow(state: tuple[int, tuple[int, ...]], symbol: int) -> tuple[int, tuple[int, ...]] | None:
        beginning, run = state
        byte = symbol % _RUN
        if symbol < _RUN:  # a run that is no text by now never will be, and has cut off what was before
            then = _NO_RUN
            beginning = 0 if run else beginning
        else:
            then = _run_after(run, byte)
            if then == _BAD_RUN:
                return 0, then
        beginning = after[beginning][byte]
        return None if beginning < 0 else (beginning, then)

    states, rows = [(0, _NO_RUN)], []
    number: dict[tuple[int, tuple[int, ...]] | None, int] = {states[0]: 0}
    for state in states:  # which grows
        row = [follow(state, symbol) for symbol in range(2 * _RUN)]
        for then in row:
            if then is not None and then not in number:
                number[then] = len(states)
                states.append(then)
        rows.append(row)
    number[None] = len(states)
    return np.array([[number[then] for then in row] for row in rows] + [[len(states)] * 2 * _RUN], np.int32)


def _beginnings(strings: list[bytes]) -> np.ndarray:
    """[beginnings, 256], the longest beginning of a string that a text ends with after one more byte.

    0 is the empty one; -1 says that the text holds a string. A text whose byte does not lengthen its beginning goes on
    as from the next shorter one that it ends with, whose row is made before: the failure links of Aho and Corasick.
    """
    beginnings = sorted({string[:size] for string in strings for size in range(len(string) + 1)}, key=len)
    number = {beginning: place for place, beginning in enumerate(beginnings)}
    after = np.zeros((len(beginnings), 256), int)
    shorter = [0] * len(beginnings)  # the longest other beginning that each ends with; -1 where that holds a string
    for place, beginning in enumerate(beginnings):
        after[place] = after[shorter[place]]
        for byte in range(256):
            more = number.get(beginning + bytes([byte]))
            if more is not None:
                shorter[more] = int(after[place, byte])
                after[place, byte] = -1 if beginnings[more] in strings or shorter[more] < 0 else more
    return after


def _run_after(run: tuple[int, ...], byte: int) -> tuple[int, ...]:
    """What is open of a run of UTF-8 after one more byte: (bytes that follow, the least and the most of the next)."""
    if run == _BAD_RUN:
        return run
    if run:
        left, least, most = run
        if not least <= byte <= most:
            return _BAD_RUN
        return (left - 1, 0x80, 0xBF) if left > 1 else _NO_RUN
    if byte < 0x80:
        return _NO_RUN
    if not 0xC2 <= byte <= 0xF4:
        return _BAD_RUN
    least, most = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}.get(
        byte, (0x80, 0xBF)
    )
    return 1 + (byte >= 0xE0) + (byte >= 0xF0), least, most


def _symbols(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """What each token adds to a text that it begins, and to one that goes on: symbols of `_automaton`.

    Returns:
        (symbols [V], symbols [V], which tokens [V] leave a text that has not begun as it is).
    """
    ids = range(min(vocab_size, tokenizer.vocab_size))
    begun = [tokenizer.decode([number]) for number in ids]
    shown = [number for number in ids if begun[number].strip() == begun[number] != "" and _UNKNOWN not in begun[number]]
    # One that puts nothing in front of itself, where there is one.
    twice = (number for number in shown if tokenizer.decode([number] * 2) == 2 * begun[number])
    anchor = next(twice, shown[0] if shown else 0)
    added = [tokenizer.decode([anchor, number])[len(begun[anchor]) :] for number in ids]
    together = _decodes_runs_together(tokenizer)
    later = [
        _bytes_of(tokenizer.token(number), text, together=together) for number, text in zip(ids, added, strict=True)
    ]
    first = [
        other if text == more or _UNKNOWN in text else np.frombuffer(text.encode(), np.uint8).astype(int)
        for text, more, other in zip(begun, added, later, strict=True)
    ]
    # A token that shows nothing at first may take the place of the first one, or not: as the next one is shown.
    probe = next((number for number in ids if begun[number] and begun[number] != added[number]), None)
    stays = np.ones(vocab_size, bool)
    for number in ids:
        stays[number] = not begun[number] and (
            not added[number] or (probe is not None and tokenizer.decode([number, probe]) == begun[probe])
        )
    nothing = [np.zeros(0, int)] * (vocab_size - len(ids))
    return first + nothing, later + nothing, stays


def _check_symbols(tokenizer: Tokenizer, first: list[np.ndarray], later: list[np.ndarray], stays: np.ndarray) -> None:
    """Refuse a tokenizer whose texts are not those of its tokens one after another; _UNKNOWN does not count."""
    rng = np.random.default_rng(0)
    for ids in rng.integers(0, tokenizer.vocab_size, (100, 8)).tolist():
        begun = next((place for place, number in enumerate(ids) if not stays[number]), len(ids))
        symbols = [symbol for number in ids[begun : begun + 1] for symbol in first[number]]
        symbols += [symbol for number in ids[begun + 1 :] for symbol in later[number]]
        text = ""
        for together, run in itertools.groupby(symbols, lambda symbol: symbol >= _RUN):
            part = bytes(symbol % _RUN for symbol in run).decode(errors="replace")
            text += "" if together and _UNKNOWN in part else part
        if text.replace(_UNKNOWN, "") != tokenizer.decode(ids).replace(_UNKNOWN, ""):
            raise ValueError(
                "config.sample.stop has strings, and with this tokenizer a token's text depends on the tokens beside "
                f"it (as in {tokenizer.decode(ids)!r}); name special tokens instead"
            )


def _bytes_of(token: str, text: str, *, together: bool) -> np.ndarray:
    """The symbols of a token that adds a text, in which bytes that are no character by themselves are unknown."""
    named = _BYTE.fullmatch(token)
    if named and text != token:
        return np.array([int(named[1], 16) + _RUN * together])
    if _UNKNOWN in text and all(letter in _BYTES_OF_LETTERS for letter in token):
        return np.array([_BYTES_OF_LETTERS[letter] for letter in token])
    return np.frombuffer(text.encode(), np.uint8).astype(int)


def _letters() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes as (Radford et al., 2019): itself where it can be printed."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES_OF_LETTERS = _letters()


def _decodes_runs_together(tokenizer: Tokenizer) -> bool:
    """Whether byte tokens side by side are one text or none, as in `tokenizers`; sentencepiece looks at each alone."""
    ids = {tokenizer.token(number): number for number in range(tokenizer.vocab_size)}
    pair = [ids[name] for name in ("<0xFF>", "<0x41>") if name in ids]
    return len(pair) == 2 and tokenizer.decode(pair) == 2 * _UNKNOWN


def _follow(step: np.ndarray, states: np.ndarray, symbols: list[np.ndarray]) -> np.ndarray:
    """[n, V], where the symbols of each of V tokens lead from each of n states."""
    lengths = np.array([len(each) for each in symbols])
    starts, flat = np.cumsum(lengths) - lengths, np.concatenate(symbols)
    reached = np.tile(states[:, None], (1, len(symbols)))
    for place in range(lengths.max(initial=0)):
        which = np.flatnonzero(lengths > place)
        reached[:, which] = step[reached[:, which], flat[starts[which] + place]]
    return reached
