"""Gradients and scores of many rows, a micro-batch of them at a time; how many there are is data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Summed = tuple[tuple[jax.Array, dict[str, Any]], Any]  # ((loss sum, metrics), gradients)


def accumulate(
    loss_of: Callable[..., Any], params: Any, source: Any, rows: Any, num_rows: jax.Array | int, micro_rows: int
) -> Summed:
    """((loss sum, metrics), gradients) of loss_of(params, source, rows) over the first num_rows of a tree of [W, ...].

    On a mesh that splits rows alone, devices add up what they find in their own rows of all micro-batches and meet once
    at the end: gradients do not travel for each micro-batch. (Beside other axes XLA cannot compile that.)
    """
    run, mesh = jax.value_and_grad(loss_of, has_aux=True), jax.sharding.get_abstract_mesh()
    apart = 1 < mesh.size == mesh.shape.get("data")

    def add_up(params: Any, source: Any, batches: Any, num_batches: jax.Array | int) -> Any:
        def one(index: jax.Array, total: Summed) -> Summed:
            return _add_metrics(total, run(params, source, jax.tree.map(lambda leaf: leaf[index], batches)))

        nothing = jax.eval_shape(run, params, source, jax.tree.map(lambda leaf: leaf[0], batches))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing)
        total = jax.lax.fori_loop(0, num_batches, one, nothing)
        return _meet(total, "data") if apart else total

    if apart:
        whole, split = PartitionSpec(), PartitionSpec(None, "data")
        add_up = jax.shard_map(add_up, in_specs=(whole, whole, split, whole), out_specs=whole, check_vma=False)
    batches = jax.tree.map(lambda leaf: leaf.reshape(-1, micro_rows, *leaf.shape[1:]), rows)
    return add_up(params, source, batches, _batches(num_rows, micro_rows))


def map_rows(function: Callable[[Any], jax.Array], rows: Any, num_rows: jax.Array, micro_rows: int) -> jax.Array:
    """function(some rows), [micro_rows, C], for the first num_rows [U] of each share of a tree of [U, W, ...].

    Returns:
        [U, W, C], 0 for the micro-batches behind them.
    """

    def of_share(share: tuple[Any, jax.Array]) -> jax.Array:
        rows, num_rows = share

        def one(index: jax.Array, whole: jax.Array) -> jax.Array:
            begin = index * micro_rows
            part = function(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, micro_rows), rows))
            return jax.lax.dynamic_update_slice_in_dim(whole, part, begin, 0)

        nothing = jnp.zeros(jax.tree.leaves(rows)[0].shape, jnp.float32)
        return jax.lax.fori_loop(0, _batches(num_rows, micro_rows), one, nothing)

    return jax.lax.map(of_share, (rows, num_rows))


def _batches(num_rows: Any, micro_rows: int) -> Any:
    """How many micro-batches hold the rows."""
    return (num_rows + micro_rows - 1) // micro_rows


def _add_metrics(total: Summed, more: Summed) -> Summed:
    """Sum two ((loss, metrics), grads) trees; a maximum stays a maximum."""
    summed, ((_, before), _), ((_, after), _) = jax.tree.map(jnp.add, total, more), total, more
    return _with_largest(summed, lambda name: jnp.maximum(before[name][0], after[name][0]))


def _meet(total: Summed, axis: str) -> Summed:
    """Sum a ((loss, metrics), grads) tree over the devices along a mesh axis; a maximum stays a maximum."""
    (_, metrics), _ = total
    return _with_largest(jax.lax.psum(total, axis), lambda name: jax.lax.pmax(metrics[name][0], axis))


def _with_largest(summed: Summed, largest: Callable[[str], jax.Array]) -> Summed:
    """A summed tree with largest(name) in the place of each sum of maxima."""
    (_, metrics), _ = summed
    for name in (name for name in metrics if name.endswith("_max")):
        metrics[name] = (largest(name), metrics[name][1])
    return summed
