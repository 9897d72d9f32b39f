"""A Hugging Face checkpoint through fine-tuning, training, export and benchmarks, as a user runs them."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from krl import hf
from tests.bpe import write_qwen
from tests.command_line import ROOT, environment, rows, run, run_here, told_by

HUGGING_FACE = {
    "data.name": "math", "data.reward": "tests.rewards:odd_letters", "data.template": "chat_boxed",
    "data.max_prompt_tokens": 160, "sample.max_new_tokens": 6, "verify.workers": 1, "policy.dtype": "float32",
    "policy.remat": "dots", "sft.steps": 0, "optim.updates_per_step": 2, "optim.learning_rate": 1e-3, "eval.every": 0,
    "steps": 3, "mesh.shape": (1,),
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The paper's config from a tiny Qwen 2.5 checkpoint: what it is changed to, and the directory of its files."""
    folder = tmp_path_factory.mktemp("hf")
    start = write_qwen(folder / "start")
    problems = [{"problem": f"What is {a}+{b}?", "answer": str(a + b)} for a in range(4) for b in range(4)]
    for name in ("math", "aime", "amc"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return HUGGING_FACE | {"policy.path": start, "data.path": folder / "math.jsonl", "eval.prompts": 3}, folder


@pytest.fixture(scope="module")
def hugging_face(start):
    """A run of it: its keys, its directory, what it printed."""
    keys, folder = start
    done = run(folder / "work", config="qwen2_5_math_7b", **keys)
    assert done.returncode == 0, done.stderr
    return keys, folder, done.stdout


@pytest.mark.slow
def test_a_hugging_face_checkpoint_trains_and_is_exported(hugging_face, tmp_path):
    _, folder, _ = hugging_face
    trained = rows(folder / "work")
    assert len(trained) == 3
    assert trained[-1]["verifier/errors"] == 0
    assert max(row["reward_mean"] for row in trained) > 0
    assert trained[-1]["importance_mean"] == pytest.approx(1.0, abs=0.01)  # sampler and learner agree
    out = subprocess.run(
        [sys.executable, "-m", "krl.hf", "export", folder / "work", tmp_path / "out"],
        cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "Warning" not in out.stderr
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "start" / name).read_bytes()
    config, params = hf.load_hf(tmp_path / "out")
    _, before = hf.load_hf(folder / "start")
    assert config.stored_dtype == "bfloat16"
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), params, before)
    assert 1e-5 < max(jax.tree.leaves(moved)) < 0.1


@pytest.mark.slow
def test_a_run_from_a_checkpoint_continues_without_it(hugging_face, tmp_path, capsys):
    keys, folder, _ = hugging_face
    shutil.copytree(folder / "work", tmp_path / "work")
    keys = keys | {"steps": 4}
    os.rename(folder / "start", folder / "moved")
    try:
        run_here(tmp_path / "work", config="qwen2_5_math_7b", **keys)
    finally:
        os.rename(folder / "moved", folder / "start")
    assert "continuing from step 3" in capsys.readouterr().out
    assert len(rows(tmp_path / "work")) == 4


@pytest.mark.slow
def test_eval_measures_a_checkpoint_on_benchmarks_and_goes_on_where_it_was_killed(hugging_face, tmp_path):
    keys, folder, _ = hugging_face
    keys = keys | {"eval.sets": "aime,amc", "eval.dir": folder, "eval.samples": 4, "eval.prompts": 0}
    first = run(tmp_path / "base", config="qwen2_5_math_7b", script="eval.py", **keys)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "base/results.json").read_text())
    for name in ("aime", "amc"):
        (file,) = (tmp_path / "base/eval").glob(f"*/{name}.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()][1:]
        assert len(samples) == 64
        assert results["sets"][name]["avg@4"]["value"] == pytest.approx(np.mean([row["reward"] for row in samples]))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = run(tmp_path / "base", config="qwen2_5_math_7b", script="eval.py", **keys)
    assert file.read_bytes() == whole
    assert again.stdout.splitlines()[-8:] == first.stdout.splitlines()[-8:]


@pytest.mark.slow
def test_fine_tuning_alone_on_packed_pairs(hugging_face, tmp_path, capsys):
    keys, _, _ = hugging_face
    pairs = [{"prompt": f"What is {a}+1?", "completion": f"It is {a + 1}."} for a in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    sft = {"sft.steps": 40, "sft.path": tmp_path / "pairs.jsonl", "sft.row_tokens": 512, "sft.batch_size": 2}
    run_here(tmp_path / "work", config="qwen2_5_math_7b", **keys | sft | {"steps": 0, "sft.learning_rate": 1e-2})
    said = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in said if line.startswith("fine-tuning")]
    assert losses[-1] < losses[0]
    assert (tmp_path / "work/checkpoints/0").is_dir()


@pytest.mark.slow
def test_a_penalty_for_leaving_the_start_is_measured(hugging_face, tmp_path):
    keys, _, _ = hugging_face
    run_here(tmp_path / "work", config="qwen2_5_math_7b", **keys | {"loss.kl_coefficient": 0.1, "steps": 2})
    assert rows(tmp_path / "work")[-1]["kl"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy.path": "nowhere"}, "nowhere"),
        ({"data.reward": "no.such:thing"}, "no.such"),
        ({"data.template": "shout"}, "config.data.template='shout' must be one of"),
        ({"data.name": "math", "data.path": "missing.jsonl"}, "missing.jsonl does not exist"),
    ],
)
def test_bad_paths_and_names_are_one_line(start, tmp_path, changes, message):
    assert message in told_by(run_here, tmp_path / "work", config="qwen2_5_math_7b", **start[0] | changes)


def test_an_unknown_benchmark_is_named_before_any_is_loaded(start, tmp_path):
    keys = start[0] | {"eval.sets": "aime,quiz"}
    refused = run(tmp_path / "base", config="qwen2_5_math_7b", script="eval.py", **keys)
    assert refused.returncode != 0
    assert "config.eval.sets names 'quiz'; the sets are gsm8k" in refused.stderr


def test_a_broken_checkpoint_claims_no_work_directory(start, tmp_path):
    keys, folder = start
    shutil.copytree(folder / "start", tmp_path / "start")
    config = tmp_path / "start" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"intermediate_size": 32', '"intermediate_size": 48'))
    keys = keys | {"policy.path": tmp_path / "start", "steps": 1}
    assert "asks for (48, 16)" in told_by(run_here, tmp_path / "work", config="qwen2_5_math_7b", **keys)
    config.write_text(whole)
    assert run_here(tmp_path / "work", config="qwen2_5_math_7b", **keys).metrics["step"] == 1
