"""Group-relative advantages over ragged groups, by segment sums."""

import math

import jax
import jax.numpy as jnp

from krl.masked import divide, segment_differs, segment_moments, segment_sum


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
    epsilon: float = 1e-6,
    clip: float = math.inf,
) -> jax.Array:
    """How much better each rollout did than its prompt's others.

        A_j = (r_j - mean) / (std + epsilon)

    over the N rollouts of the same prompt, with the sample standard deviation (N - 1 in the
    denominator), as the common implementations have it. Groups may have any sizes.

    Args:
        rewards: [R] float32.
        prompt_index: [R] int32 in [0, M), any value on padding rows.
        mask: [R] bool, False on padding rows.
        num_prompts: M, static.
        scale_by_std: False leaves out the division (Dr. GRPO, Liu et al., arXiv 2503.20783).
        epsilon: added to the standard deviation, in units of reward.
        clip: the largest size of an advantage.

    Returns:
        [R] float32: exactly 0 in groups whose rewards are all equal, in groups of one and on padding.

    Raises:
        ValueError: rewards, prompt_index and mask are not all of shape [R].

    References:
        Shao et al., "DeepSeekMath", arXiv 2402.03300, section 4.1.

    >>> group_advantages(jnp.array([1.0, 0.0, 1.0]), jnp.array([0, 0, 1]), jnp.ones(3, bool), 2).round(3).tolist()
    [0.7070000171661377, -0.7070000171661377, 0.0]
    """
    shapes = {jnp.shape(rewards), jnp.shape(prompt_index), jnp.shape(mask)}
    if len(shapes) != 1 or jnp.ndim(rewards) != 1:
        raise ValueError(f"rewards, prompt_index and mask must all have shape [R], got {sorted(shapes)}")
    rewards = jnp.where(mask, jnp.asarray(rewards, jnp.float32), 0.0)
    index = jnp.where(mask, prompt_index, num_prompts)
    count, mean, squares = segment_moments(rewards, index, num_prompts)
    advantages = rewards - jnp.append(mean, 0.0)[index]
    if scale_by_std:
        std = jnp.sqrt(divide(squares, count - 1))
        advantages = divide(advantages, jnp.append(std + epsilon, 1.0)[index])
    mixed = mixed_groups(rewards, index, mask, num_prompts)
    return jnp.where(jnp.append(mixed, False)[index], jnp.clip(advantages, -clip, clip), 0.0)


def weigh_prompts_alike(
    advantages: jax.Array, lengths: jax.Array, prompt_index: jax.Array, mask: jax.Array, num_prompts: int
) -> jax.Array:
    """Advantages with which every prompt has the same share of a loss that is averaged over all tokens.

        A_j (tokens of the step / M) / (tokens of j's prompt)

    A mean over all tokens gives a prompt the more weight the more rollouts it has, so that a budget changes what is
    maximised. With these weights it is the mean over prompts of each one's own token mean, whatever the
    counts: a budget then decides how well a prompt's gradient is known, and not how much it counts.

    Args:
        advantages: [R] float32.
        lengths: [R] int32, response tokens.
        prompt_index: [R] int32 in [0, M), any value on padding rows.
        mask: [R] bool, False on padding rows.
        num_prompts: M, static; prompts without a token take no share.

    Returns:
        [R] float32, 0 on padding rows.

    >>> weigh_prompts_alike(jnp.ones(3), jnp.array([5, 5, 5]), jnp.array([0, 0, 1]), jnp.ones(3, bool), 2).tolist()
    [0.75, 0.75, 1.5]
    """
    index = jnp.where(mask, prompt_index, num_prompts)
    tokens = segment_sum(jnp.where(mask, lengths, 0).astype(jnp.float32), index, num_prompts)
    share = divide(tokens.sum(), (tokens > 0).sum())
    return jnp.where(mask, advantages * jnp.append(divide(share, tokens), 0.0)[index], 0.0)
