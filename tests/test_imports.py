"""What is imported when: commands start without what only a run writes with, and runs go on where that is missing."""

import ast
import importlib
import subprocess
import sys

import pytest

from krl import _moved, hf, policy
from krl.report import command as report
from tests.command_line import ROOT, command, environment, rows
from tests.test_report import write_run

HEAVY = (
    "altair", "datasets", "jinja2", "matplotlib", "mlflow", "orbax", "pandas", "pyarrow", "sympy", "tensorboardX", "torch",
    "transformers", "vl_convert", "wandb",
)  # fmt: skip
OPTIONAL = ("altair", "tensorboardX", "vl_convert")


def python(program, *arguments, home):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=900
    )  # fmt: skip


@pytest.mark.parametrize(
    "modules", ["krl.train, krl.eval.command, krl.report.command, krl.plan.command", "krl, krl.budget, krl.learn, krl.policy, krl.tasks, krl.rewards, krl.rollout"]
)  # fmt: skip
def test_programs_and_rooms_import_none_of_what_only_a_run_reads_or_writes_with(tmp_path, modules):
    done = python(f"import {modules}, sys; print(*sorted(set({HEAVY}) & sys.modules.keys()))", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_without_the_libraries_that_draw_trains_and_says_what_to_install(tmp_path):
    program = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # each is then missing
from krl.train import run_command
run_command()
"""
    keys = {"sft.steps": 0, "steps": 1, "eval.every": 0}
    done = python(program, *command(tmp_path / "work", **keys)[2:], home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path / "work")] == [1]
    said = done.stdout.splitlines()
    (board,) = [line for line in said if "TensorBoard" in line]
    assert board.endswith(": pip install tensorboardX")
    workdir = tmp_path / "work"
    assert said[-1] == (
        "krl: no figures and no page: the report needs altair, vl-convert-python: pip install altair "
        f"vl-convert-python, then python -m krl.report {workdir} --out {workdir}"
    )
    assert any(line.startswith("knapsack with 16 rollouts a step: ") for line in said)
    assert "Traceback" not in done.stderr
    assert not (workdir / "tensorboard").exists()
    assert not (workdir / "report.html").exists()


def test_the_report_without_a_library_is_refused_in_one_line(tmp_path, monkeypatch):
    workdir = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(SystemExit) as refused:
        report.main([str(workdir), "--out", str(tmp_path / "out")])
    assert refused.value.code == "krl.report: the report needs vl-convert-python: pip install vl-convert-python"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("old", "new"), _moved.MODULES.items())
def test_an_old_name_is_the_module_that_moved_and_says_so(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is {new} now") as warned:
        found = importlib.import_module(old)
    assert found is importlib.import_module(new)
    package, _, name = old.rpartition(".")
    assert getattr(importlib.import_module(package), name) is found
    assert len(warned) == 1


@pytest.mark.parametrize(("old", "new"), _moved.NAMES.items())
def test_an_old_name_in_a_module_is_what_moved_and_says_so(old, new):
    module, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{old} is in {new} now"):
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(new), name)


def test_what_was_reached_through_a_package_is_still():
    program = """
import krl, krl.tasks
krl.masked.divide, krl.tasks.verify.math_reward, krl.policy.tokenizer.Decoder
from krl.types import *
Rollouts
from krl import tasks
try:
    tasks.no_such_name
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "module 'krl.tasks' has no attribute 'no_such_name'\n", done.stderr


@pytest.mark.parametrize("old", _moved.PROGRAMS)
def test_a_program_runs_by_its_old_name_and_says_so(old):
    done = subprocess.run([sys.executable, "-m", old, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stderr == f"{old} is {_moved.PROGRAMS[old]} now; the old name goes with the next version\n"
    assert _moved.PROGRAMS[old] in done.stdout


def test_nothing_in_the_house_imports_an_old_name():
    for path in [*(ROOT / "krl").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        names = [name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node)]
        assert not set(names) & _moved.MODULES.keys(), path


def imported(node):
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_checkpoints_are_found_beside_the_model_too():
    assert (policy.load_hf, policy.save_hf, policy.read_config) == (hf.load_hf, hf.save_hf, hf.read_config)
