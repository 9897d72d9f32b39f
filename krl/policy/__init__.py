"""The language model, its checkpoints and its tokenizer."""

from typing import TYPE_CHECKING, Any

from krl.policy.hf_config import read_config
from krl.policy.model import (
    Cache,
    PolicyConfig,
    apply,
    decode,
    for_decoding,
    init,
    init_cache,
    param_axes,
    read,
    token_logps,
)

if TYPE_CHECKING:
    from krl.policy.hf import load_hf, save_hf

__all__ = [
    "Cache",
    "PolicyConfig",
    "apply",
    "decode",
    "for_decoding",
    "init",
    "init_cache",
    "load_hf",
    "param_axes",
    "read",
    "read_config",
    "save_hf",
    "token_logps",
]


def __getattr__(name: str) -> Any:
    # On first use, so that `python -m krl.policy.hf` does not find its module imported already.
    if name in ("load_hf", "save_hf"):
        from krl.policy import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
