"""Breaks lines of the step's path, one at a time, and says which ones the tests do not notice.

    python -m tests.broken [--lines 40] [--seed 0] [--only krl/budget/belief.py ...]

Each broken line is tried in a copy of the checkout, first on the tests that are about its file. A line that no test
finds is printed with what it was and what it became: it needs a test, or it changes no result (a constant of speed, two
ways to the same number), or the slow tests, which are not run here, are about it. The tests are run unbroken first. No
test of the suite runs this; forty lines take about twenty minutes of two cores.
"""

import argparse
import ast
import contextlib
import copy
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).parent.parent
PATH = {  # the files of a step, and the tests that are about each
    "krl/base/threshold.py": "solve rollout",
    "krl/tasks/data.py": "tasks",
    "krl/budget/belief.py": "choose rules budget prior published",
    "krl/budget/prior.py": "prior",
    "krl/budget/allocate.py": "choose rules solve budget",
    "krl/budget/solve.py": "solve choose budget rules",
    "krl/budget/value.py": "budget solve choose rules",
    "krl/rollout/sampler.py": "rollout mesh stop",
    "krl/rollout/serve.py": "rollout stop mesh",
    "krl/rollout/slots.py": "rollout",
    "krl/rollout/tokens.py": "rollout",
    "krl/policy/model.py": "policy hf rollout update",
    "krl/policy/attention.py": "attention policy hf",
    "krl/policy/scores.py": "scores policy",
    "krl/learn/advantage.py": "learn",
    "krl/learn/loss.py": "learn update",
    "krl/learn/pack.py": "pack update sft",
    "krl/learn/batches.py": "update sft",
    "krl/run/update.py": "update sft train",
    "krl/run/optimizer.py": "update run",
    "krl/run/learner.py": "train faults run keys",
    "krl/run/spend.py": "train faults choose keys",
    "krl/run/scoring.py": "evaluate faults train",
    "krl/train.py": "train guard faults keys own",
}
OTHER = {  # what an operator becomes
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}  # fmt: skip


def main() -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PATH, default=list(PATH), metavar="FILE")
    options = parser.parse_args()
    places = [(file, *way) for file in options.only for way in ways_to_break((ROOT / file).read_text())]
    random.Random(options.seed).shuffle(places)
    chosen = list({(file, line): (file, line, text) for file, line, text in places}.values())[: options.lines]
    with ThreadPoolExecutor(options.jobs) as several:
        tests = sorted({name for file, _, _ in chosen for name in PATH[file].split()})
        failing = [name for name, bad in zip(tests, several.map(fails_unbroken, tests), strict=True) if bad]
        if failing:
            raise SystemExit(f"these tests fail as the code is: {', '.join(failing)}")
        found = sum(several.map(lambda place: try_one(*place), chosen))
    print(f"{found} of {len(chosen)} broken lines were found")
    raise SystemExit(found < len(chosen))


def ways_to_break(source: str) -> Iterator[tuple[int, str]]:
    """(line, the file with that line broken) for every operator, condition, number and `where` that is computed with."""
    lines = source.splitlines(keepends=True)
    starts = [sum(len(line.encode()) for line in lines[:number]) for number in range(len(lines))]
    raw = source.encode()
    for node in computed(ast.parse(source)):
        for other in changed(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            text = (raw[:begin] + f"({ast.unparse(other)})".encode() + raw[end:]).decode()
            yield node.lineno, text


def computed(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions that decide a result: none of signatures, annotations, messages and texts."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.arguments | ast.JoinedStr):
            continue
        if isinstance(node, ast.FunctionDef):
            for part in node.body:
                yield from computed(ast.Module([part], []))
            continue
        if isinstance(node, ast.AnnAssign):
            yield from computed(ast.Module([ast.Expr(node.value)], [])) if node.value else ()
            continue
        if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):  # a refusal, which other tests are about
            continue
        if isinstance(node, ast.expr):
            yield node
        yield from computed(node)


def changed(node: ast.expr) -> Iterator[ast.expr]:
    """An expression in a wrong form, if there is one."""
    wrong = copy.deepcopy(node)
    if isinstance(wrong, ast.BinOp | ast.BoolOp) and type(wrong.op) in OTHER:
        wrong.op = OTHER[type(wrong.op)]()
        yield wrong
    elif isinstance(wrong, ast.Compare) and type(wrong.ops[0]) in OTHER:
        wrong.ops[0] = OTHER[type(wrong.ops[0])]()
        yield wrong
    elif isinstance(wrong, ast.UnaryOp) and isinstance(wrong.op, ast.Not | ast.Invert | ast.USub):
        yield wrong.operand
    elif (
        isinstance(wrong, ast.Call)
        and isinstance(wrong.func, ast.Attribute)
        and wrong.func.attr in ("where", "minimum", "maximum")
    ):
        if wrong.func.attr == "where":
            wrong.args[1:3] = wrong.args[2:0:-1]
        else:
            wrong.func.attr = {"minimum": "maximum", "maximum": "minimum"}[wrong.func.attr]
        yield wrong
    elif isinstance(wrong, ast.Constant) and type(wrong.value) in (int, float):
        wrong.value += 1
        yield wrong


def try_one(file: str, line: int, text: str) -> bool:
    """Whether the tests find that a line of a file is another one."""
    begin = time.monotonic()
    with a_copy() as checkout:
        (checkout / file).write_text(text)
        found = any(fails(checkout, name) for name in PATH[file].split())
    was, now = ((each.splitlines()[line - 1]).strip() for each in ((ROOT / file).read_text(), text))
    print(
        f"{'found ' if found else 'MISSED'} {file}:{line} in {time.monotonic() - begin:.0f} s: {was}  ->  {now}",
        flush=True,
    )
    return found


def fails_unbroken(name: str) -> bool:
    """Whether the tests of a file fail in a copy of the checkout as it is."""
    with a_copy() as checkout:
        return fails(checkout, name)


@contextlib.contextmanager
def a_copy() -> Iterator[pathlib.Path]:
    """The checkout once more, for a while."""
    with tempfile.TemporaryDirectory(prefix="krl-broken-") as place:
        left_out = shutil.ignore_patterns(".git", ".venv*", "site", "runs", "study")
        yield pathlib.Path(shutil.copytree(ROOT, pathlib.Path(place, "checkout"), ignore=left_out, symlinks=True))


def fails(checkout: pathlib.Path, name: str) -> bool:
    """Whether one of the tests in tests/test_{name}.py fails, or they cannot be imported or take much too long."""
    test = f"tests/test_{name}.py"
    if not (checkout / test).exists():
        raise ValueError(f"there is no {test}; mend PATH")
    arguments = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", test]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    try:
        return (
            subprocess.run(arguments, cwd=checkout, env=environment, capture_output=True, timeout=600).returncode != 0
        )
    except subprocess.TimeoutExpired:
        return True


if __name__ == "__main__":
    main()
