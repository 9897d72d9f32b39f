"""Benchmarks: every sample of a policy in a file, from where a measurement that was stopped goes on."""

import contextlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from krl.base.types import Decoder, Prompts, Rollouts
from krl.eval.estimates import summarize
from krl.eval.sample import Score, as_failures, sample_tasks, score_apart
from krl.run.log import short
from krl.run.metrics import mean_of
from krl.run.processes import is_first, sum_over_processes
from krl.run.scoring import decode_rollouts, make_items
from krl.tasks import EncodedTasks


class Measured(NamedTuple):
    """What the statistics need of one sample."""

    reward: float | None  # None where it could not be computed
    length: int  # response tokens
    finished: bool  # False where the response was cut
    key: str | None  # normal form of its final answer; None if it has none


def evaluate_set(
    name: str,
    sample: Callable[..., Rollouts],
    score: Score,
    params: dict[str, Any],
    encoded: EncodedTasks,
    key: jax.Array,
    *,
    tokenizer: Decoder,
    answer_key: Callable[[str], str | None],
    samples: int,
    num_rollouts: int,
    place: Callable[[Prompts], Prompts],
    path: pathlib.Path,
    settings: dict[str, Any],
    report: Callable[[int, str], None] = lambda done, text: None,
    hear: Callable[[int, int, str], None] = lambda failed, total, where: None,
) -> dict[str, Any]:
    """Measure a policy on one benchmark and keep every sample, so that a run that was killed can go on.

    The file's first row holds the settings. Every other row is one sample, in the order of tasks and samples: `set`,
    `task` (its row in encoded), `sample`, `response`, `key`, `answer` (gold), `reward` (null where it could not be
    computed, which counts as in `krl.eval.sample.as_failures`), `length` in tokens, `finished`, and `faults`, which is
    null but on the last row of a batch: there it counts the verifier faults of the batch. A batch without that row was
    cut short by a kill; it is removed and sampled again, so that a resumed run leaves the file an uninterrupted one
    would have.

    Args:
        name: of the set, for rows and messages.
        score: the verifiers, see `Score`.
        sample, params, encoded, key, samples, num_rollouts, place: as for `sample_tasks`; num_rollouts may
            differ between a run and its continuation.
        tokenizer: turns tokens into text.
        answer_key: response -> normal form of its final answer or None, for the vote of maj@k.
        path: the .jsonl file, made if missing.
        settings: JSON values of everything else that decides the samples and their rewards, such as the
            checkpoint, temperature and seed. The set's name, its tasks and k are added.
        report: called with the tasks done and a few words after every batch.
        hear: as for `krl.eval.sample.evaluate`, of the batches of this call.

    Returns:
        `summarize` of all D * k samples, and `faults` of the verifiers by kind; {} but in the process that keeps the
        file.

    Raises:
        ValueError: the file was made with other settings, or is no file of samples.
    """
    settings = {"set": name, "tasks": encoded.identity(), "samples": samples, **settings}
    rows, faults = _resume(path, settings, samples) if is_first() else ([], Counter())
    first_task = int(sum_over_processes(np.array(len(rows) // samples)))
    report(first_task, "")
    batches = sample_tasks(
        sample, params, encoded, key, samples=samples, num_rollouts=num_rollouts, place=place, first_task=first_task
    )
    missing = measured = 0
    with path.open("ab") if is_first() else contextlib.nullcontext() as file:
        for ids, rollouts in batches:
            texts, task_ids = decode_rollouts(tokenizer, rollouts), ids[rollouts.prompt_index].tolist()
            tasks = encoded.tasks
            rewards, failed = score_apart(score, make_items(tasks, task_ids, texts))
            missing, measured = missing + sum(failed.values()), measured + len(texts)
            hear(missing, measured, name)
            if file is None:
                continue
            batch = [
                {
                    "set": name, "task": task_ids[i], "sample": int(rollouts.sample_index[i]), "response": text,
                    "key": answer_key(text), "answer": tasks.answers[task_ids[i]],
                    "reward": None if np.isnan(rewards[i]) else float(rewards[i]),
                    "length": int(rollouts.lengths[i]), "finished": bool(rollouts.finished[i]), "faults": None,
                }
                for i, text in enumerate(texts)
            ]  # fmt: skip
            batch[-1]["faults"] = failed
            _append(file, batch)
            rows += [_measure(row) for row in batch]
            faults.update(failed)
            until_now = as_failures(np.array([row.reward for row in rows], float))
            report(len(rows) // samples, f"mean reward {short(mean_of(until_now))}")
    return _summary(rows, samples) | {"faults": dict(faults)} if is_first() else {}


def _summary(rows: Sequence[Measured], samples: int) -> dict[str, Any]:
    """`summarize` of all samples in their order."""

    def grid(column: Sequence[Any], dtype: type) -> np.ndarray:
        return np.array(column, dtype).reshape(-1, samples)

    rewards, lengths, finished, keys = zip(*rows, strict=True)
    of_tasks = as_failures(grid(rewards, float)), grid(lengths, int), grid(finished, bool)
    return summarize(*of_tasks, grid(keys, object).tolist())


def _resume(path: pathlib.Path, settings: dict[str, Any], samples: int) -> tuple[list[Measured], Counter[str]]:
    """Cut a file of samples back to its last whole batch, or begin it.

    Returns:
        The samples that are kept, those of whole tasks from the first on, and their verifier faults.

    Raises:
        ValueError: the file was made with other settings, or is no file of samples.
    """
    header = {"settings": json.loads(json.dumps(settings))}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Measured] = []
    faults: Counter[str] = Counter()
    with path.open("a+b") as file:
        file.seek(0)
        first = file.readline()
        if _line(header).startswith(first) and not first.endswith(b"\n"):  # new, or killed while it was begun
            file.truncate(0)
            _append(file, [header])
            return rows, faults
        _check_settings(path, _parse(first), header["settings"])
        kept, position = (0, len(first)), len(first)  # samples and bytes of the whole batches; bytes read
        for line in file:
            row = _parse(line)
            if row is None or (row["task"], row["sample"]) != divmod(len(rows), samples):
                break
            position += len(line)
            rows.append(_measure(row))
            if row["faults"] is not None:
                kept = len(rows), position
                faults.update(row["faults"])
        file.truncate(kept[1])
    return rows[: kept[0]], faults


def _measure(row: dict[str, Any]) -> Measured:
    """The part of a row that the statistics need."""
    return Measured(*(row[field] for field in Measured._fields))


def _line(row: dict[str, Any]) -> bytes:
    """A row as it stands in the file. JSON escapes line ends, so only the last byte is one."""
    return json.dumps(row).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row of a line, or None if the line was cut short or damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _append(file: BinaryIO, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a file; once this returns they survive a kill and a loss of power."""
    file.write(b"".join(map(_line, rows)))
    file.flush()
    os.fsync(file.fileno())


def _check_settings(path: pathlib.Path, header: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    """Refuse a file that was not made with these settings."""
    if header is None or header.keys() != {"settings"}:
        raise ValueError(f"{path} is no file of samples; remove it or choose another place")
    words = [{name: f"{name}={value!r}" for name, value in each.items()} for each in (header["settings"], settings)]
    differ = [
        ", now ".join(said.get(name, f"no {name}") for said in words)
        for name in sorted(words[0].keys() | words[1].keys())
        if name not in words[0] or name not in words[1] or header["settings"][name] != settings[name]
    ]
    if differ:
        raise ValueError(
            f"{path} holds samples made with {'; '.join(differ)}; "
            "give the earlier settings, or remove the file or choose another place to sample afresh"
        )
