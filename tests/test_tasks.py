"""Tasks: exact answers, disjoint splits, files of several formats and odd content."""

import dataclasses
import datetime
import decimal
import functools
import gzip
import json
import logging
import pickle
import re
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from krl.configs import default
from krl.configs.check import check, parse_arguments
from krl.run import data as run_data
from krl.run.data import load_task_sets
from krl.run.setup import NAMES
from krl.tasks import TaskSet, encode_tasks, load_tasks, step_task_ids
from krl.tasks.arithmetic import RUNGS, make_ladder
from krl.tasks.fields import find_field, plain_answer, plain_pair, plain_prompt, plain_row
from krl.tasks.files import find_files, has_split

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
    with pytest.raises(ValueError, match="make them longer or ask for fewer"):
        make_ladder({"addition": 1}, {"warm": 100, "train": 100, "test": 100}, seed=0)
    with pytest.raises(ValueError, match="rungs must map"):
        make_ladder({"division": 1}, SIZES, seed=0)
    with pytest.raises(ValueError, match="rungs must map"):
        make_ladder({}, SIZES, seed=0)


ROWS = [{"question": f"{i}?", "answer": f"so #### {i}"} for i in range(5)]


def texts(tasks):
    """The tasks without the rest of their rows."""
    return dataclasses.replace(tasks, rows=())


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
SYSTEM = {"role": "system", "content": "Count."}
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
        ("nan.jsonl", GOOD + '{"question": "1", "answer": NaN}\n', {}, r"row 1 of .*nan.jsonl has no 'answer'"),
        ("inf.jsonl", GOOD + '{"question": "1", "answer": -Infinity}\n', {}, r"row 1 of .*inf.jsonl has no 'answer'"),
        ("lists.jsonl", '{"question": "1", "answer": [["2"]]}\n', {}, "row 0 of .*, got list"),
        ("holes.jsonl", '{"question": "1", "answer": ["2", null]}\n', {}, "row 0 of .* one of the answers .* is empty"),
        ("gaps.jsonl", '{"question": "1", "answer": ["", 2]}\n', {}, "row 0 of .* one of the answers .* is empty"),
        (
            "twice.jsonl",
            GOOD + '{"question": "1", "answer": 2, "answer": 3}\n',
            {},
            "row 1: .* the key 'answer' is there twice",
        ),
        (
            "half.jsonl",
            GOOD + '{"question": "\\ud83d", "answer": 2}\n',
            {},
            "row 1 of .* 'question' has half a character",
        ),
        ("deep.jsonl", GOOD + "[" * 99999 + "\n", {}, "row 1: its lists and objects are nested too deeply"),
        ("list.jsonl", GOOD + "[1]\n", {}, "row 1: .* list instead of an object"),
        ("rows.json", '[{"question": "1", "answer": "2"}, 3]', {}, "row 1: .* int instead of an object"),
        ("bad.json", '[{"question": "1", "answer": "2"},\n {"question": 1 2}]', {}, "row 1: .* at line 2 column 17"),
        ("open.json", '[{"question": "1", "answer": "2"}', {}, "row 0: .* neither a comma nor ]"),
        ("more.json", '[{"question": "1", "answer": "2"}]]', {}, "more behind its array"),
        ("rows.jsonl.gz", "no gzip", {}, "cannot read data file .*rows.jsonl.gz"),
        ("junk.parquet", "no parquet", {}, "cannot read data file .*junk.parquet as parquet"),
        ("junk.arrow", "no arrow at all", {}, "cannot read data file .*junk.arrow as arrow"),
        ("blank.parquet", "", {}, "blank.parquet is empty"),
        ("ask.jsonl", HALF, {"prompt_field": "chat", "completion_field": "chat"}, "has no 'chat'"),
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


