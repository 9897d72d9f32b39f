"""The search for a threshold among float32 numbers: the largest at which those at or above it are still enough.

Read as integers, with negative numbers turned round, the bits of float32 are in the order of the numbers. So a
threshold is built bit by bit, from the sign down: 32 looks at the numbers, and no sort.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NEVER = np.iinfo(np.int32).min  # below the key of every number, -inf too


def ordered_integers(values: jax.Array) -> jax.Array:
    """Integers, [...] int32, in the order of the values, [...] float32; 0.0 and -0.0 have the same."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.int32)
    return jnp.where(bits < 0, NEVER - bits - 1, bits)


def ordered_floats(keys: jax.Array) -> jax.Array:
    """The values whose `ordered_integers` the keys are."""
    return jax.lax.bitcast_convert_type(jnp.where(keys < 0, NEVER - keys - 1, keys), jnp.float32)


def largest_threshold(enough: Callable[[jax.Array], jax.Array], shape: tuple[int, ...] = ()) -> jax.Array:
    """The largest integers that are enough, where all smaller ones are too; NEVER where none is.

    Args:
        enough: of integers, int32 of the shape, whether they are; bool, the same shape.
        shape: of the integers, each of which is searched for by itself.
    """
    return narrow_threshold(lambda key, _: (enough(key), None), None, shape)[0]


def narrow_threshold(
    enough: Callable[[jax.Array, Any], tuple[jax.Array, Any]], state: Any, shape: tuple[int, ...] = ()
) -> tuple[jax.Array, Any]:
    """`largest_threshold` by a function that also takes, and returns, what it has learnt from earlier integers."""

    def with_bit(step: jax.Array, found: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        threshold, state = found
        candidate = threshold + jnp.left_shift(jnp.int32(1), 31 - step)  # the sign's bit leads from NEVER to 0
        holds, state = enough(candidate, state)
        return jnp.where(holds, candidate, threshold), state

    return jax.lax.fori_loop(0, 32, with_bit, (jnp.full(shape, NEVER, jnp.int32), state))
