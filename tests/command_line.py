"""train.py and eval.py as a user runs them, on a policy that trains in seconds."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from types import MappingProxyType
from unittest import mock

import jax
import pytest

from krl.configs.flags import one_line_errors
from krl.report import command as report
from krl.run.rollouts import read_rollouts
from krl.train import train

ROOT = pathlib.Path(__file__).parent.parent
WARM = tempfile.TemporaryDirectory(prefix="krl-sft-")  # the warm starts of all runs of this process
TINY = {
    "steps": 4, "prompts_per_step": 4, "alloc.rule": "knapsack", "alloc.budget": 16, "alloc.n_min": 2, "alloc.n_max": 8,
    "arithmetic.addition": 1,
    "arithmetic.multiplication": 0, "arithmetic.num_warm": 40, "arithmetic.num_train": 12, "arithmetic.num_test": 6,
    "policy.embed_size": 16, "policy.num_heads": 2, "policy.num_kv_heads": 1, "policy.head_size": 4,
    "policy.mlp_size": 32, "policy.unroll": 1, "sft.steps": 300, "sft.batch_size": 32,
    "sft.dir": WARM.name, "sft.learning_rate": 1e-2, "optim.micro_tokens": 64,
    "eval.every": 2, "eval.samples": 2, "checkpoint.every": 2, "data.max_prompt_tokens": 8,
    "sample.max_new_tokens": 4,
}  # fmt: skip


def command(workdir, config="arithmetic", script="train.py", **changes):
    keys = [f"--config.{key}={value}" for key, value in (TINY | changes).items()]
    return [sys.executable, script, "--config", f"configs/{config}.py", "--workdir", str(workdir), *keys]


def environment(home, drawn=False):
    """Nothing of the user's; as many devices as the tests have, since only then what one compiles serves the other.

    A library that draws is missing unless the test looks at what is `drawn`: it takes longer than the run.
    """
    jax_has = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    path = str(ROOT) if drawn else os.pathsep.join(map(str, (ROOT / "tests" / "undrawn", ROOT)))
    return os.environ | jax_has | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def run(workdir, *extra, drawn=False, **changes):
    return subprocess.run(
        [*command(workdir, **changes), *extra], cwd=ROOT, env=environment(workdir.parent, drawn), capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip


def undrawn():
    """In this process a library that draws is missing as long as this lasts."""
    return mock.patch.object(report, "missing_libraries", return_value="nobody looks at the report")


def config_with(config="arithmetic", **changes):
    made = importlib.import_module(f"krl.configs.{config}").get_config()
    made.update_from_flattened_dict(
        {key: str(value) if isinstance(value, os.PathLike) else value for key, value in (TINY | changes).items()}
    )
    return made


def run_here(workdir, config="arithmetic", own=MappingProxyType({}), **changes):
    """The same run in this process, which has its programs already and starts in no time; what `train` returns."""
    with undrawn():
        return train(config_with(config, **changes), workdir, **own)


def told_by(call, *arguments, **named):
    """The one line in which a program refuses."""
    with pytest.raises(SystemExit) as refused, one_line_errors("krl"):
        call(*arguments, **named)
    assert "\n" not in refused.value.code
    return refused.value.code.removeprefix("krl: ")


def rows(workdir, name="metrics"):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def rollouts(workdir):
    """The rollout log, by step, prompt and sample."""
    by = [("step", "ascending"), ("prompt_id", "ascending"), ("sample", "ascending")]
    return read_rollouts(workdir / "rollouts").sort_by(by).to_pylist()


def learnt(workdir):
    """What a run measured, without its times."""
    timed = ("seconds", "memory", "tokens_per_second", "compiles")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows(workdir)]


def files_of(directory):
    """Everything below a directory, with its content and when it was written."""
    found = [directory, *directory.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in sorted(found)}
