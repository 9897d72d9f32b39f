"""What a run leaves on disk: metrics, checkpoints, claims."""

import errno
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from krl import learn, policy
from krl.base.digest import digest
from krl.base.sharding import make_mesh, named_sharding, tree_sharding
from krl.base.types import Rollouts
from krl.configs import (
    arithmetic,
    default,
    gsm8k,
    maze,
    operators,
    qwen2_5_math_7b,
    qwen3_4b_base,
    r1_distill_qwen_1_5b,
    smollm2,
)
from krl.configs.check import FREE_KEYS, check, flatten
from krl.run import checkpoint, lock
from krl.run import clock as clock_module
from krl.run import log as log_module
from krl.run.checkpoint import Checkpoints, claim_workdir, open_workdir, stop_on_signal, write_json
from krl.run.clock import CompileCounter, keep_compilations, memory_used, profile
from krl.run.lock import hold_workdir
from krl.run.log import MetricsLog, format_seconds, progress, read_rows, status_line
from krl.run.metrics import gini, mean_of, over_processes, step_metrics
from krl.run.setup import NAMES
from krl.run.sft import encode_pairs
from krl.tasks import EncodedTasks, TaskSet
from tests import tiny
from tests.command_line import files_of

CONFIGS = [arithmetic, gsm8k, maze, operators, qwen2_5_math_7b, qwen3_4b_base, r1_distill_qwen_1_5b, smollm2]


