"""config.json of a Hugging Face checkpoint to a PolicyConfig, and back."""

import dataclasses
import json
import pathlib
from typing import Any

from krl.hf.families import FAMILIES, FIELDS, translate
from krl.policy.config import PolicyConfig

# The types that a checkpoint's tensors may have, by their names in safetensors.
STORED_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

SIZES = {*FIELDS.values()} - {"activation"}  # options of PolicyConfig that every family has
# Options of PolicyConfig that a policy may have for which no config.json was read.
_FREE = SIZES | {
    "qkv_bias", "qk_norm", "experts", "balance", "lora", "dtype", "attention", "unroll", "remat", "stored_dtype",
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
        if _has_images(fields):
            fields = _language_model(fields)
            text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        family = fields["model_type"]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        told = "" if file.exists() else f": {what_else(file.parent)}"
        raise ValueError(f"{path} is no checkpoint directory: cannot read {file} ({reason}){told}") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:  # numbers of many digits, or many brackets
        told = what_else(file.parent) if isinstance(error, KeyError) else ""
        told = f"; {told}" if told else ""
        raise ValueError(f"{file} is not the configuration of a model: {error!r}{told}") from None
    inner = fields.get("text_config")
    if isinstance(inner, dict):
        own = inner.get("model_type")
        told = (
            f"save that, whose model_type is {own!r}, alone" if own in FAMILIES else f"{own!r} is not supported either"
        )
        raise ValueError(
            f"{file}: model_type {family!r} is a model with more than a language model, such as one that sees images, "
            f"and of these only the language model of gemma3 is read; {told}"
        )
    if kind := fields.get("quantization_config"):
        kind = kind.get("quant_method") if isinstance(kind, dict) else kind
        raise ValueError(
            f"{file}: the field 'quantization_config' says that the weights are quantised ({kind}); "
            "take those of 16 or 32 bits"
        )
    if (file.parent / "hf_quant_config.json").exists():
        raise ValueError(f"{file.parent}: hf_quant_config.json says that the weights are quantised; take others")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{file}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    try:
        stored = fields.get("dtype") or fields.get("torch_dtype")
        found = translate(fields, family)
        found |= {"source": text, "stored_dtype": stored if stored in STORED_TYPES.values() else "float32"}
        return PolicyConfig(**found | options)
    except (KeyError, TypeError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{file}: missing or malformed field: {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def sees_images(path: str | pathlib.Path) -> bool:
    """Whether a checkpoint directory that `read_config` takes holds more than a language model, which alone is read."""
    return _has_images(json.loads((pathlib.Path(path) / "config.json").read_text()))


def _has_images(fields: Any) -> bool:
    return isinstance(fields, dict) and fields.get("model_type") == "gemma3" and "text_config" in fields


def _language_model(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model that sees images for its language model alone, as transformers would save that."""
    kept = {name: fields[name] for name in ("dtype", "torch_dtype", "eos_token_id", "transformers_version",
                                            "quantization_config") if name in fields}  # fmt: skip
    own = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    return kept | fields["text_config"] | own | {"final_logit_softcapping": None}  # the whole model has no such cap


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
    odd = [name for name in plain if name not in _FREE and getattr(config, name) != plain[name]]
    odd += ["qkv_bias with qk_norm"] if config.qkv_bias and config.qk_norm else []
    odd += ["experts without qk_norm"] if config.experts and not config.qk_norm else []
    if odd:
        raise ValueError(f"no family of checkpoints has these options: {', '.join(odd)}")
    family, experts = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama", {}
    if config.experts:
        family, experts = "qwen3_moe", {"num_experts": config.experts.count, "moe_intermediate_size": config.mlp_size,
            "num_experts_per_tok": config.experts.active, "norm_topk_prob": config.experts.normalised}  # fmt: skip
    fields = {
        "architectures": [f"{family.title().replace('_', '')}ForCausalLM"],
        "model_type": family,
        **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
        **experts,
        "max_position_embeddings": 32768,
        "torch_dtype": dtype or config.stored_dtype,
    }
    return json.dumps(fields, indent=2) + "\n"