def test_longer_chats_are_kept_as_messages(tmp_path):
    again = {
        "role": "user",
        "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "2+2?", "image": None}],
    }
    rows = [
        {"prompt": [SYSTEM, USER], "answer": 2},
        {"prompt": "3?", "answer": 3},
        {"prompt": [USER, REPLY | {"tool_calls": None}, again], "answer": 4},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = load(tmp_path / "rows.jsonl", prompt_field="prompt")
    assert tasks.prompts == (
        "system: Count.\n\nuser: 1+1?",
        "3?",
        "user: 1+1?\n\nassistant: It is \\boxed{2}.\n\nuser: And 2+2?",
    )
    asked = {"role": "user", "content": "And 2+2?"}
    assert tasks.chats == ((SYSTEM, USER), None, (USER, REPLY, asked))
    assert tasks.take([2, 1]).chats == ((USER, REPLY, asked), None)
    assert plain_pair([SYSTEM, USER, REPLY], [SYSTEM, USER, REPLY], ("chat", "chat"), "row 0") == (
        tasks.prompts[0], (SYSTEM, USER), REPLY["content"]
    )  # fmt: skip
    for reply in ([REPLY], [USER, REPLY], REPLY["content"]):
        assert plain_pair("1+1?", reply, ("q", "c"), "row 0") == ("1+1?", None, REPLY["content"])


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([USER, REPLY], "'chat' ends with a message of the assistant"),
        ([SYSTEM], "'chat' ends with a message of the system"),
        ([], "row 5 has no 'chat'"),
        ([SYSTEM, USER | {"content": " "}], "row 5 has no 'chat'"),
        ([SYSTEM | {"content": None}, USER], "content of message 0 of 'chat' must be a text, got NoneType"),
        ([{"role": "tool", "content": "2"}, USER], "message 0 of 'chat' has the role 'tool'"),
        ([USER, REPLY | {"tool_calls": [{"name": "add"}]}, USER], "message 1 of 'chat' has 'tool_calls' too"),
        ([USER | {"content": [{"type": "image", "url": "u"}]}], "message 0 of 'chat' has a part that is no text"),
        ([USER | {"content": [{"type": "text", "text": "1", "image": "u"}]}], "has a part that is no text"),
        ([{"from": "human", "value": "1"}], "'chat' must be a text, got list"),
        ({"role": "user"}, "'chat' must be a text, got dict"),
        (b"1", "'chat' must be a text, got bytes"),
    ],
)
def test_a_chat_that_would_lose_something_is_refused(chat, message):
    with pytest.raises(ValueError, match=message) as error:
        plain_prompt(chat, "chat", "row 5")
    assert str(error.value).startswith("row 5")