@pytest.mark.parametrize("module", CONFIGS)
def test_shipped_configs_pass_their_check(module):
    config = module.get_config()
    check(config, NAMES)
    assert set(FREE_KEYS) <= set(flatten(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alloc.n_min": 2, "alloc.budget": 127}, r"config.alloc.budget=127 must be between 128 .* and 8192"),
        ({"alloc.n_min": 2, "alloc.budget": 8194}, r"config.alloc.budget=8194 must be between 128 .* and 8192"),
        ({"alloc.n_min": -1}, "config.alloc.n_min=-1 must be at least 0"),
        ({"alloc.rule": "vip"}, r"config.alloc.rule='vip' must be one of .*'reach'.*, or alloc.n_min at least 1"),
        (
            {"alloc.n_min": 2, "alloc.rule": "mopps"},
            "config.alloc.rule='mopps' must be another one, or alloc.n_min must be 0",
        ),
        ({"alloc.budget": 510}, "config.alloc.budget=510 must be a multiple of alloc.group=4"),
        (
            {"alloc.rule": "pilot_commit", "alloc.candidates": 0},
            "config.alloc.candidates=0 must be at least 1 with the rule 'pilot_commit'",
        ),
        (
            {"loss.scale": "mean", "loss.overlong_tokens": 2},
            "config.loss.overlong_tokens=2 must be 0 with loss.scale='mean'",
        ),
        ({"alloc.group": 1}, "config.alloc.group=1 must be from 2 to alloc.n_max=128"),
        ({"alloc.candidates": 100}, "config.alloc.candidates=100 must be 0 for all of the data, or at least .* = 128"),
        ({"alloc.scouts": 2}, "config.alloc.scouts=2 must be 0 with alloc.n_min=0"),
        ({"loss.scale": "max"}, "config.loss.scale='max' must be one of"),
        ({"alloc.n_min": 200}, "config.alloc.n_min=200 must be at most alloc.n_max=128"),
        ({"alloc.rule": "greedy"}, "config.alloc.rule='greedy' must be one of"),
        ({"alloc.discount": 1.5}, "config.alloc.discount=1.5 must be between 0 and 1"),
        ({"optim.micro_tokens": 0}, "config.optim.micro_tokens=0 must be at least 1"),
        ({"loss.average": "batch"}, "config.loss.average='batch' must be one of"),
        ({"loss.surrogate": "ppg"}, "config.loss.surrogate='ppg' must be one of"),
        ({"loss.kl_estimator": "k4"}, "config.loss.kl_estimator='k4' must be one of"),
        ({"loss.overlong_tokens": 8}, "config.loss.overlong_tokens=8 must be at most sample.max_new_tokens=7"),
        ({"optim.updates_per_step": 3}, "config.alloc.budget=512 must be a multiple of optim.updates_per_step=3"),
        ({"mesh.shape": (3,)}, "config.alloc.budget=512 must be a multiple of the 3 devices"),
        ({"mesh.shape": (2, 2)}, "config.mesh.shape=.* must be as long as"),
        ({"mesh.shape": (0,)}, "config.mesh.shape=.* must be whole numbers"),
        ({"sample.stop": ("",)}, r"config.sample.stop=\(''?,\) must be texts with something in them"),
        ({"sample.stop": (5,)}, r"config.sample.stop=\(5,\) must be texts"),
        ({"mesh.decode": (2,)}, r"config.mesh.decode=\(2,\) must be \(\) or as many devices as mesh.shape=\(1,\)"),
        ({"data.source": "web"}, "config.data.source='web' must be"),
        ({"data.source": "dataset"}, "config.data.name='' must be a data set"),
        ({"data.source": "dataset", "data.path": "x.jsonl"}, "config.data.prompt_field='' must be the field"),
        (
            {"data.source": "dataset", "data.name": "math", "data.answer_field": "gold"},
            "data.answer_field='gold' must be left",
        ),
        ({"eval.top_p": 0.0}, "config.eval.top_p=0.0 must be above 0"),
        ({"data.template": "Q:"}, "config.data.template='Q:' must be one of .* or a text with"),
        (
            {"sample.temperature": 0.0},
            "config.sample.temperature=0.0 must be at least 0.001; sample.top_k=1 is coldest",
        ),
        (
            {"alloc.n_min": 2, "arithmetic.num_train": 10},
            "config.arithmetic.num_train=10 must be at least prompts_per_step=64",
        ),
        ({"arithmetic.num_train": 0}, "config.arithmetic.num_train=0 must be at least 1"),
        ({"seed": -1}, "config.seed=-1 must be at least 0"),
        ({"sample.slots": -1}, "config.sample.slots=-1 must be at least 0"),
        ({"sample.temperature": 1e-9}, "config.sample.temperature=1e-09 must be at least 0.001"),
        ({"eval.temperature": 1e-9}, "config.eval.temperature=1e-09 must be 0 or at least 0.001"),
        ({"optim.beta1": 1.0}, "config.optim.beta1=1.0 must be below 1"),
        ({"optim.beta2": 1.0}, "config.optim.beta2=1.0 must be below 1"),
        ({"seed": 2**32 - 1}, "config.seed=4294967295 must be at most 4294967294"),
        ({"steps": 2**31}, "config.steps=2147483648 must be at most 2147483647"),
        ({"alloc.n_max": 65537}, "config.alloc.n_max=65537 must be at most alloc.budget, or 65536"),
        ({"mesh.shape": (), "mesh.axis_names": ()}, r"config.mesh.shape=\(\) must be the devices along one axis"),
        ({"mesh.shape": (True,)}, "config.mesh.shape=.* must be whole numbers"),
        (
            {"mesh.shape": (2, 1), "mesh.axis_names": ("data", "fsdp"), "mesh.decode": (-1, -2)},
            "config.mesh.decode=.* must be whole",
        ),
        ({"mesh.decode": (1.0,)}, "config.mesh.decode=.* must be whole numbers"),
        ({"alloc.prior_width": 2**24 + 1}, "config.alloc.prior_width=16777217 must be at most 16777216"),
        ({"arithmetic.num_warm": 0}, "config.arithmetic.num_warm=0 must be at least 1"),
        ({"data.max_train": 10}, "config.data.max_train=10 must be left empty: data.source='arithmetic' reads no data"),
        ({"data.answer_field": "a"}, "config.data.answer_field='a' must be left empty"),
        (
            {"arithmetic.addition": 0, "arithmetic.multiplication": 0},
            "config.arithmetic.addition=0 must be at least 1 where no other",
        ),
    ],
)
def test_impossible_configs_are_refused_by_key_and_fix(changes, message):
    config = arithmetic.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message) as error:
        check(config, NAMES)
    assert "\n" not in str(error.value)


USUAL = flatten(default.get_config())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39], ids=["nan", "inf", "-inf", "1e39"])  # fmt: skip
@pytest.mark.parametrize("key", [key for key, value in USUAL.items() if type(value) is float])
def test_numbers_that_no_device_can_hold_are_refused_by_key(key, value):
    config = default.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=re.escape(f"config.{key}=")):
        check(config, NAMES)


@pytest.mark.parametrize("key", [key for key, value in USUAL.items() if type(value) is int])
def test_whole_numbers_beyond_32_bits_are_refused_by_key(key):
    config = default.get_config()
    config.update_from_flattened_dict({key: 2**33})
    with pytest.raises(ValueError, match=re.escape(f"config.{key}={2**33} must be")):
        check(config, NAMES)


