"""What a user is told: one plain line that says what was wrong, where, and what to do."""

import errno
import json
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys

import jax.numpy as jnp
import pytest
from absl import flags

from krl.base.masked import segment_moments
from krl.budget import number_groups
from krl.configs import arithmetic
from krl.configs.check import flatten
from krl.configs.flags import define_flags, one_line_errors, own_configs, parse_flags
from krl.eval import command as measuring
from krl.hf.tokenizer import load_tokenizer, train_sentencepiece
from krl.hf.weights import export
from krl.plan import command as plan
from krl.report import command as report
from krl.run.log import format_seconds
from krl.run.metrics import gini
from krl.run.processes import join_processes
from krl.train import train
from tests.command_line import ROOT, config_with, environment, told_by

OWN = "arithmetic, default, gsm8k, maze, operators, qwen2_5_math_7b, qwen3_4b_base, r1_distill_qwen_1_5b, smollm2"
FILES = {
    "broken.py": "x = 1\ndef get_config(:\n",
    "empty.py": "",
    "words.md": "see (\n",
    "divides.py": "def get_config():\n    return 1 / 0\n",
    "exits.py": "raise SystemExit(3)\n",
    "imports.py": "\nimport no_such_module\n",
    "returns.py": "def get_config():\n    return {}\n",
    "asks.py": "def get_config(which):\n    return which\n",
    "bare.py": "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n",
    "typo.py": "from krl.configs import default\ndef get_config():\n    config = default.get_config()\n    config.alloc.bugdet = 3\n    return config\n",
    "none.py": "from krl.configs import default\ndef get_config():\n    config = default.get_config()\n    config.steps = None\n    return config\n",
    "own.py": "from krl.configs import default\ndef get_config():\n    config = default.get_config()\n    config.steps = 7\n    return config\n",
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a few config files."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(line):
    values = flags.FlagValues()
    define_flags(values)
    flags.DEFINE_integer("tokens", 0, "as krl.plan.command has it", flag_values=values)
    parse_flags(["somewhere/train.py", *shlex.split(line)], values)
    return values


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--config.alloc.bugdet=3", "unknown config key alloc.bugdet; did you mean alloc.budget?"),
        ("--config.budget=3", "unknown config key budget; did you mean alloc.budget?"),
        ("--config.learning_rate=1", "unknown config key learning_rate; did you mean sft.learning_rate or optim.learning_rate?"),
        ("--config.zzzz=1", "unknown config key zzzz; krl/configs/default.py has all of them"),
        ("--config.alloc.rule.x=1", "unknown config key alloc.rule.x; did you mean alloc.rule?"),
        ("--config.alloc=3", "config.alloc is a section; change its keys, such as --config.alloc.budget=value"),
        ("--config.steps=abc", "config.steps='abc' must be a whole number"),
        ("--config.steps=2.5", "config.steps='2.5' must be a whole number"),
        ("--config.steps=", "config.steps='' must be a whole number"),
        ("--config.steps", "config.steps needs a value: --config.steps=value"),
        ("--config.steps --workdir x", "config.steps needs a value: --config.steps=value"),
        ("--config.optim.learning_rate=fast", "config.optim.learning_rate='fast' must be a number"),
        ("--config.optim.packed=maybe", "config.optim.packed='maybe' must be true or false"),
        ("--config.optim.packed false", "'false' is not a flag; keys are changed with --config.key=value"),
        ("--config.mesh.shape='a b'", "config.mesh.shape='a b' must be several values with commas, such as (2,4)"),
        ("--wrokdir x", "there is no flag --wrokdir; did you mean --workdir?"),
        ("--budget=3", "there is no flag --budget; did you mean --config.alloc.budget?"),
        ("--tokens=many", "--tokens='many' must be a whole number"),
        ("--workdir", "--workdir needs a value, such as --workdir=runs/first"),
        ("extra --config.steps=1", "'extra' is not a flag; keys are changed with --config.key=value"),
        ("--flagfile=gone", "Unable to open flagfile: [Errno 2] No such file or directory: 'gone'"),
    ],
)  # fmt: skip
def test_a_command_line_that_is_wrong(here, line, told):
    with pytest.raises(SystemExit) as refused:
        parse(f"--config arithmetic {line}")
    assert refused.value.code == f"train.py: {told}"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--workdir x", f"--config is missing; give a file or one of krl's own: {OWN}"),
        ("--config", "--config needs a value, such as --config=arithmetic"),
        ("--config=", "--config needs a value, such as --config=arithmetic"),
        ("--config --workdir x", "--config needs a value, such as --config=arithmetic"),
        ("--workdir --config arithmetic", "--workdir needs a value, such as --workdir=runs/first"),
        ("--config configs/nothing.py", f"there is no config file configs/nothing.py; krl has {OWN}"),
        ("--config arithmetic.yaml", f"there is no config file arithmetic.yaml; krl has {OWN}"),
        ("--config elsewhere/arithmetic.py", f"there is no config file elsewhere/arithmetic.py; krl has {OWN}"),
        ("--config folder", "the config folder is a directory; name a .py file in it"),
        ("--config broken.py", "the config file broken.py is not Python: line 2: invalid syntax"),
        ("--config words.md", "the config file words.md is not Python: line 1: '(' was never closed"),
        ("--config empty.py", "the config file empty.py must have a function get_config() that returns a ConfigDict"),
        ("--config returns.py", "the config file returns.py must have a function get_config() that returns a ConfigDict"),
        ("--config divides.py", "the config file divides.py failed in line 2: ZeroDivisionError: division by zero"),
        ("--config exits.py", "the config file exits.py failed in line 1: SystemExit: 3"),
        ("--config imports.py", "the config file imports.py failed in line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("--config asks.py", "the config file asks.py failed: TypeError: get_config() missing 1 required positional argument: 'which'"),
        ("--config bare.py", "the config file bare.py: there is no config.alloc.budget; begin with krl.configs.default.get_config() and change values"),
        ("--config typo.py", "the config file typo.py: unknown config key alloc.bugdet; did you mean alloc.budget?"),
        ("--config none.py", "the config file none.py: config.steps=None must be a whole number"),
    ],
)  # fmt: skip
def test_a_config_file_that_is_wrong(here, line, told):
    with pytest.raises(SystemExit) as refused:
        parse(line)
    assert refused.value.code == f"train.py: {told}"


