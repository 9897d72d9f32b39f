"""Gated units of which a router chooses some for each token (Shazeer et al., arXiv 1701.06538); no token is dropped."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from krl.base.sharding import RULES, open_axes, open_batch, partition_spec


@dataclasses.dataclass(frozen=True)
class Experts:
    """How many units a layer has, and how many of them a token goes through."""

    count: int  # X
    active: int
    normalised: bool = False  # the weights of a token's own experts are divided by their sum

    def __post_init__(self) -> None:
        whole = type(self.count) is type(self.active) is int
        if not whole or not 1 <= self.active <= self.count <= 1_000_000:
            raise ValueError(
                f"of {self.count!r} experts (at most 1,000,000) {self.active!r} cannot be active for a token"
            )
        if type(self.normalised) is not bool:
            raise ValueError(f"normalised {self.normalised!r} of experts must be true or false")


def apply_experts(
    experts: Experts,
    x: jax.Array,
    scores: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The sum of a token's experts, each times its score.

    Tokens are sorted by expert, so that each expert multiplies one run of them. Where the mesh splits the experts,
    each device computes its own ones for all tokens of its rows, and the devices' sums are added up.

    Args:
        experts: their numbers, static.
        x: [B, T, E].
        scores: [B, T, X] float32, of the router.
        gate, up, down: [X, E, M], the same and [X, M, E], of x's dtype.
        activation: of the gate.

    Returns:
        [B, T, E] of x's dtype.
    """
    axes = open_axes()
    split = next((name for name in RULES["expert"] if name in axes), None)

    def local(x: jax.Array, scores: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = jax.lax.top_k(scores.reshape(-1, experts.count), experts.active)
        if experts.normalised:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        first = jax.lax.axis_index(split) * len(gate) if split else 0
        number = (chosen.ravel() - first) % experts.count  # the experts of this device come first
        order = jnp.argsort(number)
        sizes = jnp.bincount(number, length=experts.count)[: len(gate)]
        token = order // experts.active
        # Rows of other devices' experts are of no group: ragged_dot may give anything for them, as may its gradient.
        here = (jnp.arange(len(order)) < sizes.sum())[:, None]
        read, times = jnp.where(here, tokens[token], 0), functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
        outputs = jnp.where(here, times(activation(times(read, gate)) * times(read, up), down), 0)
        summed = jnp.zeros_like(tokens).at[token].add(outputs * weights.ravel()[order].astype(x.dtype)[:, None])
        return (jax.lax.psum(summed, split) if split else summed).reshape(x.shape)

    if not axes:
        return local(x, scores, gate, up, down)
    spec = functools.partial(partition_spec, mesh_axes=axes)
    whole = x.shape[0] % open_batch()  # too few rows for all devices
    rows, unit = spec((None if whole else "batch", "length", None)), spec(("expert", None, None))
    specs = (rows, rows, unit, unit, unit)
    return jax.shard_map(local, in_specs=specs, out_specs=rows, axis_names=set(axes), check_vma=False)(
        x, scores, gate, up, down
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def balanced(experts: Experts, coefficient: float, scores: jax.Array, real: jax.Array) -> jax.Array:
    """The scores as they are; a gradient that goes through them also spreads the tokens over the experts.

    That adds to the loss of every real token coefficient times

        X sum_x f_x P_x,

    which is 1 where all experts are used alike: f_x is the share of the choices that fell on expert x, and P_x the mean
    score of it (Fedus et al., "Switch Transformers", arXiv 2101.03961, equation 4). f has no gradient. Nothing but this
    gradient has to leave a layer, as the loss of a step is a sum over tokens that is divided later: the gradient that
    comes in does not scale it, and of a mean it would be too large by the number of tokens.

    Args:
        experts: their numbers, static.
        coefficient: static.
        scores: [B, T, X] float32, of the router.
        real: [B, T] bool, False on padding.

    Returns:
        The scores.
    """
    return scores


def _balance_backward(
    experts: Experts, coefficient: float, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    scores, real = kept
    _, chosen = jax.lax.top_k(scores, experts.active)
    choices = jnp.where(real[..., None], chosen, experts.count)  # padding chooses none
    counts = jnp.bincount(choices.ravel(), length=experts.count).astype(jnp.float32)
    slope = coefficient * experts.count * counts / jnp.maximum(counts.sum(), 1)
    return gradient + jnp.where(real[..., None], slope, 0), None


balanced.defvjp(lambda experts, coefficient, scores, real: (scores, (scores, real)), _balance_backward)
