"""Low-rank adapters among the parameters of a policy: which they are, and what they make of the weights beside them.

Beside a weight W of a layer, such as "query", stand its adapter's A, "query_lora_a", and B, "query_lora_b".
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from krl.policy.config import PolicyConfig

A, B = "_lora_a", "_lora_b"


def trained(config: PolicyConfig, tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a tree of parameters, or of what is said of each, that a run changes: all of it, or the adapters."""
    return _part(tree, adapters=True) if config.lora else tree


def frozen(config: PolicyConfig, tree: dict[str, Any]) -> dict[str, Any]:
    """The part that a run does not change; {} without adapters."""
    return _part(tree, adapters=False) if config.lora else {}


def join(*trees: dict[str, Any]) -> dict[str, Any]:
    """One tree of what `trained` and `frozen` have parted."""
    return unflatten_dict({path: leaf for tree in trees for path, leaf in flatten_dict(tree).items()})


def merge(config: PolicyConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, float32, of the same policy without adapters: W + alpha / rank * A B."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    merge_block = functools.partial(merge_layer, config, dtype=jnp.float32)
    return wide | {"blocks": jax.vmap(merge_block)(wide["blocks"])}


def merge_layer(config: PolicyConfig, block: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """`merge` of one layer, with A and B as a computation in `dtype` has them; other weights stay as they are."""
    if config.lora is None:
        return block
    merged = {name: leaf for name, leaf in block.items() if not name.endswith((A, B))}
    for name in merged:
        if name + A in block:
            into, out = block[name + A].astype(dtype), block[name + B].astype(dtype)
            product = jnp.tensordot(into, out, 1, precision="highest", preferred_element_type=jnp.float32)
            merged[name] = merged[name].astype(jnp.float32) + config.lora.scale * product
    return merged


def _part(tree: dict[str, Any], *, adapters: bool) -> dict[str, Any]:
    flat = flatten_dict(tree)
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path[-1].endswith((A, B)) == adapters})
