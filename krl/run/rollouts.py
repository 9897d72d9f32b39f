"""The rollout log: every rollout of a run in Parquet, a file for each step (of several processes, one of each).

    datasets.load_dataset("parquet", data_files="runs/mine/rollouts/*.parquet")

The files may take a given room. When they would take more, every second one is deleted and only every second step is
kept from then on, then every fourth, and so on: what is left is spread over the whole run.
"""

import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from krl.base.types import Array
from krl.rewards.pool import FAULTS
from krl.run.processes import gather, is_first, say, to_host
from krl.tasks import EncodedTasks

_NAMES = "step-*.parquet"
SCHEMA = pa.schema([
    ("step", pa.int32()),  # steps finished, as in metrics.jsonl
    ("prompt_id", pa.int32()),  # row of the training set
    ("sample", pa.int32()),  # of the prompt, 0 .. count-1
    ("prompt", pa.string()),  # the question without its template
    ("answer", pa.string()),  # the gold answer; several accepted ones as a JSON list
    ("response", pa.string()),
    ("reward", pa.float32()),  # null where it could not be computed
    ("advantage", pa.float32()),  # with the weight of its prompt in the loss
    ("log_prob", pa.float32()),  # of the response under the distribution sampled from, nats
    ("length", pa.int32()),  # tokens, the end token counted
    ("finished", pa.bool_()),  # False where the response was cut off
    ("count", pa.int32()),  # rollouts of the prompt in the step
    ("belief", pa.float32()),  # expected success rate when the counts were chosen
    ("prior", pa.float32()),  # the same without the prompt's own record
    ("fault", pa.string()),  # how the verifier failed: of FAULTS, or ""
    ("reason", pa.string()),  # why it did, in one line, or ""
])  # fmt: skip


def describe_rollouts(tasks: EncodedTasks, step: int, groups: Mapping[str, Array], each: Mapping[str, Any]) -> pa.Table:
    """A step's rollouts as rows of SCHEMA, by prompt and sample; of several rewards each has a further column.

    Of several processes all must call it. Each gets the rows of the rollouts that it scored, whose texts it has.

    Args:
        tasks: the D training prompts.
        step: steps finished.
        groups: [M] each: task_ids, counts, belief, prior.
        each: what `krl.run.spend.each_rollout` gives of R rollouts of the M prompts.
    """
    rollouts, faults, texts = each["rollouts"], each["faults"], each["texts"]
    within = jnp.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    log_probs = jnp.where(within, rollouts.logps, 0.0).sum(axis=1)
    slots = rollouts.prompt_index, rollouts.sample_index, rollouts.lengths, rollouts.finished
    prompts, samples, lengths, finished = to_host(slots)
    rewards, advantages, log_probs = to_host((each["rewards"], each["advantages"], log_probs))
    groups = {name: np.asarray(values) for name, values in groups.items()}
    own = np.flatnonzero([text is not None for text in texts])
    order = own[np.lexsort((samples[own], prompts[own]))]
    prompt = prompts[order]
    task_ids = groups["task_ids"][prompt]
    answers = [tasks.tasks.answers[i] for i in task_ids]
    columns = {
        "step": np.full(len(order), step),
        "prompt_id": task_ids,
        "sample": samples[order],
        "prompt": [tasks.tasks.prompts[i] for i in task_ids],
        "answer": [answer if isinstance(answer, str) else json.dumps(answer) for answer in answers],
        "response": [texts[row] for row in order],
        "reward": pa.array(rewards[order], mask=faults[order] > 0),
        "advantage": advantages[order],
        "log_prob": log_probs[order],
        "length": lengths[order],
        "finished": finished[order],
        "count": groups["counts"][prompt],
        "belief": groups["belief"][prompt],
        "prior": groups["prior"][prompt],
        "fault": [("", *FAULTS)[kind] for kind in faults[order]],
        "reason": [each["reasons"][row] for row in order],
    }
    table = pa.table(columns, schema=SCHEMA)
    for name, values in each["parts"].items():
        table = table.append_column(f"reward/{name}", pa.array(values[order], pa.float32(), mask=faults[order] > 0))
    return table


