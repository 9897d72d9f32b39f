"""How many rollouts each prompt gets: pure jnp, no model, no input or output."""

from krl.budget.allocate import PILOT_RULES, RULES, allocate, value_rule
from krl.budget.belief import (
    Belief,
    init_belief,
    mean,
    mean_tokens,
    merge,
    observe,
    posterior,
    prior_by_moments,
    reward_variance,
    take,
    update,
    window_rate,
)
from krl.budget.explanation import explain
from krl.budget.prior import Prior, hash_features, inform, init_prior, learn_prior, number_groups
from krl.budget.simulate import Replay, logged_rates, replay, synthetic_rates
from krl.budget.solve import knapsack, knapsack_cost, knapsack_large, max_plus_dp, price
from krl.budget.value import (
    continuous_value,
    gains_of,
    grpo_value,
    log_gain,
    log_gains,
    log_gains_beta,
    reinforce_value,
    rloo_value,
)

__all__ = [
    "PILOT_RULES",
    "RULES",
    "Belief",
    "Prior",
    "Replay",
    "allocate",
    "continuous_value",
    "explain",
    "gains_of",
    "grpo_value",
    "hash_features",
    "inform",
    "init_belief",
    "init_prior",
    "knapsack",
    "knapsack_cost",
    "knapsack_large",
    "learn_prior",
    "log_gain",
    "log_gains",
    "log_gains_beta",
    "logged_rates",
    "max_plus_dp",
    "mean",
    "mean_tokens",
    "merge",
    "number_groups",
    "observe",
    "posterior",
    "price",
    "prior_by_moments",
    "reinforce_value",
    "replay",
    "reward_variance",
    "rloo_value",
    "synthetic_rates",
    "take",
    "update",
    "value_rule",
    "window_rate",
]
