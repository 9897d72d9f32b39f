"""The clipped policy-gradient surrogate."""

import jax
import jax.numpy as jnp

from krl.masked import masked_sum


def policy_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    sampler_logps: jax.Array | None = None,
    importance_cap: float = 2.0,
    reference_logps: jax.Array | None = None,
    kl_coefficient: float = 0.0,
) -> tuple[tuple[jax.Array, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]:
    """PPO's clipped surrogate for every token, with an asymmetric clip and a dual clip.

    With the ratio w = exp(logp - old_logp) and the advantage A of the token's rollout, a token's loss is

        -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A),    and at most  dual_clip |A|  where A < 0.

    Where the sampler computes other log-probabilities than the learner for the same parameters, each
    token's loss is multiplied by min(exp(old_logp - sampler_logp), importance_cap), before any sum. A
    coefficient above 0 adds kl_coefficient (e^d - d - 1), d = reference_logp - logp, to every token.

    Args:
        logps: [B, T] float32, nats, of the policy being trained; gradients flow through it.
        old_logps: [B, T] float32, nats, of the policy that sampled, as the learner computes them.
        advantages: [B] float32.
        mask: [B, T] bool, True on response tokens.
        clip_low, clip_high: how far the ratio may move below and above 1.
        dual_clip: bound on the ratio that counts against a bad rollout, > 1.
        sampler_logps: [B, T] float32, nats, as the sampler computed them; None if old_logps are those.
        importance_cap: the largest weight of a token for the difference, > 0.
        reference_logps: [B, T] float32, nats, of the policy to stay close to; None without a penalty.
        kl_coefficient: weight of that penalty, per nat.

    Returns:
        ((loss sum, token count), metrics): metrics map a name to a (sum, count) pair; `ratio_max` is a
        (maximum, count) pair.

    Raises:
        ValueError: shapes that do not fit together.

    References:
        Schulman et al., "PPO", arXiv 1707.06347, equation 7; Yu et al., "DAPO", arXiv 2503.14476,
        equation 8 (asymmetric clip); Ye et al., arXiv 1912.09729, section 3.4 (dual clip); Yao et al., "Your
        efficient RL framework secretly brings you off-policy RL training", 2025 (truncated importance
        weight); Schulman, "Approximating KL divergence", 2020 (the estimator "k3").
    """
    if not logps.ndim == 2 or not logps.shape == old_logps.shape == mask.shape or advantages.shape != logps.shape[:1]:
        raise ValueError(
            "logps, old_logps and mask must be [B, T] and advantages [B], got "
            f"{logps.shape}, {old_logps.shape}, {mask.shape} and {advantages.shape}"
        )
    # Beyond exp(20) a ratio carries no information; the bound keeps inf out of 0 * inf gradients.
    ratio = jnp.exp(jnp.clip(jnp.where(mask, logps - old_logps, 0.0), -20.0, 20.0))
    advantage = advantages[:, None]
    clipped_ratio = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = jnp.maximum(-ratio * advantage, -clipped_ratio * advantage)
    loss = jnp.where(advantage < 0, jnp.minimum(loss, -dual_clip * advantage), loss)
    active = mask & (advantage != 0)
    metrics = {}
    if sampler_logps is not None:
        apart = jnp.where(mask, jax.lax.stop_gradient(old_logps) - sampler_logps, 0.0)
        weight = jnp.exp(jnp.clip(apart, -20.0, 20.0))
        loss = loss * jnp.minimum(weight, importance_cap)
        metrics["importance_mean"] = masked_sum(jnp.minimum(weight, importance_cap), active)
        metrics["importance_capped_fraction"] = masked_sum(weight > importance_cap, active)
    if reference_logps is not None:
        behind = jnp.clip(jnp.where(mask, reference_logps - logps, 0.0), -20.0, 20.0)
        divergence = jnp.exp(behind) - behind - 1
        loss = loss + kl_coefficient * divergence
        metrics["kl"] = masked_sum(divergence, mask)
    metrics |= _ratio_metrics(ratio, advantage, active, clip_low, clip_high, dual_clip)
    return masked_sum(loss, mask), metrics


def _ratio_metrics(ratio, advantage, active, clip_low, clip_high, dual_clip):
    """(sum, count) pairs of the ratios [B, T] where active [B, T], given the advantages [B, 1]; see docs/metrics.md."""
    return {
        "clip_low_fraction": masked_sum((ratio < 1 - clip_low) & (advantage < 0), active),
        "clip_high_fraction": masked_sum((ratio > 1 + clip_high) & (advantage > 0), active),
        "dual_clip_fraction": masked_sum((ratio > dual_clip) & (advantage < 0), active),
        "ratio_mean": masked_sum(ratio, active),
        "ratio_max": (jnp.where(active, ratio, 0.0).max(initial=0.0), active.sum(dtype=jnp.float32)),
    }
