"""The data sets that krl knows by name: where they are, how their rows read.

The fields are the publishers'; where copies in use spell a field differently, all spellings are listed and
the first that a row has is taken. For any other data set `load_tasks` takes the names of the fields.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from krl.base.answers import Answer, extract_answer
from krl.tasks.data import TaskSet
from krl.tasks.fields import Chat, further_texts, join_parts, plain_answer, plain_prompt, plain_row, plain_text
from krl.tasks.files import Rows, has_split, read_rows


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a data set is and which fields of a row are what."""

    hub: str  # its name on the Hugging Face hub
    splits: Mapping[str, str]  # the hub's splits to train on and to test on, under "train" and "test"
    subset: str = ""
    problem: tuple[str, ...] = ("problem", "question")
    answer: tuple[str, ...] = ("answer",)
    solution: tuple[str, ...] = ()  # a worked solution; taken only if every row has one
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict  # a published row -> one with these fields, or KeyError
    drop_repeats: bool = False  # keep the first of equal problems
    drop_unanswered: bool = False  # leave out rows without an answer, instead of refusing the data set


def load_named(name: str, *, split: str, path: str = "", limit: int = 0, fields: Sequence[str] = ()) -> TaskSet:
    """Read a data set of the table.

    Args:
        name: a key of SOURCES.
        split: "train" or "test".
        path: local files to read instead of the hub, see `krl.tasks.files.find_files`; of a directory that tells its
            splits apart this one, or else the one that the hub has for it.
        limit: tasks to take from the front; 0 takes all.
        fields: further fields of a row, as published, to keep as texts, "" where a row has none.

    Returns:
        The tasks in the order of the rows, with completions if every row has a worked solution.

    Raises:
        ValueError: an unknown name or split, or data that cannot be read, lacks a field or has an empty one.
    """
    if name not in SOURCES:
        raise ValueError(f"no data set is named {name!r}; the names are {', '.join(SOURCES)}")
    source = SOURCES[name]
    if not path and split not in source.splits:
        raise ValueError(f"the data set {name} has no split {split!r}, only {', '.join(source.splits)}")
    own = has_split(path, subset=source.subset, split=split)
    published = split if own else source.splits.get(split, split)
    rows, where = read_rows(name=source.hub, subset=source.subset, split=published, path=path)
    tasks = list(itertools.islice(_read(source, rows), limit or None))
    if not tasks:
        raise ValueError(f"{where} has no row with an answer")
    solutions, chats = tuple(task.solution for task in tasks), tuple(task.chat for task in tasks)
    return TaskSet(
        prompts=tuple(task.prompt for task in tasks),
        answers=tuple(task.answer for task in tasks),
        completions=solutions if all(solutions) else (),
        fields=further_texts([task.published for task in tasks], fields, where),
        rows=tuple(plain_row(task.published, task.at) for task in tasks),
        chats=chats if any(chats) else (),
        places=tuple(task.at for task in tasks),
    )


class _Task(NamedTuple):
    prompt: str
    chat: Chat | None
    answer: Answer
    solution: str  # "" for none
    published: dict[str, Any]  # the whole row
    at: str  # the words that name it


def _read(source: Source, rows: Rows) -> Iterator[_Task]:
    seen: set[str] = set()
    for published, at in rows:
        try:
            row = source.prepare(published)
            problem_field, answer_field = _first_of(source.problem, row), _first_of(source.answer, row)
        except KeyError as error:
            raise ValueError(f"{at} has no field {error.args[0]!r}; its fields are {list(published)}") from None
        if source.drop_unanswered and row[answer_field] in (None, ""):
            continue
        prompt, chat = plain_prompt(row[problem_field], problem_field, at)
        if source.drop_repeats and prompt in seen:
            continue
        seen.add(prompt)
        solution, field = next(((row[field], field) for field in source.solution if field in row), (None, ""))
        yield _Task(
            prompt, chat, plain_answer(row[answer_field], answer_field, at),
            plain_text(solution, field, at) if solution else "", published, at,
        )  # fmt: skip


