"""Several real processes on this machine, joined as a cluster's are, against one process."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from krl.configs import arithmetic
from krl.eval.command import measure
from krl.run import processes
from krl.run.scoring import Verdicts
from tests.command_line import ROOT, TINY, command, environment, rollouts, rows, run_here

STEPS = {"steps": 6, "mesh.shape": (2,)}
SQUARE = {"mesh.shape": (2, 2), "mesh.axis_names": ("fsdp", "model"), "policy.num_kv_heads": 2, "steps": 4}


def start(workdir, count=2, script="train.py", **changes):
    """The processes of a run or a measurement, one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joined = {"distributed.coordinator": f"127.0.0.1:{port}", "distributed.processes": count}
    return [
        subprocess.Popen(
            command(workdir, script=script, **STEPS | joined | {"distributed.process": number} | changes), cwd=ROOT, text=True,
            env=environment(workdir.parent, drawn=True) | {"JAX_NUM_CPU_DEVICES": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number in range(count)
    ]  # fmt: skip


def finish(run, seconds=600):
    """(exit codes, outputs) of a run's processes."""
    end = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(end - time.monotonic(), 1))[0] for process in run]
    finally:
        for process in run:
            process.kill()
    return [process.returncode for process in run], outputs


def wait_for(run, path, seconds=600):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        assert all(process.poll() is None for process in run), finish(run)
        time.sleep(0.02)
    assert path.exists()


def assert_close(workdir, other):
    """What two runs measured is the same but for the order in which devices add."""
    for row, expected in zip(rows(workdir), rows(other), strict=True):
        for name in ("reward_mean", "loss", "grad_norm", "entropy", "kl"):
            if name in expected:
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def texts(workdir):
    """What the rollout log has of each rollout that rounding cannot change."""
    return [
        tuple(row[name] for name in ("step", "prompt_id", "sample", "response", "reward")) for row in rollouts(workdir)
    ]


