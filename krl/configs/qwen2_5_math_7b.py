"""Qwen2.5-Math-7B on DAPO-Math-17k with the settings of Knapsack RL (arXiv 2509.25849, section 5).

    python train.py --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --workdir runs/qwen2_5_math_7b
    python eval.py --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --workdir runs/base

DIR is the checkpoint's directory. The second line prints the table of benchmarks for the checkpoint
itself; with a run's work directory it does so for the run. The mesh is one machine of eight accelerators.
"""

from ml_collections import ConfigDict

from krl.configs import default


def get_config() -> ConfigDict:
    """What differs from the default."""
    config = default.get_config()
    config.steps = 1000
    config.prompts_per_step = 256
    config.alloc.rule = "knapsack_paper"  # as published, with its window of 16 and minimum of 8; "knapsack" is krl's
    config.alloc.budget = 2048  # 8 rollouts a prompt
    config.alloc.n_min = 2
    config.alloc.n_max = 128

    config.data.source = "dataset"
    config.data.name = "dapo"
    config.data.reward = "math"
    config.data.template = "chat_boxed"
    config.data.max_prompt_tokens = 2048
    config.sample.max_new_tokens = 4096
    config.sample.temperature = 1.0
    config.sample.memory_gb = 12.0  # of a device's 80: 272 slots
    config.verify.workers = 16

    config.policy.dtype = "bfloat16"
    config.policy.remat = "full"
    config.policy.unroll = 1
    config.sft.steps = 0
    config.mesh.shape = (8,)
    config.mesh.axis_names = ("fsdp",)

    config.loss.average = "tokens"  # as published
    config.loss.advantage_clip = 5.0
    config.loss.importance_cap = 2.0
    config.optim.learning_rate = 1e-6
    config.optim.warmup_steps = 0
    config.optim.decay_steps = 0
    config.optim.beta2 = 0.999
    config.optim.updates_per_step = 8  # of 256 rollouts each
    config.optim.micro_tokens = 98304  # 16 rows

    config.eval.every = 0  # eval.py measures checkpoints
    config.eval.prompts = 0
    config.eval.sets = "aime,amc,math500,minerva,olympiad_bench,gpqa"
    config.checkpoint.every = 50
    return config
