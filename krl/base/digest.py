"""What tells parameters apart."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils


def digest(params: dict[str, Any]) -> str:
    """What tells parameters from all others, whatever mesh they lie on: a digest of names, shapes and bits.

    Args:
        params: a tree of floating-point arrays; narrow ones count as the float32 of the same value.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    names = [f"{jax.tree_util.keystr(path)} {leaf.shape}" for path, leaf in named]
    sums = multihost_utils.process_allgather(_sums_of_bits([leaf for _, leaf in named]), tiled=True)
    return hashlib.blake2b("\n".join(names).encode() + sums.tobytes(), digest_size=8).hexdigest()


@jax.jit
def _sums_of_bits(leaves: Sequence[jax.Array]) -> jax.Array:
    """Two sums over the bits of each array, mixed with where they stand, [n, 2] uint32; their order changes nothing."""

    def sums(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        place = jnp.zeros_like(bits)
        for axis, size in enumerate(bits.shape):
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        mixed = bits ^ (place * jnp.uint32(0x9E3779B9))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return jnp.stack([mixed.sum(dtype=jnp.uint32), ((mixed >> 7) * (2 * place + 1)).sum(dtype=jnp.uint32)])

    return jnp.stack([sums(leaf) for leaf in leaves])
