"""Tasks: exact answers, disjoint splits, files of several formats and odd content."""

import dataclasses
import functools
import json
import logging
import pickle
import re
from typing import Any

import datasets
import numpy as np
import pytest

from krl.tasks import TaskSet, encode_tasks, load_tasks, step_task_ids
from krl.tasks.arithmetic import RUNGS, make_ladder
from krl.tasks.data import plain_answer

LADDER = {"addition": 4, "subtraction": 3, "multiplication": 3, "two_step": 2}
SIZES = {"warm": 300, "train": 200, "test": 100}


def test_ladder_answers_are_what_python_computes():
    for split in make_ladder(LADDER, SIZES, seed=0).values():
        for prompt, answer in zip(split.prompts, split.answers, strict=True):
            assert re.fullmatch(r"[0-9+*-]+=", prompt)
            assert str(eval(prompt[:-1])) == answer


def test_ladder_splits_are_disjoint_whatever_the_seed():
    first, second = make_ladder(LADDER, SIZES, seed=0), make_ladder(LADDER, SIZES, seed=1)
    for a in SIZES:
        assert len(first[a]) == len(set(first[a].prompts)) == SIZES[a]
        for b in SIZES:
            if a != b:
                assert not set(first[a].prompts) & set(first[b].prompts)
                assert not set(first[a].prompts) & set(second[b].prompts)
    assert first["train"].prompts != second["train"].prompts


def test_ladder_is_reproducible_and_has_every_rung():
    assert make_ladder(LADDER, SIZES, seed=3) == make_ladder(LADDER, SIZES, seed=3)
    prompts = make_ladder(LADDER, SIZES, seed=3)["train"].prompts
    kinds = {"+-" if "+" in p and "-" in p else p.strip("=0123456789") for p in prompts}
    assert len(kinds) == len(RUNGS)


def test_ladder_refuses_the_impossible():
    with pytest.raises(ValueError, match="add digits or ask for fewer"):
        make_ladder({"addition": 1}, {"warm": 100, "train": 100, "test": 100}, seed=0)
    with pytest.raises(ValueError, match="rungs must map"):
        make_ladder({"division": 1}, SIZES, seed=0)
    with pytest.raises(ValueError, match="rungs must map"):
        make_ladder({}, SIZES, seed=0)


ROWS = [{"question": f"{i}?", "answer": f"so #### {i}"} for i in range(5)]


def texts(tasks):
    """The tasks without the rest of their rows."""
    return dataclasses.replace(tasks, rows=())


def load(path, **changes):
    options: dict[str, Any] = {
        "name": "", "subset": "", "split": "train", "prompt_field": "question", "answer_field": "answer",
        "completion_field": "", "limit": 0,
    } | changes  # fmt: skip
    return load_tasks(path=str(path), **options)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "arrow"])
def test_local_files_of_each_format(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
            for row in ROWS:
                writer.write(row)
            writer.finalize()
    tasks = load(path, completion_field="answer", limit=3)
    assert tasks.prompts == ("0?", "1?", "2?")
    assert tasks.answers == tasks.completions == ("so #### 0", "so #### 1", "so #### 2")


def test_what_else_a_row_has_is_kept_for_rewards(tmp_path):
    rows = [row | {"tests": [f"f({i}) == 1"], "meta": {"level": i, "tags": None}} for i, row in enumerate(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = load(tmp_path / "rows.jsonl", completion_field="answer", fields=["tests"])
    assert tasks.rows == tuple({"tests": row["tests"], "meta": row["meta"]} for row in rows)
    assert tasks.take([3, 1]).rows == (tasks.rows[3], tasks.rows[1])
    assert pickle.loads(pickle.dumps(tasks)) == tasks


GOOD = '{"question": "1", "answer": "2"}\n'
USER, REPLY = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is \\boxed{2}."}
CHAT = json.dumps({"chat": [{"role": "system", "content": "Count."}, USER, REPLY], "answer": "2"})
HALF = json.dumps({"chat": [USER], "answer": "2"})


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("gone.jsonl", None, {}, "gone.jsonl does not exist"),
        ("empty.jsonl", "", {}, "empty.jsonl is empty"),
        ("rows.csv", "a,b\n1,2\n", {}, "must end in"),
        ("broken.jsonl", '{"question": "1", "answer"\n', {}, "cannot read data file"),
        ("short.jsonl", '{"question": "1"}\n', {}, "no field 'answer'"),
        ("rows.jsonl", GOOD, {"answer_field": ""}, "no answer field"),
        ("null.jsonl", GOOD + '{"question": "1", "answer": null}\n', {}, r"row 1 of .*null.jsonl has no 'answer'"),
        ("blank.jsonl", GOOD + '{"question": " ", "answer": "1"}\n', {}, r"row 1 of .*blank.jsonl has no 'question'"),
        ("dict.jsonl", '{"question": "1", "answer": {"n": 2}}\n', {}, "'answer' must be a text, a number or a list"),
        ("nested.jsonl", '{"question": ["1"], "answer": "2"}\n', {}, "'question' must be a text, got list"),
        ("chat.jsonl", CHAT, {"prompt_field": "chat", "completion_field": "chat"}, "'chat' must be one user message"),
        ("half.jsonl", HALF, {"prompt_field": "chat", "completion_field": "chat"}, "has no 'chat'"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, changes, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load(path, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        b'{"question": "1", "ans',
        b"\0\xff",
        b'{"question": "1"}',
        b'{"question": "\xff", "answer": "2"}',
        b'{"answer": 1]',
    ],
)
def test_a_row_that_is_broken_is_told_by_its_number_and_nothing_else_is_said(tmp_path, row, caplog, monkeypatch):
    path, good = tmp_path / "rows.jsonl", GOOD.encode()
    path.write_bytes(good * 2000 + b"\n" + good + row + b"\n" + good)  # empty lines are no rows
    logger = logging.getLogger("datasets")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with pytest.raises(ValueError, match=r"\brow 2001\b") as error:
        load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert caplog.records == []


def test_chats_are_read_as_questions_and_solutions(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, REPLY]}) + "\n")
    tasks = load(path, prompt_field="messages", answer_field="", completion_field="messages")
    assert texts(tasks) == TaskSet(("1+1?",), ("It is \\boxed{2}.",), ("It is \\boxed{2}.",))
    path.write_text(json.dumps({"prompt": [USER], "completion": [REPLY], "answer": 2}) + "\n")
    tasks = load(path, prompt_field="prompt", completion_field="completion")
    assert texts(tasks) == TaskSet(("1+1?",), ("2",), ("It is \\boxed{2}.",))


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = r"^cannot load data set a/b \(c\), split test: no route; name a local file instead$"
    with pytest.raises(ValueError, match=message):
        load("", name="a/b", subset="c", split="test")