def test_a_work_directory_belongs_to_one_config(tmp_path):
    workdir, tokenizer = tmp_path / "work", tmp_path / "t.model"
    tokenizer.write_bytes(b"pieces")
    config = {"seed": 0, "steps": 5, "mesh.shape": (1,)}
    open_workdir(workdir, config | {"seed": 9}, ())
    open_workdir(workdir, config, ("steps",))  # nobody's until it is claimed
    copied: Any = SimpleNamespace(files=(tokenizer,), eos_ids=(1, 7))
    claim_workdir(workdir, config, '{"model_type": "llama"}', copied)
    assert json.loads((workdir / "policy/generation_config.json").read_text()) == {"eos_token_id": [1, 7]}
    assert (workdir / "policy/tokenizer.model").read_bytes() == b"pieces"
    assert (workdir / "policy/config.json").read_text() == '{"model_type": "llama"}'
    open_workdir(workdir, config | {"steps": 9}, ("steps",))
    with pytest.raises(ValueError, match=r"config.seed=0, not 1"):
        open_workdir(workdir, config | {"seed": 1}, ("steps",))
    open_workdir(workdir, config | {"log.new": 1}, ("steps", "log.new"))  # a later version has keys that may change
    with pytest.raises(ValueError, match="other keys"):
        open_workdir(workdir, config | {"speed": 1}, ("steps",))
    with pytest.raises(ValueError, match="choose another --workdir"):
        open_workdir(tokenizer / "below", config, ())
    (workdir / "config.json").write_text("{")
    with pytest.raises(ValueError, match="choose another --workdir"):
        open_workdir(workdir, config, ())


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch, reason):
    """Also one that is there, as on a file system that is mounted for reading; the error is the system's own."""

    def refuse(path, *_, **__):
        raise OSError(reason, os.strerror(reason), str(path))

    monkeypatch.setattr(pathlib.Path, "touch", refuse)
    with pytest.raises(ValueError, match=f"^cannot write the work directory .*{os.strerror(reason)}.*; choose another"):
        open_workdir(tmp_path, {"seed": 0}, ())
    monkeypatch.undo()
    for place in ("/proc/krl", "/dev/null/krl"):
        with pytest.raises(
            ValueError, match=rf"^cannot write the work directory {place}: .*; choose another"
        ) as refused:
            open_workdir(pathlib.Path(place), {"seed": 0}, ())
        assert "\n" not in str(refused.value)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    mesh = make_mesh((4,), ("data",))
    state = {"a": jax.device_put(jnp.arange(8.0), named_sharding(mesh, "batch")), "b": jnp.int32(3)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore({"state": state}) is None
        for step in (1, 2, 3):
            checkpoints.save(step, {"state": {**state, "b": jnp.int32(step)}})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        step, found = checkpoints.restore({"state": state})
        assert step == 3
        np.testing.assert_array_equal(found["state"]["a"], state["a"])
        assert found["state"]["a"].sharding.is_equivalent_to(state["a"].sharding, 1)
        assert int(found["state"]["b"]) == 3
        with pytest.raises(ValueError, match="cannot read checkpoint"):
            checkpoints.restore({"state": {"a": jnp.zeros(5), "b": jnp.int32(0)}})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax
@pytest.mark.parametrize("harm", ["truncated", "emptied", "removed", "one truncated", "one emptied", "one removed", "no tree", "nothing"])  # fmt: skip
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_it_is_used(tmp_path, harm, capsys):
    state = {"a": jnp.arange(2000.0), "b": jnp.int32(0)}
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"state": {**state, "b": jnp.int32(step)}, "belief": {"c": jnp.ones(2)}})
    newest = tmp_path / "checkpoints" / "3"
    files = [path for path in newest.rglob("*") if path.is_file()]
    if harm.startswith("one "):  # the one with the arrays
        files, harm = [max(files, key=lambda path: path.stat().st_size)], harm.removeprefix("one ")
    if harm == "no tree":
        shutil.rmtree(newest / "belief")
    elif harm == "nothing":
        shutil.rmtree(newest)
        newest.mkdir()
    for path in files if harm in ("truncated", "emptied", "removed") else ():
        if harm == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if harm == "truncated" else 0])
    like = {"state": state, "belief": {"c": jnp.ones(2)}}
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        step, found = checkpoints.restore(like)
        assert (step, int(found["state"]["b"])) == (2, 2)
        if harm != "nothing":  # which Orbax takes for no checkpoint
            assert "krl: checkpoint 3 cannot be read" in capsys.readouterr().out
            assert len(list((tmp_path / "damaged").iterdir())) == 1
        checkpoints.save(3, like)
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        assert checkpoints.restore(like)[0] == 3


