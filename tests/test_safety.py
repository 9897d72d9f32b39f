"""What others give a run, it reads as values: it runs nothing of it but the reward that the config names."""

import ast
import os
import pathlib
import pickle
import subprocess
import sys

import jax.numpy as jnp
import pytest

from krl.rewards.pool import VerifierPool
from krl.rewards.verify import find_reward
from krl.run.checkpoint import Checkpoints
from krl.tasks import load_tasks

ROOT = pathlib.Path(__file__).parent.parent
PARSED = """
import sys
from absl import flags
from krl.configs.flags import define_flags, parse_flags
define_flags()
parse_flags(sys.argv)
print(repr(flags.FLAGS.config))
"""


class Bomb:
    """What makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.touch, (self.file,)


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["steps", "optim.learning_rate", "optim.packed", "mesh.shape", "data.name"])
def test_overrides_are_values_and_never_run(tmp_path, key):
    code = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    for value in (code, f"({code},)", f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]"):
        parsed = subprocess.run(
            [sys.executable, "-c", PARSED, "--config", "configs/arithmetic.py", f"--config.{key}={value}"],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert not (tmp_path / "ran").exists()
        if key in ("mesh.shape", "data.name") and parsed.returncode == 0:
            assert "pathlib" in parsed.stdout  # the text itself
        else:
            assert (parsed.returncode, parsed.stdout) == (1, "")
            assert len(parsed.stderr.splitlines()) == 1
            assert f": config.{key}=" in parsed.stderr


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.arrow", "rows.pkl", "rows.npy"])
def test_data_is_not_unpickled(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match=name):
        load_tasks(
            name="", subset="", split="", path=str(tmp_path / name), prompt_field="question", answer_field="answer",
            completion_field="", limit=0,
        )  # fmt: skip
    assert not (tmp_path / "ran").exists()


def test_checkpoints_are_not_unpickled(tmp_path):
    like = {"state": {"a": jnp.ones(2)}}
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, like)
    for path in (tmp_path / "checkpoints" / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.restore(like)[0] == 1
    assert not (tmp_path / "ran").exists()


def test_nothing_but_a_worker_unpickles_and_nothing_evaluates():
    """A worker reads what its own parent writes. NumPy unpickles only when it is told to."""
    reads = {"load", "loads", "Unpickler", "read_pickle"}
    found = set()
    for path in [*(ROOT / "krl").rglob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile"), path
            if isinstance(node, ast.Call):
                options = {option.arg: getattr(option.value, "value", None) for option in node.keywords}
                assert not options.get("allow_pickle"), path
                assert not options.get("trust_remote_code"), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                unpickles = node.value.id in ("pickle", "cloudpickle", "dill", "joblib", "torch") and node.attr in reads
                found |= {path.relative_to(ROOT).as_posix()} if unpickles else set()
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "cloudpickle", "dill", "joblib", "torch"), path
    assert found == {"krl/rewards/worker.py"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_comes_from_the_module_that_is_named_and_from_no_other(tmp_path, monkeypatch, workers):
    """Neither from a path, nor from a module of the same name where the process happens to stand."""
    (tmp_path / "here").mkdir()
    (tmp_path / "named").mkdir()
    said = "def give(prompt, response, answer):\n    return {}\n"
    (tmp_path / "named" / "my_own_reward.py").write_text(said.format(0.5))
    for name in ("my_own_reward", "json", "numpy", "unnamed"):
        bomb = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        (tmp_path / "here" / f"{name}.py").write_text(bomb + said.format(0.25))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "named"), *filter(None, sys.path)])
    monkeypatch.chdir(tmp_path / "here")
    limits = {"item_seconds": 10, "batch_seconds": 20, "items_per_worker": 10, "memory_gb": 2}
    with VerifierPool("my_own_reward:give", workers=workers, **limits) as pool:
        assert pool.score([("", "", "")])[0].tolist() == [0.5]
    for name in ("unnamed", f"{tmp_path}/here/unnamed", "./unnamed", "unnamed.py", f"{tmp_path}/here/unnamed.py"):
        with pytest.raises(ValueError, match="cannot import"):
            find_reward(f"{name}:give")
    assert not (tmp_path / "ran").exists()
