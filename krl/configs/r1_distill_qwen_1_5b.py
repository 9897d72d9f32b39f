"""DeepSeek-R1-Distill-Qwen-1.5B with the settings of configs/qwen2_5_math_7b.py.

python train.py --config configs/r1_distill_qwen_1_5b.py --config.policy.path=DIR --workdir runs/r1_distill
"""

from ml_collections import ConfigDict

from krl.configs import qwen2_5_math_7b


def get_config() -> ConfigDict:
    """What differs from the 7B run: a model small enough to keep on every accelerator."""
    config = qwen2_5_math_7b.get_config()
    config.mesh.axis_names = ("data",)
    return config
