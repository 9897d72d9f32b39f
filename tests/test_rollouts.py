"""The rollout log: what its rows say, the room it takes, and what reads it; the writers for live views."""

import html
import json
import pathlib
import re
import sys
import time
from types import MappingProxyType

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from krl.base.types import Rollouts
from krl.run.log import MetricsLog
from krl.run.rollouts import SCHEMA, describe_rollouts, logged_steps, read_rollouts, show_rollouts, write_step
from krl.run.writers import check_writers, find_writers, mlflow, wandb
from krl.tasks import EncodedTasks, TaskSet

QUIET = {"log.wandb": "", "log.mlflow": ""}


def table_of(step=3, faults=(0, 0, 3, 0, 0), parts=MappingProxyType({})):
    tasks = TaskSet(prompts=("p0", "p1", "p2"), answers=("x", ("y", "z"), "w"))
    encoded = EncodedTasks(tasks=tasks, tokens=np.zeros((3, 1), np.int32), mask=np.ones((3, 1), bool), dropped=0)
    logps = np.array([[-1, -2, 9], [-0.5, 9, 9], [-1, -1, -1], [-3, -0.25, 9], [9, 9, 9]], np.float32)
    rollouts = Rollouts(
        prompt_index=np.array([1, 0, 1, 1, 2]), sample_index=np.array([1, 0, 0, 2, 0]), mask=np.ones(5, bool),
        tokens=np.zeros((5, 3), int), logps=logps,
        lengths=np.array([2, 1, 3, 2, 3]), finished=np.array([1, 1, 0, 1, 0], bool),
    )  # fmt: skip
    groups = {"task_ids": np.array([2, 1]), "counts": np.array([1, 3]), "belief": np.array([0.25, 0.5]), "prior": np.array([0.125, 0.75])}  # fmt: skip
    reasons = ["it raised ValueError" if kind else "" for kind in faults]
    texts = ["a", "b", "ccc", "d", None]  # the last one is another process's
    rewards, advantages = np.array([1, 0, 0, 0.5, 9], np.float32), np.array([2, 0, -1, 0.5, 9], np.float32)
    each = {
        "rollouts": rollouts, "rewards": rewards, "advantages": advantages, "faults": np.array(faults), "texts": texts,
        "reasons": reasons, "parts": parts,
    }  # fmt: skip
    return describe_rollouts(encoded, step, groups, each)


def test_a_row_says_all_of_its_rollout():
    table = table_of()
    assert table.schema == SCHEMA
    first, second, third, last = table.to_pylist()  # by prompt and sample, without the one that is not here
    assert first == {
        "step": 3, "prompt_id": 2, "sample": 0, "prompt": "p2", "answer": "w", "response": "b", "reward": 0.0, "advantage": 0.0,
        "log_prob": -0.5, "length": 1, "finished": True, "count": 1, "belief": 0.25, "prior": 0.125, "fault": "",
        "reason": "",
    }  # fmt: skip
    assert (second["response"], second["finished"], second["log_prob"]) == ("ccc", False, -3.0)
    assert (second["reward"], second["fault"], second["reason"]) == (None, "errors", "it raised ValueError")
    assert (third["response"], third["reward"], third["advantage"], third["log_prob"]) == ("a", 1.0, 2.0, -3.0)
    assert (last["sample"], last["count"], last["prior"], last["reward"]) == (2, 3, 0.75, 0.5)
    assert json.loads(last["answer"]) == ["y", "z"]


def test_several_rewards_have_a_column_each_and_older_logs_read_with_newer_ones(tmp_path):
    parts = {"math": np.array([1, 0, 0, 0.5, 9]), "mine:form": np.array([0.25, 1, 0, 0, 9])}
    write_step(tmp_path, 2, table_of(2, parts=parts), 1.0)
    write_step(tmp_path, 1, table_of(1).drop_columns(["reason"]), 1.0)
    read = read_rollouts(tmp_path)
    assert read["reward/math"].to_pylist() == [None] * 4 + [0.0, None, 1.0, 0.5]
    assert read["reward/mine:form"].to_pylist() == [None] * 4 + [1.0, None, 0.25, 0.0]
    assert read["reason"].to_pylist() == [None] * 4 + ["", "it raised ValueError", "", ""]
    assert read.schema.names[: len(SCHEMA.names)] == SCHEMA.names