def test_a_config_is_a_file_or_one_of_krls_own(here):
    assert ", ".join(own_configs()) == OWN
    for name in ("operators", "operators.py", "configs/operators.py", "krl/configs/operators.py"):
        assert parse(f"--config {name}").config.data.source == "operators"
    assert parse("--config own.py").config.steps == 7
    (here / "configs").mkdir()
    (here / "configs" / "operators.py").write_text(FILES["own.py"])
    assert parse("--config configs/operators.py").config.steps == 7  # a file that exists wins
    assert parse("--config operators").config.steps == 400


def test_keys_may_stand_anywhere_and_the_last_one_counts():
    line = "--config.steps=3 --config=arithmetic --workdir w --config.steps 5 --config.mesh.shape=2,1 --noconfig.optim.packed"
    found = parse(line)
    assert (found.config.steps, found.config.mesh.shape, found.config.optim.packed, found.workdir) == (
        5,
        (2, 1),
        False,
        "w",
    )
    with pytest.raises(AttributeError):
        found.config.colour = 1  # locked


DATA = {"data.source": "dataset", "data.prompt_field": "q", "data.answer_field": "a", "prompts_per_step": 2, "alloc.budget": 8}  # fmt: skip
ROWS = {
    "none.jsonl": None,
    "blank.jsonl": "\n\n",
    "broken.jsonl": '{"q": "1", "a": "2"}\n{"q": broken\n',
    "text.jsonl": '"text"\n',
    "one.jsonl": '{"q": "1", "a": "2"}\n',
    "rows.csv": "q,a\n",
}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.jsonl", "data file none.jsonl does not exist or cannot be read; check the path"),
        ("blank.jsonl", "data file blank.jsonl is empty; it needs a row for each prompt"),
        ("broken.jsonl", "cannot read data file broken.jsonl as json, row 1: JSON parse error: .*; mend or remove that row"),
        ("text.jsonl", "cannot read data file text.jsonl as json, row 0: JSON parse error: .*; mend or remove that row"),
        ("one.jsonl", "the training data has a single row; a run needs some to train on and some to hold out"),
        ("rows.csv", "data file rows.csv must end in .jsonl, .json, .parquet or .arrow"),
    ],
)  # fmt: skip
def test_data_that_is_wrong(here, name, told):
    if ROWS[name] is not None:
        pathlib.Path(name).write_text(ROWS[name])
    said = told_by(train, config_with(**DATA, **{"data.path": name}), "work")
    assert said == told or re.fullmatch(told, said), said


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim.learning_rate": float("inf")}, "config.optim.learning_rate=inf must be a finite number"),
        ({"optim.learning_rate": 1e39}, "config.optim.learning_rate=1e+39 must be at most 3e+38"),
        ({"sft.path": "a.jsonl"}, "config.sft.path='a.jsonl' must be left empty: data.source='arithmetic' reads no data; set it to 'dataset'"),
        ({"mesh.shape": (64,), "alloc.budget": 64, "alloc.n_max": 64, "sft.batch_size": 64}, "mesh shape (64,) needs 64 devices and 8 are here; give config.mesh.shape no more than there are"),
        ({"mesh.axis_names": ("rows",)}, "mesh axis names ('rows',) (config.mesh.axis_names) must be distinct names from ('data', 'fsdp', 'model')"),
        ({"tokenizer.path": "gone"}, "the tokenizer gone does not exist; name a .model file or a checkpoint's directory"),
        ({"policy.path": "gone"}, "config.policy.path='gone': gone is no checkpoint directory: cannot read gone/config.json "
         r"\(No such file or directory\): it does not exist; a checkpoint of a hub must be downloaded first"),
        ({"policy.attention": "fast"}, "config.policy: attention 'fast' must be one of ['auto', 'cudnn', 'splash', 'xla']"),
        ({"sft.dir": "own.py/x"}, r"cannot write own.py/x/\w+: \[Errno 20\] Not a directory: .*; choose another config.sft.dir"),
        ({"checkpoint.dir": "own.py"}, r"cannot write checkpoints to own.py/checkpoints: .*; choose another directory"),
        ({"checkpoint.dir": "ftp://x/y"}, "config.checkpoint.dir='ftp://x/y' must be a directory, or one in gs://, s3:// or az://"),
        ({"data.reward": "guess"}, "reward 'guess' must be one of ['exact', 'math', 'math_or_number', 'reasoning_gym'] or look like package.module:function"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong(here, changes, told):
    said = told_by(train, config_with(**changes), "work")
    assert said == told or re.fullmatch(told, said), said


def test_places_that_are_wrong(here):
    """What holds no run, or cannot hold one."""
    assert (
        told_by(train, config_with(), "own.py")
        == "cannot write the work directory own.py: it is a file; choose another --workdir"
    )
    run_or_policy = "gone holds no run; give the --workdir of one, or a checkpoint with --config.policy.path=DIR"
    assert told_by(measuring.measure, config_with(), "gone") == run_or_policy
    assert told_by(export, "gone", "out") == "gone holds no run; give the --workdir of a train.py run"
    for place in ("gone", "own.py"):
        told = told_by(report.write, [pathlib.Path(place)], pathlib.Path("out"))
        assert told == f"{place} holds no run; give the --workdir of a run that has taken a step"
    said = told_by(plan.plan, config_with(), "v5p:no")
    assert said.startswith("cannot plan for --topology=v5p:no (")
    assert said.endswith("; it needs libtpu: pip install 'jax[tpu]'")


def test_a_notebook_is_told_of_a_key_that_is_none(here):
    config = config_with()
    config.alloc.bugdet = 3
    assert told_by(train, config, "work") == "unknown config key alloc.bugdet; did you mean alloc.budget?"
    assert not (here / "work").exists()


def test_a_benchmark_none_of_whose_prompts_fits_is_named(here):
    for name in ("aime", "amc"):
        (here / f"{name}.jsonl").write_text(json.dumps({"problem": "9" * (3 if name == "aime" else 40), "answer": "1"}) + "\n")  # fmt: skip
    (here / "work" / "policy").mkdir(parents=True)
    config = config_with(**{"eval.sets": "aime,amc", "eval.dir": "."})
    (here / "work" / "config.json").write_text(json.dumps(flatten(config)))
    train_sentencepiece(["123456789"], here / "work" / "policy" / "tokenizer.model", vocab_size=64, byte_fallback=False)
    assert (
        told_by(measuring.measure, config, "work")
        == "amc: none of 1 prompts has 1 to 8 tokens (the shortest has 40); raise config.data.max_prompt_tokens"
    )


def fail_outside(error):
    raise error


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: format_seconds(float("nan")), "ValueError: cannot convert float NaN to integer"),  # Python, called by krl
        (lambda: number_groups([["a"], ["b", "c"]]), "ValueError: setting an array element with a sequence"),  # NumPy
        (lambda: gini(jnp.ones((2, 3)).reshape(4)), "TypeError: cannot reshape"),  # JAX
        (lambda: segment_moments(jnp.ones(3), jnp.zeros(2, int), 2), "ValueError: "),  # JAX, called by krl
        (lambda: fail_outside(ValueError("of a function of the user's")), "ValueError: of a function of the user's"),
        (lambda: fail_outside(FileNotFoundError(errno.ENOENT, "gone")), "FileNotFoundError: [Errno 2] gone"),
        (lambda: fail_outside(RuntimeError("a device")), "RuntimeError: a device"),
    ],
)  # fmt: skip
def test_what_a_user_cannot_mend_ends_with_a_traceback_that_is_kept(tmp_path, capsys, call, told):
    file = tmp_path / "error.txt"
    with pytest.raises(SystemExit) as ended, one_line_errors("krl", file):
        call()
    assert ended.value.code.startswith(f"krl: {told}")
    assert ended.value.code.endswith(f" (the traceback is above and in {file})")
    assert "\n" not in ended.value.code
    assert file.read_text().startswith("Traceback (most recent call last):")
    assert "in test_what_a_user_cannot_mend" in file.read_text()
    assert capsys.readouterr().err == file.read_text() + "\n"