def _first_of(names: tuple[str, ...], row: dict[str, Any]) -> str:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise KeyError(" or ".join(names))
    return found


def _gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    """The published answer is a worked solution whose last line is "#### n"; n may have thousands' commas."""
    worked = "" if row["answer"] is None else str(row["answer"])
    return row | {"answer": worked.rpartition("####")[2].strip().replace(",", ""), "solution": worked}


def _math(row: dict[str, Any]) -> dict[str, Any]:
    """The published row has no answer, only a solution in which it is boxed."""
    return row if "answer" in row else row | {"answer": extract_answer(row["solution"] or "")}


_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem."
)
_DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'


def _dapo(row: dict[str, Any]) -> dict[str, Any]:
    """The published prompt is a chat whose question stands between two instructions, which are dropped."""
    prompt, reward = row["prompt"], row["reward_model"]
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        prompt = [*prompt[:-1], {**prompt[-1], "content": _dapo_problem(prompt[-1].get("content"))}]
    if reward is not None and not isinstance(reward, dict):
        raise KeyError("reward_model.ground_truth")
    return row | {"prompt": _dapo_problem(prompt), "answer": reward and reward["ground_truth"]}


def _dapo_problem(content: object) -> object:
    """A text, or a message's content, without the instructions."""
    text = join_parts(content) if isinstance(content, list) else content
    if not isinstance(text, str):
        return content
    return text.strip().removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER).strip()


def _olympiad_bench(row: dict[str, Any]) -> dict[str, Any]:
    """Some published questions need the context that they were asked in."""
    if not row.get("context") or not row["question"]:
        return row
    return row | {"question": f"{row['context']}\n{row['question']}"}


def _gpqa(row: dict[str, Any]) -> dict[str, Any]:
    """Four options in an order that a hash decides, so that it is the same in every run; the answer is a letter."""
    question, correct = row["Question"], row["Correct Answer"]
    options = [correct, *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    if not question:
        return row
    options.sort(key=lambda option: hashlib.blake2b(f"{question}\n{option}".encode()).digest())
    lines = [f"{letter}) {str(option).strip()}" for letter, option in zip("ABCD", options, strict=True)]
    text = "\n".join([f"{question}".strip(), "", *lines, "", "Answer with the letter of the right option."])
    return row | {"Question": text, "Correct Answer": "ABCD"[options.index(correct)] if correct else None}


SOURCES: dict[str, Source] = {
    "gsm8k": Source(
        "openai/gsm8k", {"train": "train", "test": "test"}, "main",
        problem=("question",), solution=("solution",), prepare=_gsm8k,
    ),
    "math": Source(  # four rows of the copy that DeepScaleR's authors gave out have no answer
        "DigitalLearningGmbH/MATH-lighteval", {"train": "train", "test": "test"},
        problem=("problem",), solution=("solution",), prepare=_math, drop_unanswered=True,
    ),
    "dapo": Source(  # every problem is there about a hundred times
        "BytedTsinghua-SIA/DAPO-Math-17k", {"train": "train"}, problem=("prompt",), prepare=_dapo, drop_repeats=True
    ),
    "deepscaler": Source(
        "agentica-org/DeepScaleR-Preview-Dataset", {"train": "train"},
        problem=("problem",), solution=("solution",), drop_unanswered=True,
    ),
    "aime": Source("HuggingFaceH4/aime_2024", {"test": "train"}),
    "aime25": Source("math-ai/aime25", {"test": "test"}),
    "amc": Source("AI-MO/aimo-validation-amc", {"test": "train"}),
    "math500": Source("HuggingFaceH4/MATH-500", {"test": "test"}),
    "minerva": Source("math-ai/minervamath", {"test": "test"}),
    "olympiad_bench": Source(
        "Hothan/OlympiadBench", {"test": "train"}, "OE_TO_maths_en_COMP",
        answer=("final_answer", "answer"), prepare=_olympiad_bench,
    ),
    "gpqa": Source(
        "Idavidrein/gpqa", {"test": "train"}, "gpqa_diamond",
        problem=("Question",), answer=("Correct Answer",), prepare=_gpqa,
    ),
}  # fmt: skip
