"""Qwen3-4B-Base with the settings of configs/qwen2_5_math_7b.py.

python train.py --config configs/qwen3_4b_base.py --config.policy.path=DIR --workdir runs/qwen3_4b
"""

from ml_collections import ConfigDict

from krl.configs import qwen2_5_math_7b


def get_config() -> ConfigDict:
    """What differs from the 7B run."""
    config = qwen2_5_math_7b.get_config()
    config.sample.slots = 128  # 116 GB of keys and values over the mesh
    config.data.template = "boxed"  # a base model that has seen no chats
    return config
