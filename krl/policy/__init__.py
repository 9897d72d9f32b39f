"""The language model and its tokenizer."""

from krl.policy.model import (
    Cache,
    PolicyConfig,
    apply,
    decode,
    init,
    init_cache,
    param_axes,
    token_logps,
)

__all__ = ["Cache", "PolicyConfig", "apply", "decode", "init", "init_cache", "param_axes", "token_logps"]
