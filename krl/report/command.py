"""What runs showed: one table, one sentence, the figures and the page.

    python -m krl.report runs/uniform runs/uniform_1024 runs/knapsack --out runs

compares runs of the same prompts; --out report.html writes the page alone. Runs may differ in their rule, their
rollouts a step and their steps.
"""

import argparse
import importlib
import math
import pathlib
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from krl.configs.flags import one_line_errors
from krl.report.history import Run, before_and_after, read_runs, rollouts_to_reach, summary
from krl.run.log import format_seconds

# What figures and page are drawn with: module, and what pip calls it. Slow to import, and a run needs none of them.
LIBRARIES = {"altair": "altair", "jinja2": "jinja2", "vl_convert": "vl-convert-python"}


def write(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> str:
    """Write the page and the figures of some runs and say in words how they did.

    Args:
        workdirs: of the runs; the first is the one whose accuracy the others are to reach, the last is named first.
        out: where report.html, figures.png and the single figures go; or a name that ends in .html, for the page alone.

    Returns:
        Where the figures and the page are, a table with a row a run, and the sentence that compares their accuracies.

    Raises:
        ValueError: a directory holds no run, or a library is missing.
    """
    drawn, path, told = _write(workdirs, out)
    return "\n".join([*drawn, f"report: {path}", "", told])


def _write(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> tuple[list[str], pathlib.Path, str]:
    """(a line that says where the figures are, if they were drawn; where the page is; what they come to)."""
    problem = missing_libraries()
    if problem:
        raise ValueError(problem)
    from krl.report import charts, figures, page

    runs, said_of_figures = read_runs(workdirs), []
    drawn, rows = charts.make(runs)
    path = out if out.suffix == ".html" else out / "report.html"
    if path != out:
        figures.draw(runs, drawn, rows, out)
        said_of_figures = [f"figures: {out}/figures.png"]
    headings = {" ".join(heading.split()): cells for heading, cells in columns(runs).items()}
    text = page.build(runs, drawn, rows, headings, sentence(runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(path)
    return said_of_figures, path, in_words(runs)


def missing_libraries() -> str:
    """Which of LIBRARIES cannot be imported, and what to install; "" if all can be."""
    missing = []
    for name, package in LIBRARIES.items():
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(package)
    return f"the report needs {', '.join(missing)}: pip install {' '.join(missing)}" if missing else ""


def in_words(runs: Sequence[Run]) -> str:
    """The table of some runs, the sentence that compares them, and what had no reward."""
    return "\n".join([table(runs), *said(runs), "", sentence(runs), *without_reward(runs)])


def said(runs: Sequence[Run]) -> list[str]:
    """Lines with what a single run said to a few held-out prompts, before and after."""
    shown = before_and_after(runs[0]) if len(runs) == 1 else []
    lines = ["", "what it said to the first held-out prompts:"] if shown else []
    for prompt, ends in shown:
        lines.append(f"  {shorten(prompt)}")
        for when, (worth, text) in zip(("before", "after"), ends, strict=True):
            lines.append(f"    {f'{when}, {worth}:':22} {shorten(text)}")
    return lines


def shorten(text: str, most: int = 100) -> str:
    """A text as one line of at most so many characters.

    >>> shorten("one\\n\\ntwo three", 9)
    'one two …'
    """
    line = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in " ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def without_reward(runs: Sequence[Run]) -> list[str]:
    """Lines about the rewards that could not be computed, of the runs that had any."""
    from krl.report.findings import faults  # with Arrow, which a run imports when it logs its first rollouts

    lines = []
    for run in runs:
        if told := faults(run):
            lines += ["", f"{run['label']}: {told[0]}", *(f"  {reason}" for reason in told[1])]
    return lines


def columns(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What the runs did, by heading a cell a run; docs/metrics.md defines the columns."""
    rows = [summary(run) for run in runs]
    level = rows[0]["final_accuracy"]
    rates = {
        "effective_ratio_rollouts": "effective\nrollouts",
        "effective_ratio_prompts": "effective\nprompts",
        "first_accuracy": "accuracy\nbefore",
        "final_accuracy": "\nafter",
    }
    if not all(math.isnan(row["found"]) for row in rows):
        rates["found"] = "\nfound"
    columns = {"run": [run["label"] for run in runs]}
    columns |= {heading: [_rate(row[key]) for row in rows] for key, heading in rates.items()}
    columns["\nrollouts"] = [f"{row['rollouts']:,.0f}" for row in rows]
    if len(runs) > 1 and not math.isnan(level):
        needed = [rollouts_to_reach(run, level) for run in runs]
        columns[f"rollouts\nto {level:.3f}"] = ["never" if n is None else f"{n:,.0f}" for n in needed]
    columns["time in\nsteps"] = [format_seconds(row["seconds"]) for row in rows]
    return columns


def table(runs: Sequence[Run]) -> str:
    """The columns as text, a row a run."""
    cells = columns(runs)
    drawn = Table(box=None, pad_edge=False)
    for number, heading in enumerate(cells):
        drawn.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in zip(*cells.values(), strict=True):
        drawn.add_row(*row)
    console = Console(width=150, color_system=None)
    with console.capture() as capture:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def sentence(runs: Sequence[Run]) -> str:
    """The runs' accuracy at their last evaluation, the last run first, with their rollouts a step.

    Runs of different length also say their steps: those times the rollouts a step is what each spent.
    """
    steps = [run["metrics"][-1]["step"] for run in runs]
    parts: list[str] = []
    for run, number in zip((runs[-1], *runs[:-1]), (steps[-1], *steps[:-1]), strict=True):
        spent = f"{run['config']['alloc.budget']:,}" + (" rollouts a step" if not parts else "")
        length = f" for {number:,} steps" if len(set(steps)) > 1 else ""
        accuracy = summary(run)["final_accuracy"]
        outcome = "not evaluated" if math.isnan(accuracy) else f"{accuracy:.3f}"
        parts.append(f"{run['name']} with {spent}{length}: {outcome}")
    return "; ".join(parts)


def _rate(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def of_a_run(workdir: pathlib.Path) -> str:
    """Write a run's report; what goes wrong there is told, and is not the run's failure.

    Without the libraries that draw it there are the words, and what to install.
    """
    try:
        problem = missing_libraries()
        if problem:
            again = f"python -m krl.report {workdir} --out {workdir}"
            return f"{in_words(read_runs([workdir]))}\n\nkrl: no figures and no page: {problem}, then {again}"
        return write([workdir], workdir)
    except Exception as error:
        return f"krl: the run is finished, but its report could not be written ({type(error).__name__}: {error})"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: print the comparison and write the page and the figures."""
    parser = argparse.ArgumentParser(prog="python -m krl.report", description="Compare runs.")
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, help="work directories, the baseline first")
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="where page and figures go, or NAME.html for the page alone"
    )
    options = parser.parse_args(arguments)
    with one_line_errors("krl.report"):
        drawn, path, told = _write(options.workdirs, options.out)
    print("\n".join([*drawn, "", told, "", f"report: {path}"]).lstrip("\n"))
