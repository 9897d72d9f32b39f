"""From rewards to gradients: pure jnp, no model, no input or output."""

from krl.learn.advantage import group_advantages, mixed_groups, weigh_prompts_alike
from krl.learn.loss import policy_loss

__all__ = ["group_advantages", "mixed_groups", "policy_loss", "weigh_prompts_alike"]
