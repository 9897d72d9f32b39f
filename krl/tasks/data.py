"""Data sets to prompts: loading, encoding, and the resumable order in which steps visit them."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Encoder(Protocol):
    """The part of a tokenizer that encoding tasks needs."""

    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """D tasks as text."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    completions: tuple[str, ...] = ()  # worked solutions for a supervised start; may be empty

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> "TaskSet":
        """The tasks in some rows, in their order."""
        prompts, answers, completions = (
            tuple(texts[i] for i in rows) if texts else () for texts in (self.prompts, self.answers, self.completions)
        )
        return TaskSet(prompts, answers, completions)


@dataclasses.dataclass(frozen=True)
class EncodedTasks:
    """D tasks whose prompts fit, as host arrays padded on the left."""

    tokens: np.ndarray  # [D, P] int32
    mask: np.ndarray  # [D, P] bool
    tasks: TaskSet  # the same D tasks as text
    dropped: int  # tasks left out because their prompt was too long

    def __len__(self) -> int:
        return len(self.tokens)


def load_tasks(
    *,
    name: str,
    subset: str,
    split: str,
    path: str,
    prompt_field: str,
    answer_field: str,
    completion_field: str,
    template: str,
    limit: int,
) -> TaskSet:
    """Read tasks from a local file or from the Hugging Face hub.

    Args:
        name, subset, split: a hub data set, for example "openai/gsm8k", "main", "train"; subset may be "".
        path: a local .jsonl, .json, .parquet or .arrow file, used instead of the hub unless "".
        prompt_field, answer_field: the fields of a row that hold the question and the answer.
        completion_field: the field with a worked solution, "" for none.
        template: the prompt's text with {prompt} where the question goes.
        limit: rows to read from the front; 0 reads all.

    Returns:
        The tasks in the order of the rows.

    Raises:
        ValueError: the data cannot be read, is empty or lacks a field; the message names it.
    """
    rows, source = _load_rows(name, subset, split, path)
    fields = [field for field in (prompt_field, answer_field, completion_field) if field]
    missing = [field for field in fields if field not in rows.column_names]
    if missing:
        raise ValueError(f"{source} has no field {missing[0]!r}; its fields are {rows.column_names}")
    if limit:
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise ValueError(f"{source} is empty")
    for field in fields:
        empty = next((i for i, value in enumerate(rows[field]) if value is None or value == ""), None)
        if empty is not None:
            raise ValueError(f"{source} has no {field!r} in row {empty}; remove the row or fill the field")
    return TaskSet(
        prompts=tuple(template.replace("{prompt}", str(text)) for text in rows[prompt_field]),
        answers=tuple(str(text) for text in rows[answer_field]),
        completions=tuple(str(text) for text in rows[completion_field]) if completion_field else (),
    )


def _load_rows(name: str, subset: str, split: str, path: str):
    """A datasets.Dataset and the words that name it in messages."""
    import datasets  # slow to import, and the embedded arithmetic does without

    datasets.disable_progress_bars()
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
        raise ValueError(f"{source} does not exist or cannot be read")
    if file.stat().st_size == 0:
        raise ValueError(f"{source} is empty")
    try:
        return datasets.load_dataset(builder, data_files=str(file), split="train"), source
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"cannot read {source} as {builder}: {str(cause).strip().splitlines()[0]}") from None


def encode_tasks(tasks: TaskSet, tokenizer: Encoder, *, max_prompt_tokens: int, limit: int = 0) -> EncodedTasks:
    """Tokenise prompts and leave out those that do not fit.

    Args:
        tasks: the tasks as text.
        tokenizer: its pad_id fills the left side.
        max_prompt_tokens: P.
        limit: keep at most so many of the tasks that fit; 0 keeps all.

    Returns:
        The first tasks that fit, in their order.

    Raises:
        ValueError: no prompt fits.
    """
    encoded = [tokenizer.encode(prompt) for prompt in tasks.prompts]
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
