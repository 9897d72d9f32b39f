"""The decoder's sizes and options."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from krl.policy.attention import KERNELS
from krl.policy.experts import Experts
from krl.policy.rotary import LARGEST, RopeScaling

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}
UNIT = ("gate", "up", "down")
MODULES = ("query", "key", "value", "output", *UNIT)  # weights of a layer that adapters may change
DTYPES = ("float32", "bfloat16", "float16")
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al., arXiv 2106.09685): a frozen weight W acts as W + alpha / rank * A B."""

    rank: int  # r of A [inputs, r] and B [r, outputs]
    alpha: float
    modules: tuple[str, ...] = MODULES  # the weights of every layer that have them, in whatever order they are given

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"lora rank {self.rank!r} must be a whole number of at least 1")
        if not 0 < self.alpha < LARGEST:
            raise ValueError(f"lora alpha {self.alpha!r} must be a number above 0")
        unknown = [name for name in self.modules if name not in MODULES]
        if unknown or not self.modules or len(set(self.modules)) < len(self.modules):
            raise ValueError(f"lora modules {self.modules} must be different ones of {', '.join(MODULES)}")
        object.__setattr__(self, "modules", tuple(name for name in MODULES if name in self.modules))

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
    qk_norm: bool = False  # queries and keys are normalised: Qwen 3, Gemma 3, OLMo
    joint_qk_norm: bool = False  # over all heads together, not per head: OLMo
    activation: str = "silu"  # a key of ACTIVATIONS
    norm_plus_one: bool = False  # norms multiply by 1 + weight: Gemma
    pre_norms: bool = True  # attention and unit are normalised before; not in OLMo 2 and 3
    post_norms: bool = False  # and before they are added: Gemma, OLMo 2 and 3
    embedding_scale: float = 1.0  # embeddings are multiplied by it: Gemma (sqrt(E)), Granite
    residual_scale: float = 1.0  # and what attention and unit add: Granite
    logit_divisor: float = 1.0  # logits are divided by it: Granite
    attention_scale: float = 0.0  # of attention logits; 0 means Q^-1/2
    attention_softcap: float = 0.0  # bound on attention logits, 0 for none: Gemma 2
    logit_softcap: float = 0.0  # bound on logits, 0 for none: Gemma 2
    window: int = 0  # positions that a sliding layer sees, the query's own counted
    sliding: tuple[bool, ...] = ()  # which of the L layers slide; () for none
    rotary_size: int = 0  # the first r numbers of a head that are rotated, 0 for all: Phi-3
    rope_scaling: RopeScaling | None = None  # of layers that do not slide, or of all: Llama 3.1, Gemma 3, YaRN
    scale_sliding: bool = True  # whether sliding layers have that scaling, too; not in Gemma 3 and OLMo 3
    sliding_rope_theta: float = 0.0  # of sliding layers, 0 for rope_theta: Gemma 3
    unrotated: tuple[bool, ...] = ()  # which of the L layers have no rotary positions; () for none: SmolLM3
    longest: int = 0  # tokens of a sequence beyond which positions would be other ones, 0 for any: LongRoPE, dynamic

    experts: Experts | None = None  # in the place of one gated unit, of mlp_size each: Qwen 3 MoE, OLMoE
    balance: float = 0.0  # weight of the auxiliary loss that spreads tokens over experts, where gradients are taken

    lora: Lora | None = None  # adapters are trained, all else is frozen and kept in the compute dtype

    dtype: str = "float32"  # of the computation; "bfloat16" on accelerators
    attention: str = "auto"  # one of krl.policy.attention.KERNELS
    unroll: int = 1  # layers per iteration of the scan; more is faster for few small layers
    remat: str = "none"  # what the backward pass recomputes: "none", "full" layers, or all but their "dots"

    # Where a checkpoint came from, for its export; no part of the computation or of equality.
    source: str = dataclasses.field(default="", repr=False, compare=False)  # text of its config.json
    stored_dtype: str = dataclasses.field(default="float32", repr=False, compare=False)  # of its tensors
    fused: bool = dataclasses.field(default=False, repr=False, compare=False)  # query, key, value and gate, up: Phi-3

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "mlp_size"):
            value, most = getattr(self, name), 10_000 if name == "num_layers" else 10_000_000
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} {value!r} must be a whole number from 1 to {most:,}")
        for name in ("rope_theta", "norm_epsilon", "embedding_scale", "residual_scale", "logit_divisor"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < LARGEST:
                raise ValueError(f"{name} {value!r} must be a number above 0")
            object.__setattr__(self, name, float(value))  # whole numbers may be larger than what JAX has of them
        for name in ("attention_scale", "attention_softcap", "logit_softcap", "sliding_rope_theta", "balance"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < LARGEST:
                raise ValueError(f"{name} {value!r} must be a number of at least 0")
            object.__setattr__(self, name, float(value))
        for name in ("window", "longest"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} {getattr(self, name)!r} must be a whole number from 0 to 2^31 - 1")
        if type(self.tie_embeddings) is not bool:
            raise ValueError(f"tie_embeddings {self.tie_embeddings!r} must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_size % 2 or self.rotary_size % 2 or not 0 <= self.rotary_size <= self.head_size:
            raise ValueError(f"head_size {self.head_size} and rotary_size {self.rotary_size} must be even, for halves")
        for name in ("sliding", "unrotated"):
            if getattr(self, name) and len(getattr(self, name)) != self.num_layers:
                raise ValueError(f"{name} names {len(getattr(self, name))} layers and num_layers is {self.num_layers}")
        if self.lora and not set(self.lora.modules) <= set(self.adaptable):
            raise ValueError(f"experts have no adapters; leave {', '.join(UNIT)} out of config.policy.lora_modules")
        if self.balance and not self.experts:
            raise ValueError(
                f"balance {self.balance!r} is of experts, and the policy has none; set config.policy.balance to 0"
            )
        if any(self.sliding) and self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1 where layers slide")
        for name, allowed in (("activation", ACTIVATIONS), ("remat", REMAT), ("attention", KERNELS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {sorted(allowed)}")

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The weights of a layer that adapters may change: beside experts those of attention alone."""
        return tuple(name for name in MODULES if not (self.experts and name in UNIT))
