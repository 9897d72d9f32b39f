"""Gold answers, and where the final answer of a response stands."""

import re
from collections.abc import Iterator, Sequence

Answer = str | Sequence[str]  # the gold answer, or several of which any is accepted

_THOUGHT_BEGINS = re.compile(
    r"[<\u25c1](?:seed:)?(?:think(?:ing)?|thought|reasoning)\s*+[>\u25b7]|\[THINK\]|<\|begin_of_thought\|>",
    re.IGNORECASE,
)
_THOUGHT_ENDS = re.compile(
    r"[<\u25c1]/(?:seed:)?(?:think(?:ing)?|thought|reasoning)\s*+[>\u25b7]|\[/THINK\]|<\|end_of_thought\|>",
    re.IGNORECASE,
)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BOX_OR_BRACE = re.compile(r"(?<!\\)\\++f?box(?:ed)?\s*+\{|\\.|[{}]", re.DOTALL)
_MARK = re.compile(
    r"^[\#*_> \t]*+(?:the[ ])?(?:final[ ])?answer[*_ \t]*+$"
    r"|(\#{4,})"
    r"|(?<![a-zA-Z])answers?[*_]*+\s*+(?:is|are|[:=\uff1a])[*_]*+(?:\s*+(?:therefore|thus|simply)\b,?)?\s*+[:=\uff1a]?",
    re.IGNORECASE | re.MULTILINE,
)
_DISPLAY = re.compile(r"\$\$|\\\[|\\begin\{((?:equation|align|gather|displaymath)\*?)\}")
_DECORATION = re.compile(r"[*_\s]*")
_SENTENCE = re.compile(r"((?:\$[^$\n]*\$|\{[^{}\n]*\}|.)*?)(?:\.(?=\s|$)|$)", re.MULTILINE)
_BOLD_END = re.compile(r"\*\*([^*\n]+)\*\*[\s.!]*+\Z")
_LAST_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?")


def extract_answer(text: str, *, last_number: bool = False) -> str | None:
    """The final answer a text marks, or None.

    Of a text that thinks first, only what follows the last `</think>` counts (or `</reasoning>` and the like), and
    what stands before a `<think>` that is never closed: a thought that was cut off gives no answer. In that part the
    first of these that is there decides:

    1. The last `<answer>...</answer>` that is not empty, or an `<answer>` that nothing closes up to the end. If
       there is one of the marks below in it, that mark's answer.
    2. The last balanced \\boxed{...} or \\fbox{...} that is not empty; of nested ones the innermost.
    3. The last of: the rest of the line after "####", or the line after it; the sentence after "answer is", "answer:"
       or the like; what follows a heading or a line of nothing but "Final answer". Where displayed mathematics ($$ or
       \\[) follows the words or the heading, that is the answer, over several lines too; else it is the first line that
       is not empty.
    4. Bold text with which the whole text ends.

    So of several marks of one kind only the last counts, and a text cannot give two answers.

    Args:
        text: a response, or a gold answer.
        last_number: take the text's last number where nothing is marked.

    >>> extract_answer("so \\\\boxed{\\\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    >>> extract_answer("<think>is it 4?</think> <answer>It is \\\\boxed{5}.</answer>")
    '5'
    """
    text = after_thinking(text)
    found = _tagged(text) or _marked(text)
    if not found and last_number:
        found = next(reversed(_LAST_NUMBER.findall(text)), None)
    return found or None


def after_thinking(text: str) -> str:
    """What follows the last thought of a text that thinks first, without one that was cut off."""
    ends = [match.end() for match in _THOUGHT_ENDS.finditer(text)]
    text = text[ends[-1] :] if ends else text
    unclosed = _THOUGHT_BEGINS.search(text)
    return text[: unclosed.start()] if unclosed else text


def _from_last(pattern: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], str]]:
    """The places of a pattern from the last to the first, each with the text between it and the next one."""
    end = len(text)
    for match in reversed(list(pattern.finditer(text))):
        yield match, text[match.end() : end]
        end = match.start()


def _tagged(text: str) -> str | None:
    """The answer in the last tags that are not empty."""
    for match, rest in _from_last(_TAG, text):
        if not match[1] and (inside := rest.strip()):
            return _marked(inside) or inside
    return None


def _marked(text: str) -> str | None:
    if found := _last_boxed(text) or _last_mark(text):
        return found
    bold = _BOLD_END.search(text)
    return bold[1].strip() if bold else None


def _last_boxed(text: str) -> str | None:
    """What the last balanced box that is not empty holds, in one pass: a text may open very many."""
    opened: list[tuple[int, bool]] = []
    begin, last = -1, None
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            start, is_box = opened.pop() if opened else (0, False)
            if is_box and start > begin and text[start : match.start()].strip():
                begin, last = start, text[start : match.start()].strip()
        elif token[-1] == "{" and token != r"\{":
            opened.append((match.end(), len(token) > 1))
    return last


def _last_mark(text: str) -> str | None:
    for match, rest in _from_last(_MARK, text):
        line = rest.partition("\n")[0].strip(" *\t\r") if match[1] else ""
        if found := line or _displayed_or_sentence(rest):
            return found
    return None


def _displayed_or_sentence(text: str) -> str:
    text = _DECORATION.sub("", text, count=1)
    if display := _DISPLAY.match(text):
        right = {"$$": "$$", "\\[": "\\]"}.get(display[0], f"\\end{{{display[1]}}}")
        return text[display.end() :].partition(right)[0].strip()
    sentence = _SENTENCE.match(text)
    return sentence[1].strip(" *_\t") if sentence else ""
