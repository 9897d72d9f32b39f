"""Data sets to prompts: loading, encoding, and the resumable order in which steps visit them."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np

from krl.base.answers import Answer
from krl.tasks.fields import Chat, find_field, further_texts, plain_answer, plain_pair, plain_prompt, plain_row
from krl.tasks.files import read_rows, spell_numbers
from krl.tasks.templates import Encoder, find_template


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """D tasks as text."""

    prompts: tuple[str, ...]  # the questions, before any template; of a longer chat what was said, for people to read
    answers: tuple[Answer, ...]
    completions: tuple[str, ...] = ()  # worked solutions for a supervised start; may be empty
    fields: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # what else is known, by name
    # What a reward function may ask for: each row's fields besides those with the prompt, the answer and the completion
    # (of a data set that krl knows by name: the row as published), as plain Python values that can be pickled. () where
    # tasks come from no rows.
    rows: tuple[Mapping[str, object], ...] = ()
    # Prompts that are a chat of more than one message, as {"role", "content"} messages; None for the others. () if all
    # are single questions.
    chats: tuple[Chat | None, ...] = ()
    places: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # where each stands, for messages; or ()

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
            chats=tuple(self.chats[i] for i in rows) if self.chats else (),
            places=tuple(self.places[i] for i in rows) if self.places else (),
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
        """The number of tasks and a digest of their tokens, questions, answers and rows; padding does not count."""
        digest = hashlib.blake2b(json.dumps([self.tasks.prompts, self.tasks.answers]).encode(), digest_size=6)
        if any(self.tasks.rows):  # rewards may depend on them
            try:
                rows = json.dumps(self.tasks.rows, default=str)
            except ValueError:  # whole numbers of more than 4300 digits
                rows = json.dumps(spell_numbers(self.tasks.rows), default=str)
            digest.update(rows.encode())
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
    """Read tasks from local files or from the Hugging Face hub, by the names of their fields.

    A question may also be a chat, a list of {"role", "content"} messages that ends with the user's, and a worked
    solution one whose last message is the assistant's. With "messages" as prompt_field and as completion_field, the
    usual chat rows are read for supervised training: the last message is the reply, those before it the prompt.

    Args:
        name, subset, split: a hub data set, for example "openai/gsm8k", "main", "train"; subset may be "".
        path: local .jsonl, .json, .parquet or .arrow files, a directory of them or a pattern, used instead of the hub
            unless ""; see `krl.tasks.files.find_files`.
        prompt_field, answer_field: the fields of a row that hold the question and the answer, see `find_field`; with
            answer_field "" the worked solution stands for the answer.
        completion_field: the field with a worked solution, "" for none.
        limit: rows to read from the front; 0 reads all.
        fields: further fields of a row to keep as texts, "" where a row has none.

    Returns:
        The tasks in the order of the rows, equal ones too; answers as `plain_answer` makes them.

    Raises:
        ValueError: the data cannot be read, is empty or lacks a field; the message names it, and the row.
    """
    if not (answer_field or completion_field):
        raise ValueError("no answer field; name the field with the answer, or the one with the worked solution")
    rows, source = read_rows(name=name, subset=subset, split=split, path=path)
    kept = list(itertools.islice(rows, limit or None))
    prompts, answers, completions, chats = [], [], [], []
    for row, at in kept:
        asked = find_field(row, prompt_field, at)
        if completion_field:
            reply = find_field(row, completion_field, at)
            prompt, chat, completion = plain_pair(asked, reply, (prompt_field, completion_field), at)
            completions.append(completion)
        else:
            prompt, chat = plain_prompt(asked, prompt_field, at)
        prompts.append(prompt)
        chats.append(chat)
        answer = plain_answer(find_field(row, answer_field, at), answer_field, at) if answer_field else completions[-1]
        answers.append(answer)
    named = (prompt_field, answer_field, completion_field)
    return TaskSet(
        prompts=tuple(prompts),
        answers=tuple(answers),
        completions=tuple(completions),
        fields=further_texts([row for row, _ in kept], fields, source),
        rows=tuple(plain_row(row, at, without=named) for row, at in kept),
        chats=tuple(chats) if any(chats) else (),
        places=tuple(at for _, at in kept),
    )


def encode_tasks(
    tasks: TaskSet,
    tokenizer: Encoder,
    *,
    template: str,
    max_prompt_tokens: int,
    limit: int = 0,
    arguments: Mapping[str, object] | None = None,
) -> EncodedTasks:
    """Tokenise prompts and leave out those that do not fit.

    Args:
        tasks: the tasks as text.
        tokenizer: its pad_id fills the left side.
        template: what stands around the question, see `find_template`.
        max_prompt_tokens: P.
        limit: keep at most so many of the tasks that fit; 0 keeps all.
        arguments: of a chat template, see `find_template`.

    Returns:
        The first tasks that fit, in their order; their texts stay as they are, without the template.

    Raises:
        ValueError: no prompt fits, the template is unknown, the tokenizer has no chat template for it, or it takes no
            chat such as one of the tasks; then the row is named.
    """
    encode = find_template(template, arguments)
    encoded = []
    for number, prompt in enumerate(tasks.prompts):
        chat = tasks.chats[number] if tasks.chats else None
        try:
            encoded.append(encode(tokenizer, prompt if chat is None else chat))
        except ValueError as error:
            if chat is None:
                raise
            at = tasks.places[number] if tasks.places else f"task {number}"
            raise ValueError(f"{at}: {error}") from None
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
        raise ValueError(f"only {num_tasks} are left for steps of {num_prompts} prompts; lower config.prompts_per_step")
    epoch, batch = divmod(step, num_tasks // num_prompts)
    order = np.random.default_rng((seed, epoch)).permutation(num_tasks)
    return order[batch * num_prompts : (batch + 1) * num_prompts].astype(np.int32)
