"""Whole runs that something goes wrong with, against a run that nothing happened to."""

import errno
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from krl import budget, train
from krl.configs import arithmetic
from krl.configs.flags import one_line_errors
from krl.report import command as report
from krl.run.log import MetricsLog
from krl.run.rollouts import read_rollouts
from tests import tiny
from tests.command_line import ROOT, command, environment, learnt, rollouts, rows, run_here


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps that nothing happened to; its warm start lies beside it."""
    workdir = tmp_path_factory.mktemp("whole") / "work"
    run_here(workdir, **warm(workdir))
    assert sum(row["grad_norm"] > 0 for row in rows(workdir)[1:]) > 1  # it learns, or what follows says little
    return workdir


def warm(workdir):
    return {"sft.dir": str(workdir.with_name("sft"))}


def parameters(workdir, step=4):
    """What a checkpoint holds: parameters, state of the optimiser and belief."""
    names = ("params", "opt_state", "belief")
    arguments = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in names})
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        assert manager.latest_step() == step
        return {name: manager.restore(step, args=arguments)[name] for name in names}


def assert_same_run(workdir, expected):
    """To the last bit, but for times."""
    assert learnt(workdir) == learnt(expected)
    assert rollouts(workdir) == rollouts(expected)
    for name in ("groups", "evaluations"):
        assert rows(workdir, name) == rows(expected, name)
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number", "logged", "saved"),
    [
        ("budget", 5, 2, 2),  # the second of the two of the third step
        ("decoding", 6, 3, 2),  # the first of two looks of the fourth step
        ("verify", 0, 0, None),
        ("update", 3, 3, 2),
        ("evaluation", 1, 1, None),
        ("evaluated", 2, 3, 2),
        ("logged", 2, 2, None),  # the rows of before the first step, of the first and of the second
        ("checkpoint", 1, 4, 2),
        ("commit", 0, 2, None),
    ],
)
def test_a_run_killed_in_any_phase_continues_as_if_nothing_had_happened(whole, tmp_path, moment, number, logged, saved):
    workdir = tmp_path / "work"
    arguments = command(workdir, **warm(whole))[2:]
    killed = subprocess.run(
        [sys.executable, "-m", "tests.killed", moment, str(number), *arguments], cwd=ROOT, env=environment(tmp_path),
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert rows(workdir)[-1]["step"] == logged
    checkpoints = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(checkpoints, default=None) == saved or moment == "checkpoint"  # which may just have been written
    run_here(workdir, **warm(whole))
    assert_same_run(workdir, whole)


@pytest.mark.parametrize("harm", ["deleted", tiny.slow("truncated"), tiny.slow("emptied")])
def test_a_run_whose_newest_checkpoint_is_lost_continues_from_the_one_before(whole, tmp_path, harm, capsys):
    workdir = shutil.copytree(whole, tmp_path / "work")
    newest = workdir / "checkpoints" / "4"
    if harm == "deleted":
        shutil.rmtree(newest)
    for path in newest.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2 if harm == "truncated" else 0)
    run_here(workdir, **warm(whole))
    said = capsys.readouterr().out
    assert "krl: continuing from step 2" in said
    assert ("krl: checkpoint 4 cannot be read" in said) == (harm != "deleted")
    assert_same_run(workdir, whole)


def test_a_run_whose_logs_were_cut_off_writes_them_again(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "work")
    shutil.rmtree(workdir / "checkpoints" / "4")
    for name in ("metrics", "groups", "evaluations"):
        file = workdir / f"{name}.jsonl"
        os.truncate(file, file.stat().st_size - 20)
    run_here(workdir, **warm(whole))
    assert_same_run(workdir, whole)


def test_a_disk_that_is_full_for_a_while_costs_one_line_and_no_result(whole, tmp_path, monkeypatch):
    workdir, write = tmp_path / "work", MetricsLog.write

    def fail(log, step, metrics):
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(log, step, metrics)

    monkeypatch.setattr(MetricsLog, "write", fail)
    told = r"^train.py: \[Errno 28\] No space left on device$"
    with pytest.raises(SystemExit, match=told), one_line_errors("train.py"):
        run_here(workdir, **warm(whole))
    monkeypatch.undo()
    assert [row["step"] for row in rows(workdir)] == [0, 1, 2]
    run_here(workdir, **warm(whole))
    assert_same_run(workdir, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_responses_without_a_reward_are_left_out_told_of_and_explained(whole, tmp_path, workers, capsys):
    """Rewards are 3, -1 or an error; what is left out changes neither advantages nor the belief of the others."""
    workdir = tmp_path / "work"
    changes = {"data.reward": "tests.rewards:error_where_wrong", "verify.workers": workers, "log.texts_every": 1}
    run_here(workdir, **warm(whole), **changes)
    said, log, groups = capsys.readouterr().out, rollouts(workdir), rows(workdir, "groups")
    assert (
        said.count("a response has no reward and is left out; this is told once: it raised ValueError: no number in")
        == 1
    )
    scored = np.zeros(12, int)
    for row, group in zip(rows(workdir)[1:], groups, strict=True):
        mine = [rollout for rollout in log if rollout["step"] == row["step"]]
        assert row["verifier/errors"] == sum(rollout["fault"] == "errors" for rollout in mine) > 0
        assert row["reward_mean"] == pytest.approx(np.mean([r["reward"] for r in mine if r["reward"] is not None]))
        assert f"no reward {100 * row['verifier/errors'] / 16:.3g}%" in said
        for number, task in enumerate(group["task_ids"]):
            of_group = [rollout for rollout in mine if rollout["prompt_id"] == task]
            kept = [rollout for rollout in of_group if rollout["reward"] is not None]
            assert (len(of_group), len(kept)) == (group["counts"][number], group["scored"][number])
            assert group["successes"][number] == sum(min(max(rollout["reward"], 0), 1) for rollout in kept)
            assert sum(rollout["length"] for rollout in of_group) == group["tokens"][number]
            assert sum(rollout["advantage"] for rollout in kept) == pytest.approx(0, abs=1e-4)
            scored[task] += len(kept)
    for rollout in log:
        missing = rollout["reward"] is None
        assert missing == (rollout["fault"] != "") == rollout["reason"].startswith("it raised ValueError: no number in")
        assert not missing or rollout["advantage"] == 0
    assert any(rollout["advantage"] for rollout in log)
    np.testing.assert_array_equal(parameters(workdir)["belief"]["recorded"], scored)
    for reader in (groups, read_rollouts(workdir / "rollouts")):
        np.testing.assert_allclose(budget.logged_rates(reader, 12), budget.logged_rates(groups, 12), rtol=1e-5)
    total = sum(row["verifier/errors"] for row in rows(workdir)[1:])
    told = f"{total} of 64 rollouts have no reward (errors {total}) and were left out; "
    assert told in said
    report.write([workdir], workdir)
    text = (workdir / "report.html").read_text()
    assert told in text
    assert "x it raised ValueError: no number in" in text


@pytest.mark.parametrize("evaluate", [2, 0])
def test_a_reward_that_always_fails_ends_the_run_with_its_reason(whole, tmp_path, evaluate, capsys):
    workdir, changes = tmp_path / "work", {"data.reward": "tests.rewards:never", "eval.every": evaluate}
    where = "12 responses of the evaluation" if evaluate else "16 responses of step 1"
    with pytest.raises(
        ValueError, match=rf"the reward failed on all {where}: it raised KeyError: 'solution' \(prompt"
    ) as ended:
        run_here(workdir, **warm(whole), **changes)
    assert "\n" not in str(ended.value)
    assert not list((workdir / "checkpoints").glob("[0-9]*"))
    if not evaluate:
        assert {rollout["reason"] for rollout in rollouts(workdir)} == {"it raised KeyError: 'solution'"}
        assert rows(workdir)[-1]["reward_mean"] is None
    run_here(workdir, **warm(whole), **changes | {"verify.may_fail": True, "steps": 1})
    assert rows(workdir)[-1]["verifier/errors"] == 16
    assert rows(workdir)[-1]["grad_norm"] == 0
    assert parameters(workdir, 1)["belief"]["recorded"].sum() == 0
    assert "this is told once: it raised KeyError" in capsys.readouterr().out


def test_several_rewards_are_logged_by_name_and_the_first_is_the_accuracy(whole, tmp_path):
    workdir = tmp_path / "work"
    changes = {"data.reward": "tests.rewards:same * 0.5, tests.rewards:odd_length*0.25", "steps": 2}
    run_here(workdir, **warm(whole), **changes)
    for row in rows(workdir)[1:]:
        mine = [rollout for rollout in rollouts(workdir) if rollout["step"] == row["step"]]
        for rollout in mine:
            same, odd = rollout["reward/tests.rewards:same"], rollout["reward/tests.rewards:odd_length"]
            assert same == (rollout["response"] == rollout["answer"])
            assert odd == len(rollout["response"]) % 2
            assert rollout["reward"] == 0.5 * same + 0.25 * odd
        for name in ("tests.rewards:same", "tests.rewards:odd_length"):
            assert row[f"reward/{name}"] == pytest.approx(np.mean([rollout[f"reward/{name}"] for rollout in mine]))
    first, expected = rows(workdir)[0], rows(whole)[0]  # the reward of that run is 1 for what is the same
    assert first["eval/accuracy"] == expected["eval/accuracy"] > 0
    assert first["eval/pass_at_k"] == expected["eval/pass_at_k"]


def test_the_best_parameters_are_kept_though_all_rewards_are_low(whole, tmp_path):
    run_here(tmp_path / "work", **warm(whole), **{"data.reward": "tests.rewards:low", "steps": 2})
    assert rows(tmp_path / "work")[-1]["eval/accuracy"] < -1
    assert (tmp_path / "work" / "best" / "2").is_dir()


def test_updates_that_are_not_finite_are_skipped_and_counted_and_too_many_end_the_run(whole, tmp_path, monkeypatch):
    find_advantages, calls = train.find_advantages, itertools.count()

    def poisoned(*given):
        return find_advantages(*given) * (float("nan") if next(calls) in bad else 1.0)

    monkeypatch.setattr(train, "find_advantages", poisoned)
    bad, each = (1,), arithmetic.get_config().optim.updates_per_step
    run_here(tmp_path / "once", **warm(whole), max_bad_updates=each + 1)
    before, after = rows(tmp_path / "once")[:2], rows(tmp_path / "once")[2:]
    assert learnt(tmp_path / "once")[:2] == learnt(whole)[:2]
    assert [row["skipped_updates"] for row in before[1:] + after] == [0, each, each, each]
    assert before[1]["loss"] is not None
    assert after[0]["loss"] is None
    assert after[1]["loss"] is not None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters(tmp_path / "once")["params"]))

    calls, bad = itertools.count(), (1, 2, 3)
    with pytest.raises(FloatingPointError, match=f"^{2 * each} updates in a row had a loss or gradient"):
        run_here(tmp_path / "often", **warm(whole), max_bad_updates=2 * each)
    assert rows(tmp_path / "often")[-1]["step"] == 3
    assert rows(tmp_path / "often")[-1]["skipped_updates"] == 2 * each


@pytest.mark.slow
def test_a_run_continues_on_another_mesh(whole, tmp_path, capsys):
    """With the same rollouts; losses to 1e-5."""
    workdir = shutil.copytree(whole, tmp_path / "work")
    shutil.rmtree(workdir / "checkpoints" / "4")
    run_here(workdir, **warm(whole), **{"mesh.shape": (2, 2), "mesh.axis_names": ("data", "fsdp")})
    assert "krl: continuing from step 2" in capsys.readouterr().out
    assert rows(workdir, "groups") == rows(whole, "groups")
    for row, expected in zip(rows(workdir), rows(whole), strict=True):
        for name in ("reward_mean", "loss", "grad_norm", "entropy", "eval/accuracy"):
            assert row.get(name) == pytest.approx(expected.get(name), abs=1e-5), name


@pytest.mark.slow
def test_other_users_cannot_write_what_a_run_leaves_whatever_the_umask(whole, tmp_path):
    workdir = tmp_path / "work"
    changes = warm(whole) | {"steps": 1, "sft.dir": str(tmp_path / "sft"), "sft.steps": 2}
    done = subprocess.run(
        command(workdir, **changes), cwd=ROOT, env=environment(tmp_path), umask=0, capture_output=True, text=True, timeout=900
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    left = [workdir, *workdir.rglob("*"), *(tmp_path / "sft").rglob("*")]
    assert len(left) > 30
    assert [path for path in left if path.stat().st_mode & stat.S_IWOTH] == []
