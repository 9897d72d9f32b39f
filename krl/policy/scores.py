"""Log-probabilities and entropies of tokens from hidden states, without the logits of a whole batch."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from krl.base.sharding import RULES, open_axes


def token_scores(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: jax.Array | float,
    softcap: float,
    vocab_first: bool,
    chunk: int,
    entropy: bool,
) -> tuple[jax.Array, jax.Array]:
    """Score tokens by the distributions that hidden states predict.

    Logits exist for about `chunk` tokens at a time. The backward pass makes them again and keeps of the
    forward pass two numbers a token, so memory does not grow with T * V.

    On a mesh every device goes through the chunks of its own rows with the whole head (but for the axis "model"), and
    what they found of its gradient is summed once: XLA by itself gathers the head and sums its gradient for every
    chunk.

    Args:
        hidden: [B, T, E] in the compute dtype.
        head: [V, E], or [E, V] unless vocab_first, in the compute dtype.
        targets: [B, T] int32, the tokens to score.
        temperature: the logits are divided by it, > 0; no gradient flows to it.
        softcap: bound on logits before the temperature, 0 for none.
        vocab_first: the layout of the head.
        chunk: tokens, over all rows of a device, whose logits are alive at a time.
        entropy: whether entropies are wanted.

    Returns:
        (log-probabilities [B, T], entropies [B, T]), float32, nats; entropies are 0 if not wanted.
    """
    rows, length = targets.shape
    columns = min(max(chunk * _devices(rows) // rows, 1), max(length, 1))
    padding = -length % columns

    def cut(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, padding), *((0, 0),) * (array.ndim - 2)))
        return array.reshape(rows, -1, columns, *array.shape[2:]).swapaxes(0, 1)

    options = (softcap, vocab_first, entropy)
    scores = _scores(cut(hidden), head, cut(targets), jnp.asarray(temperature, jnp.float32), options)
    logps, entropies = (part.swapaxes(0, 1).reshape(rows, -1)[:, :length] for part in scores)
    return logps, entropies


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scores(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array, options: tuple[float, bool, bool]
) -> tuple[jax.Array, jax.Array]:
    return _forward(hidden, head, targets, temperature, options)[0]


def _batch_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh that split so many rows; none if they do not divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in RULES["batch"] if name in open_axes() and mesh.shape[name] > 1)
    return axes if rows % math.prod(mesh.shape[name] for name in axes) == 0 else ()


def _devices(rows: int) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in _batch_axes(rows))


def _on_own_rows(
    function: Callable[..., tuple[jax.Array, ...]], kinds: str, results: str
) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of (batch axes, arguments) on each device's rows: "r" has them along its second axis, "w" is whole."""

    def on_own_rows(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        rows = next(argument.shape[1] for argument, kind in zip(arguments, kinds, strict=True) if kind == "r")
        axes = _batch_axes(rows)
        if not axes:
            return function(axes, *arguments)
        specs = {"r": PartitionSpec(None, axes), "w": PartitionSpec()}
        return jax.shard_map(
            functools.partial(function, axes), in_specs=tuple(specs[kind] for kind in kinds),
            out_specs=tuple(specs[kind] for kind in results), axis_names=set(axes), check_vma=False,
        )(*arguments)  # fmt: skip

    return on_own_rows


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array, options: tuple[float, bool, bool]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """Scores [n, B, c] of n chunks, and what the backward pass needs."""
    local = _on_own_rows(functools.partial(_forward_here, options), "rwrw", "rrr")
    logps, entropies, normalisers = local(hidden, head, targets, temperature)
    return (logps, entropies), (hidden, head, targets, temperature, entropies, normalisers)


def _forward_here(
    options: tuple[float, bool, bool],
    _: tuple[str, ...],
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def one(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden, targets = chunk
        logits, _ = _logits(hidden, head, temperature, options)
        largest = logits.max(axis=-1, keepdims=True)
        shares = jnp.exp(logits - largest)
        total = shares.sum(axis=-1)
        normaliser = largest[..., 0] + jnp.log(total)
        logps = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - normaliser
        if not options[2]:
            return logps, jnp.zeros_like(logps), normaliser
        return logps, normaliser - (shares * logits).sum(axis=-1) / total, normaliser

    return jax.lax.map(one, (hidden, targets))


def _backward(
    options: tuple[float, bool, bool], kept: tuple[jax.Array, ...], gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    local = _on_own_rows(functools.partial(_backward_here, options), "rwrwrrrr", "rw")
    hidden_gradient, head_gradient = local(*kept, *gradients)
    return hidden_gradient, head_gradient, None, None


def _backward_here(
    options: tuple[float, bool, bool],
    batch_axes: tuple[str, ...],
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
    entropies: jax.Array,
    normalisers: jax.Array,
    *gradients: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    _, vocab_first, entropy = options

    def one(head_gradient: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, entropies, normalisers, by_logp, by_entropy = chunk
        logits, slope = _logits(hidden, head, temperature, options)
        logps = logits - normalisers[..., None]
        chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
        weight = by_logp[..., None]
        if entropy:
            weight = weight + by_entropy[..., None] * (logps + entropies[..., None])
        gradient = jnp.where(chosen, by_logp[..., None], 0.0) - jnp.exp(logps) * weight
        gradient = (gradient * slope).astype(hidden.dtype)
        back, outer = ("btv,ve->bte", "btv,bte->ve") if vocab_first else ("btv,ev->bte", "btv,bte->ev")
        hidden_gradient = jnp.einsum(back, gradient, head)
        more = jnp.einsum(outer, gradient, hidden, preferred_element_type=jnp.float32)
        return head_gradient + more, hidden_gradient

    chunks = (hidden, targets, entropies, normalisers, *gradients)
    head_gradient, hidden_gradient = jax.lax.scan(one, jnp.zeros(head.shape, jnp.float32), chunks)
    if batch_axes:
        head_gradient = jax.lax.psum(head_gradient, batch_axes)
    return hidden_gradient, head_gradient.astype(head.dtype)


def _logits(
    hidden: jax.Array, head: jax.Array, temperature: jax.Array, options: tuple[float, bool, bool]
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, c, V] float32, and their derivative by the product of hidden state and head."""
    softcap, vocab_first, _ = options
    equation = "bte,ve->btv" if vocab_first else "bte,ev->btv"
    logits = jnp.einsum(equation, hidden, head, preferred_element_type=jnp.float32)
    if not softcap:
        return logits / temperature, 1 / temperature
    bounded = jnp.tanh(logits / softcap)
    return softcap * bounded / temperature, (1 - jnp.square(bounded)) / temperature


_scores.defvjp(_forward, _backward)
