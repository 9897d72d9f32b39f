"""Tasks: exact answers, disjoint splits, files of several formats and odd content, verifiers."""

import json
import re

import datasets
import numpy as np
import pytest

from krl.tasks import TaskSet, encode_tasks, load_tasks, step_task_ids
from krl.tasks.arithmetic import RUNGS, make_ladder
from krl.tasks.verify import exact_match, extract_answer, math_reward

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


def load(path, **changes):
    options = {
        "name": "", "subset": "", "split": "train", "prompt_field": "question", "answer_field": "answer",
        "completion_field": "", "template": "Q: {prompt}\n", "limit": 0,
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
    assert tasks.prompts == ("Q: 0?\n", "Q: 1?\n", "Q: 2?\n")
    assert tasks.answers == tasks.completions == ("so #### 0", "so #### 1", "so #### 2")


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("gone.jsonl", None, {}, "gone.jsonl does not exist"),
        ("empty.jsonl", "", {}, "empty.jsonl is empty"),
        ("rows.csv", "a,b\n1,2\n", {}, "must end in"),
        ("broken.jsonl", '{"question": "1", "answer"\n', {}, "cannot read data file"),
        ("short.jsonl", '{"question": "1"}\n', {}, "no field 'answer'"),
        ("null.jsonl", '{"question": "1", "answer": "2"}\n{"question": "1", "answer": null}\n', {}, "in row 1"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, changes, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load(path, **changes)
    assert "\n" not in str(error.value)


class Letters:
    """A tokenizer of one token a character."""

    pad_id = 0

    def encode(self, text):
        return [ord(c) for c in text]


def test_prompts_are_padded_on_the_left_and_long_ones_left_out():
    tasks = TaskSet(("ab", "abcdef", "c"), ("1", "2", "3"), ("x", "y", "z"))
    encoded = encode_tasks(tasks, Letters(), max_prompt_tokens=3)
    assert encoded.tokens.tolist() == [[0, 97, 98], [0, 0, 99]]
    assert encoded.mask.tolist() == [[False, True, True], [False, False, True]]
    assert encoded.tasks == TaskSet(("ab", "c"), ("1", "3"), ("x", "z"))
    assert encoded.dropped == 1
    assert encode_tasks(tasks, Letters(), max_prompt_tokens=3, limit=1).tasks.prompts == ("ab",)


def test_all_prompts_too_long_is_refused():
    with pytest.raises(ValueError, match=r"the shortest has 4.*max_prompt_tokens"):
        encode_tasks(TaskSet(("abcd",), ("1",)), Letters(), max_prompt_tokens=3)


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


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("work #### 18", "worked <<9*2=18>>18\n#### 18", 1.0),
        ("#### 1,234", "#### 1234", 1.0),
        ("#### $5.00", "5", 1.0),
        ("#### 0.5", "1/2", 1.0),
        ("#### 18\n#### 19", "#### 18", 0.0),
        ("18", "18", 0.0),  # not marked as the answer
        ("", "18", 0.0),
        ("####", "18", 0.0),
        ("Answer: x + 1", "x+1", 1.0),
        ("so \\boxed{\\frac{1}{2}} or #### 3", "\\frac{1}{2}", 1.0),
        ("\\boxed{3", "3", 0.0),
        ("#### 1/0", "1/0", 1.0),  # not a number: compared as text
        ("#### -7", "7", 0.0),
    ],
)
def test_math_reward(response, answer, reward):
    assert math_reward(response, answer) == reward


def test_extraction_takes_the_last_balanced_box():
    assert extract_answer("\\boxed{1} then \\boxed{f{x}{y}}") == "f{x}{y}"
    assert extract_answer("nothing") is None


def test_exact_match():
    assert exact_match(" 12", "12") == 1.0
    assert exact_match("12 ", "13") == 0.0
    assert exact_match("0 12", "12") == 0.0
