"""Group-relative advantages over ragged groups, by segment sums."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ops import segment_sum

from krl.base.masked import divide, segment_differs, segment_moments

ROUNDED = 1e-4  # most that float32 may round a reward, in parts of the distance between its group's best and worst
SCALES = ("std", "none", "mean")  # what the advantages of a prompt are divided by
EPSILON = 1e-6  # added to a standard deviation before it divides, in units of reward
LARGEST = 1e30  # most that a reward may differ from the middle of a group that is moved and scaled


def mixed_groups(rewards: jax.Array, prompt_index: jax.Array, mask: jax.Array, num_prompts: int) -> jax.Array:
    """Which prompts saw rewards that differ: the only groups with a gradient.

    Args:
        rewards: [R] float32.
        prompt_index: [R] int32 in [0, M), any value on padding rows.
        mask: [R] bool, False on padding rows.
        num_prompts: M, static.

    Returns:
        [M] bool; False for a prompt without rollouts.
    """
    return segment_differs(rewards, jnp.where(mask, prompt_index, num_prompts), num_prompts)


def group_advantages(
    rewards: jax.Array,
    prompt_index: jax.Array,
    mask: jax.Array,
    num_prompts: int,
    *,
    scale_by_std: bool = True,
    scale_by_mean: bool = False,
    leave_one_out: bool = False,
    clip: float = math.inf,
) -> jax.Array:
    """How much better each rollout did than its prompt's others (Shao et al., arXiv 2402.03300, section 4.1).

        A_j = (r_j - mean) / (std + 1e-6)

    over the N rollouts of the same prompt, with the sample standard deviation (N - 1 in the denominator), as the common
    implementations have it. Groups may have any sizes, and rewards any that float32 has.

    Args:
        rewards: [R] float32; see `fit_float32` for those of a wider range.
        prompt_index: [R] int32 in [0, M), any value on rows outside the mask.
        mask: [R] bool, False on padding rows and on rollouts without a reward, which change nothing for the others.
        num_prompts: M, static.
        scale_by_std: False leaves out the division (Dr. GRPO, Liu et al., arXiv 2503.20783).
        scale_by_mean: instead divide by the mean of the prompt's rewards, which must not be negative: of rewards of 0
            and 1 that is the gradient of log p, in which rare successes count as much as common ones (MaxRL, arXiv
            2602.02710).
        leave_one_out: compare a rollout with the mean of the others alone, which makes r_j - mean larger by N / (N - 1)
            (Ahmadian et al., arXiv 2402.14740, section 2.2).
        clip: the largest size of an advantage.

    Returns:
        [R] float32: exactly 0 in groups whose rewards are all equal, in groups of one and outside the mask.

    Raises:
        ValueError: rewards, prompt_index and mask are not all of shape [R].

    >>> group_advantages(jnp.array([1.0, 0.0, 1.0]), jnp.array([0, 0, 1]), jnp.ones(3, bool), 2).round(3).tolist()
    [0.7070000171661377, -0.7070000171661377, 0.0]
    """
    shapes = {jnp.shape(rewards), jnp.shape(prompt_index), jnp.shape(mask)}
    if len(shapes) != 1 or jnp.ndim(rewards) != 1:
        raise ValueError(f"rewards, prompt_index and mask must all have shape [R], got {sorted(shapes)}")
    rewards = jnp.where(mask, jnp.asarray(rewards, jnp.float32), 0.0)
    index = jnp.where(mask, prompt_index, num_prompts)
    above, unit = _above_the_worst(rewards, index, num_prompts)
    count, mean, squares = segment_moments(above, index, num_prompts)
    advantages = above - jnp.append(mean, 0.0)[index]
    if leave_one_out:
        advantages = advantages * jnp.append(divide(count, count - 1), 0.0)[index]
    if scale_by_mean:
        reward = segment_moments(rewards / unit[index], index, num_prompts)[1]
        advantages = divide(advantages, jnp.append(reward, 1.0)[index])
    elif scale_by_std:
        std = jnp.sqrt(divide(squares, count - 1))
        advantages = divide(advantages, (jnp.append(std, 1.0) + EPSILON / unit)[index])
    else:
        advantages = advantages * unit[index]
    mixed = mixed_groups(rewards, index, mask, num_prompts)
    return jnp.where(jnp.append(mixed, False)[index], jnp.clip(advantages, -clip, clip), 0.0)


def _above_the_worst(rewards: jax.Array, index: jax.Array, num_prompts: int) -> tuple[jax.Array, jax.Array]:
    """How far each reward is above its group's worst, [R] in 0..4, and the unit of that, [M + 1], a power of two.

    Dividing by a power of two changes no digit, and of such numbers neither squares nor sums leave float32.
    """
    largest = jax.ops.segment_max(jnp.abs(rewards), index, num_segments=num_prompts + 1)
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32) & jnp.int32(0x7F800000)  # of a float32 its exponent alone
    unit = jax.lax.bitcast_convert_type(bits, jnp.float32)
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1.0)
    worst = jax.ops.segment_min(rewards, index, num_segments=num_prompts + 1) / unit
    return rewards / unit[index] - worst[index], unit


def fit_float32(rewards: np.ndarray, prompt_index: np.ndarray, mask: np.ndarray, *, summed: bool = False) -> np.ndarray:
    """Rewards as float32 from which the advantages are right, also where float32 cannot hold what differs; on the host.

    A group that float32 holds well enough is as it is. One of 1e9 and 1e9 + 1, which would be equal, is moved to have
    its middle at 0, and one that reaches beyond float32 is scaled down besides: advantages are about differences. What
    differs in the last digits of float64 alone, as 0.1 + 0.2 and 0.3 do, was meant to be equal; whole numbers that were
    not added up are what they are.

    Args:
        rewards: [R] float64, finite.
        prompt_index: [R] int32, the group of each; any value outside the mask.
        mask: [R] bool, False on rows without a reward.
        summed: whether each is the sum of several.

    Returns:
        [R] float32, 0 outside the mask.

    >>> fit_float32(np.array([0.0, 0.1, 1e9, 1e9 + 1]), np.array([0, 0, 1, 1]), np.ones(4, bool)).round(1).tolist()
    [0.0, 0.10000000149011612, -0.5, 0.5]
    """
    rewards = np.where(mask, rewards, 0.0)
    with np.errstate(over="ignore"):  # beyond float32 it is infinite, and so is what it was rounded by
        rounded = np.abs(rewards.astype(np.float32) - rewards)
    most = np.finfo(np.float32).max
    fitted = rewards.clip(-most, most).astype(np.float32)
    if not mask.any() or not rounded.any():
        return fitted
    _, group = np.unique(np.where(mask, prompt_index, -1), return_inverse=True)
    size = int(group.max()) + 1
    best, worst, error = np.full(size, -np.inf), np.full(size, np.inf), np.zeros(size)
    np.maximum.at(best, group, rewards / 2)  # halves: the distance of two float64 may be beyond float64
    np.minimum.at(worst, group, rewards / 2)
    np.maximum.at(error, group, rounded)
    noise = 16 * np.finfo(np.float64).eps * np.maximum(np.abs(best), np.abs(worst))  # of sums that should be equal
    if not summed:
        broken = np.bincount(group, rewards != np.trunc(rewards), size)
        noise = np.where(broken > 0, noise, 0.0)
    moved = (error / 2 > ROUNDED * (best - worst)) & (best - worst > noise)
    unit = np.maximum((best - worst) / LARGEST, 1.0)
    differences = (rewards - (best + worst)[group]) / unit[group]
    return np.where(mask & moved[group], differences, fitted).astype(np.float32)


def token_weights(
    average: str,
    lengths: jax.Array,
    prompt_index: jax.Array,
    mask: jax.Array,
    num_prompts: int,
    max_tokens: int,
    chances: jax.Array | None = None,
) -> jax.Array:
    """What an advantage is to be multiplied by, so that a mean over all the tokens of a step is another mean.

    A mean over all tokens gives a prompt the more weight the more rollouts and tokens it has, so that a budget changes
    what is maximised. Surrogates are proportional to the advantage, so weights on it give these means of the token
    losses l, of R rollouts of M prompts:

        "tokens"     sum l / tokens of the step
        "sequences"  the mean over rollouts of each one's token mean
        "prompts"    the mean over prompts of each one's token mean, whatever its count: a budget then decides how
                     well a prompt's gradient is known, and not how much it counts
        "candidates" the same over all that the step chose its prompts from: a prompt that is served with probability c
                     counts for 1 / c of them, so that what is maximised is what uniform budgets maximise
        "constant"   sum l / (R T): a token counts the same in every step, and a long answer more than a short one

    Args:
        average: a key of AVERAGES.
        lengths: [R] int32, response tokens.
        prompt_index: [R] int32 in [0, M), any value on rows outside the mask.
        mask: [R] bool, False on padding rows and on rollouts without a reward, which take no share.
        num_prompts: M, static; prompts without a token take no share.
        max_tokens: T.
        chances: [M] float32 in (0, 1], the probability with which each prompt got any rollouts; for "candidates".

    Returns:
        [R] float32, 0 on padding rows.

    Raises:
        ValueError: an unknown average, or no chances for "candidates".

    References:
        Shao et al., arXiv 2402.03300, equation 3 ("sequences"); Yu et al., "DAPO", arXiv 2503.14476, equation 8
        ("tokens"); Liu et al., "Understanding R1-Zero-Like Training", arXiv 2503.20783, section 3.2 ("constant");
        Horvitz and Thompson, J. American Statistical Association 47, 1952 ("candidates", divided by the sum of its
        weights).

    >>> lengths, index, mask = jnp.array([5, 5, 5]), jnp.array([0, 0, 1]), jnp.ones(3, bool)
    >>> token_weights("prompts", lengths, index, mask, 2, 8).tolist()
    [0.75, 0.75, 1.5]
    """
    if average not in AVERAGES:
        raise ValueError(f"average {average!r} must be one of {sorted(AVERAGES)}")
    if average == "candidates" and chances is None:
        raise ValueError("the average 'candidates' needs the chances of the prompts")
    lengths = jnp.where(mask, lengths, 0).astype(jnp.float32)
    index = jnp.where(mask, prompt_index, num_prompts)
    share = AVERAGES[average](lengths, index, mask, num_prompts, max_tokens, chances)
    return jnp.where(mask, share * lengths.sum(), 0.0)


def _prompts_alike(lengths: jax.Array, index: jax.Array, mask: jax.Array, num_prompts: int, *_: Any) -> jax.Array:
    tokens = segment_sum(lengths, index, num_prompts)
    return jnp.append(divide(1.0, tokens * (tokens > 0).sum()), 0.0)[index]


def _candidates_alike(
    lengths: jax.Array, index: jax.Array, mask: jax.Array, num_prompts: int, max_tokens: int, chances: jax.Array
) -> jax.Array:
    tokens = segment_sum(lengths, index, num_prompts)
    stands_for = jnp.where(tokens > 0, divide(1.0, chances), 0.0)
    return jnp.append(divide(stands_for, tokens * stands_for.sum()), 0.0)[index]


AVERAGES: dict[str, Callable[..., jax.Array]] = {  # what a token of each rollout counts in a loss that is a sum, [R]
    "tokens": lambda lengths, *_: divide(1.0, lengths.sum()),
    "sequences": lambda lengths, index, mask, *_: divide(1.0, lengths * mask.sum()),
    "prompts": _prompts_alike,
    "candidates": _candidates_alike,
    "constant": lambda lengths, index, mask, num_prompts, max_tokens, *_: divide(1.0, mask.sum() * max_tokens),
}