@pytest.mark.slow
def test_two_processes_that_are_killed_and_stopped_give_what_one_gives(tmp_path):
    workdir, alone, warm = tmp_path / "pod", tmp_path / "alone", {"sft.dir": str(tmp_path / "sft")}
    run_here(alone, **STEPS, **warm)
    run = start(workdir, **warm)
    wait_for(run, workdir / "checkpoints" / "2")
    run[1].kill()
    began = time.monotonic()
    codes, outputs = finish(run)
    assert codes == [processes.ENDED_BY_ANOTHER, -signal.SIGKILL], outputs
    assert time.monotonic() - began < 200
    assert re.search(r"^krl: process 1 has been silent for 30 s; the same command continues", outputs[0], re.M)
    assert "knapsack" not in outputs[1]  # one process tells how the run is

    run = start(workdir, **warm, **{"checkpoint.every": 1})
    wait_for(run, workdir / "checkpoints" / "4")
    run[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(run)
    assert codes == [processes.STOPPED] * 2, outputs
    stopped = int(re.search(r"krl: stopped after step (\d)", outputs[0])[1])
    assert stopped in (4, 5)

    codes, outputs = finish(start(workdir, **warm))
    assert codes == [0, 0], outputs
    assert f"krl: continuing from step {stopped}" in outputs[0]
    assert (workdir / "figures.png").exists()

    told = rows(workdir, "processes")
    assert [row["step"] for row in told] == [1, 2, 3, 4, 5, 6]
    assert all(len(row["seconds/wait"]) == len(row["memory/host_gb"]) == 2 for row in told)
    assert rows(workdir, "groups") == rows(alone, "groups")
    assert rows(workdir, "evaluations") == rows(alone, "evaluations")
    assert texts(workdir) == texts(alone)
    assert_close(workdir, alone)

    copy = shutil.copytree(workdir, tmp_path / "copy")
    codes, outputs = finish(start(workdir, script="eval.py", **warm))
    assert codes == [0, 0], outputs
    assert "held_out" not in outputs[1]
    config = arithmetic.get_config()
    config.update_from_flattened_dict(TINY | STEPS | warm)
    measure(config, copy)
    samples = (f"{place}/eval/step_6/held_out.jsonl" for place in (workdir, copy))
    assert len({pathlib.Path(path).read_text() for path in samples}) == 1


@pytest.mark.slow
def test_four_processes_that_split_parameters_are_continued_by_one(tmp_path):
    workdir, alone, warm = tmp_path / "pod", tmp_path / "alone", {"sft.dir": str(tmp_path / "sft")}
    run_here(alone, **SQUARE | warm)
    codes, outputs = finish(start(workdir, count=4, **SQUARE | warm | {"steps": 2}))
    assert codes == [0] * 4, outputs
    run_here(workdir, **SQUARE | warm)
    assert rows(workdir, "groups") == rows(alone, "groups")
    assert rows(workdir, "evaluations") == rows(alone, "evaluations")
    assert texts(workdir) == texts(alone)
    assert_close(workdir, alone)


@pytest.mark.slow
def test_what_one_process_refuses_ends_all_in_one_line(tmp_path):
    began = time.monotonic()
    codes, outputs = finish(start(tmp_path / "pod", **{"alloc.prior": "groups", "alloc.prior_field": "nothing"}))
    assert codes == [1, processes.ENDED_BY_ANOTHER], outputs
    assert time.monotonic() - began < 200
    for output in outputs:
        said = [line for line in output.splitlines() if line.startswith("krl: process 0 ends")]
        assert len(said) == 1
        assert "config.alloc.prior_field='nothing' is none of the training data's fields" in said[0]
        assert "Traceback" not in output
        assert "continues" not in said[0]  # the same command would be refused again


@pytest.mark.slow
def test_a_reward_that_always_fails_ends_all_processes_with_its_reason(tmp_path):
    changes = {"data.reward": "tests.rewards:never", "sft.steps": 0, "eval.every": 0}
    codes, outputs = finish(start(tmp_path / "pod", **changes))
    assert set(codes) <= {1, processes.ENDED_BY_ANOTHER}, outputs
    for output in outputs:
        assert (
            "ends: train.py: the reward failed on all 16 responses of step 1: it raised KeyError: 'solution'" in output
        )
        assert "Traceback" not in output


def test_what_a_process_says_last_is_that_it_has_left(monkeypatch):
    """JAX aborts a process whose coordinator is gone, so process 0 may not take a process for gone that only waits."""
    done: list = []
    said = {"krl/left/1": ""}
    client = SimpleNamespace(
        key_value_set=lambda name, *_, **__: (done.append(name), said.update({name: ""})),
        key_value_dir_get=lambda place: [name for name in said if name.startswith(place)],
    )
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: done.append(seconds))
    monkeypatch.setattr(processes.os, "_exit", lambda code: done.append(f"exit {code}"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    processes._leave("no reward", 1, client)
    assert done == ["krl/ended", 3 * processes.BEAT_SECONDS, "krl/left/0", "exit 1"]
    done.clear()
    processes._leave("another has ended", processes.ENDED_BY_ANOTHER, client)
    assert done == ["krl/ended", "krl/left/0", "exit 76"]


def test_processes_that_disagree_are_told_so(monkeypatch):
    said = [np.array([[1, 2], [1, 2], [1, 3]], np.uint32)]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda _: said[0])
    with pytest.raises(RuntimeError, match=r"processes \[2\] differ from those of process 0"):
        processes.check_agreement(np.arange(3))
    said[0] = said[0][:2]
    processes.check_agreement(np.arange(3))


def test_what_processes_exchange_keeps_its_64_bits_and_its_text(monkeypatch):
    mine, theirs = np.array([0.1, 0.0, 1e300]), np.array([0.0, 1e9 + 0.5, 0.0])
    others: list = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes.multihost_utils, "process_allgather", lambda sent: np.asarray(jnp.stack([jnp.asarray(sent), jnp.asarray(others.pop())]))
    )  # fmt: skip
    others.append(theirs.view(np.uint32))
    assert processes.sum_over_processes(mine).tolist() == [0.1, 1e9 + 0.5, 1e300]
    others.append(np.array([3]).view(np.uint32))
    assert processes.sum_over_processes(np.array(4)) == 7
    others.append(np.array([1, 2], np.int32))
    assert processes.sum_over_processes(np.array([1, 1], np.int32)).tolist() == [2, 3]
    columns = Verdicts(mine, np.zeros(3, np.int32), np.array([[0.1, 1], [0, 0], [0.3, 2]]), np.zeros(3), [], [])
    others += [np.array(part).view(np.uint32) for part in ([0.0, 4, 0], [0.0, 0.7, 0])]
    others += [np.array([0, 3, 0], np.int32), theirs.view(np.uint32)]
    whole = columns.of_all_processes()
    assert whole.parts.tolist() == [[0.1, 1], [0.7, 4], [0.3, 2]]
    assert whole.faults.tolist() == [0, 3, 0]
    text = np.zeros(1000, np.uint8)
    text[:3] = list("né".encode())
    others.append(text)
    assert processes.first_text("") == "né"
    others.append(text)
    assert processes.first_text("é" * 600) == "é" * 500
    others.append(np.zeros(1000, np.uint8))
    assert processes.first_text("") == ""


