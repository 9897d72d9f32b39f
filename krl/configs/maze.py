"""Knapsack-GRPO on the embedded mazes, about three minutes on one CPU core after the warm start.

    python train.py --config configs/maze.py --workdir runs/maze
    python train.py --config configs/maze.py --workdir runs/uniform --config.alloc.rule=uniform

The policy saw too few mazes to find its way through all of them: most of those whose path goes right and down alone it
can solve, longer ones rarely. With few rollouts it gives the longer ones up before it has learnt from a success.
"""

from ml_collections import ConfigDict

from krl.configs import default


def get_config() -> ConfigDict:
    """Differences from the default configuration."""
    config = default.get_config()
    config.data.source = "maze"
    config.steps = 200
    config.prompts_per_step = 32
    config.alloc.budget = 256
    config.alloc.rule = "knapsack_log"  # rare successes are what this task is about
    config.maze.side = 5
    config.data.max_prompt_tokens = 26  # a digit for each of 25 cells, "="
    config.sample.max_new_tokens = 25  # of at most 24 moves and the end
    config.tokenizer.vocab_size = 13  # every character is a piece of its own
    config.sft.steps = 400  # about a fifth of the held-out samples are right then
    config.loss.kl_coefficient = 0.02
    config.optim.learning_rate = 5e-4  # at 1.2e-3 held-out accuracy falls as often as it rises
    config.optim.decay_steps = 0
    config.optim.updates_per_step = 1
    config.optim.micro_tokens = 512
    config.eval.prompts = 1024
    config.eval.samples = 2
    config.eval.temperature = 1.0
    return config
