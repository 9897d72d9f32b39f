"""Knapsack-GRPO on the embedded operators, a minute or two on two CPU cores after the warm start.

    python train.py --config configs/operators.py --workdir runs/operators
    python train.py --config configs/operators.py --workdir runs/uniform --config.alloc.rule=uniform

The policy can execute eight string functions and must find out by trial which one each of 52 letters means.
`make demo` trains it with uniform budgets, four times as many of them, and with prompts that are chosen.
"""

from ml_collections import ConfigDict

from krl.configs import default


def get_config() -> ConfigDict:
    """Differences from the default configuration."""
    config = default.get_config()
    config.data.source = "operators"
    config.steps = 400
    config.alloc.budget = 256
    config.alloc.candidates = 128
    config.data.max_prompt_tokens = 6  # a letter, four digits, "="
    config.sample.max_new_tokens = 5  # four digits and the end
    config.tokenizer.vocab_size = 68  # every character is a piece of its own
    config.sft.steps = 2500
    config.loss.kl_coefficient = 0.02  # without it operators are given up before they are found, whatever the budgets
    config.optim.learning_rate = 1.2e-3
    config.optim.decay_steps = 0
    config.optim.updates_per_step = 1
    config.optim.micro_tokens = 512  # on a CPU a quarter faster than 1024, most of whose last part is empty
    config.eval.prompts = 2048
    config.eval.samples = 2
    config.eval.temperature = 1.0
    return config
