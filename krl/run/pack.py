"""Sequences side by side in rows of equal width, so that computation follows real tokens."""

import jax
import jax.numpy as jnp
from flax import struct


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

    def place(left, length):
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