def test_a_checkpoint_tells_of_itself_and_takes_the_place_of_later_ones(tmp_path):
    state = {"a": jnp.arange(3)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.about_newest() == {}
        checkpoints.save(1, {"state": state})
        checkpoints.save(2, {"state": state}, {"step": 2, "config": {"mesh.shape": [8]}})
        checkpoints.save(3, {"state": state})
        assert checkpoints.restore({"state": state})[1]["about"] == checkpoints.about_newest() == {}
        checkpoints.save(4, {"state": state})  # and is still being written
        checkpoints.save(2, {"state": state}, {"never": "written"})
        step, found = checkpoints.restore({"state": state})
        assert (step, found["about"]) == (2, {"step": 2, "config": {"mesh.shape": [8]}})
        assert checkpoints.about_newest() == found["about"]
        checkpoints.save(3, {"state": state}, {"step": 3})
        assert checkpoints.about_newest() == {"step": 3}


def test_checkpoints_may_lie_in_object_storage(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("orbax.checkpoint.CheckpointManager", lambda directory, **_: asked.append(str(directory)))
    monkeypatch.chdir(tmp_path)
    for given in ("gs://bucket/run/checkpoints", "s3://bucket/run/checkpoints", "run/checkpoints"):
        Checkpoints(given, keep=1)
    assert asked == ["gs://bucket/run/checkpoints", "s3://bucket/run/checkpoints", f"{tmp_path}/run/checkpoints"]


def test_checkpoints_that_are_all_damaged_are_refused_by_name_and_stay_where_they_are(tmp_path):
    like = {"state": {"a": jnp.ones(200)}}
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, like)
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        with pytest.raises(
            ValueError, match=f"^cannot read checkpoint {tmp_path / 'checkpoints' / '2'}: .*"
        ) as refused:
            checkpoints.restore(like)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "damaged").exists()


def test_a_checkpoint_that_another_process_cannot_read_is_used_by_none(tmp_path, monkeypatch, capsys):
    like = {"state": {"a": jnp.ones(2)}}
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, like)
    # Of all processes, to "does it answer?" and "did one fail?" for either checkpoint, and to "has one moved it?".
    answers = [False, True, False, False, False]
    monkeypatch.setattr(checkpoint, "any_process", lambda flag: answers.pop(0) or flag)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.restore(like, move_aside=False)[0] == 1
        assert not (tmp_path / "damaged").exists()
        answers[:] = [False, True, False, False, False]
        assert checkpoints.restore(like)[0] == 1
        assert not answers
    assert (
        "krl: checkpoint 2 cannot be read (another process could not); going on from the one before it, 1"
        in capsys.readouterr().out
    )


def told_once(monkeypatch, manager, *errors):
    """Let the next reads of a manager fail so, each once."""
    left, restore = list(errors), manager.restore

    def fail_or_restore(*arguments, **options):
        if left:
            raise left.pop(0)
        return restore(*arguments, **options)

    monkeypatch.setattr(manager, "restore", fail_or_restore)


def caused_by(error):
    """As Orbax wraps what TensorStore says."""
    wrapped = Exception("Encountered error while reading array index")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        TimeoutError("the bucket"),
        PermissionError(errno.EACCES, "Permission denied"),
        caused_by(ValueError("UNAVAILABLE: HTTP response code 503")),
        caused_by(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")),
        RuntimeError("what a package for buckets raises"),
    ],
)
def test_a_place_that_does_not_answer_is_asked_again_and_no_checkpoint_is_moved(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(checkpoint, "_PAUSES", (0.01, 0.02))
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"state": {"a": jnp.full(2, step)}}, {"step": step})
        told_once(monkeypatch, checkpoints._manager, error, error)
        step, found = checkpoints.restore({"state": {"a": jnp.ones(2, int)}})
        assert (step, found["state"]["a"].tolist(), found["about"]) == (2, [2, 2], {"step": 2})
        assert capsys.readouterr().out.count("krl: checkpoint 2 does not answer (") == 2
        before = files_of(tmp_path)
        told_once(monkeypatch, checkpoints._manager, error, error, error)
        with pytest.raises(ValueError, match=r"^cannot reach checkpoint .*/checkpoints/2: .*; it was left as it is"):
            checkpoints.restore({"state": {"a": jnp.ones(2, int)}})
        assert files_of(tmp_path) == before