def test_copies_of_parameters_that_differ_are_told(monkeypatch):
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.int32(7)}
    rows = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda mine: rows.append(mine) or mine[None])
    processes.check_copies(params)
    processes.check_copies(params | {"a": params["a"].at[1, 2].add(1e-6)})
    whole, flipped = rows
    elsewhere = flipped + np.array([1, 0, 0], np.uint32)  # another part of the arrays: nothing to compare with
    for gathered, odd in (
        ([whole, whole, elsewhere], None),
        ([whole, flipped, whole], 1),
        ([elsewhere, whole, flipped], 2),
    ):
        monkeypatch.setattr(
            processes.multihost_utils, "process_allgather", lambda _, gathered=gathered: np.stack(gathered)
        )
        if odd is None:
            processes.check_copies(params)
            continue
        with pytest.raises(
            RuntimeError, match=rf"parameters of processes \[{odd}\] differ from those of process {odd - 1}"
        ):
            processes.check_copies(params)


def distributed(coordinator="", count=0, process=0):
    return ConfigDict({"coordinator": coordinator, "processes": count, "process": process})


def test_a_cluster_is_asked_where_there_is_one(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **known: calls.append(known))
    for name in [name for name in os.environ if name.startswith(("SLURM", "TPU", "MEGASCALE"))]:
        monkeypatch.delenv(name)
    processes.join_processes(distributed())
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    processes.join_processes(distributed())
    assert not calls
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    processes.join_processes(distributed())
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "10.0.0.1,10.0.0.2")
    processes.join_processes(distributed())
    assert len(calls) == 2
    assert all("process_id" not in call for call in calls)
    processes.join_processes(distributed("a:1", 3, 2))
    assert (calls[2]["coordinator_address"], calls[2]["num_processes"], calls[2]["process_id"]) == ("a:1", 3, 2)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: int("no coordinator"))
    with pytest.raises(ValueError, match=r"JAX found no cluster to ask .*; give config.distributed.coordinator"):
        processes.join_processes(distributed(count=-1))
    processes.join_processes(distributed("a:1", 1, 0))
    assert len(calls) == 3
    for wrong in (("", 2, 0), ("a:1", 2, 2), ("a:1", 2, -1)):
        with pytest.raises(ValueError, match=r"config.distributed.coordinator, host:port"):
            processes.join_processes(distributed(*wrong))
