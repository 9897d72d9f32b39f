"""Knapsack-GRPO on the embedded arithmetic ladder, a few minutes on two CPU cores.

    python train.py --config configs/arithmetic.py --workdir runs/arithmetic
    python train.py --config configs/arithmetic.py --workdir runs/uniform --config.alloc.rule=uniform

docs/results.md compares rules on it over three seeds: rollouts are not what limits it.
"""

from ml_collections import ConfigDict

from krl.configs import default


def get_config() -> ConfigDict:
    """The default configuration is this run, but for how it is evaluated."""
    config = default.get_config()
    config.eval.samples = 8
    config.eval.temperature = 1.0
    return config
