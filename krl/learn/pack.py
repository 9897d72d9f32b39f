"""Rollouts side by side in rows of equal width, behind the prompts that they share: computation follows real tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from krl.base.sharding import batch_devices
from krl.base.types import Prompts, Rollouts, Segments

RESPONSES, WIDEST = 4, 512  # rows of shared prompts have room for so many of the longest, or so many columns


class Place(struct.PyTreeNode):
    """Which token of which rollout stands in each column of W rows."""

    rollout: jax.Array  # [W, C] int32; -1 where a column is padding
    position: jax.Array  # [W, C] int32, of the token in its prompt and response; undefined on padding
    leader: jax.Array  # [W, C] int32, the rollout whose prompt a column belongs to or follows; undefined on padding


def pack(
    group: jax.Array, asked: jax.Array, answered: jax.Array, *, num_groups: int, num_rows: int, row_tokens: int
) -> tuple[Place, jax.Array]:
    """Give every rollout a place: its response, behind its prompt or behind another response to the same prompt.

    Prompts come in the order of their longest rollouts, the longest first, and each one's responses from the longest on
    behind the one before; with the prompt once more into the first row that has room for both, where that row is full.
    So any two rows together hold more than C tokens, and what is left of a row but the last is less than the longest
    rollout.

    Args:
        group: [B] int32 in [0, num_groups); rollouts with the same number have the same prompt, and share it.
        asked: [B] int32, tokens of the prompt.
        answered: [B] int32, tokens of the response; 0 leaves a rollout out. Both together are C at most.
        num_groups, num_rows, row_tokens: static. W rows of C columns. min(B, 2 S / C + 1) rows are enough for rollouts
            of S tokens in all, prompts included.

    Returns:
        (the places, [] int32: so many first rows hold all the rollouts).

    References:
        Johnson, Demers, Ullman, Garey and Graham, "Worst-case performance bounds for simple
        one-dimensional packing algorithms", SIAM J. Comput. 3 (1974), on first fit.

    >>> asked, answered = jnp.array([2, 2, 3]), jnp.array([1, 2, 1])
    >>> place, num_rows = pack(jnp.array([0, 0, 1]), asked, answered, num_groups=2, num_rows=3, row_tokens=5)
    >>> place.rollout[:num_rows].tolist(), place.position[0].tolist()
    ([[1, 1, 1, 1, 0], [2, 2, 2, 2, -1]], [0, 1, 2, 3, 2])
    """

    def put(state: tuple[jax.Array, ...], rollout: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        left, home, before = state
        group, asked, answered = rollout
        follows = (group == before) & (left[home] >= answered)
        row = jnp.where(follows, home, jnp.argmax(left >= asked + answered).astype(jnp.int32))
        taken = answered + jnp.where(follows, 0, asked)
        return (left.at[row].add(-taken), row, group), (row, row_tokens - left[row], follows)

    group, asked, answered = (part.astype(jnp.int32) for part in (group, asked, answered))
    whole = jnp.where(answered > 0, asked + answered, 0)
    longest = jax.ops.segment_max(whole, group, num_segments=num_groups)[group]
    order = jnp.lexsort((-answered, group, -jnp.where(answered > 0, longest, 0)))
    asked_of, answered_of = jnp.where(answered > 0, asked, 0)[order], answered[order]
    room = jnp.full(num_rows, row_tokens, jnp.int32), jnp.int32(0), jnp.int32(-1)
    (left, *_), (row, start, follows) = jax.lax.scan(put, room, (group[order], asked_of, answered_of))

    order, shape = order.astype(jnp.int32), (num_rows, row_tokens)
    brings = (answered_of > 0) & ~follows
    leader, prompt_begin = _begun(order, jnp.where(brings, row, num_rows), start, shape)
    answer_start = start + jnp.where(follows, 0, asked_of)
    answer, answer_begin = _begun(order, jnp.where(answered_of > 0, row, num_rows), answer_start, shape)
    answers = (answer >= 0) & (answer_begin >= prompt_begin)
    rollout = jnp.where(answers, answer, leader)
    position = jnp.arange(row_tokens, dtype=jnp.int32) - jnp.where(answers, answer_begin - asked[answer], prompt_begin)
    real = (rollout >= 0) & (position < (asked + answered)[rollout])
    return Place(jnp.where(real, rollout, -1), position, leader), (left < row_tokens).sum(dtype=jnp.int32)


def _begun(
    rollouts: jax.Array, row: jax.Array, start: jax.Array, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Which of some rollouts began last before each column's end, [W, C] int32, -1 for none, and in which column."""
    first = jnp.full(shape, -1, jnp.int32).at[row, start].set(rollouts, mode="drop")
    begin = jax.lax.cummax(jnp.where(first >= 0, jnp.arange(shape[1], dtype=jnp.int32), 0), axis=1)
    return jnp.take_along_axis(first, begin, axis=1), begin


# ---------------------------------------------------------------- the rows of a step's rollouts


class Columns(struct.PyTreeNode):
    """The tokens of W rows and what the loss knows of each; all arrays are [W, C]."""

    tokens: jax.Array  # int32
    segments: Segments  # of a prompt and the responses that share it
    sequences: jax.Array  # int32 in [0, W C), a number for each rollout
    response: jax.Array  # bool, True on response tokens
    logps: jax.Array  # float32, the sampler's, of the whole distribution
    advantages: jax.Array  # float32