def test_a_reply_must_be_one_and_belong_to_the_prompt():
    for reply, message in (
        ([USER], "row 5 has no 'c': its chat must end with a message of the assistant"),
        ([SYSTEM, USER, REPLY], "'c' has messages besides the reply that are not those of 'q'"),
        ("", "row 5 has no 'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            plain_pair("1+1?", reply, ("q", "c"), "row 5")


def test_fields_inside_others():
    row = {"a": {"b": 1, "c": [{"d": 2}, 3]}, "x.y": 4, "x": {"y": 5}, "p": {"q.r": {"s": 6}}, "none": None, "e": {}}
    for name, value in {
        "a.b": 1,
        "a.c.0.d": 2,
        "a.c.1": 3,
        "x.y": 4,
        "p.q.r.s": 6,
        "none.z": None,
        "a.c": row["a"]["c"],
    }.items():
        assert find_field(row, name, "row 0") == value, name
    for name in ("a.z", "a.b.c", "a.c.2", "z", "a.", ""):
        with pytest.raises(ValueError, match=r"row 0 has no field .*'a\.b', 'a\.c', 'x\.y', .*'none', 'e'\]"):
            find_field(row, name, "row 0")


def test_a_row_that_is_nested_too_deeply_is_named():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="row 3: its lists and objects are nested too deeply"):
        plain_row({"x": deep}, "row 3")
    assert plain_row({"x": [[1]], "y": 2}, "row 3", without=["y"]) == {"x": [[1]]}


def test_the_layout_of_verl(tmp_path):
    rows = [
        {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": i}, "extra_info": {"level": f"L{i}"}}
        for i in range(3)
    ] + [{"prompt": [USER], "reward_model": {"ground_truth": "4"}}]
    write_rows(tmp_path / "rows.jsonl", rows)
    fields = {"prompt_field": "prompt", "answer_field": "reward_model.ground_truth", "fields": ["extra_info.level"]}
    tasks = load(tmp_path / "rows.jsonl", **fields)
    assert tasks.prompts == ("1+1?",) * 4  # equal prompts stay
    assert tasks.answers == ("0", "1", "2", "4")
    assert tasks.fields == {"extra_info.level": ("L0", "L1", "L2", "")}
    assert tasks.rows[0] == {"reward_model": rows[0]["reward_model"], "extra_info": {"level": "L0"}}
    with pytest.raises(ValueError, match=r"no field 'extra_info.lvl'; its fields are .*'extra_info\.level'"):
        load(tmp_path / "rows.jsonl", **fields | {"fields": ["extra_info.lvl"]})
    write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": [USER], "reward_model": None}])
    with pytest.raises(ValueError, match=r"row 4 of .* has no 'reward_model.ground_truth'"):
        load(tmp_path / "rows.jsonl", **fields)


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
        (["7.5 \\times 10^7", "7.5 \\times 10^7\n"], "7.5 \\times 10^7"),
        (True, "True"),
        ([False, 0], ("False", "0")),
        (10**40 + 1, "1" + "0" * 39 + "1"),
        (1e22, "1" + "0" * 22),
        (1e300, "1e+300"),
        (-0.0, "0"),
        (decimal.Decimal("0.10"), "0.10"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (["1", " 10^{-3}\n", 1.0], ("1", "10^{-3}")),
    ],
)
def test_answers_of_every_kind(value, answer):
    assert plain_answer(value, "answer", "row 0") == answer


@pytest.mark.parametrize("value", [None, "", " \n", [], ["", None], float("nan")])
def test_a_row_without_an_answer_is_named(value):
    with pytest.raises(ValueError, match="row 7 has no 'gold'"):
        plain_answer(value, "gold", "row 7")


def test_a_column_may_have_several_kinds_and_whole_numbers_any_size(tmp_path):
    huge = 123456789012345678901234567890
    values = [7, "x+1", ["1", 2], 0.5, huge, 2**53 + 1, True, "2024-05-01", "2024-05-01T00:00:00Z", ["x"]]
    answers = (
        "7",
        "x+1",
        ("1", "2"),
        "0.5",
        str(huge),
        str(2**53 + 1),
        "True",
        "2024-05-01",
        "2024-05-01T00:00:00Z",
        "x",
    )
    rows = [{"question": f"{i}?", "answer": value} for i, value in enumerate(values)]
    assert load(write_rows(tmp_path / "rows.jsonl", rows)).answers == answers
    rows[3:3] = [{"question": "1", "answer": i} for i in range(5000)]  # the kind changes late
    assert load(write_rows(tmp_path / "rows.jsonl", rows)).answers[:3] + answers[3:] == answers
    long = "7" * 5000  # more digits than Python reads at a time
    (tmp_path / "rows.jsonl").write_text(f'{{"question": {long}, "answer": {long}, "n": {long}}}')
    tasks = load(tmp_path / "rows.jsonl")
    assert tasks.answers == tasks.prompts == (long,)
    assert tasks.rows[0]["n"] == 7 * (10**5000 - 1) // 9


def test_further_fields_may_have_whole_numbers_of_any_size(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        f'{{"question": "1", "answer": 1, "n": -1{"0" * 5000}, "l": [1{"0" * 5000}, "a"]}}\n'
    )
    fields = load(tmp_path / "a.jsonl", fields=["n", "l"]).fields
    assert fields == {"n": ("-1" + "0" * 5000,), "l": (f"[1{'0' * 5000}, 'a']",)}


def test_numbers_have_the_digits_that_stand_in_the_file(tmp_path):
    written = {
        "0.1": "0.1", "2.50": "2.50", "142.0": "142", "1e22": "1" + 22 * "0", "6.02E23": "602" + 21 * "0", "1e-7": "1e-7",
        "0.30000000000000004": "0.30000000000000004", "3.14159265358979323846": "3.14159265358979323846",
        "123456789012345678901.0": "123456789012345678901", "1e400": "1e400", "-0.0": "0", "1e99999999999999999999": "1e99999999999999999999",
    }  # fmt: skip
    lines = (f'{{"question": "q", "answer": {digits}, "x": [{digits}], "y": NaN}}\n' for digits in written)
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    tasks = load(tmp_path / "rows.jsonl", fields=["x"])
    assert tasks.answers == tuple(written.values())
    assert tasks.rows[1]["x"] == [2.5]
    assert type(tasks.rows[1]["x"][0]) is float


ODD = [{"question": "a\u2028b\x85c\u00e9\U0001f600", "answer": "x" * 2_000_000}, {"question": "2?", "answer": "2"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mark.jsonl", b"\xef\xbb\xbf" + "\n".join(json.dumps(row, ensure_ascii=False) for row in ODD).encode()),
        ("windows.jsonl", "\r\n\r\n".join(json.dumps(row) for row in ODD).encode() + b"\r\n"),
        ("array.json", json.dumps(ODD, indent=2).encode()),
        ("marked.json", b"\xef\xbb\xbf\n" + json.dumps(ODD, ensure_ascii=False).encode() + b"\n\n"),
        ("lines.json", "\n".join(json.dumps(row) for row in ODD).encode()),
        ("lines.jsonl.gz", gzip.compress("\n".join(json.dumps(row) for row in ODD).encode())),
    ],
)
def test_json_of_every_layout(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    tasks = load(tmp_path / name)
    assert tasks.prompts == (ODD[0]["question"], "2?")
    assert tasks.answers == (ODD[0]["answer"], "2")
    assert tasks.places[1] == f"row 1 of data file {tmp_path / name}"


def test_columns_are_read_as_datasets_yields_them(tmp_path):
    columns = {
        "question": [[SYSTEM, USER], [USER]],
        "answer": [decimal.Decimal("0.10"), decimal.Decimal("2.00")],
        "day": [datetime.date(2024, 5, 1), None],
        "single": [{"x": [0.1]}, {"x": []}],
        "mixed": [{"a": [1, "x"]}, 7],
    }
    features = {
        "question": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        "answer": datasets.Value("decimal128(20, 2)"), "day": datasets.Value("date32"),
        "single": {"x": datasets.List(datasets.Value("float32"))},
    }  # fmt: skip
    if hasattr(datasets, "Json"):  # older versions have no columns of several kinds
        features["mixed"] = datasets.Json()
    else:
        del columns["mixed"]
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    in_columns = datasets.Features(features | {"question": datasets.Sequence(features["question"].feature)})
    turned = [{"role": ["system", "user"], "content": ["Count.", "1+1?"]}, {"role": ["user"], "content": ["1+1?"]}]
    datasets.Dataset.from_dict(columns | {"question": turned}, features=in_columns).to_parquet(
        str(tmp_path / "old.parquet")
    )
    for name in ("rows.parquet", "old.parquet", "saved", "saved/data-00000-of-00001.arrow"):
        tasks = load(tmp_path / name, fields=["day"])
        assert tasks.chats == ((SYSTEM, USER), None)
        assert tasks.prompts == ("system: Count.\n\nuser: 1+1?", "1+1?")
        assert tasks.answers == ("0.10", "2")
        assert tasks.fields == {"day": ("2024-05-01", "")}
        assert [row["single"] for row in tasks.rows] == columns["single"]
        assert [row.get("mixed") for row in tasks.rows] == columns.get("mixed", [None, None])
        assert load(tmp_path / name, answer_field="day", limit=1).answers == ("2024-05-01",)


def test_columns_that_datasets_has_no_type_for_and_two_of_one_name(tmp_path):
    file = tmp_path / "a.parquet"
    columns = {
        "question": pyarrow.array(["1", "2"]),
        "answer": pyarrow.array([0.1, 2.0], pyarrow.float32()),
        "sizes": pyarrow.array([[("a", 1), ("b", 2)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    tasks = load(file)
    assert tasks.answers == ("0.1", "2")
    assert tasks.rows == ({"sizes": {"a": 1, "b": 2}}, {"sizes": None})
    twice = pyarrow.Table.from_arrays([*columns.values(), columns["answer"]], [*columns, "answer"])
    pyarrow.parquet.write_table(twice, file)
    with pytest.raises(
        ValueError, match=r"^data file .*a\.parquet has two columns named 'answer'; rename or remove one$"
    ):
        load(file)


@pytest.fixture
def folder(tmp_path):
    """Two files of different columns, and more to choose from."""
    write_rows(tmp_path / "b.jsonl", [{"question": "1", "answer": 1, "level": 5}])
    write_rows(tmp_path / "a,1.jsonl", [{"question": "2", "answer": "two"}, {"question": "3", "answer": None}])
    return tmp_path


def test_several_files(folder):
    first, second = folder / "a,1.jsonl", folder / "b.jsonl"
    for path, files in {
        f"{second}, {second.with_name('a*')}": [second, first],
        f"{folder}/*.jsonl": [first, second],
        f"{folder}/[b]*": [second],
        str(folder): [first, second],
        str(first): [first],
    }.items():
        assert find_files(path) == files, path
    with pytest.raises(ValueError, match=r"^row 1 of data file .*a,1\.jsonl has no 'answer'"):
        load(folder)
    write_rows(first, [{"question": "2", "answer": "two"}])
    tasks = load(folder, fields=["level"])
    assert (tasks.prompts, tasks.answers, tasks.fields["level"]) == (("2", "1"), ("two", "1"), ("", "5"))
    datasets.Dataset.from_list([{"question": "4", "answer": 4.0}]).to_parquet(str(folder / "c.parquet"))
    assert load(f"{folder}/?.*,{first.with_name('a?1*')}").answers == ("1", "4", "two")
    (folder / "empty").mkdir()
    for path, message in (
        (folder, r"holds \.jsonl and \.parquet files; name those to read by a pattern"),
        (folder / "empty", r"the directory .*empty holds no \.jsonl, \.json, \.parquet or \.arrow files"),
        (f"{folder}/x*.jsonl", r"no data file matches .*x\*\.jsonl"),
        (f"{second},gone.jsonl", r"data file gone\.jsonl does not exist"),
        (f"{second},{folder}/b*", r"names data file .*b\.jsonl twice"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path)


def test_directories_with_splits(tmp_path):
    def make(name, *files):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(GOOD)
        return str(tmp_path / name)

    def names(path, split, **options):
        return [file.name for file in find_files(path, split=split, **options)]

    hub = make(
        "hub",
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    )
    assert names(hub, "train") == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert names(hub, "test") == ["test-00000-of-00001.parquet"]
    assert has_split(hub, split="test")
    with pytest.raises(ValueError, match=r"has no split 'dev', only test, train"):
        names(hub, "dev")
    gsm8k = make("gsm8k", "main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet")
    assert [file.parent.name for file in find_files(gsm8k, subset="main")] == ["main"]
    chat = make("chat", "train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet")
    assert names(chat, "test_sft") == ["test_sft-00000-of-00001.parquet"]
    with pytest.raises(ValueError, match="has no split 'train', only test_sft, train_sft"):
        names(chat, "train")
    cache = make("cache", "gsm8k-train.arrow", "gsm8k-test.arrow", "dataset_info.json")
    assert names(cache, "train") == ["gsm8k-train.arrow"]
    plain = make("plain", "algebra.jsonl", "latest.jsonl", ".hidden.jsonl")
    assert names(plain, "train") == names(plain, "test") == ["algebra.jsonl", "latest.jsonl"]
    assert not has_split(plain, split="test")
    inside = make("inside", "train/a.jsonl", "train/b.jsonl", "test/a.jsonl", "other/a.jsonl")
    assert names(inside, "train") == ["a.jsonl", "b.jsonl"]
    assert find_files(inside, split="test") == [tmp_path / "inside" / "test" / "a.jsonl"]
    words = {
        "train": ("Train.jsonl", "training.jsonl", "my-TRAIN.json"),
        "test": ("Test.jsonl", "testing.jsonl", "my TEST.json"),
    }
    words |= {"dev": ("Dev.jsonl", "development.jsonl"), "eval": ("EVAL.jsonl", "evaluation.jsonl")}
    for split, files in words.items():
        for number, file in enumerate(files):
            assert names(make(f"words{number}", *(some[number % len(some)] for some in words.values())), split) == [
                file
            ]
    shards = make("shards", "Train-00000-of-00001.parquet", "x-Testing-00000-of-00001.parquet")
    assert names(shards, "train") == ["Train-00000-of-00001.parquet"]
    assert names(shards, "test") == ["x-Testing-00000-of-00001.parquet"]
    folders = make("folders", "Training/a.jsonl", "Testing/b.jsonl")
    assert (names(folders, "train"), names(folders, "test")) == (["a.jsonl"], ["b.jsonl"])
    assert names(folders, "testing") == ["b.jsonl"]
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data, test=data.select([3])).save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path / "saved", split="test").prompts == ("3?",)
    assert load(tmp_path / "saved").prompts == tuple(row["question"] for row in ROWS)
    for state in ("{}", "[]", '{"_data_files": null}', '{"_data_files": [{}]}'):
        (tmp_path / "saved" / "train" / "state.json").write_text(state)
        with pytest.raises(
            ValueError, match=r"state\.json does not list _data_files, .*; name the data files instead$"
        ):
            load(tmp_path / "saved" / "train")


def test_the_test_split_of_a_directory_is_held_out(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    config = default.get_config()
    config.data.update(source="dataset", path=str(tmp_path), prompt_field="question", answer_field="answer")
    assert [len(load_task_sets(config)[name]) for name in ("train", "test")] == [3, 2]  # the last rows
    write_rows(tmp_path / "test.jsonl", ROWS[:1])
    assert [len(load_task_sets(config)[name]) for name in ("train", "test")] == [5, 1]
    config.data.test_path = str(tmp_path / "train.jsonl")
    assert len(load_task_sets(config)["test"]) == 5
    config.data.update(name="aime", test_path="", prompt_field="", answer_field="")
    write_rows(tmp_path / "test.jsonl", [{"problem": "1", "answer": "2"}])
    write_rows(tmp_path / "train.jsonl", [{"problem": str(i), "answer": i} for i in range(5)])
    assert [len(load_task_sets(config)[name]) for name in ("train", "test")] == [5, 1]
    write_rows(tmp_path / "train.jsonl", ROWS)
    config.data.update(name="", test_split="train", prompt_field="question", answer_field="answer")
    assert [len(load_task_sets(config)[name]) for name in ("train", "test")] == [3, 2]


def test_the_identity_of_tasks_is_that_of_all_that_decides_rewards():
    def identity(rows):
        return encode_tasks(
            TaskSet(("a",), ("1",), rows=rows), Letters(), template="raw", max_prompt_tokens=3
        ).identity()

    large = [identity(({"n": [{"m": 10**5000 + i}]},)) for i in (0, 1)]  # which Python refuses to write
    assert large[0] != large[1]
    assert identity(()) == identity(({},))
    assert identity(()) != identity(({"tests": ["1"]},)) != identity(({"tests": ["2"]},))


class Letters:
    """A tokenizer of one token a character; 1 begins a sequence, 2 a user's message and 3 the reply."""

    pad_id = 0

    def encode_prompt(self, text):
        return [1, *map(ord, text)]

    def encode_chat(self, messages, **arguments):
        if messages[0]["role"] == "system" and "Refuse" in messages[0]["content"]:
            raise ValueError("the chat template fails: no system role")
        said = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return [2, *map(ord, said.removeprefix("<user>")), *arguments.values(), 3]


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


def test_chats_go_to_chat_templates_whole():
    tasks = TaskSet(
        ("system: Be.\n\nuser: 1", "2"), ("1", "2"), chats=((SYSTEM, USER), None), places=("row 4", "row 5")
    )
    encode = functools.partial(encode_tasks, tasks, Letters(), max_prompt_tokens=200)

    def said(template, **options):
        encoded = encode(template=template, **options)
        return ["".join(map(chr, row[real][1:-1])) for row, real in zip(encoded.tokens, encoded.mask, strict=True)]

    assert said("chat") == ["<system>Count.<user>1+1?", "2"]
    ask = BOXED.removeprefix("a {prompt}")
    assert said("chat_boxed") == [f"<system>Count.<user>1+1?{ask}", f"2{ask}"]
    french = {"system_prompt": "Reply in French.", "number": 65}
    assert said("chat", arguments=french) == ["<system>Count.<user>1+1?A", "<system>Reply in French.<user>2A"]
    for template in ("raw", "boxed", "Q: {prompt}"):
        with pytest.raises(ValueError, match=r"row 4: the prompt is a chat \(system, user\), .*'chat' or 'chat_boxed'"):
            encode(template=template)
        with pytest.raises(ValueError, match="takes no arguments"):
            encode(template=template, arguments=french)
    refused = dataclasses.replace(tasks, chats=(None, (SYSTEM | {"content": "Refuse"}, USER)))
    with pytest.raises(ValueError, match="row 5: the chat template fails: no system role"):
        encode_tasks(refused, Letters(), template="chat", max_prompt_tokens=200)


def test_the_configs_arguments_reach_the_template():
    config = default.get_config()
    config.data.update(template="chat", template_arguments="number=66, system_prompt='Be.'", max_prompt_tokens=40)
    encoded = run_data.encode(config, Letters(), TaskSet(("1",), ("1",)))
    assert "".join(map(chr, encoded.tokens[encoded.mask][1:-1])) == "<system>Be.<user>1B"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", {}),
        ("enable_thinking=False", {"enable_thinking": False}),
        (
            "a=1, b='x, \"y\"',\nc=[-1.5, None], d={'e': ()},",
            {"a": 1, "b": 'x, "y"', "c": [-1.5, None], "d": {"e": ()}},
        ),
    ],
)
def test_template_arguments(text, arguments):
    assert parse_arguments(text) == arguments


@pytest.mark.parametrize(
    "text", ["False", "a", "a=b", "a=f()", "a=1) or g(b=2", "**{'a': 1}", "*[1]", "a=1, a=2", "a=", "a=1;b=2", "=1", "\0", "a=" + "(" * 9999, "{'a': 1}"]
)  # fmt: skip
def test_template_arguments_are_literals(text):
    config = default.get_config()
    config.data.update(template="chat", template_arguments=text)
    with pytest.raises(ValueError, match="must") as error:
        check(config, NAMES)
    assert str(error.value).startswith(f"config.data.template_arguments={text!r} must ")


def test_template_arguments_need_a_chat_template():
    config = default.get_config()
    config.data.template_arguments = "enable_thinking=False"
    with pytest.raises(ValueError, match=r"must be left empty: data\.template='raw' is no chat template"):
        check(config, NAMES)
    config.data.update(template="chat", template_arguments="system_prompt=3")
    with pytest.raises(ValueError, match="system_prompt is a text"):
        check(config, NAMES)


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
