"""What mkdocs makes beside docs/*.md: the page of keys, the beginning of the README, two files of the root."""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).parent.parent
FROM_ROOT = ("index.md", "changelog.md", "contributing.md")  # pages with text of files in the root


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
        table = runpy.run_path(str(ROOT / "krl" / "configs" / "default.py"))
        lines = tables(table["KEYS"], table["SECTIONS"])
        markdown = markdown.replace("<!-- the keys of krl/configs/default.py -->", "\n".join(lines))
    return markdown.replace("](docs/", "](") if page.file.src_uri in FROM_ROOT else markdown


def tables(keys, sections: dict[str, str]) -> list[str]:
    """The keys of krl/configs/default.py as lines of Markdown, by section; those without one come first."""
    lines = []
    for section in ("", *sorted(sections)):
        lines += [
            f"## {section or 'The run'}",
            "",
            sections.get(section, ""),
            "",
            "| key | default | values | meaning |",
            "|---|---|---|---|",
        ]
        for name, key in keys.items():
            if name.rpartition(".")[0] == section:
                number = key.help[1] == ","  # k, samples: another letter than K
                text = (key.help if number else key.help[0].upper() + key.help[1:]) + "."
                values = "" if key.range.must == "anything" else key.range.must
                cells = (f"[`{name}`](#{name}){{#{name}}}", f"`{key.default!r}`", values, text)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return lines
