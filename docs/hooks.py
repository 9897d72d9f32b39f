"""What mkdocs makes of the checkout beside docs/*.md: the page of keys, the beginning of the README, two files of the root."""

import ast
import io
import pathlib
import tokenize
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
FROM_ROOT = ("index.md", "changelog.md", "contributing.md")  # pages with text of files in the root


class Key(NamedTuple):
    """A key of the configuration."""

    name: str  # "alloc.n_min"
    default: str  # as it is written
    text: str  # from the comments


class Section(NamedTuple):
    """The keys that share a prefix, or those without one."""

    name: str  # "alloc"; "" for keys without a prefix
    text: str  # from the comment above it
    keys: list[Key]


def on_files(files, config):
    """Add pages whose source lies in the root of the checkout."""
    from mkdocs.structure.files import File  # not there where only the tests are

    for name in ("CHANGELOG", "CONTRIBUTING"):
        files.append(File.generated(config, f"{name.lower()}.md", abs_src_path=str(ROOT / f"{name}.md")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put generated text where a page asks for it by a comment; links of the root's files begin at docs/ here."""
    if page.file.src_uri == "index.md":
        begin = (ROOT / "README.md").read_text().partition("\n## ")[0].partition("\n")[2]
        markdown = markdown.replace("<!-- the beginning of README.md -->", begin)
    if page.file.src_uri == "configuration.md":
        source = (ROOT / "krl" / "configs" / "default.py").read_text()
        markdown = markdown.replace("<!-- the keys of krl/configs/default.py -->", "\n".join(tables(read_keys(source))))
    return markdown.replace("](docs/", "](") if page.file.src_uri in FROM_ROOT else markdown


def tables(sections: list[Section]) -> list[str]:
    """The sections as lines of Markdown, in alphabetical order after the keys without a prefix."""
    lines = []
    for section in sorted(sections):
        lines += [
            f"## {section.name or 'The run'}",
            "",
            section.text,
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for name, default, text in section.keys:
            lines.append(f"| [`{name}`](#{name}){{#{name}}} | `{default}` | {text.replace('|', chr(92) + '|')} |")
        lines.append("")
    return lines


def read_keys(source: str) -> list[Section]:
    """The keys of a file like krl/configs/default.py, which is read and not run.

    A comment describes the key on its line, or the key or the section whose assignment it stands above.
    """
    comments = {}  # line -> text
    alone = set()  # lines that have nothing but a comment
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.removeprefix("#").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    sections = {"": Section("", "", [])}
    assignments = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign))
    for node in sorted(assignments, key=lambda node: node.lineno):
        name = ast.unparse(node.targets[0]).partition(".")[2]
        if not name:
            continue  # config itself
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        lines = range(first, (node.end_lineno or node.lineno) + 1)
        text = " ".join(comments[line] for line in lines if line in comments)
        text = text[:1].upper() + text[1:].rstrip(".") + "." if text else ""
        if ast.unparse(node.value) == "ConfigDict()":
            sections[name] = Section(name, text, [])
        else:
            sections[name.rpartition(".")[0]].keys.append(Key(name, ast.unparse(node.value), text))
    return list(sections.values())
