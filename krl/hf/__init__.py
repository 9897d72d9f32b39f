"""Checkpoints of Hugging Face and their tokenizers; needed only with real models."""

from krl.hf.adapters import check_adapters, load_adapters, save_adapters
from krl.hf.config import read_config, sees_images
from krl.hf.summary import describe
from krl.hf.tokenizer import load_tokenizer
from krl.hf.weights import export, load_hf, save_hf

__all__ = [
    "check_adapters",
    "describe",
    "export",
    "load_adapters",
    "load_hf",
    "load_tokenizer",
    "read_config",
    "save_adapters",
    "save_hf",
    "sees_images",
]
