"""Sequences side by side in rows of equal width, so that computation follows real tokens."""

import jax
import jax.numpy as jnp
from flax import struct

from krl.base.sharding import batch_devices
from krl.base.types import Prompts, Rollouts


class Packed(struct.PyTreeNode):
    """Which token of which sequence stands in each column of W rows."""

    sequence: jax.Array  # [W, C] int32; -1 where a column is padding
    position: jax.Array  # [W, C] int32, of the token in its sequence; undefined on padding
    num_rows: jax.Array  # [] int32, the first rows hold all the sequences


def pack(lengths: jax.Array, num_rows: int, row_tokens: int) -> Packed:
    """Give every sequence a place, first-fit decreasing: at most 11/9 of the fewest rows possible (+ 1).

    The longest sequence left goes into the first row that has room for it.

    Args:
        lengths: [B] int32, between 0 and row_tokens; 0 leaves a sequence out.
        num_rows: W, at least B; static.
        row_tokens: C, static.

    References:
        Johnson, Demers, Ullman, Garey and Graham, "Worst-case performance bounds for simple
        one-dimensional packing algorithms", SIAM J. Comput. 3 (1974).

    >>> packed = pack(jnp.array([2, 0, 4, 1]), 4, 5)
    >>> packed.sequence[:2].tolist(), int(packed.num_rows)
    ([[2, 2, 2, 2, 3], [0, 0, -1, -1, -1]], 2)
    """

    def place(left: jax.Array, length: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        row = jnp.argmax(left >= length)
        return left.at[row].add(-length), (row, row_tokens - left[row])

    order = jnp.argsort(-lengths)
    left, (row, start) = jax.lax.scan(place, jnp.full(num_rows, row_tokens, jnp.int32), lengths[order])
    row = jnp.where(lengths[order] > 0, row, num_rows)
    first = jnp.full((num_rows, row_tokens), -1, jnp.int32).at[row, start].set(order.astype(jnp.int32), mode="drop")
    columns = jnp.arange(row_tokens, dtype=jnp.int32)
    begin = jax.lax.cummax(jnp.where(first >= 0, columns, 0), axis=1)
    sequence = jnp.take_along_axis(first, begin, axis=1)
    real = (sequence >= 0) & (columns - begin < lengths[sequence])
    return Packed(jnp.where(real, sequence, -1), columns - begin, (left < row_tokens).sum(dtype=jnp.int32))


# ---------------------------------------------------------------- the rows of a step's rollouts


class Place(struct.PyTreeNode):
    """Which token of which rollout stands in each column of W rows."""

    rollout: jax.Array  # [W, C] int32 in [0, R); -1 where a column is padding
    position: jax.Array  # [W, C] int32, of the token in its prompt and response; undefined on padding


class Columns(struct.PyTreeNode):
    """The tokens of W rows and what the loss knows of each; all arrays are [W, C]."""

    tokens: jax.Array  # int32
    segments: jax.Array  # int32, the rollout's number from 1 on, 0 on padding
    sequences: jax.Array  # int32 in [0, W C), a number for each rollout
    response: jax.Array  # bool, True on response tokens
    logps: jax.Array  # float32, the sampler's, of the whole distribution
    advantages: jax.Array  # float32


def place_rollouts(
    prompts: Prompts, rollouts: Rollouts, run: jax.Array, shares: jax.Array, micro_tokens: int, packed: bool
) -> tuple[Place, jax.Array, int]:
    """Where the rollouts to run, [R] bool, stand in the rows of each of U shares, [U, R / U] int32.

    Returns:
        (place with leaves [U, W, C], num_rows [U] int32 of each share that hold rollouts, rows of a micro-batch).
    """
    row_tokens = prompts.tokens.shape[1] + rollouts.tokens.shape[1]
    micro_rows = rows_at_once(micro_tokens, row_tokens, shares.shape[1])
    size = -(-shares.shape[1] // micro_rows) * micro_rows
    taken = _prompt_lengths(prompts)[_prompt_of(prompts, rollouts)] + rollouts.lengths
    taken = jnp.where(run, taken if packed else row_tokens, 0)
    places = jax.vmap(lambda share: pack(taken[share], size, row_tokens))(shares)
    rollout = jax.vmap(lambda share, sequence: jnp.where(sequence >= 0, share[sequence], -1))(shares, places.sequence)
    return Place(rollout, places.position), places.num_rows, micro_rows


def rows_at_once(micro_tokens: int, row_tokens: int, num_rows: int) -> int:
    """Rows of row_tokens columns in a micro-batch: equally many for every device of the mesh, one at least."""
    devices = batch_devices(jax.sharding.get_abstract_mesh())
    most = -(-num_rows // devices)
    return devices * max(1, min(micro_tokens // (row_tokens * devices), most))


def _prompt_of(prompts: Prompts, rollouts: Rollouts) -> jax.Array:
    """The prompt of each rollout, [R] int32; any on padding rows."""
    return jnp.minimum(rollouts.prompt_index, prompts.tokens.shape[0] - 1)


def _prompt_lengths(prompts: Prompts) -> jax.Array:
    return jnp.asarray(prompts.mask).sum(axis=1, dtype=jnp.int32)


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
    begin = jnp.arange(place.position.size).reshape(place.position.shape) - place.position
    return Columns(
        tokens=jnp.where(time < 0, asked.get(mode="clip"), answered.get(mode="clip")),
        segments=jnp.where(real, which + 1, 0),
        sequences=begin,
        response=real & (time >= 0) & (place.position > 0),
        logps=logps.at[which, jnp.maximum(time, 0)].get(mode="clip"),
        advantages=advantages[which],
    )