def write_step(directory: pathlib.Path, step: int, table: pa.Table, most_gb: float) -> None:
    """Make room and add the file of a step, whole or not at all, if the step is one of those that are kept.

    Of several processes all must call it: the first makes room for all of them, before any of them writes.

    Args:
        directory: WORKDIR/rollouts; made if it is missing.
        step: steps finished.
        table: of `describe_rollouts`.
        most_gb: 10^9 bytes that all files may take; 0 writes nothing.
    """
    if not most_gb:
        return
    written = pa.BufferOutputStream()
    parquet.write_table(table, written, compression="zstd")
    data = written.getvalue()
    needed = sum(gather({"bytes": data.size})["bytes"])
    every = _make_room(directory, most_gb * 1e9 - needed) if is_first() else 0
    every = int(gather({"every": every})["every"][0])
    if every and step % every == 0:
        directory.mkdir(exist_ok=True)
        process = f"-{jax.process_index():04d}" if jax.process_count() > 1 else ""
        path = directory / f"step-{step:07d}{process}.parquet"
        partial = path.with_suffix(".partial")
        partial.write_bytes(data)
        partial.replace(path)
    elif not every and step == 1:
        say(
            f"krl: the rollouts of a step take {needed / 1e9:.2g} GB, more than config.log.rollouts_gb={most_gb:g}; "
            "none are kept"
        )


def _make_room(directory: pathlib.Path, most: float) -> int:
    """Delete steps until the others take at most so many bytes; returns the power of two whose multiples stay, or 0."""
    steps = logged_steps(directory)
    every = math.gcd(*steps) if len(steps) > 1 else 1
    every &= -every  # the power of two in it; a gap may also be from a time without a log
    while (left := logged_steps(directory)) and sum(path.stat().st_size for path in directory.glob(_NAMES)) > most:
        every *= 2
        drop_steps(directory, [step for step in left if step % every])
    return every if most >= 0 else 0


def drop_steps(directory: pathlib.Path, steps: Iterable[int]) -> None:
    """Delete the files of some steps."""
    for step in steps:
        for path in _paths(directory, step):
            path.unlink()


def logged_steps(directory: pathlib.Path) -> list[int]:
    """The steps that a directory has the rollouts of, ascending; [] if there is none."""
    return sorted({int(path.stem.split("-")[1]) for path in directory.glob(_NAMES)})


def read_rollouts(directory: pathlib.Path, steps: Iterable[int] | None = None) -> pa.Table:
    """Rollouts of some logged steps, or of all, as rows of SCHEMA and the columns of several rewards.

    What an older version did not write is null.
    """
    chosen = logged_steps(directory) if steps is None else steps
    paths = [path for step in chosen for path in _paths(directory, step)]
    return pa.concat_tables([SCHEMA.empty_table(), *map(parquet.read_table, paths)], promote_options="default")


def count_reasons(directory: pathlib.Path) -> Counter[str]:
    """Why rollouts of the logged steps have no reward, and how many each reason left out."""
    files = sorted(directory.glob(_NAMES))
    columns = (parquet.read_table(path, columns=["reason"], schema=SCHEMA)["reason"] for path in files)
    return Counter(reason for column in columns for reason in column.to_pylist() if reason)


def _paths(directory: pathlib.Path, step: int) -> list[pathlib.Path]:
    return sorted(directory.glob(f"step-{step:07d}*.parquet"))


def show_rollouts(table: pa.Table, most: int = 4) -> str:
    """A few rollouts of the prompt with the most of them, as Markdown: the best and the worst rewarded ones."""
    rows = table.sort_by([("count", "descending"), ("prompt_id", "ascending"), ("reward", "descending")]).to_pylist()
    rows = [row for row in rows if row["prompt_id"] == rows[0]["prompt_id"]]
    shown = rows if len(rows) <= most else [*rows[: most // 2], *rows[-(most - most // 2) :]]
    asked = f"{rows[0]['prompt']}\n\nanswer: {rows[0]['answer']}   rollouts: {rows[0]['count']}"
    answered = [f"{_worth(row)}, {row['length']} tokens\n\n{row['response']}" for row in shown]
    return "\n\n".join(map(_quoted, [asked, *answered]))


def _worth(row: Mapping) -> str:
    """The reward of a logged rollout in words."""
    return f"no reward ({row['reason']})" if row["reward"] is None else f"reward {row['reward']:g}"


def _quoted(text: str) -> str:
    """Text as it is, in Markdown: an indented block."""
    return "\n".join("    " + line for line in text.splitlines())
