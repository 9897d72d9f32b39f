"""Where the tensors of a checkpoint lie in the parameters."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from krl.policy.config import PolicyConfig

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
Groups = tuple[tuple[int, ...], ...]
_VECTOR: Groups = ((0,),)
_MATRIX: Groups = ((1,), (0,))  # [inputs, outputs] is stored as [outputs, inputs]
_INTO_HEADS: Groups = ((1, 2), (0,))  # [E, H, Q] as [H Q, E]
_OUT_OF_HEADS: Groups = ((2,), (0, 1))  # [H, Q, E] as [E, H Q]


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a tensor of a checkpoint, or some rows of it, lies in the parameters."""

    path: tuple[str, ...]  # keys of the parameter tree
    at: tuple[int, ...]  # which of a stacked parameter: the layer, and the expert in it; () if it is not stacked
    groups: Groups  # for each axis of the tensor, the axes of the parameter (but for those of `at`) that make it


def parts_of(config: PolicyConfig) -> dict[str, tuple[Part, ...]]:
    """Every tensor of a checkpoint by name, in the order of a forward pass: parts that lie one below the other."""
    parts: dict[str, tuple[Part, ...]] = {EMBEDDING: (Part(("embedding",), (), ((0,), (1,))),)}
    block = _block(config)
    for layer in range(config.num_layers):
        for name, places in block.items():
            own = (Part(("blocks", *path), (layer, *at), groups) for path, at, groups in places)
            parts[f"model.layers.{layer}.{name}"] = tuple(own)
    parts["model.norm.weight"] = (Part(("final_norm", "weight"), (), _VECTOR),)
    if not config.tie_embeddings:
        parts[HEAD] = (Part(("head",), (), _MATRIX),)
    return parts


def _block(config: PolicyConfig) -> dict[str, list[tuple[tuple[str, ...], tuple[int, ...], Groups]]]:
    """The tensors of a layer: of their parts the keys below "blocks", the expert if it is one's, and the groups."""

    def norm(name: str) -> list[Any]:
        return [((name, "weight"), (), _VECTOR)]

    into_heads: dict[str, tuple[str, ...]] = {"q_proj": ("query",), "k_proj": ("key",), "v_proj": ("value",)}
    into_unit: dict[str, tuple[str, ...]] = {"gate_proj": ("gate",), "up_proj": ("up",)}
    if config.fused:
        into_heads, into_unit = {"qkv_proj": ("query", "key", "value")}, {"gate_up_proj": ("gate", "up")}
    found = {"input_layernorm.weight": norm("attention_norm")} if config.pre_norms else {}
    for theirs, ours in into_heads.items():
        found[f"self_attn.{theirs}.weight"] = [((name,), (), _INTO_HEADS) for name in ours]
        if config.qkv_bias:
            found[f"self_attn.{theirs}.bias"] = [((f"{name}_bias",), (), ((0, 1),)) for name in ours]
    if config.qk_norm:
        found |= {f"self_attn.{name[0]}_norm.weight": norm(f"{name}_norm") for name in ("query", "key")}
    found["self_attn.o_proj.weight"] = [(("output",), (), _OUT_OF_HEADS)]
    # A norm after attention is of what attention adds where what units add has one, too, and else of what they read.
    found["post_attention_layernorm.weight"] = norm("attention_post_norm" if config.post_norms else "mlp_norm")
    if config.post_norms and config.pre_norms:
        found["pre_feedforward_layernorm.weight"] = norm("mlp_norm")
    units: dict[str, tuple[int, ...]] = {"mlp": ()}
    if config.experts:
        found["mlp.gate.weight"] = [(("router",), (), _MATRIX)]
        units = {f"mlp.experts.{expert}": (expert,) for expert in range(config.experts.count)}
    for unit, at in units.items():
        for theirs, ours in (*into_unit.items(), ("down_proj", ("down",))):
            found[f"{unit}.{theirs}.weight"] = [((name,), at, _MATRIX) for name in ours]
    if config.post_norms:
        found["post_feedforward_layernorm.weight"] = norm("mlp_post_norm")
    return found


def part_shape(part: Part, leaf: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a part of a tensor, from its parameter's."""
    shape = leaf[len(part.at) :]
    return tuple(math.prod(shape[axis] for axis in group) for group in part.groups)


def tensor_shape(parts: Sequence[Part], leaves: Mapping[tuple[str, ...], Any]) -> tuple[int, ...]:
    """The shape of a tensor, from its parameters'."""
    shapes = [part_shape(part, leaves[part.path].shape) for part in parts]
    return sum(shape[0] for shape in shapes), *shapes[0][1:]