def test_shown_rollouts_are_the_best_and_the_worst_of_the_largest_group():
    shown = show_rollouts(table_of(), most=2)
    assert "p1" in shown
    assert "p2" not in shown
    assert shown.index("reward 1, 2 tokens") < shown.index("no reward (it raised ValueError), 3 tokens")
    assert "reward 0.5" not in shown
    assert all(line.startswith("    ") for line in shown.splitlines() if line)  # nothing is taken for Markdown


def test_a_full_log_keeps_every_second_step_then_every_fourth(tmp_path, capsys):
    directory, table = tmp_path / "rollouts", table_of()
    write_step(directory, 1, table, 1.0)
    size = next(directory.iterdir()).stat().st_size / 1e9
    for step in range(2, 30):
        write_step(directory, step, table, 4.5 * size)
        assert len(logged_steps(directory)) <= 4
    assert logged_steps(directory) == [8, 16, 24]
    write_step(directory, 30, table, 4.5 * size)
    write_step(directory, 32, table, 4.5 * size)
    assert logged_steps(directory) == [8, 16, 24, 32]
    assert not list(directory.glob("*.partial"))
    write_step(directory, 40, table, 0.5 * size)  # not even one
    assert logged_steps(directory) == []
    write_step(directory, 1, table, 0.5 * size)
    assert re.fullmatch(
        r"krl: the rollouts of a step take \S+ GB, more than config.log.rollouts_gb=\S+; none are kept\n",
        capsys.readouterr().out,
    )
    write_step(tmp_path / "none", 1, table, 0.0)
    assert not (tmp_path / "none").exists()


def test_a_log_may_begin_at_any_step(tmp_path):
    for step in (176, 177, 178):
        write_step(tmp_path, step, table_of(step), 1.0)
    assert logged_steps(tmp_path) == [176, 177, 178]
    assert read_rollouts(tmp_path)["step"].to_pylist() == [176] * 4 + [177] * 4 + [178] * 4
    assert read_rollouts(tmp_path, [177])["step"].to_pylist() == [177] * 4
    assert read_rollouts(tmp_path / "none").num_rows == 0
    for step in (1, 101, 102):  # a time without a log is not taken for a full one
        write_step(tmp_path / "paused", step, table_of(step), 1.0)
    assert logged_steps(tmp_path / "paused") == [1, 101, 102]


def test_a_continued_run_forgets_later_rollouts(tmp_path):
    for step in (1, 2, 3):
        write_step(tmp_path / "rollouts", step, table_of(step), 1.0)
    with MetricsLog(tmp_path, first_step=2, rollouts_gb=1.0, texts_every=3) as log:
        assert logged_steps(tmp_path / "rollouts") == [1, 2]
        log.write_rollouts(3, table_of(3, faults=(0,) * 5))
    assert set(read_rollouts(tmp_path / "rollouts", [3])["fault"].to_pylist()) == {""}


def events(directory: pathlib.Path) -> list[Event]:
    """Every event of TensorBoard's files: a length, its checksum, the event, its checksum."""
    found = []
    for path in sorted(directory.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def test_tensorboard_has_scalars_histograms_and_texts(tmp_path):
    with MetricsLog(tmp_path, first_step=0, texts_every=3) as log:
        log.write(3, {"loss": 0.5})
        log.write_groups(3, {"counts": np.array([2, 4]), "scored": np.array([2, 4]), "successes": np.array([1, 4]), "belief": np.array([0.1, 0.2])})  # fmt: skip
        log.write_rollouts(3, table_of())
        log.write_rollouts(4, table_of(4))
    values = {
        value.tag: (event.step, value) for event in events(tmp_path / "tensorboard") for value in event.summary.value
    }
    assert values["loss"][1].simple_value == 0.5
    assert (values["counts"][1].histo.min, values["counts"][1].histo.max) == (2, 4)
    assert values["success_rate"][1].histo.sum == 1.5
    step, text = values["rollouts/text_summary"]
    assert step == 3  # not 4
    assert "reward 1" in text.tensor.string_val[0].decode()


def test_a_number_that_is_not_finite_is_not_written_and_nothing_is_said_of_it(tmp_path, caplog):
    with MetricsLog(tmp_path, first_step=0) as log:
        log.write(1, {"mismatch": float("nan"), "loss": float("inf"), "reward_mean": 0.5})
        log.write_groups(1, {"counts": np.array([2, 4]), "scored": np.array([0, 2]), "successes": np.array([0, 1]), "belief": np.array([0.1, np.nan])})  # fmt: skip
    tags = {value.tag: value for event in events(tmp_path / "tensorboard") for value in event.summary.value}
    assert set(tags) == {"reward_mean", "counts", "belief", "success_rate"}
    assert tags["belief"].histo.num == 1
    assert (tags["success_rate"].histo.num, tags["success_rate"].histo.sum) == (1, 0.5)
    assert not caplog.records
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "mismatch": None, "loss": None, "reward_mean": 0.5}  # fmt: skip


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    shown: dict = {}
    library = pytest.importorskip("wandb")
    kept = library.sdk.wandb_run.Run.log
    monkeypatch.setattr(library.sdk.wandb_run.Run, "log", lambda run, data: (shown.setdefault(data["step"], {}).update(data), kept(run, data))[1])  # fmt: skip
    with wandb("project", tmp_path, {"seed": 3}) as write:
        write(1, {"loss": 0.5}, {"counts": np.array([2, 4])}, {"rollouts": "<script>"})
    assert shown[1]["loss"] == 0.5
    assert sum(shown[1]["counts_histogram"].histogram) == 2
    end = time.monotonic() + 60  # W&B's own process writes the file, on a busy machine a moment after the run has ended
    while (
        not (written := b"loss" in next((tmp_path / "wandb").rglob("*.wandb")).read_bytes()) and time.monotonic() < end
    ):
        time.sleep(0.05)
    assert written
    page = next((tmp_path / "wandb").rglob("*.html")).read_text()
    assert html.escape("<script>") in page
    assert "<pre><script>" not in page
    identity = (tmp_path / "run_id").read_text()
    assert next((tmp_path / "wandb").rglob("*.wandb")).name == f"run-{identity}.wandb"


