"""Runs notebooks from top to bottom and stores what they show, without times, paths and messages of programs.

    python notebooks/execute.py notebooks/quickstart.ipynb [...]

Cells with the tag "install" are not run, and of those with the tag "quiet" only figures are kept. It needs the
packages of `pip install 'krl[dev]'`.
"""

import pathlib
import sys
import tempfile

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
"language_info": {"name": "python"}}  # fmt: skip


def execute(path: pathlib.Path) -> None:
    """Run a notebook in an empty directory, with the krl of this checkout, and write it again with its outputs."""
    book = nbformat.read(path, as_version=4)
    cells = list(book.cells)
    book.cells = [cell for cell in cells if "install" not in cell.metadata.get("tags", ())]
    first = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
    book.cells.insert(0, first)
    with tempfile.TemporaryDirectory() as place:
        NotebookClient(book, timeout=1800, resources={"metadata": {"path": place}}).execute()
    number = 0
    for cell in cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            number += 1
            cell.execution_count = number
            cell.outputs = [output for output in cell.outputs if _kept(output, cell.metadata.get("tags", ()))]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = number
    book.cells, book.metadata = cells, nbformat.from_dict(KERNEL)
    nbformat.write(book, path)


def _kept(output: nbformat.NotebookNode, tags: list[str]) -> bool:
    drawn = "image/png" in output.get("data", {})
    return drawn or ("quiet" not in tags and output.get("name") != "stderr")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(pathlib.Path(name))
