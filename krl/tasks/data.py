"""Data sets to prompts: loading, encoding, and the resumable order in which steps visit them."""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from krl.tasks.templates import Encoder, find_template
from krl.tasks.verify import Answer


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """D tasks as text."""

    prompts: tuple[str, ...]  # the questions, before any template
    answers: tuple[Answer, ...]
    completions: tuple[str, ...] = ()  # worked solutions for a supervised start; may be empty
    fields: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # what else is known, by name
    # What a reward function may ask for: each row's fields besides those with the prompt, the answer and the completion
    # (of a data set that krl knows by name: the row as published), as plain Python values that can be pickled. () where
    # tasks come from no rows.
    rows: tuple[Mapping[str, object], ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> "TaskSet":
        """The tasks in some rows, in their order."""
        return TaskSet(
            prompts=tuple(self.prompts[i] for i in rows),
            answers=tuple(self.answers[i] for i in rows),
            completions=tuple(self.completions[i] for i in rows) if self.completions else (),
            fields={name: tuple(values[i] for i in rows) for name, values in self.fields.items()},
            rows=tuple(self.rows[i] for i in rows) if self.rows else (),
        )


@dataclasses.dataclass(frozen=True)
class EncodedTasks:
    """D tasks whose prompts fit, as host arrays padded on the left."""

    tokens: np.ndarray  # [D, P] int32
    mask: np.ndarray  # [D, P] bool
    tasks: TaskSet  # the same D tasks as text
    dropped: int  # tasks left out because their prompt was too long

    def __len__(self) -> int:
        return len(self.tokens)

    def identity(self) -> str:
        """The number of tasks and a digest of their tokens, questions and answers; padding does not count."""
        digest = hashlib.blake2b(json.dumps([self.tasks.prompts, self.tasks.answers]).encode(), digest_size=6)
        digest.update(self.mask.sum(axis=1).astype(np.int64).tobytes())
        digest.update(self.tokens[self.mask].astype(np.int64).tobytes())
        return f"{len(self)} with digest {digest.hexdigest()}"


def load_tasks(
    *,
    name: str,
    subset: str,
    split: str,
    path: str,
    prompt_field: str,
    answer_field: str,
    completion_field: str,
    limit: int,
    fields: Sequence[str] = (),
) -> TaskSet:
    """Read tasks from a local file or from the Hugging Face hub, by the names of their fields.

    A question or a worked solution may also be a chat, a list of {"role", "content"} messages: one of the
    user's and at most one of the assistant's. With "messages" as prompt_field and as completion_field, the
    usual chat rows are read for supervised training.

    Args:
        name, subset, split: a hub data set, for example "openai/gsm8k", "main", "train"; subset may be "".
        path: a local .jsonl, .json, .parquet or .arrow file, used instead of the hub unless "".
        prompt_field, answer_field: the fields of a row that hold the question and the answer; with
            answer_field "" the worked solution stands for the answer.
        completion_field: the field with a worked solution, "" for none.
        limit: rows to read from the front; 0 reads all.
        fields: further fields of a row to keep as texts.

    Returns:
        The tasks in the order of the rows; answers as `plain_answer` makes them.

    Raises:
        ValueError: the data cannot be read, is empty or lacks a field; the message names it.
    """
    if not (answer_field or completion_field):
        raise ValueError("no answer field; name the field with the answer, or the one with the worked solution")
    rows, columns, source = read_rows(name=name, subset=subset, split=split, path=path)
    named = (prompt_field, answer_field, completion_field, *fields)
    missing = [field for field in named if field and field not in columns]
    if missing:
        raise ValueError(f"{source} has no field {missing[0]!r}; its fields are {columns}")
    prompts: list[str] = []
    answers: list[Answer] = []
    completions: list[str] = []
    known: dict[str, list[str]] = {field: [] for field in fields}
    others: list[dict[str, object]] = []
    for number, row in enumerate(itertools.islice(rows, limit or None)):
        at = f"row {number} of {source}"
        prompts.append(plain_text(row[prompt_field], "user", prompt_field, at))
        if completion_field:
            completions.append(plain_text(row[completion_field], "assistant", completion_field, at))
        answers.append(plain_answer(row[answer_field], answer_field, at) if answer_field else completions[-1])
        for field, texts in known.items():
            texts.append("" if row[field] is None else str(row[field]))
        others.append({name: value for name, value in row.items() if name not in named[:3]})
    by_field = {field: tuple(texts) for field, texts in known.items()}
    return TaskSet(tuple(prompts), tuple(answers), tuple(completions), by_field, tuple(others))


def plain_text(value: object, role: str, field: str, at: str) -> str:
    """A field's text, or what a role says in a chat of at most one question and one reply.

    Args:
        value: of the field.
        role: "user" or "assistant".
        field, at: the field and the row, for messages.

    Raises:
        ValueError: there is no text, or the chat has more to it.
    """
    if isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value):
        if [message["role"] for message in value] not in (["user"], ["assistant"], ["user", "assistant"]):
            raise ValueError(f"{at}: {field!r} must be one user message and at most one assistant message after it")
        value = next((message.get("content") for message in value if message["role"] == role), None)
    if value is None or not str(value).strip():
        raise ValueError(f"{at} has no {field!r}; remove the row or fill the field")
    if isinstance(value, list | dict):
        raise ValueError(f"{at}: {field!r} must be a text, got {type(value).__name__}")
    return str(value)


