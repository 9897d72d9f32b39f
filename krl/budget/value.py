"""What a rollout is worth: from success rates, or beliefs about them, to marginal gains.

A prompt with success probability p and N rollouts of 0/1 rewards has a non-zero group-relative
gradient with probability 1 - p^N - (1-p)^N. Its value is that probability times the information
gained from it (Li et al., "Knapsack RL", arXiv 2509.25849, section 3):

    V(N, p) = p (1-p)^2 (1 - p^N - (1-p)^N)

The gain of one rollout more, V(n+1, p) - V(n, p) = p (1-p)^2 (p^n (1-p) + (1-p)^n p), falls strictly
in n for 0 < p < 1, so V is concave in N and the largest gains are the optimal ones to take. Gains
are kept as logarithms: in float32 the plain ones underflow long before n = 128.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import betaln


def grpo_value(p: jax.Array, n: jax.Array) -> jax.Array:
    """V(n, p), the value of giving n rollouts to a prompt of success rate p; shapes broadcast.

    Args:
        p: [...] float, success rates in [0, 1].
        n: [...] int or float, rollouts.

    Returns:
        [...] float32, dimensionless.

    References:
        Li et al., "Knapsack RL", arXiv 2509.25849.

    >>> float(grpo_value(0.5, 2))
    0.0625
    """
    p, n = jnp.asarray(p, jnp.float32), jnp.asarray(n, jnp.float32)
    return p * (1 - p) ** 2 * (1 - p**n - (1 - p) ** n)


def log_gains(p: jax.Array, n_min: int, n_max: int) -> jax.Array:
    """Logarithm of the gain of the rollouts n_min + 1 .. n_max of each prompt.

    Args:
        p: [M] float, success rates in [0, 1].
        n_min, n_max: the fewest and the most rollouts of a prompt, static.

    Returns:
        [M, n_max - n_min] float32; column j holds log(V(n_min + j + 1, p) - V(n_min + j, p)). Rows do
        not rise; a prompt with p = 0 or p = 1 has nothing to gain, -inf.

    Raises:
        ValueError: p is not of rank 1, or not 1 <= n_min <= n_max.
    """
    _check(n_min, n_max, p=p)
    p = jnp.asarray(p, jnp.float32)[:, None]
    n = jnp.arange(n_min, n_max, dtype=jnp.float32)[None, :]
    log_p, log_q = jnp.log(p), jnp.log1p(-p)
    gains = log_p + 2 * log_q + jnp.logaddexp(n * log_p + log_q, n * log_q + log_p)
    certain = (p <= 0) | (p >= 1)
    return jax.lax.cummin(jnp.where(certain, -jnp.inf, gains), axis=1)


def log_gains_beta(alpha: jax.Array, beta: jax.Array, n_min: int, n_max: int) -> jax.Array:
    """Logarithm of the expected gain of each further rollout when p ~ Beta(alpha, beta).

    The expectation of p (1-p)^2 (p^n (1-p) + (1-p)^n p) has a closed form,

        E[g(n)] = [B(a+n+1, b+3) + B(a+2, b+n+2)] / B(a, b),

    and as a mixture of functions that fall in n it falls in n too. Prompts never seen, always failed
    and always solved need no special case: 0 of 2 and 0 of 200 are different beliefs.

    Args:
        alpha, beta: [M] float > 0, the parameters of each prompt's belief.
        n_min, n_max: the fewest and the most rollouts of a prompt, static.

    Returns:
        [M, n_max - n_min] float32, finite; column j is the gain of rollout n_min + j + 1.

    Raises:
        ValueError: alpha or beta is not of rank 1, or not 1 <= n_min <= n_max.
    """
    _check(n_min, n_max, alpha=alpha, beta=beta)
    a, b = jnp.asarray(alpha, jnp.float32)[:, None], jnp.asarray(beta, jnp.float32)[:, None]
    n = jnp.arange(n_min, n_max, dtype=jnp.float32)[None, :]
    successes_first, failures_first = betaln(a + n + 1, b + 3), betaln(a + 2, b + n + 2)
    gains = jnp.logaddexp(successes_first, failures_first) - betaln(a, b)
    return jax.lax.cummin(gains, axis=1)


def _check(n_min: int, n_max: int, **vectors) -> None:
    for name, vector in vectors.items():
        if jnp.ndim(vector) != 1:
            raise ValueError(f"{name} must have shape [M], got {jnp.shape(vector)}")
    if not 1 <= n_min <= n_max:
        raise ValueError(f"need 1 <= n_min <= n_max, got n_min={n_min}, n_max={n_max}")
