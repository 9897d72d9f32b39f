"""From rewards to gradients: pure jnp, no model, no input or output."""

from krl.learn.advantage import AVERAGES, SCALES, fit_float32, group_advantages, mixed_groups, token_weights
from krl.learn.loss import KL_ESTIMATORS, SURROGATES, Loss, overlong_penalty, policy_loss

__all__ = [
    "AVERAGES",
    "KL_ESTIMATORS",
    "SCALES",
    "SURROGATES",
    "Loss",
    "fit_float32",
    "group_advantages",
    "mixed_groups",
    "overlong_penalty",
    "policy_loss",
    "token_weights",
]
