"""The data sets that krl knows by name: where they are, how their rows read.

The fields are the publishers'; where copies in use spell a field differently, all spellings are listed and
the first that a row has is taken. For any other data set `load_tasks` takes the names of the fields.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from krl.tasks.data import Answer, TaskSet, plain_answer, plain_text, read_rows
from krl.tasks.verify import extract_answer


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a data set is and which fields of a row are what."""

    hub: str  # its name on the Hugging Face hub
    splits: Mapping[str, str]  # the hub's splits to train on and to test on, under "train" and "test"
    subset: str = ""
    problem: tuple[str, ...] = ("problem", "question")
    answer: tuple[str, ...] = ("answer",)
    solution: tuple[str, ...] = ()  # a worked solution; taken only if every row has one
    prepare: Callable[[dict], dict] = dict  # a row as published -> one with these fields; KeyError if it lacks one
    drop_repeats: bool = False  # keep the first of equal problems
    drop_unanswered: bool = False  # leave out rows without an answer, instead of refusing the data set


def load_named(name: str, *, split: str, path: str = "", limit: int = 0, fields: Sequence[str] = ()) -> TaskSet:
    """Read a data set of the table.

    Args:
        name: a key of SOURCES.
        split: "train" or "test".
        path: a local .jsonl, .json, .parquet or .arrow file to read instead of the hub, whatever the split.
        limit: tasks to take from the front; 0 takes all.
        fields: further fields of a row, as published, to keep as texts.

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
    rows, columns, where = read_rows(
        name=source.hub, subset=source.subset, split=source.splits.get(split, ""), path=path
    )
    unknown = [field for field in fields if field not in columns]
    if unknown:
        raise ValueError(f"{where} has no field {unknown[0]!r}; its fields are {columns}")
    tasks = list(itertools.islice(_read(source, rows, columns, where, fields), limit or None))
    if not tasks:
        raise ValueError(f"{where} has no row with an answer")
    prompts, answers, solutions, known, published = zip(*tasks, strict=True)
    by_field = {field: tuple(texts[i] for texts in known) for i, field in enumerate(fields)}
    return TaskSet(prompts, answers, solutions if all(solutions) else (), by_field, published)


def _read(
    source: Source, rows: Iterator[dict], columns: list[str], where: str, fields: Sequence[str]
) -> Iterator[tuple[str, Answer, str, list[str], dict]]:
    """The problem, the answer, the worked solution ("" for none), the further fields and the whole of each row."""
    seen: set[str] = set()
    for number, published in enumerate(rows):
        at = f"row {number} of {where}"
        try:
            row = source.prepare(published)
            problem_field, answer_field = _first_of(source.problem, row), _first_of(source.answer, row)
        except KeyError as error:
            raise ValueError(f"{where} has no field {error.args[0]!r}; its fields are {columns}") from None
        if source.drop_unanswered and row[answer_field] in (None, ""):
            continue
        problem = plain_text(row[problem_field], "user", problem_field, at)
        if source.drop_repeats and problem in seen:
            continue
        seen.add(problem)
        solution = next((row[field] for field in source.solution if field in row), None)
        known = ["" if row[field] is None else str(row[field]) for field in fields]
        yield problem, plain_answer(row[answer_field], answer_field, at), solution or "", known, published


def _first_of(names: tuple[str, ...], row: dict) -> str:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise KeyError(" or ".join(names))
    return found


def _gsm8k(row: dict) -> dict:
    """The published answer is a worked solution whose last line is "#### n"; n may have thousands' commas."""
    worked = "" if row["answer"] is None else str(row["answer"])
    return row | {"answer": worked.rpartition("####")[2].strip().replace(",", ""), "solution": worked}


def _math(row: dict) -> dict:
    """The published row has no answer, only a solution in which it is boxed."""
    return row if "answer" in row else row | {"answer": extract_answer(row["solution"] or "")}


_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem."
)
_DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'


def _dapo(row: dict) -> dict:
    """The published prompt is a chat of one message: the problem between two instructions, which are dropped."""
    text = row["prompt"][-1]["content"] if isinstance(row["prompt"], list) and row["prompt"] else row["prompt"]
    problem = str(text or "").strip().removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER).strip()
    return row | {"prompt": problem, "answer": (row["reward_model"] or {"ground_truth": None})["ground_truth"]}


def _olympiad_bench(row: dict) -> dict:
    """Some published questions need the context that they were asked in."""
    return row | {"question": f"{row['context']}\n{row['question']}"} if row.get("context") else row


def _gpqa(row: dict) -> dict:
    """Four options in an order that a hash decides, so that it is the same in every run; the answer is a letter."""
    question, correct = row["Question"], row["Correct Answer"]
    options = [correct, *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
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
