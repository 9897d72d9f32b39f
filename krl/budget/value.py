"""What a rollout is worth: from success rates, or beliefs about them, to marginal gains.

A prompt with success probability p and N rollouts of 0/1 rewards has a non-zero group-relative
gradient with probability 1 - p^N - (1-p)^N. Its value is that probability times the information
gained from it (Li et al., "Knapsack RL", arXiv 2509.25849, section 3):

    V(N, p) = p (1-p)^2 (1 - p^N - (1-p)^N)

The gain of one rollout more, V(n+1, p) - V(n, p) = p (1-p)^2 (p^n (1-p) + (1-p)^n p), falls strictly
in n for 0 < p < 1, so V is concave in N and the largest gains are the optimal ones to take. Gains
are kept as logarithms: in float32 the plain ones underflow long before n = 128.

Other estimators learn differently from the same rollouts. Let one logit decide whether a rollout
succeeds, so that its score is r - p and the true gradient is v = p (1-p). A step of the best size along
an estimate g is sure to improve a smooth objective by v^2 E[g]^2 / E[g^2] times a constant, whatever g's
scale, and one along the true gradient by v^2 times that constant. The share that noise leaves is

    rho_N = E[g]^2 / E[g^2]    in [0, 1],

and a group's value is p (1-p)^2 rho_N. `rloo_value`, `reinforce_value` and `continuous_value` are that for
their estimators. For rare successes the first two are p N p / (1 + N p), where the paper's is
p (1 - exp(-N p)): the same beginning and end.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from krl.base.masked import divide
from krl.base.sharding import readable

Bound = int | np.ndarray | jax.Array  # one number of rollouts for all prompts, or [M] of them
Value = Callable[[jax.Array, jax.Array], jax.Array]  # (p, n) -> value, broadcasting
_State = tuple[jax.Array, jax.Array, jax.Array]  # of a scan over rollouts


def grpo_value(p: jax.Array, n: jax.Array) -> jax.Array:
    """V(n, p), the value of giving n rollouts to a prompt of success rate p; shapes broadcast.

    Args:
        p: [...] float, success rates in [0, 1].
        n: [...] int or float, rollouts.

    Returns:
        [...] float32, dimensionless. It is 0 of one rollout, which has nothing to be compared with, and below 0 of
        none: gains of single rollouts begin at n = 1.

    References:
        Li et al., "Knapsack RL", arXiv 2509.25849.

    >>> float(grpo_value(0.5, 2))
    0.0625
    """
    p, n = jnp.asarray(p, jnp.float32), jnp.asarray(n, jnp.float32)
    rarer = jnp.minimum(p, 1 - p)  # expm1 and log1p keep the digits that 1 - p^n - (1-p)^n cancels
    mixed = -jnp.expm1(n * jnp.log1p(-rarer)) - rarer**n
    return p * (1 - p) ** 2 * mixed


def rloo_value(p: jax.Array, n: jax.Array) -> jax.Array:
    """The value of n rollouts under the leave-one-out estimator, and under Dr. GRPO.

    RLOO's estimate of the gradient is the sample variance s^2 of the rewards (N - 1 in the denominator):
    it is unbiased, and Var[s^2] = (m4 - v^2 (N-3)/(N-1)) / N with the fourth central moment
    m4 = v (1 - 3v) of a 0/1 reward of variance v = p (1-p). Hence

        rho_N = v / (v + (1 - 4v + 2v/(N-1)) / N).

    Dr. GRPO leaves the standard deviation out and averages over N: (N-1)/N times RLOO's estimate. rho
    does not see a scale, so both have this value.

    Args:
        p: [...] float, success rates in [0, 1].
        n: [...] int or float, rollouts; one rollout has no other to compare with and is worth 0.

    Returns:
        [...] float32, dimensionless.

    References:
        Ahmadian et al., "Back to Basics", arXiv 2402.14740; Liu et al., "Dr. GRPO", arXiv 2503.20783.

    >>> float(rloo_value(0.5, 2))
    0.0625
    """
    p, n = jnp.asarray(p, jnp.float32), jnp.asarray(n, jnp.float32)
    variance = p * (1 - p)
    noise = divide(1 - 4 * variance + divide(2 * variance, n - 1), n)
    return jnp.where(n > 1, divide(variance, variance + noise), 0.0) * variance * (1 - p)


def reinforce_value(p: jax.Array, n: jax.Array) -> jax.Array:
    """The value of n rollouts under REINFORCE without a baseline.

    The estimate is the mean of r (r - p) over the group: unbiased, of variance (1-p)^2 v / N with
    v = p (1-p), so that rho_N = N p / (N p + 1 - p). A single rollout already teaches.

    Args:
        p: [...] float, success rates in [0, 1].
        n: [...] int or float, rollouts.

    Returns:
        [...] float32, dimensionless.

    References:
        Williams, "Simple statistical gradient-following algorithms", Machine Learning 8, 1992.

    >>> float(reinforce_value(0.5, 1))
    0.0625
    """
    p, n = jnp.asarray(p, jnp.float32), jnp.asarray(n, jnp.float32)
    return divide(n * p, n * p + 1 - p) * p * (1 - p) ** 2


def continuous_value(mean: jax.Array, variance: jax.Array, n: jax.Array) -> jax.Array:
    """The value of n rollouts whose rewards are any numbers in [0, 1].

    For 0/1 rewards p (1-p)^2 is the variance of the reward times the room above its mean, and that is
    what any bounded reward offers. The estimate is the sample variance again. With the fourth moment of a
    normal distribution, m4 = 3 v^2, its own variance is 2 v^2 / (N - 1), so rho_N = (N-1) / (N+1): groups of
    continuous rewards are never even, and the first rollouts are worth most.

    Args:
        mean: [...] float, mean rewards in [0, 1].
        variance: [...] float >= 0, variances of the reward.
        n: [...] int or float, rollouts; one is worth 0.

    Returns:
        [...] float32, in units of squared reward.

    >>> round(float(continuous_value(0.5, 0.25, 3)), 6)
    0.0625
    """
    mean, variance, n = (jnp.asarray(array, jnp.float32) for array in (mean, variance, n))
    return variance * (1 - mean) * divide(jnp.maximum(n - 1, 0), n + 1)


def log_gains(p: jax.Array, n_min: Bound, n_max: Bound, *, columns: int | None = None) -> jax.Array:
    """Logarithm of the gain of the rollouts n_min + 1 .. n_max of each prompt.

    Args:
        p: [M] float, success rates in [0, 1].
        n_min, n_max: the fewest and the most rollouts, ints or [M] int arrays.
        columns: J, static. By default the largest n_max less the smallest n_min; name it where the bounds
            are traced. Rows with less room have gains beyond their n_max: give `knapsack` the bounds too.

    Returns:
        [M, J] float32; column j of row i holds log(V(n + 1, p_i) - V(n, p_i)) at n = n_min_i + j. Rows do
        not rise; a prompt with p = 0 or p = 1 has nothing to gain, -inf.

    Raises:
        ValueError: p is not of rank 1, not 1 <= n_min <= n_max, or no columns for traced bounds.
    """
    n = _rollouts(n_min, n_max, columns, p=p)
    return jax.lax.cummin(log_gain(jnp.asarray(p, jnp.float32)[:, None], n), axis=1)


def log_gain(p: jax.Array, n: jax.Array) -> jax.Array:
    """Logarithm of the gain of one rollout, V(n + 1, p) - V(n, p); shapes broadcast.

    Args:
        p: [...] float32, success rates in [0, 1].
        n: [...] float32, rollouts before this one.

    Returns:
        [...] float32, -inf at p = 0 and p = 1.
    """
    log_p, log_q = jnp.log(p), jnp.log1p(-p)
    gain = log_p + 2 * log_q + jnp.logaddexp(n * log_p + log_q, n * log_q + log_p)
    return jnp.where((p <= 0) | (p >= 1), -jnp.inf, gain)


def log_gains_beta(
    alpha: jax.Array,
    beta: jax.Array,
    n_min: Bound,
    n_max: Bound,
    *,
    columns: int | None = None,
    powers: tuple[int, int] = (1, 2),
) -> jax.Array:
    """Logarithm of the expected gain of each further rollout when p ~ Beta(alpha, beta).

    The expectation of p^i (1-p)^k (p^n (1-p) + (1-p)^n p) has a closed form,

        E[g(n)] = [B(a+i+n, b+k+1) + B(a+i+1, b+k+n)] / B(a, b),

    and as a mixture of functions that fall in n it falls in n too. The paper's value is i = 1, k = 2. With i = 0 and
    k = 1 a mixed group moves the logit of p by as much everywhere, and so log p by 1 - p as much. The ratios of Beta
    functions are products of plain fractions: Gamma functions would lose their digits for strong beliefs.

    Args:
        alpha, beta: [M] float > 0, the parameters of each prompt's belief.
        n_min, n_max, columns: as for `log_gains`.
        powers: i and k, static, whole numbers >= 0.

    Returns:
        [M, J] float32, finite; column j of row i is the gain of rollout n_min_i + j + 1.

    Raises:
        ValueError: alpha or beta is not of rank 1, powers that are not whole and >= 0, or bounds as for `log_gains`.
    """
    n = _rollouts(n_min, n_max, columns, alpha=alpha, beta=beta)
    if not all(isinstance(power, int) and power >= 0 for power in powers):
        raise ValueError(f"powers must be whole numbers of at least 0, got {powers}; `gains_of` takes any value")
    a, b = jnp.asarray(alpha, jnp.float32), jnp.asarray(beta, jnp.float32)
    if a.shape != b.shape:
        raise ValueError(f"alpha and beta must both have shape [M], got {a.shape} and {b.shape}")
    i, k = powers
    total = _log_rising(a + b, i + k + 1)
    won = _log_rising(a, i) + _log_rising(b, k + 1) - total  # at n = 0
    lost = _log_rising(a, i + 1) + _log_rising(b, k) - total

    def one_more(won: jax.Array, lost: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        """From n to n + 1 by B(x+1, y) = B(x, y) x / (x+y)."""
        total = a + b + n + i + k + 1
        return won + jnp.log(divide(a + n + i, total)), lost + jnp.log(divide(b + n + k, total))

    def before_first(n: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        won, lost = one_more(*state, n)
        return jnp.where(n < first, won, state[0]), jnp.where(n < first, lost, state[1])

    def column(state: _State, offset: jax.Array) -> tuple[_State, jax.Array]:
        won_since, lost_since, lowest = state  # from 0, so that small steps are not lost in a large sum
        # Rounding must not make a row rise.
        gain = jnp.minimum(lowest, jnp.logaddexp(won + won_since, lost + lost_since))
        return (*one_more(won_since, lost_since, first + offset), gain), gain

    first = n[:, 0] if n.shape[1] else jnp.zeros(1)
    won, lost = jax.lax.fori_loop(0, first.max(initial=0).astype(jnp.int32), before_first, (won, lost))
    start = jnp.zeros_like(won), jnp.zeros_like(won), jnp.full_like(won, jnp.inf)
    return jax.lax.scan(column, start, jnp.arange(n.shape[1], dtype=jnp.float32))[1].T


def _log_rising(x: jax.Array, times: int) -> jax.Array:
    """log of x (x+1) ... (x+times-1)."""
    return sum((jnp.log(x + j) for j in range(times)), jnp.zeros_like(x))


def gains_of(value: Value, p: jax.Array, n_min: Bound, n_max: Bound, *, columns: int | None = None) -> jax.Array:
    """Logarithms of the marginal gains of any value function, for a knapsack of your own.

    Args:
        value: (p, n) -> value, for arrays that broadcast; it must rise in n ever more slowly. `knapsack`
            refuses a table whose gains rise; `max_plus_dp` takes any values.
        p: [M] float, what is known of each prompt; it goes to `value` as [M, 1].
        n_min, n_max, columns: as for `log_gains`.

    Returns:
        [M, J] float32; column j of row i is log(value(p_i, n + 1) - value(p_i, n)) at n = n_min_i + j, and
        -inf where nothing is gained, or something lost.

    >>> [round(float(gain), 2) for gain in gains_of(lambda p, n: p * jnp.sqrt(n), jnp.array([1.0]), 1, 4)[0]]
    [-0.88, -1.15, -1.32]
    """
    n = _rollouts(n_min, n_max, columns, least=0, p=p)
    p = jnp.asarray(p, jnp.float32)[:, None]
    shape = (p.shape[0], n.shape[1])
    after = jnp.broadcast_to(value(p, n + 1), shape)
    gain = after - jnp.broadcast_to(value(p, n), shape)
    falling = jax.lax.cummin(gain, axis=1)
    # Rounding makes flat stretches wiggle, by as much as it does in the largest value, since 1 - (1 - p)^n may be small
    # and is computed from numbers near 1. A rise beyond that is the function's own and is left to be seen.
    rounding = 8 * np.finfo(np.float32).eps * jnp.abs(after).max(initial=0.0)
    gain = jnp.where((gain > falling + rounding).any(axis=1, keepdims=True), gain, falling)
    return jnp.where(gain <= 0, -jnp.inf, jnp.log(jnp.where(gain <= 0, 1.0, gain)))


def _rollouts(n_min: Bound, n_max: Bound, columns: int | None, least: int = 1, **vectors: jax.Array) -> jax.Array:
    """[M or 1, J] float32: how many rollouts a prompt has before the one of each column."""
    for name, vector in vectors.items():
        if jnp.ndim(vector) != 1:
            raise ValueError(f"{name} must have shape [M], got {jnp.shape(vector)}")
    check_bounds(n_min, n_max, len(next(iter(vectors.values()))), least)
    if columns is None:
        if isinstance(n_min, jax.core.Tracer) or isinstance(n_max, jax.core.Tracer):
            raise ValueError("n_min or n_max is traced, so the width of the table is unknown; name columns")
        highest = np.max(np.asarray(n_max), initial=0)
        columns = int(highest - np.min(np.asarray(n_min), initial=highest))
    first = jnp.asarray(n_min, jnp.float32).reshape(-1, 1)
    return first + jnp.arange(columns, dtype=jnp.float32)[None, :]


def check_bounds(n_min: Bound, n_max: Bound, prompts: int, least: int) -> None:
    """Refuse bounds that are not one number or [M], or, where they are known, not least <= n_min <= n_max."""
    for name, bound in (("n_min", n_min), ("n_max", n_max)):
        if jnp.shape(bound) not in ((), (prompts,)):
            raise ValueError(f"{name} must be one number or have shape [M] = [{prompts}], got {jnp.shape(bound)}")
    if readable(n_min, n_max) and (np.any(np.asarray(n_min) < least) or np.any(np.asarray(n_min) > np.asarray(n_max))):
        raise ValueError(f"need {least} <= n_min <= n_max, got n_min={n_min}, n_max={n_max}")
