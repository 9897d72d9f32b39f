"""train.py and eval.py as a user runs them, on a policy that trains in seconds."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from krl import budget
from krl import train as script
from krl.configs import arithmetic
from krl.eval.command import measure
from krl.hf.weights import export
from krl.run import learner, spend
from krl.run.lock import hold_workdir
from krl.run.log import MetricsLog
from krl.run.setup import prompts_of_a_step
from krl.train import train
from tests import tiny
from tests.command_line import (
    ROOT,
    TINY,
    command,
    config_with,
    environment,
    files_of,
    learnt,
    rollouts,
    rows,
    run,
    run_here,
    told_by,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps from start to end, with its warm start beside it."""
    workdir = tmp_path_factory.mktemp("run") / "work"
    done = run(workdir, drawn=True, **{"sft.dir": workdir.with_name("sft")})
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_groups_are_logged_that_got_any_rollouts(tmp_path):
    groups = {"counts": jnp.array([0, 1, 4]), "scored": [0, 1, 3], "successes": [0, 1, 2], "belief": [0.1, 0.5, 0.7]}
    with MetricsLog(tmp_path, first_step=0) as log:
        script.log_step(log, None, 1, {"reward_mean": 0.5}, {"seconds/step": [2.0]}, groups, {})
    (row,) = rows(tmp_path, "groups")
    assert row == {"step": 1, "counts": [1, 4], "scored": [1, 3], "successes": [1, 2], "belief": [0.5, 0.7]}


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_measured(tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.1, 0.4, 0.4, 0.2])
    evaluate_held_out = script.evaluate_held_out
    with monkeypatch.context() as patch:
        patch.setattr(
            script, "evaluate_held_out", lambda *where: evaluate_held_out(*where) | {"eval/accuracy": next(accuracies)}
        )
        run_here(tmp_path, **{"eval.every": 1, "checkpoint.every": 4, "checkpoint.keep": 1})
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["2"]  # the first of the highest after training
    about = json.loads((tmp_path / "best" / "2" / "about" / "metadata").read_text())
    assert (about["step"], about["accuracy"], about["config"]["seed"]) == (2, 0.4, 0)
    config = arithmetic.get_config()
    config.update_from_flattened_dict(TINY | {"eval.every": 1, "checkpoint.every": 4, "checkpoint.keep": 1})
    measure(config, tmp_path)
    config.eval.best = True
    measure(config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["step_2", "step_4"]


def test_checkpoints_in_a_directory_of_their_own_belong_to_one_run(tmp_path):
    keys = {"checkpoint.dir": str(tmp_path / "kept"), "sft.steps": 0, "eval.every": 2}
    run_here(tmp_path / "first", **keys, steps=2)
    assert not (tmp_path / "first" / "checkpoints").exists()
    assert (tmp_path / "kept" / "best" / "2").exists()
    assert export(tmp_path / "first", tmp_path / "exported") == 2
    with pytest.raises(
        ValueError, match="kept/checkpoints has checkpoints of a run with another config; choose another"
    ):
        run_here(tmp_path / "second", **keys | {"optim.learning_rate": 1e-5})
    assert run_here(tmp_path / "first", **keys).metrics["step"] == 4


def test_a_signal_while_a_run_is_set_up_stops_it_before_its_first_step(tmp_path, monkeypatch, capsys):
    set_up = script.set_up

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return set_up(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script, "set_up", interrupted)
        assert run_here(tmp_path, **{"sft.steps": 0}) is None
    assert "krl: stopped after step 0; the same command continues from there" in capsys.readouterr().out
    assert rows(tmp_path) == []
    refused = told_by(measure, config_with(**{"sft.steps": 0, "eval.best": True}), tmp_path)
    assert refused.endswith("best holds no checkpoint; train.py writes one every config.eval.every=2 steps")
    assert run_here(tmp_path, **{"sft.steps": 0}).metrics["step"] == 4
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_run_is_not_continued_on_other_data(tmp_path):
    data = tmp_path / "sums.jsonl"
    write = lambda rows: data.write_text("".join(json.dumps({"q": f"{i}+{i}", "a": f"{2 * i}"}) + "\n" for i in rows))  # noqa: E731
    keys = {"data.source": "dataset", "data.path": str(data), "data.prompt_field": "q", "data.answer_field": "a", "sft.steps": 0, "eval.every": 0}  # fmt: skip
    write(range(30))
    run_here(tmp_path / "run", **keys | {"steps": 2})
    before = (tmp_path / "run" / "held_out.json").read_bytes()
    for other, kind in (
        (range(1, 31), "training"),
        ([*range(15), *range(16, 31)], "held-out"),
    ):  # the last ones are held out
        write(other)
        told = rf"the {kind} prompts are not those of the run: 15 with digest .* at step 2"
        with pytest.raises(ValueError, match=told):
            run_here(tmp_path / "run", **keys)
        assert (tmp_path / "run" / "held_out.json").read_bytes() == before
    write(range(30))
    run_here(tmp_path / "run", **keys)


def test_a_run_with_a_penalty_continues_only_towards_the_policy_that_it_began_from(tmp_path, monkeypatch):
    """One of the same sizes, here with one parameter a bit larger, is not the same."""
    keys = {"sft.steps": 0, "eval.every": 0, "loss.kl_coefficient": 0.1, "checkpoint.every": 1}
    run_here(tmp_path, **keys, steps=1)
    about = json.loads((tmp_path / "checkpoints" / "1" / "about" / "metadata").read_text())
    start_params = learner.start_params

    def another(*arguments, **options):
        params = start_params(*arguments, **options)
        weight = params["final_norm"]["weight"]
        return params | {"final_norm": {"weight": weight.at[3].set(jnp.nextafter(weight[3], 2.0))}}

    with monkeypatch.context() as patch:
        patch.setattr(learner, "start_params", another)
        told = f"hold the run to is not the one that it began from: {about['reference']} at step 1, .* now; bring back"
        with pytest.raises(ValueError, match=told):
            run_here(tmp_path, **keys, steps=2)
    assert run_here(tmp_path, **keys, steps=2).metrics["step"] == 2


def test_a_run_leaves_everything_a_user_looks_for(finished):
    workdir, output = finished
    assert [row["step"] for row in rows(workdir)] == [0, 1, 2, 3, 4]
    assert sum(row["grad_norm"] > 0 for row in rows(workdir)[1:]) > 1  # it learns, or what follows says little
    assert "knapsack 4/4" in output
    assert "eta" in output
    for name in ("figures.png", "config.json", "policy/tokenizer.model", "policy/config.json"):
        assert (workdir / name).stat().st_size > 0
    assert list((workdir / "tensorboard").glob("events*"))
    held_out = json.loads((workdir / "held_out.json").read_text())
    assert len(held_out["prompts"]) == 6
    assert set(map(len, held_out["fields"].values())) <= {6}
    measured = {row["step"]: row for row in rows(workdir, "evaluations")}
    assert list(measured) == [0, 2, 4]
    for row in rows(workdir):
        if row["step"] in measured:
            at = measured[row["step"]]
            assert (at["rollouts_total"], at["samples"]) == (row["rollouts_total"], 2)
            assert np.mean(at["solved"]) / 2 == pytest.approx(row["eval/accuracy"])  # rewards are 0 or 1
    for row in rows(workdir, "groups"):
        assert sum(row["counts"]) == 16
        assert min(row["counts"]) >= 2
        assert max(row["counts"]) <= 8


def test_the_rollout_log_says_what_the_groups_say_and_rules_replay_on_it(finished, tmp_path):
    workdir, _ = finished
    log = datasets.load_dataset("parquet", data_files=str(workdir / "rollouts/*.parquet"), split="train", cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert len(log) == 4 * 16
    groups = rows(workdir, "groups")
    for row in groups:
        mine = log.filter(lambda rollout, step=row["step"]: rollout["step"] == step)
        for number, task in enumerate(row["task_ids"]):
            group = mine.filter(lambda rollout, task=task: rollout["prompt_id"] == task)
            assert len(group) == row["counts"][number] == group["count"][0]
            assert sum(group["reward"]) == row["successes"][number]
            assert row["scored"][number] == row["counts"][number]
            assert sum(group["length"]) == row["tokens"][number]
            assert group["belief"][0] == np.float32(row["belief"][number])
            assert group["prior"][0] == np.float32(row["prior"][number])
    correct = [(row["response"] == row["answer"]) == (row["reward"] == 1.0) for row in log]
    assert all(correct)
    assert any(log["reward"])
    rates = budget.logged_rates(log, 12)
    np.testing.assert_allclose(rates, budget.logged_rates(groups, 12), rtol=1e-5)
    options = {"prompts_per_step": 4, "budget": 16, "n_min": 2, "n_max": 8}
    replay = budget.replay("knapsack", rates[None], jax.random.split(jax.random.key(0), 1), **options)
    assert replay.effective.shape == (1, 4)


def test_rewards_beyond_0_and_1_count_as_failures_and_successes_for_the_belief(finished, tmp_path):
    """A group's advantages see neither scale nor shift, so the first two steps are those of rewards 0 and 1."""
    workdir, _ = finished
    run_here(tmp_path, **{"data.reward": "tests.rewards:signed"})
    mine, theirs = rows(tmp_path, "groups"), rows(workdir, "groups")
    for name in ("task_ids", "counts", "belief", "prior"):
        assert [row[name] for row in mine[:2]] == [row[name] for row in theirs[:2]]
    assert [row["successes"] for row in mine[:2]] == [row["successes"] for row in theirs[:2]]  # as the belief saw them
    assert all(0 <= rate <= 1 for row in mine for rate in row["belief"])


def test_every_metric_is_documented(finished):
    text = (ROOT / "docs" / "metrics.md").read_text()
    for name in rows(finished[0])[-1]:
        assert f"`{name}`" in text, name


def test_steps_compile_nothing_after_the_first_two(finished):
    compiles = [row["compiles"] for row in rows(finished[0])[1:]]
    assert compiles[1] == compiles[-1]


def test_a_finished_run_is_not_trained_again(finished, capsys):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert run_here(workdir).metrics == rows(workdir)[-1]
    assert "fine-tuning" not in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, capsys):
    workdir = tmp_path / "work"
    run_here(workdir, steps=2)
    run_here(workdir, steps=4)
    assert "continuing from step 2" in capsys.readouterr().out
    assert learnt(workdir) == learnt(finished[0])
    assert rows(workdir, "evaluations") == rows(finished[0], "evaluations")


POOL = {"alloc.n_min": 0, "alloc.rule": "reach", "alloc.candidates": 10, "alloc.group": 4, "alloc.explored": 0.25}


@pytest.mark.slow
def test_prompts_that_get_nothing_are_left_out_and_the_run_continues_as_exactly(tmp_path):
    """Of ten candidates four at most are served; on two devices and continued it is the same run."""
    alone, continued, devices = (tmp_path / name for name in ("alone", "continued", "devices"))
    run_here(alone, **POOL)
    for steps in (2, 4):
        run_here(continued, **POOL | {"steps": steps})
    assert learnt(continued) == learnt(alone)
    run_here(devices, **POOL | {"mesh.shape": (2,)})
    for step, (row, other) in enumerate(zip(rows(alone, "groups"), rows(devices, "groups"), strict=True)):
        assert row["task_ids"] == other["task_ids"]
        assert row["counts"] == other["counts"]
        assert sum(row["counts"]) == 16
        assert set(row["counts"]) <= {4, 8}
        assert len(row["task_ids"]) == len(set(row["task_ids"])) == rows(alone)[1 + step]["prompts"] <= 4
        assert rows(alone)[1 + step]["candidates"] == 10
    logged = {(row["step"], row["prompt_id"]): row["count"] for row in rollouts(alone)}
    given = {
        (row["step"], task): n
        for row in rows(alone, "groups")
        for task, n in zip(row["task_ids"], row["counts"], strict=True)
    }
    assert logged == given
    ages = rows(alone)[-1]
    assert 0 < ages["staleness_mean"] < ages["staleness_max"] <= 4
    rates = budget.logged_rates(rows(alone, "groups"), 12)
    assert rates.shape == (4, 12)
    shown = budget.replay("reach", rates[None], jax.random.split(jax.random.key(0), 1), prompts_per_step=10, budget=16, n_min=0, n_max=8, group=4)  # fmt: skip
    assert shown.counts.shape == (1, 20)


@pytest.mark.parametrize(
    ("counts", "wrong"),
    [
        ([4, 0, 0], "4 rollouts, and 16 of config.alloc.budget=16 are to be spent"),
        ([12, 4, 0], "a prompt 0 rollouts and another 12, and config.alloc.n_min=0 to n_max=8 are allowed"),
        ([8, 5, 3], "a prompt 5 rollouts, and config.alloc.group=4 or a multiple of it are allowed"),
        ([20, -4, 0], "a prompt -4 rollouts and another 20"),
        ([8.0, 8.0, 0.0], "counts of type float32, which are to be whole numbers"),
    ],
)
def test_counts_that_a_rule_must_not_give_are_refused_by_its_name(counts, wrong):
    alloc = config_with(**POOL).alloc
    spend.check_counts(alloc, np.array([8, 4, 4]), 16)
    with pytest.raises(ValueError, match=re.escape(f"the rule 'reach' gave {wrong}")):
        spend.check_counts(alloc, np.asarray(counts, np.float32 if isinstance(counts[0], float) else np.int32), 16)


@pytest.mark.parametrize("number", [signal.SIGTERM, tiny.slow(signal.SIGINT)])
def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path, number, capsys):
    workdir = tmp_path / "work"
    changes = {"steps": 2000, "eval.every": 0, "checkpoint.every": 2000}
    process = subprocess.Popen(
        command(workdir, **changes), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    file, deadline = workdir / "metrics.jsonl", time.time() + 600
    while time.time() < deadline and not (file.exists() and len(rows(workdir)) > 3):
        time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors  # saved, to be continued
    assert "stopped after step" in output
    assert "Traceback" not in errors
    stopped = rows(workdir)[-1]["step"]
    run_here(workdir, **(changes | {"steps": stopped + 1}))
    assert f"continuing from step {stopped}" in capsys.readouterr().out
    assert [row["step"] for row in rows(workdir)] == list(range(1, stopped + 2))


def test_a_killed_run_continues_from_its_last_checkpoint(finished, tmp_path):
    workdir = tmp_path / "work"
    process = subprocess.Popen(
        command(workdir), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 600
    while time.time() < deadline and not (workdir / "checkpoints" / "2").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    run_here(workdir)
    assert learnt(workdir) == learnt(finished[0])


@pytest.mark.slow
def test_two_devices_equal_one(finished, tmp_path, capsys):
    workdir = tmp_path / "work"
    warm = str(finished[0].with_name("sft"))
    run_here(workdir, **{"mesh.shape": (2,), "steps": 1, "eval.every": 0, "sft.dir": warm})
    assert "'data': 2" in capsys.readouterr().out
    first, second = rows(finished[0])[1], rows(workdir)[-1]
    for name in ("reward_mean", "loss", "grad_norm", "entropy"):
        np.testing.assert_allclose(second[name], first[name], atol=1e-3)


@pytest.mark.slow
def test_a_run_decodes_in_another_layout_than_it_learns_in(tmp_path, capsys):
    """Keys, prompts and counts come from the mesh of the update, which is another one to JAX."""
    run_here(
        tmp_path, config="operators", **{
            "mesh.shape": (2, 1), "mesh.axis_names": ("fsdp", "model"), "mesh.decode": (1, 2), "policy.num_kv_heads": 2,
            "operators.num_operators": 51, "operators.num_warm": 3000, "operators.num_train": 16, "operators.num_test": 4,
            "data.max_prompt_tokens": 6, "sft.steps": 0, "steps": 1, "eval.every": 1, "alloc.scouts": 2,
            "alloc.rule": "two_round",
        },
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "mesh {'fsdp': 2, 'model': 1}" in said
    assert "krl: responses end with </s> (1)\n" in said
    assert np.isfinite([rows(tmp_path)[-1][name] for name in ("loss", "entropy", "eval/accuracy")]).all()


@pytest.mark.slow
def test_updates_that_are_not_finite_stop_the_run(tmp_path):
    bad = run(
        tmp_path / "work",
        **{"optim.learning_rate": 1e38, "max_bad_updates": 2, "steps": 9, "data.reward": "tests.rewards:nth"},
    )
    assert bad.returncode != 0
    assert "not finite" in bad.stderr
    assert "config.optim.learning_rate" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_a_fine_tuning_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"lower config.sft.learning_rate"):
        run_here(tmp_path / "work", **{"sft.learning_rate": 1e30, "max_bad_updates": 2, "sft.steps": 20})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alloc.rulez": "uniform"}, "train.py: unknown config key alloc.rulez; did you mean alloc.rule?"),
        ({"steps": "many"}, "train.py: config.steps='many' must be a whole number"),
        ({"alloc.budget": 6}, "config.alloc.budget=6 must be between 8"),
    ],
)
def test_bad_input_is_one_line_before_any_compilation(tmp_path, changes, message):
    refused = run(tmp_path / "work", **changes)
    assert refused.returncode != 0
    assert message in refused.stderr
    lines = [line for line in refused.stderr.splitlines() if "TPU" not in line and "xla_bridge" not in line]
    assert len(lines) == 1, refused.stderr
    assert not (tmp_path / "work" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.shape": (8,), "alloc.budget": 60, "alloc.n_max": 16}, "config.alloc.budget=60 must be a multiple of the 8"),
        ({"data.max_prompt_tokens": 1}, "raise config.data.max_prompt_tokens"),
        ({"data.source": "dataset", "data.prompt_field": "q", "data.answer_field": "a", "data.path": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_kept(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        run_here(tmp_path / "work", **changes)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "work" / "checkpoints").exists()


def test_a_notebook_calls_the_run_without_flags_and_from_any_thread(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "work")
    config = arithmetic.get_config()
    config.update_from_flattened_dict(TINY)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, config, workdir).result().metrics == rows(workdir)[-1]
        results = pool.submit(measure, config, workdir).result()
    assert results["held_out"]["avg@2"]["value"] == pytest.approx(rows(workdir)[-1]["eval/accuracy"], abs=1e-6)
    drawn = rows(workdir / "eval" / "step_4", "held_out")
    first = [[row["response"], row["reward"]] for row in drawn if row.get("sample") == 0]
    assert rows(workdir, "evaluations")[-1]["said"] == first[:3]  # the same numbers drew them
    config.seed = 7
    with pytest.raises(ValueError, match=r"config.seed=0, not 7"):
        train(config, workdir)
    assert "config" not in flags.FLAGS


def test_another_config_in_the_same_directory_is_refused(finished):
    refused = run(finished[0], seed=7)
    assert "config.seed=0, not 7" in refused.stderr
    assert refused.returncode != 0


@pytest.mark.parametrize("changes", [{}, {"seed": 7}, {"eval.prompts": 3}])
def test_a_run_that_is_refused_because_another_lives_changes_nothing(finished, changes):
    workdir, _ = finished
    with hold_workdir(workdir):
        before = files_of(workdir)
        with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .*; stop that run"):
            run_here(workdir, **changes)
        assert files_of(workdir) == before


def test_a_missing_config_file_is_one_line(tmp_path):
    refused = run(tmp_path / "work", config="nothing")
    assert refused.returncode != 0
    assert "nothing.py" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_real_rows_go_through_the_whole_path(tmp_path, capsys):
    """GSM8K's own form, from a local file, with held-out rows and a rule of the other kind."""
    questions = [
        {"question": f"Tom has {a} apples and gets {b} more. How many has he?", "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>\n#### {a + b}"}
        for a in range(6)
        for b in range(6)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    run_here(
        tmp_path / "work", config="gsm8k", **{
            "data.path": str(file), "alloc.rule": "uniform", "eval.prompts": 6, "data.max_prompt_tokens": 64,
            "sample.max_new_tokens": 24, "policy.num_layers": 1, "tokenizer.vocab_size": 400, "sft.steps": 2,
            "steps": 2,
        },
    )  # fmt: skip
    assert "30 training prompts" in capsys.readouterr().out
    assert "eval/accuracy" in rows(tmp_path / "work")[-1]


@pytest.mark.parametrize("rule", [tiny.slow("pilot_commit"), "mopps"])
def test_rules_that_choose_prompts_in_other_ways_train(tmp_path, rule):
    run_here(tmp_path / "work", **POOL | {"alloc.rule": rule, "sft.steps": 2, "steps": 2})
    for row in rows(tmp_path / "work", "groups"):
        assert sum(row["counts"]) == 16
        assert {n % 4 for n in row["counts"]} == {0}
        assert min(row["counts"]) > 0
        assert len(set(row["task_ids"])) == len(row["counts"])
    logged = rollouts(tmp_path / "work")
    shown = {(row["step"], row["prompt_id"], row["sample"]) for row in logged}
    assert len(shown) == 32  # later rounds go on from the samples of the first


def test_a_pool_has_no_more_prompts_than_the_data_and_says_what_it_does_not_use():
    config = config_with(**POOL | {"alloc.candidates": 50})
    assert prompts_of_a_step(config, budget.RULES["reach"], 12) == (12, 4)
    assert script.describe_step(config, 12, 4).startswith(
        "up to 4 of 12 prompts and 16 rollouts a step (prompts_per_step=4"
    )
    config.prompts_per_step = 64
    assert (
        script.describe_step(config, *prompts_of_a_step(config, budget.RULES["reach"], 100))
        == "up to 4 of 50 prompts and 16 rollouts a step"
    )


def test_rounds_that_come_to_one_are_shown_nothing_and_run(tmp_path):
    """A rule in rounds takes `shown` without a default; its bounds may be called anything."""

    @budget.in_rounds(lambda prompts, rollouts, n_min, group: (rollouts,))
    def look(belief, rollouts, least, most, group, shown):
        assert shown.counts.shape == belief.visits.shape
        return budget.allocate("uniform", belief, rollouts, least, most, group=group)

    run_here(tmp_path / "work", own={"rule": look}, **POOL | {"sft.steps": 2, "steps": 1})
    assert sum(rows(tmp_path / "work", "groups")[0]["counts"]) == 16


def test_dynamic_updates_wait_for_enough_rollouts_that_teach(tmp_path):
    changes = {"alloc.rule": "dynamic", "alloc.budget": 16, "sft.steps": 2, "steps": 6, "loss.kl_coefficient": 0.0}
    run_here(tmp_path / "work", **changes)
    logged = [row for row in rows(tmp_path / "work") if row["step"]]
    assert [row["rollouts_total"] for row in logged] == [16 * (1 + step) for step in range(6)]
    waited, updated = 0.0, []
    for row in logged:
        waited += 16 * row["effective_ratio_rollouts"]
        updated.append(waited >= 16)
        waited *= not updated[-1]
    assert [row["updated"] == 1 for row in logged] == updated


@pytest.mark.parametrize(
    ("rule", "total"), [("two_round", 16), tiny.slow("two_round", 8), tiny.slow("knapsack_paper", 16)]
)
def test_other_rules_train(tmp_path, rule, total):
    """A rule with a pilot, also when the pilot is all there is."""
    changes = {"alloc.rule": rule, "alloc.budget": total, "sft.steps": 2, "steps": 2}
    run_here(tmp_path / "work", **changes)
    logged = rows(tmp_path / "work")
    assert [row["rollouts_total"] for row in logged] == [0, total, 2 * total]
    groups = rows(tmp_path / "work", "groups")
    assert all(sum(row["counts"]) == total and min(row["counts"]) >= 2 for row in groups)
    assert (groups[0]["belief"] != [0.5] * 4) == (rule == "two_round" and total > 8)  # a pilot was seen before the rest


def test_scouts_tell_the_rates_and_change_nothing_else(tmp_path):
    """Uniform budgets do not ask for rates, so a run with scouts must be the run without them."""
    changes = {"alloc.rule": "uniform", "alloc.budget": 16, "sft.steps": 2, "steps": 2}
    for name, scouts in (("without", 0), ("with", 8)):
        run_here(tmp_path / name, **changes, **{"alloc.scouts": scouts})
    assert learnt(tmp_path / "with") == learnt(tmp_path / "without")
    for group in rows(tmp_path / "with", "groups"):
        successes = 9 * np.array(group["belief"]) - 0.5  # of eight, beside Jeffreys' prior
        np.testing.assert_allclose(successes, successes.round(), atol=1e-4)


def test_eval_measures_a_finished_run(finished):
    workdir, _ = finished
    done = run(workdir, script="eval.py")
    assert done.returncode == 0, done.stderr
    results = json.loads((workdir / "results.json").read_text())
    assert results["settings"]["policy"] == "step 4"
    measured = results["sets"]["held_out"]["avg@2"]["value"]
    assert measured == pytest.approx(rows(workdir)[-1]["eval/accuracy"], abs=1e-6)
    assert f"{100 * measured:.1f}" in done.stdout
    assert len(rows(workdir / "eval" / "step_4", "held_out")) == 1 + 6 * 2
