"""krl: GRPO with knapsack rollout budgets, in JAX.

The rooms: `krl.budget` (how many rollouts each prompt gets), `krl.rollout` (sampling them),
`krl.learn` (rewards to gradients), `krl.policy` (the language model), `krl.tasks` (prompts and
rewards), `krl.run` (devices, disk, screen). docs/architecture.md shows how a step goes through them.
"""

from krl import budget, learn, policy, rollout, tasks
from krl._version import __version__

__all__ = ["__version__", "budget", "learn", "policy", "rollout", "tasks"]
