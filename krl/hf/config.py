"""config.json of a Hugging Face checkpoint to a PolicyConfig, and back."""

import dataclasses
import json
import pathlib
from typing import Any

from krl.policy.config import PolicyConfig, RopeScaling

# The types that a checkpoint's tensors may have, by their names in safetensors.
STORED_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Fields of config.json that are those of PolicyConfig.
_FIELDS = {
    "vocab_size": "vocab_size", "hidden_size": "embed_size", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_size",
    "intermediate_size": "mlp_size", "hidden_act": "activation", "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rope_theta", "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
_WINDOWS = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
_GEMMA_OWN = (*_WINDOWS, "query_pre_attn_scalar", "final_logit_softcapping")
_GEMMA_FIELDS = {
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "activation": "gelu_tanh", "norm_plus_one": True, "post_norms": True, "scale_embedding": True,
}  # fmt: skip
# What a family's config.json leaves out, what its name alone decides, and which fields only it computes.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "llama": ({}, {}, ()),
    "qwen2": ({}, {"qkv_bias": True}, _WINDOWS),
    "qwen3": ({"head_dim": 128}, {"qk_norm": True}, _WINDOWS),
    "gemma2": (
        _GEMMA_FIELDS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _GEMMA,
        (*_GEMMA_OWN, "attn_logit_softcapping"),
    ),
    "gemma3_text": (
        _GEMMA_FIELDS | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        _GEMMA | {"qk_norm": True},
        (*_GEMMA_OWN, "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
    ),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# Fields that say nothing about the computation of a forward pass.
_HARMLESS = {
    "architectures", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "cache_implementation", "cls_token_id", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "initializer_range", "is_llama_config", "label2id", "length_penalty",
    "mask_token_id", "max_length", "max_position_embeddings", "max_sequence_length", "min_length",
    "model_max_length", "model_type", "name_or_path", "neftune_noise_alpha", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_past", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "repetition_penalty", "return_dict", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tokenizer_class", "tokenizer_model_max_length",
    "tokenizer_padding_side", "top_k", "top_p", "torch_dtype", "transformers.js_config", "transformers_version",
    "typical_p", "use_cache",
}  # fmt: skip


# What people hand over by mistake, and files that tell it. The first that is there is told.
_SAVE = "with transformers (from_pretrained, save_pretrained)"
_EXPORT = "write its policy with python -m krl.hf export WORKDIR OUT and name OUT"
_OTHERS: dict[str, tuple[str, ...]] = {
    "it holds adapters (such as LoRA): name it in config.policy.adapter, and the checkpoint that it adapts in "
    "config.policy.path": ("adapter_config.json", "adapter_model.*"),
    "it holds GGUF files, made for llama.cpp; convert one with python -m krl.hf.gguf FILE OUT and name OUT": (
        "*.gguf",
    ),
    f"it is the work directory of a run; {_EXPORT}": ("metrics.jsonl", "policy/config.json"),
    f"it is an Orbax checkpoint of a run; {_EXPORT}": (
        "_CHECKPOINT_METADATA", "params/_METADATA", "*/_CHECKPOINT_METADATA", "_METADATA"
    ),
    "it is a pipeline of diffusers, not a language model": ("model_index.json",),
    "it is a model in the hub's cache; name the directory below its snapshots": ("snapshots/*/config.json",),
    "it is in its maker's own format (params.json, consolidated files); take the one converted for transformers": (
        "consolidated.*", "params.json"
    ),
    f"it holds pickled weights, which are not read; convert them to safetensors {_SAVE}": (
        "pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt"
    ),
    f"it holds weights in another format than safetensors; convert them {_SAVE}": (
        "*.msgpack", "*.h5", "*.onnx", "*.mlmodel", "*.npz"
    ),
    "directories in it hold config.json; name one of these": ("*/config.json",),
}  # fmt: skip


def what_else(path: pathlib.Path) -> str:
    """What a path is that is no whole checkpoint, in words with what to do; "" if that is not known."""
    if not path.exists():
        name = "" if path.is_absolute() or len(path.parts) != 2 else f" (hf download {path} --local-dir DIR)"
        return f"it does not exist; a checkpoint of a hub must be downloaded first{name}"
    if path.is_file():
        if path.suffix == ".gguf":
            return "it is a GGUF file, made for llama.cpp; convert it with python -m krl.hf.gguf FILE OUT and name OUT"
        return "it is a file; name a directory with config.json and safetensors"
    for what, files in _OTHERS.items():
        if any(next(path.glob(file), None) for file in files):
            return what
    weights, tokenizer = (
        any(next(path.glob(file), None) for file in files) for files in (("*.safetensors",), ("tokenizer*", "vocab.*"))
    )
    if (path / "config.json").exists():
        return "" if weights else "it holds config.json and no weights; fetch its safetensors, too"
    if weights:
        return "it holds weights without their config.json; copy that from where they came"
    return (
        "it holds a tokenizer alone; it belongs in config.tokenizer.path"
        if tokenizer
        else "nothing in it is a checkpoint's"
    )


def read_config(path: str | pathlib.Path, **options: Any) -> PolicyConfig:
    """The decoder that a directory's config.json describes.

    Args:
        path: a directory with config.json, as transformers writes it (versions 4 and 5).
        options: fields of PolicyConfig that no checkpoint decides, such as dtype, remat and attention.

    Raises:
        ValueError: the file cannot be read, the architecture is unknown, or a field changes the
            computation in a way that this decoder does not have; the message names the field.
    """
    file = pathlib.Path(path) / "config.json"
    try:
        text = file.read_text()
        fields = json.loads(text)
        family = fields["model_type"]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        told = "" if file.exists() else f": {what_else(file.parent)}"
        raise ValueError(f"{path} is no checkpoint directory: cannot read {file} ({reason}){told}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        told = what_else(file.parent) if isinstance(error, KeyError) else ""
        told = f"; {told}" if told else ""
        raise ValueError(f"{file} is not the configuration of a model: {error!r}{told}") from None
    inner = fields.get("text_config")
    if isinstance(inner, dict):
        raise ValueError(
            f"{file}: model_type {family!r} is a model with a text_config among others, such as one that sees images; "
            "only a text model is supported: save its language model alone, whose config.json has model_type "
            f"{inner.get('model_type')!r}"
        )
    if fields.get("quantization_config"):
        kind = fields["quantization_config"]
        kind = kind.get("quant_method") if isinstance(kind, dict) else kind
        raise ValueError(
            f"{file}: the field 'quantization_config' says that the weights are quantised ({kind}); "
            "take those of 16 or 32 bits"
        )
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{file}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    defaults, decided, _ = FAMILIES[family]
    try:
        stored = fields.get("dtype") or fields.get("torch_dtype")
        found = _translate({k: v for k, v in (defaults | fields).items() if v is not None}, family)
        found |= {"source": text, "stored_dtype": stored if stored in STORED_TYPES.values() else "float32"}
        return PolicyConfig(**found | decided | options)
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"{file}: missing or malformed field: {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _translate(fields: dict[str, Any], family: str) -> dict[str, Any]:
    """Fields of PolicyConfig from those of config.json; every field must be used or be known as harmless."""
    own = {name: fields.pop(name) for name in FAMILIES[family][2] if name in fields}
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
    found = {ours: fields.pop(theirs) for theirs, ours in _FIELDS.items()}
    found |= _rotary(fields, found["rope_theta"], own.get("rope_local_base_freq", 0.0))
    found["attention_softcap"] = own.get("attn_logit_softcapping", 0.0)
    found["logit_softcap"] = own.get("final_logit_softcapping", 0.0)
    if "query_pre_attn_scalar" in own:
        found["attention_scale"] = own["query_pre_attn_scalar"] ** -0.5
    sliding = _sliding(own, family, found["num_layers"])
    if any(sliding):
        found |= {"window": own["sliding_window"], "sliding": sliding}
    if not fields.pop("is_causal", True):
        raise ValueError("the field 'is_causal' = False asks for attention to later tokens, which is not supported")
    for name, value in fields.items():
        harmless = name in _HARMLESS or name.startswith(("_", "unsloth_"))
        off = value in (0, None, "", [], {}) or (type(value) is float and value == 1.0)  # or a factor of one
        if not (harmless or off):
            raise ValueError(
                f"the field {name!r} = {value!r} may change the computation and is not supported for {family}; "
                "remove it from the file only if it changes nothing"
            )
    return found


def _sliding(own: dict[str, Any], family: str, layers: int) -> tuple[bool, ...]:
    """Which layers slide, by the family's own fields."""
    kinds = own.get("layer_types")
    if kinds is not None:
        if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise ValueError(f"the field 'layer_types' = {kinds!r} must name full or sliding attention for each layer")
        return tuple(kind == "sliding_attention" for kind in kinds)
    if family == "gemma2":
        return tuple(layer % 2 == 0 for layer in range(layers))
    if family == "gemma3_text":
        pattern = own.get("sliding_window_pattern", own.get("_sliding_window_pattern", 6))
        return tuple((layer + 1) % pattern > 0 for layer in range(layers))
    return tuple(own.get("use_sliding_window", False) and layer >= own["max_window_layers"] for layer in range(layers))


def _rotary(fields: dict[str, Any], theta: float, local: float) -> dict[str, Any]:
    """Rotary options; takes the fields of both generations of config.json that hold them."""
    values = fields.pop("rope_parameters", None) or fields.pop("rope_scaling", None) or {}
    fields.pop("rope_scaling", None)
    if "full_attention" in values:
        slides = dict(values.get("sliding_attention") or {})
        local, values = slides.pop("rope_theta", local), values["full_attention"]
        if slides.pop("rope_type", "default") != "default" or slides:
            raise ValueError(f"the field 'rope_parameters' scales sliding layers with {slides}, which is not supported")
    values = dict(values)
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    theta = values.pop("rope_theta", theta)
    stretch = None
    if kind == "linear":
        stretch = RopeScaling("linear", values.pop("factor"))
    elif kind == "llama3":
        factor, low, high = (values.pop(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        stretch = RopeScaling("llama3", factor, low, high, values.pop("original_max_position_embeddings"))
    elif kind != "default":
        raise ValueError(f"the field 'rope_scaling' has type {kind!r}; supported are default, linear and llama3")
    if values.pop("partial_rotary_factor", 1.0) != 1.0 or values:
        raise ValueError(f"the field 'rope_scaling' of type {kind!r} has {sorted(values) or 'a partial rotation'}")
    return {"rope_theta": theta, "sliding_rope_theta": local, "rope_scaling": stretch}


def config_json(config: PolicyConfig, dtype: str | None = None) -> str:
    """The text of config.json: as it was read, or in the terms of the family that has these options.

    Args:
        config: of the policy.
        dtype: the type of the tensors that it should name; None leaves what it named.

    Raises:
        ValueError: no family has these options.
    """
    if config.source:
        fields = json.loads(config.source)
        named = {key: dtype for key in ("torch_dtype", "dtype") if key in fields} or {"dtype": dtype}
        if dtype is None or named.items() <= fields.items():
            return config.source
        return json.dumps(fields | named, indent=2, sort_keys=True) + "\n"
    plain = {field.name: field.default for field in dataclasses.fields(PolicyConfig)}
    options = ("activation", "norm_plus_one", "post_norms", "scale_embedding", "attention_scale", "attention_softcap",
               "logit_softcap", "window", "sliding", "rope_scaling", "sliding_rope_theta")  # fmt: skip
    odd = [name for name in options if getattr(config, name) != plain[name]]
    if odd or (config.qkv_bias and config.qk_norm):
        raise ValueError(f"no family of checkpoints has these options: {odd or 'qkv_bias with qk_norm'}")
    family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    fields = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
        "max_position_embeddings": 32768,
        "torch_dtype": dtype or config.stored_dtype,
    }
    return json.dumps(fields, indent=2) + "\n"