def test_mlflow_has_metrics_and_the_config_and_goes_on(tmp_path, monkeypatch):
    library = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    for step, loss in ((1, 0.5), (2, 0.25)):  # a run, and its continuation
        with mlflow(uri, tmp_path, {"seed": 3, "alloc.rule": "knapsack"}) as write:
            write(step, {"eval/accuracy": loss, "kl": float("nan")}, {}, {})
    client = library.MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name("krl").experiment_id])
    assert len(found) == 1
    assert found[0].data.params == {"seed": "3", "alloc.rule": "knapsack"}
    assert found[0].info.status == "FINISHED"
    history = client.get_metric_history(found[0].info.run_id, "eval/accuracy")
    assert [(one.step, one.value) for one in history] == [(1, 0.5), (2, 0.25)]
    assert "kl" not in found[0].data.metrics


def test_a_server_that_goes_away_costs_a_line_and_not_the_run(tmp_path, monkeypatch, capsys):
    library = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def refuse(*_, **__):
        raise library.exceptions.MlflowException("no\nserver")

    with mlflow((tmp_path / "store").as_uri(), tmp_path, {}) as write:
        monkeypatch.setattr(library.MlflowClient, "log_batch", refuse)
        write(1, {"loss": 1.0}, {}, {})
        write(2, {"loss": 1.0}, {}, {})
    assert capsys.readouterr().out == "krl: MLflow gets nothing from step 1 on: no server\n"
    with pytest.raises(ValueError, match=r"config.log.mlflow='nonsense://'"), mlflow("nonsense://", tmp_path, {}):
        pass


def test_a_writer_that_is_not_installed_is_named_before_the_run_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        with pytest.raises(ValueError, match=f"config.log.{name} needs {package}, .*: pip install {package}$"):
            check_writers(QUIET | {f"log.{name}": "somewhere"})
    check_writers(QUIET)
    assert find_writers(tmp_path, QUIET) == []


def test_a_run_that_failed_is_not_shown_as_finished(tmp_path, monkeypatch):
    library = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    client = library.MlflowClient(tracking_uri=uri)
    found = lambda: client.search_runs([client.get_experiment_by_name("krl").experiment_id])[0].info.status  # noqa: E731
    with pytest.raises(KeyError), MetricsLog(tmp_path, first_step=0, writers=[mlflow(uri, tmp_path, {})]):
        raise KeyError
    assert found() == "FAILED"
    with MetricsLog(tmp_path, first_step=0, writers=[mlflow(uri, tmp_path, {})]) as log:
        assert found() == "RUNNING"
        log.write_groups(1, {"counts": np.array([2, 4]), "scored": np.zeros(2), "successes": np.zeros(2), "belief": np.array([np.nan, np.nan])})  # fmt: skip
    assert found() == "FINISHED"
