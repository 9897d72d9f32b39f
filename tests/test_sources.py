"""Data sets by name: rows in each publisher's shape, and the real files where KRL_DATA names their directory."""

import dataclasses
import json
import os
import pathlib
import re

import datasets
import pytest

from krl.tasks import SOURCES, TaskSet, load_named
from krl.tasks.files import named_file

BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def dapo(problem, answer):
    """A row of DAPO-Math-17k."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": BEFORE + problem + AFTER, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    }


# The names, then two rows of the data set, then what they mean.
SHAPES = {
    "gsm8k": (
        [{"question": "Pay?", "answer": "2*500=<<2*500=1000>>1000\n#### 1,000"}, {"question": "Why?", "answer": "-3"}],
        TaskSet(("Pay?", "Why?"), ("1000", "-3"), ("2*500=<<2*500=1000>>1000\n#### 1,000", "-3")),
    ),
    "math": (
        [{"problem": "1/2?", "level": "Level 1", "type": "Algebra", "solution": "Not $\\boxed{2}$, $\\boxed{\\frac{1}{2}}$."},
         {"problem": "x?", "level": "Level 5", "type": "Algebra", "solution": "So $\\boxed{x^2}$."}],
        TaskSet(("1/2?", "x?"), ("\\frac{1}{2}", "x^2"), ("Not $\\boxed{2}$, $\\boxed{\\frac{1}{2}}$.", "So $\\boxed{x^2}$.")),
    ),
    "dapo": (
        [dapo("Solve $x=1$.", "1"), dapo("Sum?\n\nRound.", "34"), dapo("Solve $x=1$.", "1")],
        TaskSet(("Solve $x=1$.", "Sum?\n\nRound."), ("1", "34")),
    ),
    "deepscaler": (
        [{"problem": "1+1", "answer": "2", "solution": "$1+1=2$"}, {"problem": "2+2", "answer": "4", "solution": "easy"}],
        TaskSet(("1+1", "2+2"), ("2", "4"), ("$1+1=2$", "easy")),
    ),
    "aime": (
        [{"id": 60, "problem": "Aya walks", "solution": "...", "answer": "204", "url": "u", "year": "2024"},
         {"id": 61, "problem": "There exist", "solution": "...", "answer": "025", "url": "u", "year": "2024"}],
        TaskSet(("Aya walks", "There exist"), ("204", "025")),
    ),
    "aime25": (
        [{"problem": "Find b", "answer": "70", "id": "0"}, {"problem": "Find c", "answer": "588", "id": "1"}],
        TaskSet(("Find b", "Find c"), ("70", "588")),
    ),
    "amc": (
        [{"id": 0, "problem": "m+n?", "answer": 142.0, "url": "u"}, {"id": 1, "problem": "p?", "answer": 0.5, "url": "u"}],
        TaskSet(("m+n?", "p?"), ("142", "0.5")),
    ),
    "math500": (
        [{"problem": "p", "solution": "s", "answer": "p - q", "subject": "Algebra", "level": 5, "unique_id": "test/1"}],
        TaskSet(("p",), ("p - q",)),
    ),
    "minerva": (
        [{"question": "Luminosity?", "answer": "7e37\n"}, {"question": "Angle?", "answer": "41.8"}],
        TaskSet(("Luminosity?", "Angle?"), ("7e37", "41.8")),
    ),
    "olympiad_bench": (
        [{"id": 1, "question": "Moves?", "solution": ["a", "b"], "final_answer": ["2"], "context": None, "is_multiple_answer": False},
         {"id": 2, "question": "Then?", "solution": ["c"], "final_answer": ["$1,2$"], "context": "Let $x$ be 1.", "is_multiple_answer": True}],
        TaskSet(("Moves?", "Let $x$ be 1.\nThen?"), ("2", "$1,2$")),
    ),
}  # fmt: skip


def load(name, **options):
    """The tasks without the rest of their rows."""
    return dataclasses.replace(load_named(name, **options), rows=())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", SHAPES)
def test_rows_in_the_publishers_shape(tmp_path, name):
    rows, tasks = SHAPES[name]
    path = write(tmp_path / f"{name}.jsonl", rows)
    assert load(name, split="test", path=path) == tasks
    assert load(name, split="train", path=path, limit=1) == tasks.take([0])


def test_the_rest_of_a_row_is_the_row_as_published(tmp_path):
    rows = SHAPES["dapo"][0]
    assert load_named("dapo", split="train", path=write(tmp_path / "dapo.jsonl", rows)).rows == tuple(rows[:2])


def test_dapo_keeps_what_else_the_chat_says(tmp_path):
    system = {"role": "system", "content": "Reply in French."}
    row = dapo("1+1?", 2)
    parts = [{"type": "text", "text": BEFORE}, {"type": "text", "text": "2+2?" + AFTER}]
    rows = [row | {"prompt": [system, *row["prompt"]]}, row, row | {"prompt": [{"role": "user", "content": parts}]}]
    tasks = load_named("dapo", split="train", path=write(tmp_path / "dapo.jsonl", rows), fields=["extra_info.index"])
    assert tasks.prompts == ("system: Reply in French.\n\nuser: 1+1?", "1+1?", "2+2?")
    assert tasks.chats == ((system, {"role": "user", "content": "1+1?"}), None, None)
    assert tasks.fields == {"extra_info.index": ("9a9b6eb4",) * 3}
    for prompt, message in (
        (
            [*row["prompt"], {"role": "assistant", "content": "2"}],
            "row 0 of .* 'prompt' ends with a message of the assistant",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "row 0 of .* has a part that is no text"),
    ):
        with pytest.raises(ValueError, match=message):
            load_named("dapo", split="train", path=write(tmp_path / "dapo.jsonl", [row | {"prompt": prompt}]))


def test_a_directory_as_the_hub_has_it(tmp_path):
    rows = SHAPES["gsm8k"][0]
    for split in ("train", "test"):
        (tmp_path / "main").mkdir(exist_ok=True)
        file = tmp_path / "main" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list([row | {"question": split} for row in rows[:1]]).to_parquet(str(file))
    for split in ("train", "test"):
        assert load_named("gsm8k", split=split, path=str(tmp_path)).prompts == (split,)
    (tmp_path / "aime").mkdir()
    write(tmp_path / "aime" / "train.jsonl", SHAPES["aime"][0])  # as its publisher calls the problems to test on
    assert load_named("aime", split="test", path=str(tmp_path / "aime")).answers == ("204", "025")


def test_a_set_in_a_directory_of_sets(tmp_path):
    for name in ("amc.jsonl", "aime.parquet", "math500.json.gz"):
        (tmp_path / name).touch()
    (tmp_path / "gpqa").mkdir()
    for name, file in {
        "amc": "amc.jsonl",
        "aime": "aime.parquet",
        "math500": "math500.json.gz",
        "gpqa": "gpqa",
        "minerva": "minerva.jsonl",
    }.items():
        assert named_file(tmp_path, name) == str(tmp_path / file)


def test_every_name_is_tried_here():
    assert set(SOURCES) == {*SHAPES, "gpqa"}


def test_parquet_reads_as_json_lines_do(tmp_path):
    rows, tasks = SHAPES["dapo"]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "dapo.parquet"))
    assert load("dapo", split="train", path=str(tmp_path / "dapo.parquet"), limit=2) == tasks


@pytest.mark.parametrize(
    ("name", "row", "task"),
    [
        ("minerva", {"problem": "Flux?", "answer": ["0.01\n", "0.02\n"], "type": "8.282J"}, TaskSet(("Flux?",), (("0.01", "0.02"),))),
        ("olympiad_bench", {"problem": "Moves?", "answer": ["2"]}, TaskSet(("Moves?",), ("2",))),
        ("math", {"problem": "a?", "answer": "\\pi", "difficulty": 2.0}, TaskSet(("a?",), ("\\pi",))),
        ("dapo", {"prompt": "1+1", "reward_model": {"ground_truth": "2"}}, TaskSet(("1+1",), ("2",))),
    ],
)  # fmt: skip
def test_other_spellings(tmp_path, name, row, task):
    assert load(name, split="test", path=write(tmp_path / "rows.jsonl", [row])) == task


def gpqa(number):
    """A row of GPQA."""
    wrong = {f"Incorrect Answer {i}": f"wrong {i}\n" for i in (1, 2, 3)}
    return {"Record ID": f"r{number}", "Question": f"Question {number}?\n", "Correct Answer": "right\n", **wrong}


def test_gpqa_options_are_shuffled_once_and_for_all(tmp_path):
    rows = [gpqa(number) for number in range(400)]
    tasks = load_named("gpqa", split="test", path=write(tmp_path / "gpqa.jsonl", rows))
    for number, (prompt, letter) in enumerate(zip(tasks.prompts, tasks.answers, strict=True)):
        question, options = prompt.split("\n\n")[:2]
        assert question == f"Question {number}?"
        found = {line[0]: line.removeprefix(f"{line[0]}) ") for line in options.split("\n")}
        assert list(found) == list("ABCD")
        assert sorted(found.values()) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert found[str(letter)] == "right"
    shares = [tasks.answers.count(letter) for letter in "ABCD"]
    assert all(60 < share < 140 for share in shares), shares  # 100 each, give or take four deviations
    alone = load_named("gpqa", split="test", path=write(tmp_path / "one.jsonl", rows[7:8]))
    assert alone == tasks.take([7])


def test_solutions_are_taken_only_if_every_row_has_one(tmp_path):
    rows = [{"problem": "1", "answer": "1", "solution": "s"}, {"problem": "2", "answer": "2", "solution": ""}]
    assert load_named("deepscaler", split="train", path=write(tmp_path / "rows.jsonl", rows)).completions == ()


def test_rows_without_an_answer(tmp_path):
    rows = [{"problem": str(i), "answer": answer} for i, answer in enumerate(["1", None, "", "2"])]
    path = write(tmp_path / "rows.jsonl", rows)
    assert load("math", split="train", path=path) == TaskSet(("0", "3"), ("1", "2"))
    with pytest.raises(ValueError, match=r"row 1 of data file .*rows\.jsonl has no 'answer'"):
        load_named("aime", split="test", path=path)
    with pytest.raises(ValueError, match="has no row with an answer"):
        load_named("math", split="train", path=write(tmp_path / "none.jsonl", rows[1:3]))


@pytest.mark.parametrize(
    ("name", "split", "rows", "message"),
    [
        ("gsm9k", "test", [], "no data set is named 'gsm9k'; the names are gsm8k, math, "),
        ("aime", "train", [], "the data set aime has no split 'train', only test"),
        ("aime", "test", [{"text": "1"}], r"has no field 'problem or question'; its fields are \['text'\]"),
        ("olympiad_bench", "test", [{"problem": "1"}], "has no field 'final_answer or answer'"),
        ("gpqa", "test", [{"Question": "1"}], "has no field 'Correct Answer'"),
        ("gpqa", "test", [gpqa(0) | {"Correct Answer": None}], "row 0 of data file .* has no 'Correct Answer'"),
        ("dapo", "train", [{"prompt": "1", "reward_model": {"style": "rule"}}], "has no field 'ground_truth'"),
        ("dapo", "train", [dapo("1", "1") | {"reward_model": "1"}], "row 0 of .* no field 'reward_model.ground_truth'"),
        ("dapo", "train", [dapo("1", "1") | {"reward_model": None}], "row 0 of .* has no 'answer'"),
        (
            "olympiad_bench",
            "test",
            [{"question": None, "context": "x", "answer": "1"}],
            "row 0 of .* has no 'question'",
        ),
        ("gpqa", "test", [gpqa(0) | {"Question": None}], "row 0 of .* has no 'Question'"),
        ("aime", "test", [{"problem": "1", "answer": 2}, {"problem": "3"}], "row 1 of .* has no field 'answer'"),
        ("dapo", "train", [dapo("", "1")], "row 0 of data file .* has no 'prompt'"),
        ("gsm8k", "test", [{"question": "1", "answer": "so ####"}], "row 0 of data file .* has no 'answer'"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, split, rows, message):
    path = write(tmp_path / "rows.jsonl", rows) if rows else ""
    with pytest.raises(ValueError, match=message) as error:
        load_named(name, split=split, path=path)
    assert "\n" not in str(error.value)


def test_the_hub_is_asked_for_the_right_split(monkeypatch):
    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"question": "1?", "answer": "#### 1"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_named("gsm8k", split="train") == load_named("gsm8k", split="test")
    load_named("minerva", split="test")
    assert asked == [
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("math-ai/minervamath", None, "test"),
    ]


@pytest.mark.skipif("KRL_DATA" not in os.environ, reason="KRL_DATA names no directory with the real files")
@pytest.mark.parametrize(
    ("name", "file", "size"),
    [
        ("gsm8k", "train/gsm8k", 7473),
        ("gsm8k", "test/gsm8k", 1319),
        ("math", "train/math", 7470),
        ("aime", "train/aime", 975),
        ("aime", "test/aime", 30),
        ("amc", "test/amc", 83),
        ("math500", "test/math500", 500),
        ("minerva", "test/minerva", 272),
        ("olympiad_bench", "test/olympiad_bench", 675),
    ],
)
def test_the_real_files(name, file, size):
    tasks = load_named(name, split="test", path=str(pathlib.Path(os.environ["KRL_DATA"]) / f"{file}.jsonl"))
    assert len(tasks) == len(set(tasks.prompts)) == size
    for answer in tasks.answers:
        texts = answer if isinstance(answer, tuple) else (answer,)
        assert texts
        assert all(text == text.strip() != "" for text in texts)
        assert len(set(texts)) == len(texts)
        if name in ("gsm8k", "aime", "amc"):
            assert re.fullmatch(r"-?[0-9]+", texts[0])
