"""Supervised fine-tuning on prompts with worked solutions, one pair to a row or several packed into it."""

import bisect
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
import optax

from krl import policy
from krl.base.types import Tokenizer
from krl.run.checkpoint import Checkpoints
from krl.run.compiled import for_this_backend
from krl.run.optimizer import init_state, skipped_updates
from krl.run.update import supervised_update
from krl.tasks import EncodedTasks, step_task_ids

Pair = tuple[np.ndarray, list[int]]  # the token ids of a prompt and of its completion
# Training sequences, W rows of C columns: tokens [W, C] int32, layout [W, C] bool or int32 and target mask
# [W, C] bool, as `supervised_update` takes them.
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


def encode_pairs(encoded: EncodedTasks, tokenizer: Tokenizer, max_completion_tokens: int) -> Pairs:
    """Prompts and worked solutions as training sequences, one pair to a row, in the layout of rollouts.

    Args:
        encoded: D tasks with completions.
        tokenizer: ends every completion with its first end token.
        max_completion_tokens: T; pairs with a longer completion are left out.

    Returns:
        (tokens [W, P + T] int32, mask [W, P + T] bool, target_mask [W, P + T] bool), W <= D.

    Raises:
        ValueError: the tasks have no completions, or none fits.
    """
    pairs, longest_prompt = _encode(encoded, tokenizer), encoded.tokens.shape[1]
    rows = [[(longest_prompt - len(pair[0]), pair)] for pair in pairs if len(pair[1]) <= max_completion_tokens]
    if not rows:
        raise ValueError(
            f"no worked solution has at most {max_completion_tokens} tokens; raise config.sample.max_new_tokens"
        )
    tokens, segments, target_mask = _lay_out(rows, longest_prompt + max_completion_tokens, tokenizer.pad_id)
    return tokens, segments > 0, target_mask


def pack_pairs(encoded: EncodedTasks, tokenizer: Tokenizer, row_tokens: int) -> tuple[Pairs, int]:
    """Prompts and worked solutions as training sequences, several pairs to a row without padding between.

    Args:
        encoded: D tasks with completions.
        tokenizer: ends every completion with its first end token.
        row_tokens: C; longer pairs are left out. A multiple of 128 suits the attention kernel of TPUs.

    Returns:
        ((tokens [W, C] int32, segments [W, C] int32, target_mask [W, C] bool), pairs left out), W <= D. A
        row's pairs are numbered from 1 in their order, padding at its end is 0, and a pair's targets are its
        completion, except that nothing predicts the first token of one without a prompt.

    Raises:
        ValueError: the tasks have no completions, or no pair fits.
    """
    pairs = _encode(encoded, tokenizer)
    lengths = np.array([len(prompt) + len(target) for prompt, target in pairs])
    kept = np.flatnonzero((lengths >= 2) & (lengths <= row_tokens))  # one token alone predicts nothing
    if not len(kept):
        raise ValueError(
            f"no prompt with its worked solution has 2 to {row_tokens} tokens (the shortest has {lengths.min()}); "
            "raise config.sft.row_tokens"
        )
    rows = []
    for members in _fill_rows(lengths[kept], row_tokens):
        ends = lengths[kept[members]].cumsum()
        rows.append([(end - lengths[i], pairs[i]) for end, i in zip(ends, kept[members], strict=True)])
    return _lay_out(rows, row_tokens, tokenizer.pad_id), len(lengths) - len(kept)


def _encode(encoded: EncodedTasks, tokenizer: Tokenizer) -> list[Pair]:
    """The D prompts and completions, each with its end token."""
    if not encoded.tasks.completions:
        raise ValueError(
            "supervised fine-tuning needs a worked solution of every task; name config.data.completion_field or "
            "config.sft.path, or set config.sft.steps=0"
        )
    prompts = [row[real] for row, real in zip(encoded.tokens, encoded.mask, strict=True)]
    targets = [[*tokenizer.encode(text), tokenizer.eos_ids[0]] for text in encoded.tasks.completions]
    return list(zip(prompts, targets, strict=True))