@pytest.mark.parametrize(
    "error", [OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EROFS, errno.EACCES)]
)
def test_what_the_system_says_of_a_place_is_one_line(tmp_path, capsys, error):
    with pytest.raises(SystemExit) as ended, one_line_errors("krl", tmp_path / "error.txt"):
        fail_outside(error)
    assert ended.value.code == f"krl: {error}"
    assert (capsys.readouterr().err, list(tmp_path.iterdir())) == ("", [])


def test_a_traceback_that_cannot_be_kept_is_shown_all_the_same(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors("krl", tmp_path / "gone" / "error.txt"):
        fail_outside(KeyError("x"))
    assert ended.value.code == "krl: KeyError: 'x' (the traceback is above)"
    assert "in fail_outside" in capsys.readouterr().err


def test_what_krl_raises_itself_stays_a_value_error_and_one_line(here, capsys):
    """Also where it was raised for another error, or on the way out of a context."""
    for call in (
        lambda: load_tokenizer("gone"),
        lambda: load_tokenizer(here / "own.py"),
        lambda: train_sentencepiece(["a"], here / "t.model", vocab_size=1, byte_fallback=False),
    ):
        with pytest.raises(ValueError, match=r"gone|own\.py|cannot train") as raised:
            call()
        assert told_by(call) == str(raised.value)
    assert capsys.readouterr().err == ""
    assert not list(here.glob("t.model*"))


def test_a_port_that_is_taken(here):
    """JAX would crash."""
    joined = arithmetic.get_config().distributed
    joined.processes = 2
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        joined.coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
        said = told_by(join_processes, joined)
    assert (
        said
        == f"config.distributed.coordinator='{joined.coordinator}': cannot listen on port {joined.coordinator[10:]} (Address already in use); choose another port"
    )
    joined.coordinator = "somewhere"
    assert (
        told_by(join_processes, joined)
        == "config.distributed.coordinator='somewhere' must be host:port, such as 127.0.0.1:9876"
    )


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["eval.py", "--config=arithmeti"], f"eval.py: there is no config file arithmeti; krl has {OWN}"),
        (["-m", "krl.plan", "--workdir", "x"], f"krl.plan: --config is missing; give a file or one of krl's own: {OWN}"),
        (["-m", "benchmarks.discount"], "benchmarks.discount: name work directories of runs"),
    ],
)  # fmt: skip
def test_programs_end_in_that_line(tmp_path, command, told):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{told}\n")
