"""The language model."""

import importlib
from typing import Any

from krl import _moved
from krl.policy.config import Lora, PolicyConfig
from krl.policy.lora import frozen, join, merge, trained
from krl.policy.model import Cache, adapt, apply, decode, for_decoding, init, init_cache, param_axes, read, token_logps

__all__ = [
    "Cache",
    "Lora",
    "PolicyConfig",
    "adapt",
    "apply",
    "decode",
    "for_decoding",
    "frozen",
    "init",
    "init_cache",
    "join",
    "load_hf",
    "merge",
    "param_axes",
    "read",
    "read_config",
    "save_hf",
    "token_logps",
    "trained",
]


def __getattr__(name: str) -> Any:
    # Notebooks find checkpoints beside the model; krl.hf stands above this room and is loaded when it is asked for.
    if name in ("load_hf", "save_hf", "read_config"):
        return getattr(importlib.import_module("krl.hf"), name)
    return _moved.attribute(__name__, name)
