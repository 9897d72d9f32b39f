"""How many rollouts each prompt gets: pure jnp, no model, no input or output."""

from krl.budget.allocate import RULES, allocate, knapsack
from krl.budget.belief import Belief, fit_prior, init_belief, mean, posterior, take, update
from krl.budget.value import grpo_value, log_gains, log_gains_beta

__all__ = [
    "RULES",
    "Belief",
    "allocate",
    "fit_prior",
    "grpo_value",
    "init_belief",
    "knapsack",
    "log_gains",
    "log_gains_beta",
    "mean",
    "posterior",
    "take",
    "update",
]