def plain_answer(value: object, field: str, at: str) -> Answer:
    """An answer as text: white space at its ends dropped, whole floats as integers, lists as their distinct texts.

    Args:
        value: of the field: a text, a number, or a list of these.
        field, at: the field and the row, for messages.

    Raises:
        ValueError: there is no answer, or it is of another kind.

    >>> plain_answer(142.0, "answer", "row 0"), plain_answer(["0.01\\n", "0.02\\n", "0.01"], "answer", "row 0")
    ('142', ('0.01', '0.02'))
    """
    several: list[str] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, float):
            item = None if math.isnan(item) else int(item) if item.is_integer() else item
        if not isinstance(item, str | int | float | None):
            raise ValueError(f"{at}: {field!r} must be a text, a number or a list of these, got {type(item).__name__}")
        text = "" if item is None else str(item).strip()
        if text and text not in several:
            several.append(text)
    if not several:
        raise ValueError(f"{at} has no {field!r}; remove the row or fill the field")
    return several[0] if len(several) == 1 else tuple(several)


def read_rows(*, name: str, subset: str, split: str, path: str) -> tuple[Iterator[dict], list[str], str]:
    """Open a data set, see `load_tasks` for the arguments.

    Returns:
        (the rows as dictionaries, their fields, the words that name the data set in messages).

    Raises:
        ValueError: the data set cannot be read or is empty.
    """
    data, source = _open(name, subset, split, path)
    if not len(data):
        raise ValueError(f"{source} is empty; it needs a row for each prompt")
    return _rows(data, source), data.column_names, source


def _rows(data, source: str) -> Iterator[dict]:
    """The rows of a datasets.Dataset, many times faster than one by one."""
    begin = 0
    for batch in data.with_format("arrow").iter(batch_size=1000):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            raise ValueError(
                f"row {begin + _first_unreadable(batch)} of {source} is not UTF-8; mend or remove it"
            ) from None
        yield from rows
        begin += len(rows)


def _first_unreadable(batch) -> int:
    """The first row of an arrow table whose texts are not UTF-8."""
    for number in range(len(batch)):
        try:
            batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError:
            return number
    return 0


def _has_text(file: pathlib.Path) -> bool:
    """Whether a file has anything in it but blank lines."""
    with file.open("rb") as lines:
        return any(line.strip() for line in lines)


def _broken_row(file: pathlib.Path) -> str:
    """ ", row 3" if that is the first of a file of JSON lines that is no JSON object; "" if all are."""
    with file.open("rb") as lines:
        for number, line in enumerate(line for line in lines if line.strip()):
            try:
                if not isinstance(json.loads(line), dict):
                    return f", row {number}"
            except ValueError:
                return f", row {number}"
    return ""


