"""Drawing tokens from logits."""

import jax
import jax.numpy as jnp

from krl.base.threshold import largest_threshold, ordered_floats, ordered_integers

LEVELS = 3  # a token is drawn in so many choices: a group of groups of tokens, a group of these, and one of its tokens


def random_numbers(keys: jax.Array, length: int) -> jax.Array:
    """The random numbers that the tokens of some responses are drawn with; the first ones are the same for any length.

    Each is made of 64 random bits, so that however small it is it has the 24 bits that a float32 can tell.

    Args:
        keys: [c] typed PRNG keys, one of each response.
        length: tokens of a response.

    Returns:
        [c, length, LEVELS] float32 in [0, 1).
    """

    def one(key: jax.Array, at: jax.Array) -> jax.Array:
        high, low = jax.random.bits(jax.random.fold_in(key, at), (2, LEVELS)).astype(jnp.float32)
        return jnp.minimum(high * 2.0**-32 + low * 2.0**-64, 1 - 2.0**-24)  # where rounding gives 1

    number = jnp.arange(length)
    return jax.vmap(lambda key: jax.vmap(lambda at: one(key, at))(number))(keys)


def draw_tokens(
    logits: jax.Array,
    uniform: jax.Array,
    *,
    temperature: jax.Array | float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw a token a row by the inverse of its distribution, in LEVELS choices of some V^(1/3) each.

    Rare tokens are drawn as often as they should be, to about 1 in 10^4: neither one random number of 23 bits nor sums
    beside a large one decide among them.

    Args:
        logits: [B, V] float32.
        uniform: [B, LEVELS] float32 in [0, 1), from `random_numbers`.
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
    rows, size = shares.shape
    width = 1 << -(-max(size - 1, 1).bit_length() // LEVELS)
    masses = [jnp.pad(shares, ((0, 0), (0, -size % width ** (LEVELS - 1)))).reshape(rows, -1, width)]
    for _ in range(LEVELS - 2):
        masses.append(masses[-1].sum(axis=-1).reshape(rows, -1, width))
    groups = masses[-1].sum(axis=-1)
    token = _choose(groups, uniform[:, 0])
    for level, of_groups in enumerate(reversed(masses), 1):
        inside = jnp.take_along_axis(of_groups, token[:, None, None], axis=1)[:, 0]
        token = token * width + _choose(inside, uniform[:, level])
    token = jnp.where(greedy, best, token)
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0] - largest[:, 0]
    logp = chosen - jnp.log(groups.sum(axis=-1))
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
    largest, keys = logits.max(axis=-1, keepdims=True), ordered_integers(logits)
    least = keys.min(axis=-1, keepdims=True)
    if 0 < top_k < logits.shape[-1]:
        least = largest_threshold(lambda key: (keys >= key).sum(axis=-1, keepdims=True) >= top_k, least.shape)
    if top_p < 1:
        shares = jnp.where(keys >= least, jnp.exp(logits - largest), 0.0)

        def mass(key: jax.Array) -> jax.Array:
            return jnp.where(keys >= key, shares, 0.0).sum(axis=-1, keepdims=True)

        needed = top_p * mass(least)
        least = largest_threshold(lambda key: mass(key) >= needed, least.shape)
    bound = ordered_floats(least)
    return jnp.maximum(bound, largest + jnp.log(min_p)) if min_p else bound


def _choose(masses: jax.Array, uniform: jax.Array) -> jax.Array:
    """A column of each row, as likely as its mass is large: [B] int32 of masses [B, n] >= 0 and numbers [B] in [0, 1).

    Masses are added up from the smallest to the largest, so that a small one is not rounded away beside a large one. A
    column without mass is never chosen if another has some.
    """
    number = jnp.arange(masses.shape[-1])
    mine, other = masses[:, :, None], masses[:, None, :]
    smaller = (other < mine) | ((other == mine) & (number <= number[:, None]))
    upto = jnp.where(smaller, other, 0.0).sum(axis=-1)
    total = upto.max(axis=-1, keepdims=True)
    beyond = (upto > uniform[:, None] * total) | (upto >= total)  # the product of tiny ones may round to the total
    return jnp.argmin(jnp.where(beyond, upto, jnp.inf), axis=-1).astype(jnp.int32)
