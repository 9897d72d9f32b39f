"""How krl writes docstrings, for griffe: arguments that share a line, examples without a heading, fields' comments."""

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

    def on_module_members(self, *, mod: griffe.Module, **kwargs) -> None:
        """Once for every module: the comment on the line of a constant is its description."""
        for constant in mod.attributes.values():
            text = comment(constant)
            if text and not constant.docstring:
                constant.docstring = griffe.Docstring(text[:1].upper() + text[1:], parent=constant)

    def on_class_members(self, *, cls: griffe.Class, **kwargs) -> None:
        """Once for every class: its fields become one list, each with the comment on its line."""
        fields = {
            name: field for name, field in cls.attributes.items() if field.annotation and not name.startswith("_")
        }
        if fields and cls.docstring:
            listed = (f"    {name} ({field.annotation}): {comment(field)}" for name, field in fields.items())
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(listed)
            for name in fields:
                cls.del_member(name)


def comment(attribute: griffe.Attribute) -> str:
    """What stands behind an assignment, on the line where it begins; "" if nothing does."""
    if attribute.is_alias or not attribute.lineno or not isinstance(attribute.filepath, pathlib.Path):
        return ""
    return attribute.filepath.read_text().splitlines()[attribute.lineno - 1].partition("  # ")[2]


def rewrite(text: str) -> str:
    """`a, b: text` as one entry for each, and `>>>` under the heading Examples."""

    def each(match: re.Match[str]) -> str:
        return "\n".join(f"{match['indent']}{name}:{match['text']}" for name in match["names"].split(", "))

    def example(match: re.Match[str]) -> str:
        return "Examples:\n" + "\n".join("    " + line for line in match[0].splitlines())

    return EXAMPLE.sub(example, SHARED.sub(each, text))
