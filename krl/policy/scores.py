"""Log-probabilities and entropies of tokens from hidden states, without the logits of a whole batch."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from krl.base.sharding import RULES, open_axes


class Options(NamedTuple):
    """What is static about scores."""

    softcap: float  # bound on logits before the temperature, 0 for none
    vocab_first: bool  # the layout of the head: [V, E], or [E, V]
    entropy: bool  # whether entropies are wanted


def token_scores(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    options: Options,
    *,
    temperature: jax.Array | float,
    chunk: int,
    wanted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Score tokens by the distributions that hidden states predict.

    Logits exist for about `chunk` tokens at a time. The backward pass makes them again and keeps of the
    forward pass two numbers a token, so memory does not grow with T * V. Tokens that are not wanted, such as those of
    prompts, come last in their rows, and chunks without any other are left out: what is computed goes by the row with
    the most wanted tokens.

    On a mesh every device goes through the chunks of its own rows with the whole head (but for the axis "model"), and
    what they found of its gradient is summed once: XLA by itself gathers the head and sums its gradient for every
    chunk.

    Args:
        hidden: [B, T, E] in the compute dtype.
        head: [V, E] or [E, V] in the compute dtype.
        targets: [B, T] int32, the tokens to score.
        options: static.
        temperature: the logits are divided by it, > 0; no gradient flows to it.
        chunk: tokens, over all rows of a device, whose logits are alive at a time.
        wanted: [B, T] bool, which scores are; None for all. The others are finite and mean nothing.

    Returns:
        (log-probabilities [B, T], entropies [B, T]), float32, nats; entropies are 0 if not wanted.
    """
    if wanted is not None:
        order = jnp.argsort(~wanted, axis=1, stable=True)
        hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
        targets, wanted = (jnp.take_along_axis(array, order, axis=1) for array in (targets, wanted))
    rows, length = targets.shape
    columns = min(max(chunk * _devices(rows) // rows, 1), max(length, 1))
    padding = -length % columns

    def cut(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, padding), *((0, 0),) * (array.ndim - 2)))
        return array.reshape(rows, -1, columns, *array.shape[2:]).swapaxes(0, 1)

    live = cut(jnp.ones_like(targets, bool) if wanted is None else wanted).any(axis=2)
    scores = _scores(cut(hidden), head, cut(targets), jnp.asarray(temperature, jnp.float32), live, options)
    logps, entropies = (part.swapaxes(0, 1).reshape(rows, -1)[:, :length] for part in scores)
    if wanted is not None:
        back = jnp.argsort(order, axis=1)
        logps, entropies = (jnp.take_along_axis(part, back, axis=1) for part in (logps, entropies))
    return logps, entropies


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _scores(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array, live: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    return _forward(hidden, head, targets, temperature, live, options)[0]


def _batch_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh that split so many rows; none if they do not divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in RULES["batch"] if name in open_axes() and mesh.shape[name] > 1)
    return axes if rows % math.prod(mesh.shape[name] for name in axes) == 0 else ()


def _devices(rows: int) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in _batch_axes(rows))


def _on_own_rows(function: Callable[..., tuple[Any, Any]], rows: tuple[jax.Array, ...], whole: Any) -> tuple[Any, Any]:
    """function(batch axes, rows, whole), which returns such two, on each device's part of the rows' second axis."""
    axes = _batch_axes(rows[0].shape[1])
    if not axes:
        return function(axes, rows, whole)
    specs = PartitionSpec(None, axes), PartitionSpec()
    return jax.shard_map(
        functools.partial(function, axes), in_specs=specs, out_specs=specs, axis_names=set(axes), check_vma=False
    )(rows, whole)


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array, live: jax.Array, options: Options
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, Any]]:
    """Scores [n, B, c] of n chunks, and what the backward pass needs: what has rows, and what is whole.

    Chunks of which no row is live [n, B], the last ones, keep scores of 0.
    """
    rows, whole = (hidden, targets), (head, temperature)
    (logps, entropies, normalisers), _ = _on_own_rows(functools.partial(_forward_here, options), (*rows, live), whole)
    return (logps, entropies), ((*rows, entropies, normalisers, live), whole)


def _forward_here(
    options: Options, _: tuple[str, ...], rows: tuple[jax.Array, ...], whole: tuple[jax.Array, jax.Array]
) -> tuple[tuple[jax.Array, ...], tuple[()]]:
    *chunks, live = rows

    def one(number: jax.Array, scores: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        hidden, targets = (part[number] for part in chunks)
        logits, _ = _logits(hidden, *whole, options)
        largest = logits.max(axis=-1, keepdims=True)
        shares = jnp.exp(logits - largest)
        total = shares.sum(axis=-1)
        normaliser = largest[..., 0] + jnp.log(total)
        logps = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - normaliser
        entropies = jnp.zeros_like(logps)
        if options.entropy:
            entropies = normaliser - (shares * logits).sum(axis=-1) / total
        found = (logps, entropies, normaliser)
        return tuple(every.at[number].set(part) for every, part in zip(scores, found, strict=True))

    nothing = jnp.zeros(chunks[1].shape, jnp.float32)
    return jax.lax.fori_loop(0, _chunks(live), one, (nothing, nothing, nothing)), ()


def _chunks(live: jax.Array) -> jax.Array:
    """How many chunks have a live row; they are the first ones."""
    return live.any(axis=1).sum(dtype=jnp.int32)


def _backward(
    options: Options, kept: tuple[Any, Any], gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None, None]:
    rows, whole = kept
    return *_on_own_rows(functools.partial(_backward_here, options), (*gradients, *rows), whole), None, None, None


def _backward_here(
    options: Options, batch_axes: tuple[str, ...], rows: tuple[jax.Array, ...], whole: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (head, temperature), (*chunks, live) = whole, rows

    def one(number: jax.Array, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        head_gradient, every = gradients
        by_logp, by_entropy, hidden, targets, entropies, normalisers = (part[number] for part in chunks)
        logits, slope = _logits(hidden, head, temperature, options)
        logps = logits - normalisers[..., None]
        chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
        weight = by_logp[..., None]
        if options.entropy:
            weight = weight + by_entropy[..., None] * (logps + entropies[..., None])
        gradient = jnp.where(chosen, by_logp[..., None], 0.0) - jnp.exp(logps) * weight
        gradient = (gradient * slope).astype(hidden.dtype)
        layout = "ve" if options.vocab_first else "ev"
        hidden_gradient = jnp.einsum(f"btv,{layout}->bte", gradient, head)
        more = jnp.einsum(f"btv,bte->{layout}", gradient, hidden, preferred_element_type=jnp.float32)
        return head_gradient + more, every.at[number].set(hidden_gradient)

    nothing = jnp.zeros(head.shape, jnp.float32), jnp.zeros_like(chunks[2])
    head_gradient, hidden_gradient = jax.lax.fori_loop(0, _chunks(live), one, nothing)
    if batch_axes:
        head_gradient = jax.lax.psum(head_gradient, batch_axes)
    return hidden_gradient, head_gradient.astype(head.dtype)


def _logits(
    hidden: jax.Array, head: jax.Array, temperature: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, c, V] float32, and their derivative by the product of hidden state and head."""
    equation = "bte,ve->btv" if options.vocab_first else "bte,ev->btv"
    logits = jnp.einsum(equation, hidden, head, preferred_element_type=jnp.float32)
    if not options.softcap:
        return logits / temperature, 1 / temperature
    bounded = jnp.tanh(logits / options.softcap)
    return options.softcap * bounded / temperature, (1 - jnp.square(bounded)) / temperature


_scores.defvjp(_forward, _backward)
