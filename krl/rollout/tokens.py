"""Drawing tokens from logits."""

import jax
import jax.numpy as jnp


def draw_tokens(
    logits: jax.Array, uniform: jax.Array, *, temperature: jax.Array | float, top_p: float
) -> tuple[jax.Array, jax.Array]:
    """Draw a token a row by the inverse of its distribution, from one random number.

    Args:
        logits: [B, V] float32.
        uniform: [B] float32 in [0, 1), random.
        temperature: [] the logits are divided by it; 0 takes the most likely token.
        top_p: draw from the fewest tokens that hold so much of the probability, static; 1 draws from all.

    Returns:
        ([B] int32 tokens, [B] float32 log-probabilities, nats, under what was drawn from; at temperature 0 under the
        policy itself).
    """
    greedy = jnp.asarray(temperature) <= 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    if top_p < 1:
        scaled = _nucleus(scaled, top_p)
    best = jnp.argmax(scaled, axis=-1).astype(jnp.int32)
    largest = jnp.take_along_axis(scaled, best[:, None], axis=-1)
    shares = jnp.exp(scaled - largest)
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
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return token, chosen - largest[:, 0] - jnp.log(total)


def _find(upto: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first column whose cumulative sum, [B, n], is above the target, [B], and what the target has beyond the one before."""
    column = jnp.minimum((upto <= target[:, None]).sum(axis=-1), upto.shape[1] - 1)
    before = jnp.take_along_axis(upto, jnp.maximum(column - 1, 0)[:, None], axis=-1)[:, 0]
    return column, target - jnp.where(column > 0, before, 0.0)


def _nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits [B, V] with -inf on tokens whose likelier ones already hold top_p of the probability."""
    falling = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.where(before < top_p, falling, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
