"""krl: GRPO with knapsack rollout budgets, in JAX.

The rooms: `krl.budget` (how many rollouts each prompt gets), `krl.rollout` (sampling them), `krl.learn` (rewards to
gradients), `krl.policy` (the language model), `krl.tasks` (prompts), `krl.rewards`, `krl.hf` (checkpoints of Hugging
Face), `krl.run` (devices, disk, screen); and `krl.train(config, workdir)` is a run. docs/architecture.md shows how a
step goes through them.
"""

import importlib
from typing import TYPE_CHECKING

from krl import _moved
from krl._version import __version__

if TYPE_CHECKING:
    from krl import budget, hf, learn, policy, rewards, rollout, tasks
    from krl.train import train

__all__ = ["__version__", "budget", "hf", "learn", "policy", "rewards", "rollout", "tasks", "train"]


def __getattr__(name: str):
    """A room, or a run, when it is first asked for: processes that check rewards need `krl.rewards` and load no jax."""
    if name in __all__:
        return importlib.import_module(f"krl.{name}")
    return _moved.attribute(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
