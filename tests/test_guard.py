"""Steps that leave the road are undone, as often as the config allows."""

import json

import pytest

from krl import train as script
from krl.configs import arithmetic
from krl.run.guard import draws_before, find_spike
from tests.command_line import learnt, rollouts, rows, run_here

PLAIN = {"sft.steps": 0, "optim.learning_rate": 1e-9}


def spikes_at(monkeypatch, *calls):
    """Have the given calls of take_step, counted from 1, show a large loss."""
    take_step, seen = script.take_step, []

    def spiked(config, parts, learner, step, draw, reference):
        seen.append((step, draw))
        learner, metrics, *more = take_step(config, parts, learner, step, draw, reference)
        return learner, metrics | ({"loss": -50.0} if len(seen) in calls else {}), *more

    monkeypatch.setattr(script, "take_step", spiked)
    return seen


def test_a_spike_goes_back_to_the_last_checkpoint_and_draws_other_rollouts(tmp_path, monkeypatch, capsys):
    limits = PLAIN | {"guard.loss": 10.0, "checkpoint.every": 2, "steps": 4}
    run_here(tmp_path / "calm", **limits)
    with monkeypatch.context() as patch:
        seen = spikes_at(patch, 4)  # the fourth step, after the checkpoint of the second
        run_here(tmp_path / "spiked", **limits)
    assert seen == [(0, 0), (1, 0), (2, 0), (3, 0), (2, 1), (3, 1)]
    said = "krl: step 4: loss -50 is beyond config.guard.loss=10; going back to step 2 for other rollouts, time 1 of 3"
    assert said in capsys.readouterr().out
    found, calm = learnt(tmp_path / "spiked"), learnt(tmp_path / "calm")
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    assert found[:3] == calm[:3]
    assert [row["rollbacks"] for row in found[1:]] == [0, 0, 1, 1]
    compiles = [row["compiles"] for row in rows(tmp_path / "spiked")[1:]]
    assert compiles[:2] == [0, 0]  # all that it computes is the calm run's
    assert compiles[-1] <= 2  # and is so after going back; only to read a checkpoint takes a tiny program
    drawn, before = (rows(tmp_path / name, "groups") for name in ("spiked", "calm"))
    assert [row["task_ids"] for row in drawn] == [row["task_ids"] for row in before]
    assert found[3]["entropy"] != calm[3]["entropy"]  # other rollouts of the same prompts


def test_a_run_that_was_killed_after_going_back_draws_the_same(tmp_path, monkeypatch):
    limits = PLAIN | {"guard.loss": 10.0, "checkpoint.every": 1, "steps": 4, "eval.every": 1}
    with monkeypatch.context() as patch:
        spikes_at(patch, 3)
        run_here(tmp_path / "whole", **limits)
    workdir = tmp_path / "killed"
    with monkeypatch.context() as patch:
        spikes_at(patch, 3)
        run_here(workdir, **limits | {"steps": 3})
    run_here(workdir, **limits)
    assert learnt(workdir) == learnt(tmp_path / "whole")
    assert rollouts(workdir) == rollouts(tmp_path / "whole")


@pytest.mark.parametrize(("again", "best", "rollbacks"), [(0.5, 0.9, 0), (0.95, 0.95, 1)])
def test_the_best_checkpoint_outlives_the_steps_that_it_is_from(again, best, rollbacks, tmp_path, monkeypatch):
    """Until the same step, taken again, is better."""
    accuracies = iter([0.0, 0.8, 0.9, again, 0.4])
    evaluate_held_out = script.evaluate_held_out
    monkeypatch.setattr(
        script, "evaluate_held_out", lambda *at: evaluate_held_out(*at) | {"eval/accuracy": next(accuracies)}
    )
    spikes_at(monkeypatch, 5)  # after the evaluation of the fourth step, back to the third
    run_here(tmp_path, **PLAIN | {"guard.loss": 10.0, "checkpoint.every": 3, "eval.every": 2, "steps": 5})
    (kept,) = (tmp_path / "best").iterdir()
    about = json.loads((kept / "about" / "metadata").read_text())
    assert (kept.name, about["accuracy"], about["rollbacks"]) == ("4", best, rollbacks)
    newest = json.loads((tmp_path / "checkpoints" / "5" / "about" / "metadata").read_text())
    assert newest["rollbacks"] == 1


def test_a_run_goes_back_only_so_often(tmp_path, monkeypatch):
    spikes_at(monkeypatch, 1, 2, 3)
    with pytest.raises(
        FloatingPointError, match=r"step 1: loss -50 is beyond .* after 2 rollbacks \(config.guard.rollbacks=2\)"
    ):
        run_here(tmp_path, **PLAIN | {"guard.loss": 10.0, "guard.rollbacks": 2, "eval.every": 0})  # fmt: skip
    assert [row["to"] for row in map(json.loads, (tmp_path / "rollbacks.jsonl").read_text().splitlines())] == [0, 0]


def test_limits_are_of_sizes_and_0_is_none():
    guard = arithmetic.get_config().guard
    assert not find_spike({"loss": 1e9, "ratio_max": 1e9}, guard)
    guard.ratio = 5.0
    assert not find_spike({"loss": 1e9, "ratio_max": 5.0}, guard)
    assert find_spike({"ratio_max": 5.5}, guard) == "ratio_max 5.5 is beyond config.guard.ratio=5"
    assert [draws_before([{"to": 2}, {"to": 4}], step) for step in range(6)] == [0, 0, 1, 1, 2, 2]