def place_rollouts(
    prompts: Prompts, rollouts: Rollouts, run: jax.Array, shares: jax.Array, micro_tokens: int, *, packed: bool,
    shared: bool,
) -> tuple[Place, jax.Array, int]:  # fmt: skip
    """Where the rollouts to run, [R] bool, stand in the rows of each of U shares, [U, R / U] int32.

    Args:
        prompts, rollouts, run, shares: of the step.
        micro_tokens: tokens of a micro-batch.
        packed: whether a row has several rollouts.
        shared: whether those of the same prompt share it.

    Returns:
        (place with leaves [U, W, C], num_rows [U] int32 of each share that hold rollouts, rows of a micro-batch).
    """
    count, sizes = shares.shape[1], (prompts.tokens.shape[1], rollouts.tokens.shape[1])
    row_tokens, num_rows, micro_rows = row_shape(*sizes, micro_tokens, count, shared=shared)
    group = _prompt_of(prompts, rollouts)
    asked, answered = _prompt_lengths(prompts)[group], jnp.where(run, rollouts.lengths, 0)
    answered = answered if packed else jnp.where(answered > 0, row_tokens - asked, 0)
    everyone = jnp.arange(count, dtype=jnp.int32)

    def place(share: jax.Array) -> tuple[Place, jax.Array]:
        found, used = pack(
            group[share] if shared else everyone, asked[share], answered[share],
            num_groups=prompts.tokens.shape[0] if shared else count,
            num_rows=num_rows, row_tokens=row_tokens,
        )  # fmt: skip
        rollout = jnp.where(found.rollout >= 0, share[found.rollout], -1)
        return found.replace(rollout=rollout, leader=share[found.leader]), used

    return *jax.vmap(place)(shares), micro_rows


def row_shape(
    prompt_tokens: int, new_tokens: int, micro_tokens: int, num_rollouts: int, *, shared: bool
) -> tuple[int, int, int]:
    """How the rollouts of an update lie: (columns of a row, rows that are enough, rows of a micro-batch).

    Rows have P + T columns. Those of shared prompts have room for RESPONSES of the longest responses, as far as WIDEST
    and a micro-batch allow: attention costs in proportion to a row's length.

    Args:
        prompt_tokens, new_tokens: P and T.
        micro_tokens: tokens of a micro-batch, on all devices of the mesh together.
        num_rollouts: of the update.
        shared: whether rollouts of the same prompt share it.
    """
    longest, here = prompt_tokens + new_tokens, micro_tokens // batch_devices(jax.sharding.get_abstract_mesh())
    columns = max(longest, min(prompt_tokens + RESPONSES * new_tokens, WIDEST, here)) if shared else longest
    rows = min(num_rollouts, 2 * num_rollouts * longest // columns + 1)
    expected = -(-num_rollouts // max((columns - prompt_tokens) // new_tokens, 1))  # rows of the longest, if all share
    at_once = rows_at_once(micro_tokens, columns, expected)
    return columns, -(-rows // at_once) * at_once, at_once


def rows_at_once(micro_tokens: int, row_tokens: int, num_rows: int) -> int:
    """Rows of row_tokens columns in a micro-batch: equally many for every device of the mesh, one at least.

    num_rows are split evenly into the fewest micro-batches that micro_tokens allow: 16 rows where 5 fit are computed 4
    at a time, in less memory, and not 5 at a time, of which the last would be 4 rows of nothing.
    """
    devices = batch_devices(jax.sharding.get_abstract_mesh())
    rows, most = -(-num_rows // devices), max(micro_tokens // (row_tokens * devices), 1)
    return devices * -(-rows // -(-rows // most))


def _prompt_of(prompts: Prompts, rollouts: Rollouts) -> jax.Array:
    """The prompt of each rollout, [R] int32; any on padding rows."""
    return jnp.minimum(rollouts.prompt_index, prompts.tokens.shape[0] - 1)


def _prompt_lengths(prompts: Prompts) -> jax.Array:
    return jnp.asarray(prompts.mask).sum(axis=1, dtype=jnp.int32)


def rollout_tokens(prompts: Prompts, rollouts: Rollouts, run: jax.Array) -> jax.Array:
    """Tokens of the rollouts under run, [R] bool, each with a prompt of its own: [] float32."""
    whole = _prompt_lengths(prompts)[_prompt_of(prompts, rollouts)] + rollouts.lengths
    return jnp.where(run & (rollouts.lengths > 0), whole, 0).sum(dtype=jnp.float32)


def fill_columns(place: Place, prompts: Prompts, rollouts: Rollouts, advantages: jax.Array) -> Columns:
    """Fill the columns of some rows."""
    which = jnp.maximum(place.rollout, 0)
    prompt = _prompt_of(prompts, rollouts)[which]
    padding = prompts.tokens.shape[1] - _prompt_lengths(prompts)[prompt]
    column = padding + place.position  # in the padded layout of prompts and responses
    time = column - prompts.tokens.shape[1]
    real = (place.rollout >= 0) & (time < rollouts.lengths[which])
    asked, answered = jnp.asarray(prompts.tokens).at[prompt, column], rollouts.tokens.at[which, jnp.maximum(time, 0)]
    logps = rollouts.logps if rollouts.policy_logps is None else rollouts.policy_logps
    begin = jnp.arange(place.position.size).reshape(place.position.shape) - jnp.maximum(time, 0)
    segments = Segments(
        number=jnp.where(real, place.leader + 1, 0), branch=jnp.where(real & (time >= 0), which + 1, 0),
        position=place.position,
    )  # fmt: skip
    return Columns(
        tokens=jnp.where(time < 0, asked.get(mode="clip"), answered.get(mode="clip")),
        segments=segments,
        sequences=begin,
        response=real & (time >= 0) & (place.position > 0),
        logps=logps.at[which, jnp.maximum(time, 0)].get(mode="clip"),
        advantages=advantages[which],
    )