def test_a_full_disk_is_one_line_and_leaves_older_checkpoints(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, {"state": {"a": jnp.ones(2)}})
        checkpoints._manager.wait_until_finished()
        for error in (
            OSError(28, "No space left on device"),
            ValueError("RESOURCE_EXHAUSTED: No space left on device [28]"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(checkpoints._manager, "save", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
                with pytest.raises(
                    ValueError, match=r"^no space left to write a checkpoint in .*; those that are there"
                ):
                    checkpoints.save(2, {"state": {"a": jnp.ones(2)}})
        assert checkpoints.restore({"state": {"a": jnp.ones(2)}})[0] == 1


def hold(workdir, seconds):
    code = f"import pathlib, time; from krl.run.lock import hold_workdir\nwith hold_workdir(pathlib.Path({str(workdir)!r})):\n    print('held', flush=True); time.sleep({seconds})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def holder(workdir):
    """The one file of a lock."""
    (file,) = (workdir / "running").iterdir()
    return file


def leave_lock(workdir, name, beat=0):
    """What a process of that name leaves when it is killed."""
    (workdir / "running").mkdir(parents=True)
    (workdir / "running" / name).write_text(str(beat))
    return workdir / "running" / name


def test_a_second_run_on_a_directory_is_refused_while_the_first_lives(tmp_path):
    first = hold(tmp_path, 100)
    assert first.stdout.readline() == "held\n"
    left = files_of(tmp_path)
    with pytest.raises(ValueError, match=f"in use by process {first.pid} on .*; stop that run"):
        hold_workdir(tmp_path).__enter__()
    assert files_of(tmp_path) == left
    first.kill()
    first.wait()
    with hold_workdir(tmp_path):  # what a crash leaves is taken over at once
        assert holder(tmp_path).name.startswith(f"{os.getpid()}_")
        second = hold(tmp_path, 0)
        assert "in use by process" in second.communicate(timeout=60)[1]
        with pytest.raises(
            ValueError, match=f"in use by process {os.getpid()}"
        ):  # such as another thread of a notebook
            hold_workdir(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []
    assert hold(tmp_path, 0).wait(timeout=60) == 0


def test_a_run_of_another_machine_lives_while_its_lock_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    elsewhere = leave_lock(tmp_path, f"{os.getpid()}_1_there_0_another_host", 7)
    beat = threading.Timer(0.15, elsewhere.write_text, ["8"])
    beat.start()
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on another_host;"):
        hold_workdir(tmp_path).__enter__()
    beat.join()
    with hold_workdir(tmp_path):  # it has not changed for three beats
        assert holder(tmp_path).read_text() == "8"
        time.sleep(0.25)
        assert holder(tmp_path).read_text() in "123"
    for other in ("no such name", "_", ".nfs0001"):
        leave_lock(tmp_path, other)
        with hold_workdir(tmp_path):
            assert holder(tmp_path).name.startswith(f"{os.getpid()}_")
    with hold_workdir(tmp_path), monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError()))
        with pytest.raises(ValueError, match="in use by process"):  # another user's process lives too
            hold_workdir(tmp_path).__enter__()


def test_a_process_that_lost_its_directory_while_it_was_halted_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    with hold_workdir(tmp_path):
        taken = holder(tmp_path).rename(tmp_path / "running" / "1_1_there_0_another")
        assert ended.wait(10)
        time.sleep(0.1)
        assert (holder(tmp_path), taken.read_text()) == (taken, "0")  # its beat is the other's to write
    assert holder(tmp_path) == taken
    assert "is gone: this process was halted and another has taken over; it ends" in capsys.readouterr().err


RACE = """
import multiprocessing, pathlib, socket, sys
from krl.run.lock import _place, hold_workdir

context = multiprocessing.get_context("fork")
places = sorted(pathlib.Path(sys.argv[1]).iterdir())
start, tried, wins = context.Barrier(4), context.Barrier(4), context.Array("i", len(places))
for place in places[::2]:  # left by process 1, which was born at another time
    (place / "running").mkdir()
    (place / "running" / f"1_0_{_place()}_0_{socket.gethostname()}").write_text("0")

def race():
    for number, place in enumerate(places):
        start.wait(30)
        try:
            with hold_workdir(place):
                with wins.get_lock():
                    wins[number] += 1
                tried.wait(30)
        except ValueError as refused:
            assert "in use by process" in str(refused)
            tried.wait(30)

racers = [context.Process(target=race) for _ in range(4)]
for racer in racers:
    racer.start()
for racer in racers:
    racer.join(60)
    assert racer.exitcode == 0
print(set(wins))
"""


def test_of_several_that_start_at_the_same_instant_exactly_one_gets_the_directory(tmp_path):
    """New ones, and ones whose lock a killed process left."""
    for number in range(100):
        (tmp_path / f"{number:02}").mkdir()
    done = subprocess.run([sys.executable, "-c", RACE, tmp_path], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("{1}\n", 0), done.stderr
    assert list(tmp_path.glob("*/*")) == []


def test_an_unfinished_checkpoint_is_ignored(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, {"state": {"a": jnp.ones(2)}})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore({"state": {"a": jnp.ones(2)}})[0] == 1


def test_a_continued_log_drops_later_rows_and_broken_ones(tmp_path):
    with MetricsLog(tmp_path, first_step=0) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": 1.0 if step < 3 else float("nan")})
            log.write_groups(step, dict.fromkeys(("counts", "scored", "successes", "belief"), np.array([step])))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert read_rows(tmp_path / "metrics.jsonl")[-1] == {"step": 3, "loss": None}
    with MetricsLog(tmp_path, first_step=2) as log:
        log.write(3, {"loss": 5.0})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["loss"] == 5.0
    assert [row["counts"] for row in read_rows(tmp_path / "groups.jsonl")] == [[1], [2]]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_log_of_evaluations_is_continued_as_the_metrics_are(tmp_path):
    with MetricsLog(tmp_path, first_step=0) as log:
        for step in (0, 2, 4):
            log.write_evaluation(
                step, rollouts_total=8 * step, samples=4, solved=np.array([0, step, 4]), said=[("x", None)]
            )
    row = {"step": 2, "rollouts_total": 16, "samples": 4, "solved": [0, 2, 4], "said": [["x", None]]}
    assert read_rows(tmp_path / "evaluations.jsonl")[1] == row
    with MetricsLog(tmp_path, first_step=3):
        pass
    assert [row["step"] for row in read_rows(tmp_path / "evaluations.jsonl")] == [0, 2]


def test_a_run_that_begins_anew_does_not_keep_its_row_of_step_0(tmp_path):
    for _ in range(2):
        with MetricsLog(tmp_path, first_step=0) as log:
            log.write(0, {"eval/accuracy": 0.5})
            log.write_evaluation(0, rollouts_total=0, samples=1, solved=np.array([1, 0]))
    assert len(read_rows(tmp_path / "metrics.jsonl")) == len(read_rows(tmp_path / "evaluations.jsonl")) == 1


def test_a_digest_tells_parameters_apart_and_not_their_layout():
    params = tiny.params()
    mesh = make_mesh((4, 2), ("fsdp", "model"))
    spread = jax.device_put(params, tree_sharding(mesh, policy.param_axes(tiny.CONFIG), jax.eval_shape(tiny.params)))
    with jax.set_mesh(mesh):
        assert digest(spread) == digest(params)
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros(3, np.float32)
    minus, one_bit, last = b.copy(), a.copy(), a.copy()
    minus[1], one_bit[0, 1], last[1, 2] = -0.0, np.nextafter(a[0, 1], 9, dtype=np.float32), np.nan
    different = [
        {"a": a, "b": b}, {"a": one_bit, "b": b}, {"a": last, "b": b}, {"a": a, "b": minus}, {"a": a[::-1], "b": b}, {"a": a.T, "b": b},
        {"a": a.reshape(3, 2), "b": b}, {"b": a, "a": b}, {"a": a}, {"a": a[[0, 0]], "b": b},
    ]  # fmt: skip
    assert len({digest(jax.tree.map(jnp.asarray, each)) for each in different}) == len(different)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"sets": {"aime": {"avg@2": {"value": 0.5}}}})
    with pytest.raises(TypeError):
        write_json(path, {"sets": object()})
    assert json.loads(path.read_text()) == {"sets": {"aime": {"avg@2": {"value": 0.5}}}}


def test_signals_ask_to_stop_and_are_given_back():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with stop_on_signal() as stop:
        assert isinstance(stop, threading.Event)
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_phase_that_is_stuck_is_named_and_ends_the_run():
    code = """
import time
from krl.run.clock import PhaseClock
clock = PhaseClock(2.0)
with clock.phase("budget"):
    pass
time.sleep(2.5)  # nobody waits for what is over
def wait_for_ever():
    time.sleep(100)
with clock.phase("verify"):
    wait_for_ever()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 77
    assert "krl: the phase verify has taken 2 s (config.stuck_seconds)" in done.stderr
    assert "in wait_for_ever" in done.stderr


def test_another_thread_leaves_signals_alone():
    handler, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with stop_on_signal() as stop:
            seen.append((stop.is_set(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, handler)]


def test_step_metrics_leave_out_what_has_no_reward():
    # prompt 0: 1 of 1 solved, one without a reward; prompt 1: 1 of 2, one without; prompt 2: none has one
    index, scored = jnp.array([0, 0, 1, 1, 1, 2]), jnp.array([True, False, True, True, False, False])
    rewards, every = jnp.array([1.0, 0.0, 1.0, -1.0, 0.0, 0.0]), jnp.ones(6, bool)
    rollouts = Rollouts(
        prompt_index=index, sample_index=index, mask=every, tokens=jnp.zeros((6, 4), jnp.int32), logps=jnp.zeros((6, 4)),
        lengths=jnp.full(6, 2), finished=every,
    )  # fmt: skip
    advantages = learn.group_advantages(rewards, index, scored, 3)
    got = {
        k: float(v)
        for k, v in step_metrics(jnp.array([2, 3, 1]), jnp.ones(3, bool), rollouts, rewards, advantages, scored).items()
    }
    assert got["prompts_all_solved"] == got["prompts_mixed"] == pytest.approx(1 / 3)
    assert got["prompts_all_failed"] == 0
    assert got["effective_ratio_rollouts"] == pytest.approx(2 / 6)
    assert got["rollouts"] == 6


def test_means_of_rewards_of_any_size():
    assert mean_of(np.array([1.0, 0.0])) == 0.5
    assert np.isnan(mean_of(np.ones(0)))
    tenths = np.random.default_rng(0).random(100)
    assert mean_of(tenths) == tenths.mean()
    assert mean_of(np.array([1e300, -1e300, 3e300])) == pytest.approx(1e300)
    largest = np.finfo(np.float64).max
    assert mean_of(np.full(3, largest)) == largest
    assert mean_of(np.full(3, -largest)) == -largest
    assert mean_of(np.array([largest, -largest, 3e-300])) < 1e-250


def test_step_metrics_of_a_step_worked_by_hand():
    # prompt 0: 2 of 2 solved; prompt 1: 1 of 3; prompt 2: 0 of 2; prompt 3: no rollouts; one padding row
    index = jnp.array([0, 0, 1, 1, 1, 2, 2, 4])
    rewards = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    mask = index < 4
    lengths = jnp.array([1, 2, 3, 4, 1, 2, 3, 0])
    rollouts = Rollouts(
        prompt_index=index, sample_index=index, mask=mask, tokens=jnp.zeros((8, 4), jnp.int32),
        logps=jnp.where(jnp.arange(4) < lengths[:, None], -0.5, 0.0), lengths=lengths, finished=mask & (lengths < 4),
    )  # fmt: skip
    advantages = learn.group_advantages(rewards, index, mask, 4)
    counts, seen = jnp.array([2, 3, 2, 0]), jnp.array([True, True, False, True])
    got = {k: float(v) for k, v in step_metrics(counts, seen, rollouts, rewards, advantages, mask).items()}
    assert got["effective_ratio_rollouts"] == pytest.approx(3 / 7)
    for share in (
        "effective_ratio_prompts",
        "prompts_mixed",
        "prompts_all_solved",
        "prompts_all_failed",
        "prompts_unseen",
    ):
        assert got[share] == pytest.approx(1 / 3)  # of the prompts that got any
    assert got["prompts"] == 3
    assert (got["count_min"], got["count_mean"], got["count_max"]) == (2, pytest.approx(7 / 3), 3)
    assert got["response_length_mean"] == pytest.approx(16 / 7)
    assert got["response_length_max"] == 4
    assert got["truncation_rate"] == pytest.approx(1 / 7)
    assert got["entropy"] == pytest.approx(0.5)
    assert got["rollouts"] == 7


def test_gini_by_hand():
    assert float(gini(jnp.array([3, 3, 3]))) == pytest.approx(0.0)
    assert float(gini(jnp.array([0, 0, 0, 4]))) == pytest.approx(0.75)
    assert float(gini(jnp.zeros(3, jnp.int32))) == 0.0


def test_compilations_are_counted():
    counter = CompileCounter()
    double = jax.jit(lambda x: x * 2)
    double(jnp.ones(7))
    first = counter.count
    assert first > 0
    double(jnp.ones(7))
    assert counter.count == first


class Letters:
    """A tokenizer of one token a letter."""

    pad_id, eos_ids, vocab_size = 0, (1,), 128

    def encode(self, text):
        return [ord(c) for c in text]


def test_pairs_mark_the_completion_and_leave_long_ones_out():
    tasks = TaskSet(("a", "b"), ("", ""), ("xy", "xyz"))
    encoded = EncodedTasks(np.array([[0, 97], [0, 98]], np.int32), np.array([[False, True]] * 2), tasks, dropped=0)
    tokens, mask, target = encode_pairs(encoded, Letters(), 3)
    assert tokens.tolist() == [[0, 97, 120, 121, 1]]
    assert mask.tolist() == [[False, True, True, True, True]]
    assert target.tolist() == [[False, False, True, True, True]]
    with pytest.raises(ValueError, match="max_new_tokens"):
        encode_pairs(encoded, Letters(), 2)


def test_seconds_as_words():
    assert [format_seconds(s) for s in (5, 65.4, 3671)] == ["0:05", "1:05", "1:01:11"]


def test_tiny_prompts_are_left_padded():
    mask = np.asarray(tiny.prompts().mask)
    assert (np.diff(mask.astype(int), axis=1) >= 0).all()


def test_the_profiler_records_the_steps_that_were_asked_for(tmp_path):
    with profile(tmp_path / "none", begin=0, steps=0) as record:
        record(0)
    with profile(tmp_path / "two", begin=1, steps=2) as record:
        for step in range(2):
            record(step)
            jnp.ones(3).block_until_ready()
    assert not (tmp_path / "none").exists()
    assert list((tmp_path / "two").rglob("*.xplane.pb"))


def test_what_was_compiled_is_kept_below_the_users_cache_unless_jax_was_told_where(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compilations()
        chosen = pathlib.Path(jax.config.jax_compilation_cache_dir)
        assert chosen.parent == tmp_path / "krl" / "compiled"
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        keep_compilations()
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", told)


def test_the_process_that_the_others_waited_for_is_named():
    every = {"seconds/wait": [0.5, 0.1, 0.7], "seconds/rollout": [1.0, 1.4, 0.8], "memory/host_gb": [1.0, 2.0, 1.5]}
    found = over_processes(every)
    assert found == {"memory/host_gb": 2.0, "slowest_process": 1, "seconds/behind": pytest.approx(0.6)}
    assert over_processes({"seconds/wait": [0.1], "memory/host_gb": [1.0]}) == {"memory/host_gb": 1.0}
    assert memory_used()["memory/host_gb"] > 0.05


@pytest.mark.parametrize("width", [80, 120])
def test_a_step_is_one_line_of_a_terminal_with_its_steps_and_the_time_left(monkeypatch, width):
    written = io.StringIO()
    monkeypatch.setattr(log_module, "Console", lambda: Console(file=written, force_terminal=True, color_system=None, width=width))  # fmt: skip
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    seen = {"reward_mean": 0.8731, "effective_ratio_rollouts": 0.341, "count_max": 117.0, "seconds/step": 1.0}
    with progress(400, 396, "knapsack_log") as show:
        show(397, status_line(seen, None))
        show(399, status_line(seen, 0.917))
    shown = re.split(r"[\r\n]|\x1b\[[\d?]*[A-Za-z]", written.getvalue())
    line = next(part.rstrip() for part in reversed(shown) if part.strip())
    assert re.search(
        r"399/400 eta [-\d]:[-\d]{2}:[-\d]{2} reward 0.873  effective 0.34  max count 117  accuracy 0.917$", line
    )
    assert len(line) <= width
    assert line.startswith("knapsack_log") == (width == 120)
    assert status_line(seen | {"reward_mean": -1.5e300}, 0.5).startswith("reward -1.5e+300  effective 0.34")


@pytest.mark.parametrize(
    ("size", "backend", "libc", "times"),
    [(3, "cpu", True, 1), (2, "cpu", True, 0), (3, "tpu", True, 0), (3, "cpu", False, 0)],
)
def test_memory_is_given_back_where_large_policies_compute_on_cpus(monkeypatch, size, backend, libc, times):
    given = []
    known = {"malloc_trim": given.append} if libc else {}
    monkeypatch.setattr(clock_module, "LARGE", 3)
    monkeypatch.setattr(clock_module.ctypes, "CDLL", lambda name: SimpleNamespace(**known))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    clock_module.give_back_memory({"weight": np.zeros(size)})
    assert given == [0] * times