def test_the_network_is_not_asked_about_local_files(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("looked up a host"))
    (tmp_path / "rows.jsonl").write_text(GOOD)
    assert texts(load(tmp_path / "rows.jsonl")) == TaskSet(("1",), ("2",))


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("025 \n", "025"),
        (142.0, "142"),
        (0.5, "0.5"),
        (-3, "-3"),
        (0, "0"),
        (["9.6\n"], "9.6"),
        (["7.5 \\times 10^7", "7.5 \\times 10^7\n", "", None], "7.5 \\times 10^7"),
        (["1", " 10^{-3}\n", 1.0], ("1", "10^{-3}")),
    ],
)
def test_answers_of_every_kind(value, answer):
    assert plain_answer(value, "answer", "row 0") == answer


@pytest.mark.parametrize("value", [None, "", " \n", [], ["", None], float("nan")])
def test_a_row_without_an_answer_is_named(value):
    with pytest.raises(ValueError, match="row 7 has no 'gold'"):
        plain_answer(value, "gold", "row 7")


class Letters:
    """A tokenizer of one token a character; 1 begins a sequence, 2 a user's message and 3 the reply."""

    pad_id = 0

    def encode_prompt(self, text):
        return [1, *map(ord, text)]

    def encode_chat(self, messages):
        (message,) = messages
        assert message["role"] == "user"
        return [2, *map(ord, message["content"]), 3]


def test_prompts_are_padded_on_the_left_and_long_ones_left_out():
    tasks = TaskSet(("ab", "abcdef", "c"), ("1", ("2", "3"), ("3", "4")), ("x", "y", "z"))
    encode = functools.partial(encode_tasks, tasks, Letters(), template="raw", max_prompt_tokens=4)
    encoded = encode()
    assert encoded.tokens.tolist() == [[0, 1, 97, 98], [0, 0, 1, 99]]
    assert encoded.mask.tolist() == [[False, True, True, True], [False, False, True, True]]
    assert encoded.tasks == TaskSet(("ab", "c"), ("1", ("3", "4")), ("x", "z"))
    assert encoded.dropped == 1
    assert encode(limit=1).tasks.prompts == ("ab",)


BOXED = "a {prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        ("raw", [1, *map(ord, "a {prompt}")]),
        ("boxed", [1, *map(ord, BOXED)]),
        ("chat", [2, *map(ord, "a {prompt}"), 3]),
        ("chat_boxed", [2, *map(ord, BOXED), 3]),
        ("Q: {prompt}\nA:", [1, *map(ord, "Q: a {prompt}\nA:")]),
    ],
)
def test_templates(template, ids):
    tasks = TaskSet(("a {prompt}",), ("1",))  # a question may hold anything
    encoded = encode_tasks(tasks, Letters(), template=template, max_prompt_tokens=100)
    assert encoded.tokens[encoded.mask].tolist() == ids
    assert encoded.tasks == tasks


def test_an_unknown_template_is_refused():
    with pytest.raises(ValueError, match=r"'chatt' is none of raw, boxed, chat, chat_boxed and has no \{prompt\}"):
        encode_tasks(TaskSet(("a",), ("1",)), Letters(), template="chatt", max_prompt_tokens=3)


def test_all_prompts_too_long_is_refused():
    with pytest.raises(ValueError, match=r"the shortest has 5.*max_prompt_tokens"):
        encode_tasks(TaskSet(("abcd",), ("1",)), Letters(), template="raw", max_prompt_tokens=3)


def test_every_pass_visits_every_task_once_and_steps_repeat_none():
    for step in range(12):
        ids = step_task_ids(22, 5, step, seed=1)
        assert len(set(ids.tolist())) == 5
        np.testing.assert_array_equal(ids, step_task_ids(22, 5, step, seed=1))
    one_pass = np.concatenate([step_task_ids(20, 5, step, seed=1) for step in range(4)])
    assert sorted(one_pass) == list(range(20))
    assert not np.array_equal(one_pass, np.concatenate([step_task_ids(20, 5, 4 + step, seed=1) for step in range(4)]))
    with pytest.raises(ValueError, match="only 3 are left"):
        step_task_ids(3, 5, 0, seed=0)