def _lay_out(rows: Sequence[Sequence[tuple[int, Pair]]], row_tokens: int, pad_id: int) -> Pairs:
    """Rows of pairs, each with the column where it begins, as (tokens, segments, target_mask)."""
    tokens = np.full((len(rows), row_tokens), pad_id, np.int32)
    segments, target_mask = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, bool)
    for row, members in enumerate(rows):
        for number, (begin, (prompt, target)) in enumerate(members, start=1):
            end = begin + len(prompt) + len(target)
            tokens[row, begin:end] = [*prompt, *target]
            segments[row, begin:end] = number
            target_mask[row, begin + max(len(prompt), 1) : end] = True
    return tokens, segments, target_mask


def _fill_rows(lengths: np.ndarray, row_tokens: int) -> list[list[int]]:
    """Which sequences share a row: best-fit decreasing, at most 11/9 of the fewest rows possible (+ 4).

    The longest sequence left goes into the fullest row that has room for it, or into a new one.

    Args:
        lengths: [W] int, between 1 and row_tokens.
        row_tokens: C.

    References:
        Johnson, Demers, Ullman, Garey and Graham, "Worst-case performance bounds for simple
        one-dimensional packing algorithms", SIAM J. Comput. 3 (1974).

    >>> _fill_rows(np.array([3, 6, 4, 7, 2]), 10)
    [[3, 0], [1, 2], [4]]
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (columns left, row), ascending, of rows that can still take a sequence
    shortest = lengths.min()
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        place = bisect.bisect_left(spaces, (length, 0))
        if place == len(spaces):
            rows.append([])
            left, row = row_tokens, len(rows) - 1
        else:
            left, row = spaces.pop(place)
        rows[row].append(i)
        if left - length >= shortest:
            bisect.insort(spaces, (left - length, row))
    return rows


def finetune(
    config: policy.PolicyConfig,
    optimizer: optax.GradientTransformation,
    params: dict,
    pairs: Pairs,
    directory: pathlib.Path,
    *,
    steps: int,
    batch_size: int,
    micro_tokens: int,
    seed: int,
    save_every: int,
    max_bad_updates: int,
    should_stop: Callable[[], bool],
    place: Callable[[np.ndarray], jax.Array],
    report: Callable[[int, float], None],
) -> tuple[dict, bool]:
    """Train params on worked solutions, or read the result from an earlier run.

    Args:
        config, optimizer: the policy's sizes; from `krl.run.optimizer.make_optimizer`.
        params: placed on the mesh; their buffers are reused.
        pairs: from `encode_pairs` or the first of what `pack_pairs` returns.
        directory: keeps the newest checkpoint; an interrupted training continues from it.
        steps: updates in all.
        batch_size: rows of pairs per update; each pass over the rows is a fresh permutation.
        micro_tokens: tokens that go through the model at once.
        seed: order of the rows.
        save_every: updates between checkpoints, >= 1. It is also saved at the end and when it should stop.
        max_bad_updates: non-finite updates in a row that end the run.
        should_stop: whether to save and leave, asked before each update.
        place: puts a host batch on the mesh.
        report: called with (step, loss in nats per token) every few steps.

    Returns:
        (params, whether they are finished; False only if it should stop).

    Raises:
        FloatingPointError: too many updates in a row were not finite.
        ValueError: the checkpoint in the directory does not fit these params.
    """
    update = for_this_backend(supervised_update, config, optimizer, micro_tokens=micro_tokens)
    state = init_state(config, optimizer, params)
    with Checkpoints(directory, keep=1) as checkpoints:
        restored = checkpoints.restore({"state": state})
        first, state = (0, state) if restored is None else (restored[0], restored[1]["state"])
        batch_size = min(batch_size, len(pairs[0]))
        done = first
        while done < steps and not should_stop():
            rows = step_task_ids(len(pairs[0]), batch_size, done, seed=seed)
            batch = [place(part[rows]) for part in pairs]
            state, metrics = update(state, *batch)
            loss = float(metrics["loss"])  # waits, so that a signal is not answered many queued steps later
            done += 1
            if skipped_updates(state)[0] >= max_bad_updates:
                raise FloatingPointError(
                    f"fine-tuning: {max_bad_updates} updates in a row were not finite; lower config.sft.learning_rate"
                )
            if done % min(20, max(steps // 8, 1)) == 0 or done == steps:
                report(done, loss)
            if done % save_every == 0:
                checkpoints.save(done, {"state": state})
        if done > first:
            checkpoints.save(done, {"state": state})
    return state.params, done >= steps
