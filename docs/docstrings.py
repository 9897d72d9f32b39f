"""How krl writes docstrings, for griffe: arguments that share a line, examples without a heading, fields with a comment."""

import pathlib
import re

import griffe

SHARED = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+):(?P<text> .*(?:\n(?P=indent) +\S.*)*)", re.MULTILINE)
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings to what the parser of Google style knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Once for every module, class and function."""
        if obj.docstring:
            obj.docstring.value = rewrite(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs) -> None:
        """Once for every field and constant: the comment on its line is its description."""
        if not attr.docstring and attr.lineno and isinstance(attr.filepath, pathlib.Path):
            _, found, comment = attr.filepath.read_text().splitlines()[attr.lineno - 1].partition("  # ")
            if found:
                attr.docstring = griffe.Docstring(comment, parent=attr)


def rewrite(text: str) -> str:
    """`a, b: text` as one entry for each, and `>>>` under the heading Examples."""

    def each(match: re.Match[str]) -> str:
        return "\n".join(f"{match['indent']}{name}:{match['text']}" for name in match["names"].split(", "))

    def example(match: re.Match[str]) -> str:
        return "Examples:\n" + "\n".join("    " + line for line in match[0].splitlines())

    return EXAMPLE.sub(example, SHARED.sub(each, text))
