"""Drawing tokens from logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def draw_tokens(
    logits: jax.Array,
    uniform: jax.Array,
    *,
    temperature: jax.Array | float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw a token a row by the inverse of its distribution, from one random number.

    Args:
        logits: [B, V] float32.
        uniform: [B] float32 in [0, 1), random.
        temperature: [] the logits are divided by it; 0 takes the most likely token.
        top_k, top_p, min_p: what is drawn from, see `least_logit`; static.

    Returns:
        ([B] int32 tokens, [B] float32 log-probabilities, nats, under what was drawn from, [B] float32 under
        the whole distribution); at temperature 0 both are the policy's own.
    """
    greedy = jnp.asarray(temperature) <= 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    best = jnp.argmax(scaled, axis=-1).astype(jnp.int32)
    largest = jnp.take_along_axis(scaled, best[:, None], axis=-1)
    shares = jnp.exp(scaled - largest)
    whole = shares
    if top_k or top_p < 1 or min_p:
        kept = scaled >= least_logit(scaled, top_k=top_k, top_p=top_p, min_p=min_p)
        shares = jnp.where(kept | greedy, shares, 0.0)
    # In two levels: which block of tokens, then which of its tokens. So sums over the whole vocabulary are of blocks.
    rows, size = shares.shape
    width = 1 << (max(size - 1, 1).bit_length() + 1) // 2
    blocks = jnp.pad(shares, ((0, 0), (0, -size % width))).reshape(rows, -1, width)
    upto = jnp.cumsum(blocks.sum(axis=-1), axis=-1)
    total = upto[:, -1]
    block, rest = _find(upto, uniform * total)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    column, _ = _find(jnp.cumsum(inside, axis=-1), rest)
    token = (block * width + column).astype(jnp.int32)
    possible = jnp.take_along_axis(inside, column[:, None], axis=-1)[:, 0] > 0  # rounding may lead past the last one
    token = jnp.where(greedy | ~possible, best, token)
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0] - largest[:, 0]
    logp = chosen - jnp.log(total)
    return token, logp, logp if shares is whole else chosen - jnp.log(whole.sum(axis=-1))


def least_logit(logits: jax.Array, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> jax.Array:
    """The least logit that may be drawn; each limit looks at what those before it left, and ties are kept together.

    Args:
        logits: [B, V] float32.
        top_k: that many most likely tokens, static; 0 for all.
        top_p: of those, the fewest that hold so much of the probability (Holtzman et al., arXiv 1904.09751), static;
            1 for all.
        min_p: of those, the ones at least so likely relative to the most likely one (Nguyen et al., arXiv
            2407.01082), static; 0 for all.

    Returns:
        [B, 1] float32.
    """
    largest, least = logits.max(axis=-1, keepdims=True), logits.min(axis=-1, keepdims=True)
    if 0 < top_k < logits.shape[-1]:
        least = _largest_where(lambda bound: (logits >= bound).sum(axis=-1, keepdims=True) >= top_k, least, largest)
    if top_p < 1:
        shares = jnp.where(logits >= least, jnp.exp(logits - largest), 0.0)
        mass = lambda bound: jnp.where(logits >= bound, shares, 0.0).sum(axis=-1, keepdims=True)  # noqa: E731
        needed = top_p * mass(least)
        least = _largest_where(lambda bound: mass(bound) >= needed, least, largest)
    return jnp.maximum(least, largest + jnp.log(min_p)) if min_p else least


def _largest_where(holds: Callable, least: jax.Array, largest: jax.Array) -> jax.Array:
    """The largest float32 for which something holds that holds at `least` and for all smaller numbers than one it holds for.

    By bisection of the numbers' bits, whose order as integers is that of the numbers: 32 passes over the vocabulary
    and no sort of it.
    """

    def ordered(bits):  # its own inverse
        return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    def number(order):
        return jax.lax.bitcast_convert_type(ordered(order), jnp.float32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean without overflow
        enough = holds(number(middle))
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, high = (ordered(jax.lax.bitcast_convert_type(bound, jnp.int32)) for bound in (least, largest))
    return number(jax.lax.fori_loop(0, 32, halve, (low, high + 1))[0])


def _find(upto: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first column whose cumulative sum, [B, n], is above the target, [B], and what the target has beyond the one before."""
    column = jnp.minimum((upto <= target[:, None]).sum(axis=-1), upto.shape[1] - 1)
    before = jnp.take_along_axis(upto, jnp.maximum(column - 1, 0)[:, None], axis=-1)[:, 0]
    return column, target - jnp.where(column > 0, before, 0.0)
