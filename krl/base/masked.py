"""Masked and segment reductions, and the division of losses and metrics by their counts.

Losses and metrics travel as (sum, count) pairs until the last step, so that micro-batches, padding
and the number of devices cannot change them.
"""

import jax
import jax.numpy as jnp
from jax.ops import segment_sum  # rows of no segment, outside [0, M), are left out


def masked_sum(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum and number of the values under a mask.

    Args:
        values: [...] float.
        mask: [...] bool, the same shape.

    Returns:
        (sum, count), both float32 scalars. Values outside the mask are never read into the sum, so
        they may be NaN.
    """
    total = jnp.where(mask, values, 0.0).sum(dtype=jnp.float32)
    return total, mask.sum(dtype=jnp.float32)


def divide(total: jax.Array | float, count: jax.Array) -> jax.Array:
    """total / count where count > 0, else 0; shapes broadcast."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0.0)


def segment_differs(values: jax.Array, index: jax.Array, num_segments: int) -> jax.Array:
    """Which segments hold values that differ.

    Decided by comparing values, not by a variance, so that rounding cannot make equal ones look mixed.

    Args:
        values: [R] float32.
        index: [R] int32; rows with an index outside [0, num_segments) belong to no segment.
        num_segments: M.

    Returns:
        [M] bool; False for an empty segment.
    """
    highest = jax.ops.segment_max(values, index, num_segments)
    lowest = jax.ops.segment_min(values, index, num_segments)
    return highest > lowest


def segment_moments(values: jax.Array, index: jax.Array, num_segments: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Size, mean and sum of squared deviations of each segment.

    The deviations are taken from the mean before they are squared, so equal values give exactly the
    rounding of one subtraction and no cancellation.

    Args:
        values: [R] float32.
        index: [R] int32; num_segments marks rows that belong to no segment.
        num_segments: M.

    Returns:
        (count [M], mean [M], squares [M]), float32; zeros for an empty segment.
    """
    count = segment_sum(jnp.ones_like(values), index, num_segments)
    mean = divide(segment_sum(values, index, num_segments), count)
    deviation = values - jnp.append(mean, 0.0)[index]
    return count, mean, segment_sum(deviation**2, index, num_segments)
