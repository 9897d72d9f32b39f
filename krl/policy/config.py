"""The decoder's sizes and options."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from krl.policy.attention import KERNELS

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}
MODULES = ("query", "key", "value", "output", "gate", "up", "down")  # weights of a layer that adapters may change
DTYPES = ("float32", "bfloat16", "float16")
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length of the pre-training."""

    kind: str  # "linear" (all divided by factor) or "llama3" (low ones divided, high ones kept)
    factor: float
    low_frequency_factor: float = 1.0  # llama3: wavelengths above original_length / this are divided
    high_frequency_factor: float = 4.0  # and below original_length / this are kept
    original_length: int = 8192  # positions of the pre-training


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al., arXiv 2106.09685): a frozen weight W acts as W + alpha / rank * A B."""

    rank: int  # r of A [inputs, r] and B [r, outputs]
    alpha: float
    modules: tuple[str, ...] = MODULES  # the weights of every layer that have them

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"lora rank {self.rank!r} must be a whole number of at least 1")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora alpha {self.alpha!r} must be a number above 0")
        unknown = [name for name in self.modules if name not in MODULES]
        if unknown or not self.modules or len(set(self.modules)) < len(self.modules):
            raise ValueError(f"lora modules {self.modules} must be different ones of {', '.join(MODULES)}")

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Sizes and options of the decoder; hashable, so that it can be a static argument."""

    vocab_size: int  # V
    embed_size: int = 64  # E
    num_layers: int = 2  # L
    num_heads: int = 4  # H
    num_kv_heads: int = 2  # K, divides H
    head_size: int = 16  # Q, even
    mlp_size: int = 256
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True

    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # queries and keys are normalised per head: Qwen 3, Gemma 3
    rope_scaling: RopeScaling | None = None  # of layers that do not slide: Llama 3.1, Gemma 3
    activation: str = "silu"  # a key of ACTIVATIONS
    norm_plus_one: bool = False  # norms multiply by 1 + weight: Gemma
    post_norms: bool = False  # attention and unit are also normalised before they are added: Gemma
    scale_embedding: bool = False  # embeddings are multiplied by sqrt(E): Gemma
    attention_scale: float = 0.0  # of attention logits; 0 means Q^-1/2
    attention_softcap: float = 0.0  # bound on attention logits, 0 for none: Gemma 2
    logit_softcap: float = 0.0  # bound on logits, 0 for none: Gemma 2
    window: int = 0  # positions that a sliding layer sees, the query's own counted
    sliding: tuple[bool, ...] = ()  # which of the L layers slide; () for none
    sliding_rope_theta: float = 0.0  # of sliding layers, 0 for rope_theta: Gemma 3

    lora: Lora | None = None  # adapters are trained, all else is frozen and kept in the compute dtype

    dtype: str = "float32"  # of the computation; "bfloat16" on accelerators
    attention: str = "auto"  # one of krl.policy.attention.KERNELS
    unroll: int = 1  # layers per iteration of the scan; more is faster for few small layers
    remat: str = "none"  # what the backward pass recomputes: "none", "full" layers, or all but their "dots"

    # Where a checkpoint came from, for its export; no part of the computation or of equality.
    source: str = dataclasses.field(default="", repr=False, compare=False)  # text of its config.json
    stored_dtype: str = dataclasses.field(default="float32", repr=False, compare=False)  # of its tensors

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "mlp_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} {value!r} must be a whole number of at least 1")
        factors = {"rope_theta": self.rope_theta, "norm_epsilon": self.norm_epsilon}
        if self.rope_scaling:
            factors["rope_scaling factor"] = self.rope_scaling.factor
        for name, value in factors.items():
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} {value!r} must be a number above 0")
        if type(self.tie_embeddings) is not bool:
            raise ValueError(f"tie_embeddings {self.tie_embeddings!r} must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} must be even for rotary positions")
        if self.sliding and len(self.sliding) != self.num_layers:
            raise ValueError(f"sliding names {len(self.sliding)} layers and num_layers is {self.num_layers}")
        if any(self.sliding) and self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1 where layers slide")
        for name, allowed in (("activation", ACTIVATIONS), ("remat", REMAT), ("attention", KERNELS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {sorted(allowed)}")
