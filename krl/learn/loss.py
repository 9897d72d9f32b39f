"""The policy-gradient loss: PPO's clipped surrogate and its relatives.

Schulman et al., "PPO", arXiv 1707.06347, equation 7; Yu et al., "DAPO", arXiv 2503.14476, equation 8 (asymmetric clip);
Ye et al., arXiv 1912.09729, section 3.4 (dual clip); Zheng et al., "GSPO", arXiv 2507.18071, equations 5 and 7;
MiniMax, "MiniMax-M1", arXiv 2506.13585, equation 4 (CISPO); Yao et al., "Your efficient RL framework secretly brings
you off-policy RL training", 2025 (truncated importance weight); Schulman, "Approximating KL divergence", 2020 (the
estimators).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from krl.base.masked import divide, masked_sum

_FARTHEST = 20.0  # beyond exp(20) a ratio carries no information; the bound keeps inf out of 0 * inf gradients


class Loss(NamedTuple):
    """How the loss of a token follows from its ratio, `policy_loss`; the fields are keyword arguments of it."""

    surrogate: str = "ppo"  # a key of SURROGATES
    clip_low: float = 0.2  # how far the ratio may move below 1
    clip_high: float = 0.28  # and above 1
    dual_clip: float = 10.0  # bound on the ratio that counts against a bad rollout, > 1
    importance_cap: float = 2.0  # the largest weight of a token for what the sampler computed otherwise, > 0
    kl_coefficient: float = 0.0  # weight of the divergence from the reference, per nat
    kl_estimator: str = "k3"  # a key of KL_ESTIMATORS
    entropy_coefficient: float = 0.0  # weight of the bonus for entropy, per nat


def policy_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    sequences: jax.Array | None = None,
    sampler_logps: jax.Array | None = None,
    reference_logps: jax.Array | None = None,
    entropies: jax.Array | None = None,
    **options: Any,
) -> tuple[tuple[jax.Array, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]:
    """The loss of every token, by the ratio w = exp(logp - old_logp) and the advantage A of the token's rollout.

        "ppo"    -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A),   and at most  dual_clip |A|  where A < 0
        "gspo"   the same, with the geometric mean of its rollout's ratios in place of w
        "cispo"  -min(w, 1 + clip_high) A logp,   where the factor before logp has no gradient

    times `sampler_weight`, plus kl_coefficient times `divergence`, less entropy_coefficient times the entropy.

    Args:
        logps: [B, T] float32, nats, of the policy being trained; gradients flow through it.
        old_logps: [B, T] float32, nats, of the policy that sampled, as the learner computes them.
        advantages: [B] float32, or [B, T] where rows hold several rollouts.
        mask: [B, T] bool, True on response tokens.
        sequences: [B, T] int32 in [0, B T), the rollout of each token where rows hold several; None for one a row.
        sampler_logps: [B, T] float32, nats, as the sampler computed them; None if old_logps are those.
        reference_logps: [B, T] float32, nats, of the policy to stay close to; None without a penalty.
        entropies: [B, T] float32, nats, of the distributions that the tokens were drawn from; None without a bonus.
        options: the fields of `Loss`.

    Returns:
        ((loss sum, token count), metrics): (sum, count) pairs by name; `ratio_max` is a (maximum, count) pair.

    Raises:
        ValueError: shapes that do not fit together, or an unknown surrogate or estimator.
    """
    how = Loss(**options)
    _check(logps, old_logps, advantages, mask, how)
    advantage = advantages[:, None] if advantages.ndim == 1 else advantages
    log_ratio = jnp.where(mask, logps - old_logps, 0.0)
    if how.surrogate == "gspo":
        log_ratio = _sequence_mean(log_ratio, mask, sequences)
    ratio = jnp.exp(jnp.clip(log_ratio, -_FARTHEST, _FARTHEST))
    loss = SURROGATES[how.surrogate](ratio, jnp.where(mask, logps, 0.0), advantage, how)
    active = mask & (advantage != 0)
    metrics = _ratio_metrics(ratio, advantage, active, how)
    if sampler_logps is not None:
        weight = sampler_weight(jax.lax.stop_gradient(old_logps), sampler_logps, mask)
        loss = loss * jnp.minimum(weight, how.importance_cap)
        metrics["importance_mean"] = masked_sum(jnp.minimum(weight, how.importance_cap), active)
        metrics["importance_capped_fraction"] = masked_sum(weight > how.importance_cap, active)
    if reference_logps is not None:
        apart = divergence(logps, reference_logps, mask, how.kl_estimator)
        loss = loss + how.kl_coefficient * apart
        metrics["kl"] = masked_sum(apart, mask)
    if entropies is not None:
        loss = loss - how.entropy_coefficient * jnp.where(mask, entropies, 0.0)
    return masked_sum(loss, mask), metrics


def sampler_weight(old_logps: jax.Array, sampler_logps: jax.Array, mask: jax.Array) -> jax.Array:
    """exp(old_logp - sampler_logp), [B, T]: what a token counts, up to a cap, where the sampler computes otherwise.

    For the same parameters sampler and learner have other log-probabilities, by their kernels and precisions. The cap
    is put on each token's weight before any sum.
    """
    return jnp.exp(jnp.clip(jnp.where(mask, old_logps - sampler_logps, 0.0), -_FARTHEST, _FARTHEST))


def divergence(logps: jax.Array, reference_logps: jax.Array, mask: jax.Array, estimator: str) -> jax.Array:
    """An estimate of how far the policy is from the reference, [B, T] nats, by d = reference_logp - logp.

        "k1"  -d        "k2"  d^2 / 2        "k3"  e^d - d - 1

    In expectation the gradient of "k1" is zero, that of "k2" the divergence's.
    """
    behind = jnp.clip(jnp.where(mask, reference_logps - logps, 0.0), -_FARTHEST, _FARTHEST)
    return KL_ESTIMATORS[estimator](behind)


def _check(logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, mask: jax.Array, how: Loss) -> None:
    fits = advantages.shape in (logps.shape, logps.shape[:1])
    if not logps.ndim == 2 or not logps.shape == old_logps.shape == mask.shape or not fits:
        raise ValueError(
            "logps, old_logps and mask must be [B, T] and advantages [B] or [B, T], got "
            f"{logps.shape}, {old_logps.shape}, {mask.shape} and {advantages.shape}"
        )
    for name, known in (("surrogate", SURROGATES), ("kl_estimator", KL_ESTIMATORS)):
        if getattr(how, name) not in known:
            raise ValueError(f"{name} {getattr(how, name)!r} must be one of {sorted(known)}")


def _clipped(ratio: jax.Array, logps: jax.Array, advantage: jax.Array, how: Loss) -> jax.Array:
    clipped_ratio = jnp.clip(ratio, 1 - how.clip_low, 1 + how.clip_high)
    loss = jnp.maximum(-ratio * advantage, -clipped_ratio * advantage)
    return jnp.where(advantage < 0, jnp.minimum(loss, -how.dual_clip * advantage), loss)


def _weighted_likelihood(ratio: jax.Array, logps: jax.Array, advantage: jax.Array, how: Loss) -> jax.Array:
    return -jax.lax.stop_gradient(jnp.minimum(ratio, 1 + how.clip_high)) * advantage * logps


SURROGATES: dict[str, Callable[..., jax.Array]] = {"ppo": _clipped, "gspo": _clipped, "cispo": _weighted_likelihood}

KL_ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "k1": lambda behind: -behind,
    "k2": lambda behind: behind**2 / 2,
    "k3": lambda behind: jnp.exp(behind) - behind - 1,
}


def overlong_penalty(lengths: jax.Array, max_tokens: int, buffer: int) -> jax.Array:
    """What is taken off the reward of a response that comes close to the limit.

    Nothing up to max_tokens - buffer tokens, then rising linearly to 1 at max_tokens.

    Args:
        lengths: [R] int32, response tokens.
        max_tokens: T.
        buffer: tokens, 1 to T.

    Returns:
        [R] float32 in [0, 1].

    References:
        Yu et al., "DAPO", arXiv 2503.14476, equation 13 (soft overlong punishment).

    >>> overlong_penalty(jnp.array([5, 8, 9, 10]), 10, 2).tolist()
    [0.0, 0.0, 0.5, 1.0]
    """
    return jnp.clip((lengths - (max_tokens - buffer)) / buffer, 0.0, 1.0)


def _sequence_mean(values: jax.Array, mask: jax.Array, sequences: jax.Array | None) -> jax.Array:
    """Each token's rollout's mean over the tokens under a mask, [B, T]; 0 outside."""
    if sequences is None:
        sequences = jnp.broadcast_to(jnp.arange(values.shape[0])[:, None], values.shape)
    index, size = jnp.where(mask, sequences, values.size), values.size + 1
    total = jnp.zeros(size).at[index].add(jnp.where(mask, values, 0.0))
    count = jnp.zeros(size).at[index].add(mask.astype(jnp.float32))
    return jnp.where(mask, divide(total, count)[index], 0.0)


def _ratio_metrics(
    ratio: jax.Array, advantage: jax.Array, active: jax.Array, how: Loss
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(sum, count) pairs of the ratios [B, T] where active [B, T], given the advantages; see docs/metrics.md."""
    return {
        "clip_low_fraction": masked_sum((ratio < 1 - how.clip_low) & (advantage < 0), active),
        "clip_high_fraction": masked_sum((ratio > 1 + how.clip_high) & (advantage > 0), active),
        "dual_clip_fraction": masked_sum((ratio > how.dual_clip) & (advantage < 0), active),
        "ratio_mean": masked_sum(ratio, active),
        "ratio_max": (jnp.where(active, ratio, 0.0).max(initial=0.0), active.sum(dtype=jnp.float32)),
    }
