"""What the fields of config.json mean, family by family."""

import dataclasses
import math
from typing import Any

from krl.policy.experts import Experts
from krl.policy.rotary import RopeScaling

# Fields that are those of PolicyConfig.
FIELDS = {
    "vocab_size": "vocab_size", "hidden_size": "embed_size", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_size",
    "intermediate_size": "mlp_size", "hidden_act": "activation", "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rope_theta", "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
# The same of fields that only some families have.
_OWN_FIELDS = {
    "attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap",
    "embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_divisor", "attention_multiplier": "attention_scale",
}  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# Fields that say nothing about the computation of a forward pass.
_HARMLESS = {
    "architectures", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "cache_implementation", "cls_token_id", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "initializer_range", "is_decoder", "is_llama_config", "label2id",
    "length_penalty", "mask_token_id", "max_length", "max_position_embeddings", "max_sequence_length", "min_length",
    "model_max_length", "model_type", "name_or_path", "neftune_noise_alpha", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_past",
    "pad_token_id", "prefix", "pretraining_tp", "problem_type", "repetition_penalty", "return_dict", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tokenizer_class", "tokenizer_model_max_length",
    "tokenizer_padding_side", "top_k", "top_p", "torch_dtype", "transformers.js_config", "transformers_version",
    "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model_type says by itself."""

    absent: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields that its config.json may leave out
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of PolicyConfig, that its name decides
    own: tuple[str, ...] = ()  # fields that not every family computes


_WINDOWS = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
_GEMMA_FIELDS = {
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
# Checkpoints that see images leave out of their text_config what is like this.
_GEMMA3_FIELDS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "max_position_embeddings": 131072,
}  # fmt: skip
_GEMMA = {"activation": "gelu_tanh", "norm_plus_one": True, "post_norms": True}
_GEMMA_OWN = (*_WINDOWS, "query_pre_attn_scalar", "final_logit_softcapping")
_ROTARY_BY_KIND = ("gemma3_text", "olmo3")  # whose rope_parameters are those of two kinds of layers
_OLMO = {"qk_norm": True, "joint_qk_norm": True, "pre_norms": False, "post_norms": True}
# Those about the training of routers are not computed here, and norm_topk_prob is false where it is absent.
_EXPERTS = (
    "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef",
    "output_router_logits",
)  # fmt: skip
FAMILIES = {
    "llama": Family(),
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096}, {}, ("sliding_window",)),
    "ministral": Family({"num_key_value_heads": 8, "sliding_window": 4096}, {}, ("sliding_window", "layer_types")),
    "qwen2": Family({}, {"qkv_bias": True}, _WINDOWS),
    "qwen3": Family({"head_dim": 128}, {"qk_norm": True}, _WINDOWS),
    "smollm3": Family(
        {"rope_theta": 2e6, "num_key_value_heads": 4, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
        {},
        (*_WINDOWS, "no_rope_layers", "no_rope_layer_interval"),
    ),
    "gemma2": Family(
        _GEMMA_FIELDS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _GEMMA,
        (*_GEMMA_OWN, "attn_logit_softcapping", "sliding_window_size"),  # older files repeat the window
    ),
    "gemma3_text": Family(
        _GEMMA_FIELDS | _GEMMA3_FIELDS,
        _GEMMA | {"qk_norm": True, "scale_sliding": False},
        (*_GEMMA_OWN, "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
    ),
    "olmo2": Family({"rms_norm_eps": 1e-5}, _OLMO),
    "olmo3": Family(
        {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
        _OLMO | {"scale_sliding": False},
        ("layer_types", "sliding_window"),
    ),
    "qwen3_moe": Family(
        {
            "head_dim": 128,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
        },
        {"qk_norm": True},
        (
            *_EXPERTS,
            "moe_intermediate_size",
            "decoder_sparse_step",
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
        ),
    ),
    "olmoe": Family(
        {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        {"qk_norm": True, "joint_qk_norm": True},
        _EXPERTS,
    ),
    "phi3": Family(
        {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "max_position_embeddings": 4096},
        {"fused": True},
        # The last two are of its maker's own code, and transformers does not compute them.
        (
            "sliding_window",
            "partial_rotary_factor",
            "original_max_position_embeddings",
            "full_attn_mod",
            "interpolate_factor",
        ),
    ),
    "granite": Family(
        {"attention_multiplier": 1.0},
        {},
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"),
    ),
}


def translate(fields: dict[str, Any], family: str) -> dict[str, Any]:
    """Fields of PolicyConfig from those of config.json.

    Args:
        fields: of the text model; null ones are as if absent, and no default of the family stands in for them.
        family: a key of FAMILIES.

    Raises:
        ValueError: a field that may change the computation and is not known, or a value that is not supported.
        KeyError, TypeError, ArithmeticError, AttributeError: a field that is missing or malformed.
    """
    if family == "mistral" and fields.get("layer_types"):  # as transformers reads it
        family = "ministral"
    fields = {name: value for name, value in (FAMILIES[family].absent | fields).items() if value is not None}
    own = {name: fields.pop(name) for name in FAMILIES[family].own if name in fields}
    heads, act = fields["num_attention_heads"], fields.get("hidden_act", "silu")
    if family.startswith("gemma"):  # older files of Gemma repeat it as hidden_act
        act = fields.pop("hidden_activation", None) or act
    if act not in _ACTIVATIONS:
        raise ValueError(f"activation {act!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    absent = {
        "num_key_value_heads": heads, "head_dim": fields["hidden_size"] // heads, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "tie_word_embeddings": False,
    }  # fmt: skip
    fields = absent | fields | {"hidden_act": _ACTIVATIONS[act]}
    found = {ours: fields.pop(theirs) for theirs, ours in FIELDS.items()}
    if found["num_layers"] > 10_000:  # before a list has as many entries
        raise ValueError(f"num_hidden_layers {found['num_layers']} must be at most 10,000")
    found |= {ours: own[theirs] for theirs, ours in _OWN_FIELDS.items() if theirs in own}
    found |= _rotary(fields, own, family, found)
    if "query_pre_attn_scalar" in own:
        found["attention_scale"] = own["query_pre_attn_scalar"] ** -0.5
    if family.startswith("gemma"):
        found["embedding_scale"] = found["embed_size"] ** 0.5
    if "num_experts" in FAMILIES[family].own:
        if own.get("decoder_sparse_step", 1) != 1:
            raise ValueError(f"the field 'decoder_sparse_step' = {own['decoder_sparse_step']}: all layers need experts")
        found["mlp_size"] = own.get("moe_intermediate_size", found["mlp_size"])
        count = own["num_local_experts"] if "num_local_experts" in own else own["num_experts"]  # newer files have it
        found["experts"] = Experts(count, own["num_experts_per_tok"], own.get("norm_topk_prob", False))
    if found.get("attention_scale") == 0:
        raise ValueError("the field 'attention_multiplier' = 0 leaves nothing of attention")
    sliding = _sliding(own, family, found)
    if any(sliding):
        found |= {"window": own["sliding_window"], "sliding": sliding}
    if not fields.pop("is_causal", True):
        raise ValueError("the field 'is_causal' = False asks for attention to later tokens, which is not supported")
    if FAMILIES[family].options.get("qk_norm") and fields.get("use_qk_norm") is True:
        del fields["use_qk_norm"]
    for name, value in fields.items():
        # Dropout is never applied: updates compute the policy that has sampled.
        harmless = name in _HARMLESS or name.startswith(("_", "unsloth_")) or name.endswith(("_dropout", "_pdrop"))
        off = value in (0, "", [], {}) or (type(value) is float and value == 1.0)  # or a factor of one
        if not (harmless or off) or name.startswith("clip"):
            raise ValueError(
                f"the field {name!r} = {value!r} may change the computation and is not supported for {family}; "
                "remove it from the file only if it changes nothing"
            )
    return found | FAMILIES[family].options


def _sliding(own: dict[str, Any], family: str, found: dict[str, Any]) -> tuple[bool, ...]:
    """Which layers slide, by the family's own fields."""
    layers, kinds = found["num_layers"], own.get("layer_types")
    if kinds is not None:
        if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise ValueError(f"the field 'layer_types' = {kinds!r} must name full or sliding attention for each layer")
        return tuple(kind == "sliding_attention" for kind in kinds)
    if family in ("mistral", "ministral", "phi3"):
        return ("sliding_window" in own,) * layers
    if family == "qwen3_moe":
        return (bool(own.get("use_sliding_window") and "sliding_window" in own),) * layers
    period = {"gemma2": 2, "olmo3": 4}.get(family)
    if family == "gemma3_text":
        period = own.get("sliding_window_pattern", own.get("_sliding_window_pattern", 6))
    if period:
        return tuple((layer + 1) % period > 0 for layer in range(layers))
    if family == "smollm3":
        wanted = own.get("use_sliding_window", False) and "sliding_window" in own
        return tuple(wanted and still for still in found["unrotated"])
    return tuple(own.get("use_sliding_window", False) and layer >= own["max_window_layers"] for layer in range(layers))


def _rotary(fields: dict[str, Any], own: dict[str, Any], family: str, found: dict[str, Any]) -> dict[str, Any]:
    """Rotary options; takes the fields of both generations of config.json that hold them."""
    apart = fields.get("rope_parameters")
    if apart and ("full_attention" in apart) != (family in _ROTARY_BY_KIND):
        must = "must" if family in _ROTARY_BY_KIND else "must not"
        raise ValueError(
            f"the field 'rope_parameters' of {family} {must} have 'full_attention' and 'sliding_attention': "
            "transformers reads others elsewise; write it as transformers saves that family"
        )
    given = [value for name in ("rope_parameters", "rope_scaling") if (value := fields.pop(name, None))]
    if len(given) > 1 and given[0] != given[1]:
        raise ValueError("the fields 'rope_parameters' and 'rope_scaling' say two things; leave one of them out")
    values = given[0] if given else {}
    local = own.get("rope_local_base_freq", 0.0)
    if "full_attention" in values:
        slides = dict(values.get("sliding_attention") or {})
        local, values = slides.pop("rope_theta", local), values["full_attention"]
        if slides.pop("rope_type", "default") != "default" or slides:
            raise ValueError(f"the field 'rope_parameters' scales sliding layers with {slides}, which is not supported")
    values = dict(values)
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    if family == "phi3" and kind in ("su", "yarn"):  # as LongRoPE was called at first
        kind = "longrope"
    theta = values.pop("rope_theta", found["rope_theta"])
    parts = {where.pop("partial_rotary_factor") for where in (values, fields, own) if "partial_rotary_factor" in where}
    part = min(parts, default=1.0)
    if len(parts) > 1 or (part != 1.0 and family != "phi3"):
        raise ValueError(f"the field 'partial_rotary_factor' = {sorted(parts)} is not supported for {family}")
    options = {"rope_theta": theta, "sliding_rope_theta": 0.0 if local == theta else local}
    options["rotary_size"] = int(found["head_size"] * part) if part != 1.0 else 0
    if kind != "default":
        options |= _scaling(kind, values, fields | own, options["rotary_size"] or found["head_size"])
    if values:
        raise ValueError(
            f"the field 'rope_scaling' of type {kind!r} has {sorted(values)}, which is not supported, nor read "
            "by transformers; remove it from the file to compute as transformers does"
        )
    if family == "smollm3":
        layers, turns = found["num_layers"], own.get("no_rope_layers")
        if turns is None:
            turns = [int((layer + 1) % own["no_rope_layer_interval"] > 0) for layer in range(layers)]
        if len(turns) < layers or not set(turns) <= {0, 1}:
            raise ValueError(f"the field 'no_rope_layers' = {turns!r} must have a 0 or a 1 for each of {layers} layers")
        options["unrotated"] = tuple(not turn for turn in turns[:layers])
    return options


def _scaling(kind: str, values: dict[str, Any], fields: dict[str, Any], size: int) -> dict[str, Any]:
    """The options of a kind of rope_scaling; takes of its values those that it has."""
    longest: Any = fields.get("max_position_embeddings")
    factor = values.pop("factor", None)
    original = values.pop("original_max_position_embeddings", longest)
    if kind == "linear":
        return {"rope_scaling": RopeScaling("linear", factor)}
    if kind == "dynamic":  # frequencies change beyond the length of the pre-training alone
        return {"longest": fields["max_position_embeddings"]}
    if kind == "llama3":
        low, high = (values.pop(name) for name in ("low_freq_factor", "high_freq_factor"))
        return {"rope_scaling": RopeScaling("llama3", factor, low, high, original)}
    if kind not in ("yarn", "longrope"):
        supported = "default, linear, dynamic, llama3, yarn and longrope"
        raise ValueError(f"the field 'rope_scaling' has type {kind!r}; supported are {supported}")
    original = fields.get("original_max_position_embeddings", original)
    if type(original) is not int or original < 2:
        raise ValueError(f"the length of the pre-training, {original!r}, must be a whole number of at least 2")
    factor = longest / original if factor is None else factor
    magnitude = values.pop("attention_factor", None)
    if kind == "yarn":
        scales = [values.pop(name, None) for name in ("mscale", "mscale_all_dim")]
        if magnitude is None:
            grown = 0.1 * math.log(factor) if factor > 1 else 0.0
            magnitude = (1 + scales[0] * grown) / (1 + scales[1] * grown) if all(scales) else 1 + grown
        slow, fast = (values.pop(name, None) or usual for name, usual in (("beta_slow", 1), ("beta_fast", 32)))
        whole = values.pop("truncate", True)
        return {"rope_scaling": RopeScaling("yarn", factor, slow, fast, original, whole, magnitude=magnitude)}
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, _ = values.pop("short_factor"), values.pop("long_factor", None)
    if len(short) != size // 2:
        raise ValueError(f"the field 'short_factor' of 'rope_scaling' has {len(short)} numbers, not {size // 2}")
    # Rows beyond the length of the pre-training would be rotated by other divisors from their first token on.
    return {
        "rope_scaling": RopeScaling("longrope", 1.0, divisors=tuple(short), magnitude=magnitude),
        "longest": original,
    }
