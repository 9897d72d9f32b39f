"""GSM8K (Cobbe et al., arXiv 2110.14168) through the whole path, with a small decoder from scratch.

    python train.py --config configs/gsm8k.py --workdir runs/gsm8k \\
        --config.data.path=DIR/train.jsonl --config.data.test_path=DIR/test.jsonl

Without the two paths it reads openai/gsm8k from the hub. A decoder this small learns the form of a
worked solution and next to no arithmetic: expect accuracies near 0.01, and real data in every part.
"""

from ml_collections import ConfigDict

from krl.configs import default


def get_config() -> ConfigDict:
    """What differs from the default."""
    config = default.get_config()
    config.steps = 100
    config.alloc.budget = 128
    config.alloc.candidates = 64
    config.alloc.n_max = 64

    config.data.source = "dataset"
    config.data.reward = "math"
    config.data.name = "gsm8k"
    config.data.template = "{prompt}\n"
    config.data.max_prompt_tokens = 128
    config.tokenizer.vocab_size = 2048
    config.tokenizer.byte_fallback = True
    config.sample.max_new_tokens = 160

    config.policy.embed_size = 128
    config.policy.num_layers = 3
    config.policy.unroll = 1
    config.policy.head_size = 32
    config.policy.mlp_size = 512
    config.sft.steps = 100
    config.sft.batch_size = 16
    config.sft.learning_rate = 1e-3
    config.optim.micro_tokens = 4608  # 9 rows of 512 at most
    config.optim.decay_steps = 0
    config.eval.every = 20
    config.eval.prompts = 64
    config.eval.samples = 1
    config.eval.temperature = 1.0
    return config