def _open(name: str, subset: str, split: str, path: str):
    """A datasets.Dataset and the words that name it in messages."""
    import datasets  # slow to import, and the embedded arithmetic does without

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells every try of a hub that is out of reach
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it tells what is raised too
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it reports to the hub, even of local files
    if not path:
        source = f"data set {name}" + (f" ({subset})" if subset else "") + f", split {split}"
        try:
            return datasets.load_dataset(name, subset or None, split=split), source
        except Exception as error:  # the hub's client raises many unrelated types
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"cannot load {source}: {reason}; name a local file instead") from None
    file = pathlib.Path(path)
    source = f"data file {file}"
    builder = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}.get(file.suffix)
    if builder is None:
        raise ValueError(f"{source} must end in .jsonl, .json, .parquet or .arrow")
    if not file.is_file() or not os.access(file, os.R_OK):
        raise ValueError(f"{source} does not exist or cannot be read; check the path")
    if not _has_text(file):
        raise ValueError(f"{source} is empty; it needs a row for each prompt")
    try:
        return datasets.load_dataset(builder, data_files=str(file), split="train"), source
    except Exception as error:
        cause = error.__cause__ or error
        row = _broken_row(file) if file.suffix == ".jsonl" else ""
        mend = "mend or remove that row" if row else "see that it is what its name says"
        reason = str(cause).strip().splitlines()[0]
        raise ValueError(f"cannot read {source} as {builder}{row}: {reason}; {mend}") from None


def encode_tasks(
    tasks: TaskSet, tokenizer: Encoder, *, template: str, max_prompt_tokens: int, limit: int = 0
) -> EncodedTasks:
    """Tokenise prompts and leave out those that do not fit.

    Args:
        tasks: the tasks as text.
        tokenizer: its pad_id fills the left side.
        template: what stands around the question, see `find_template`.
        max_prompt_tokens: P.
        limit: keep at most so many of the tasks that fit; 0 keeps all.

    Returns:
        The first tasks that fit, in their order; their texts stay as they are, without the template.

    Raises:
        ValueError: no prompt fits, the template is unknown, or the tokenizer has no chat template for it.
    """
    encode = find_template(template)
    encoded = [encode(tokenizer, prompt) for prompt in tasks.prompts]
    kept = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= max_prompt_tokens]
    if not kept:
        shortest = min((len(ids) for ids in encoded), default=0)
        raise ValueError(
            f"none of {len(encoded)} prompts has 1 to {max_prompt_tokens} tokens (the shortest has {shortest}); "
            "raise config.data.max_prompt_tokens"
        )
    dropped = len(encoded) - len(kept)
    kept = kept[: limit or None]
    tokens = np.full((len(kept), max_prompt_tokens), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(kept), max_prompt_tokens), bool)
    for row, i in enumerate(kept):
        tokens[row, max_prompt_tokens - len(encoded[i]) :] = encoded[i]
        mask[row, max_prompt_tokens - len(encoded[i]) :] = True
    return EncodedTasks(tokens, mask, tasks.take(kept), dropped=dropped)


def step_task_ids(num_tasks: int, num_prompts: int, step: int, *, seed: int) -> np.ndarray:
    """The tasks of a step: each pass over the data is a fresh permutation, cut into whole steps.

    A function of the step alone, so that a resumed run needs no stream state. No task occurs twice in
    a step; the D mod M tasks at the end of a pass wait for another one.

    Args:
        num_tasks: D >= num_prompts.
        num_prompts: M.
        step: counted from 0.
        seed: of the permutations.

    Returns:
        [M] int32.

    Raises:
        ValueError: fewer tasks than prompts in a step.
    """
    if num_tasks < num_prompts:
        raise ValueError(f"a step takes {num_prompts} prompts and only {num_tasks} are left after filtering")
    epoch, batch = divmod(step, num_tasks // num_prompts)
    order = np.random.default_rng((seed, epoch)).permutation(num_tasks)
    return order[batch * num_prompts : (batch + 1) * num_prompts].astype(np.int32)
