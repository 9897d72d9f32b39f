"""Train a policy with Knapsack-GRPO, from scratch or from a Hugging Face checkpoint.

    python train.py --config configs/arithmetic.py --workdir runs/arithmetic [--config.key=value ...]
    python train.py --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --workdir runs/qwen

The same command continues a run from its last checkpoint. krl/train.py is the program; where krl is installed,
krl-train is this command.
"""

from krl.train import run_command, take_step, train

__all__ = ["take_step", "train"]

if __name__ == "__main__":
    run_command()
