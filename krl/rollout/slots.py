"""Counts to flat slots: which prompt, and which of its samples, each row of a step belongs to."""

import jax
import jax.numpy as jnp


def make_slots(counts: jax.Array, num_rollouts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lay ragged counts out as flat rows sorted by prompt.

    Args:
        counts: [M] int32 >= 0; their sum must not exceed num_rollouts (further rollouts have no row).
        num_rollouts: R, the number of rows, static.

    Returns:
        prompt_index [R] int32, sample_index [R] int32, mask [R] bool. Rows beyond the sum of the counts
        have prompt_index M, sample_index 0 and mask False.

    Raises:
        ValueError: counts is not of rank 1.

    >>> [a.tolist() for a in make_slots(jnp.array([2, 0, 1]), 4)]
    [[0, 0, 2, 3], [0, 1, 0, 0], [True, True, True, False]]
    """
    if jnp.ndim(counts) != 1:
        raise ValueError(f"counts must have shape [M], got {jnp.shape(counts)}")
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    rows = jnp.arange(num_rollouts, dtype=jnp.int32)
    prompt_index = jnp.searchsorted(ends, rows, side="right").astype(jnp.int32)
    mask = prompt_index < counts.shape[0]
    starts = jnp.append(ends - counts, num_rollouts)
    sample_index = jnp.where(mask, rows - starts[prompt_index], 0).astype(jnp.int32)
    return prompt_index, sample_index, mask
