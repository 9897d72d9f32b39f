"""Low-rank adapters in and out, as PEFT keeps them: adapter_model.safetensors beside an adapter_config.json."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from krl.hf.config import STORED_TYPES
from krl.hf.tensors import Part, part_shape, parts_of
from krl.hf.weights import appearing_whole, check_new, few, first_device, read_part, write_part
from krl.policy import lora
from krl.policy.config import MODULES, Lora, PolicyConfig
from krl.policy.model import abstract_params
from krl.policy.rotary import LARGEST

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of adapter_config.json that say nothing about what is computed, or nothing that the tensors do not say. All
# others but "r", "lora_alpha" and "use_rslora" ask for more than an adapter if they have a value.
_ASIDE = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# What that value may be where it is one.
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
_MERGE = (
    "; merge the adapter into its base model with peft (merge_and_unload, save_pretrained) and name what that writes "
    "in config.policy.path"
)


def _names(config: PolicyConfig) -> dict[str, Part]:
    """Every tensor of the adapters of a policy by its name in PEFT, in the order of a forward pass."""
    found = {}
    for name, (part, *more) in parts_of(config).items():
        if not part.at or config.lora is None or part.path[-1] not in config.lora.modules:
            continue
        if more:
            raise ValueError(
                f"{name} is several weights in one, and PEFT has one adapter for it where a run has one for each: "
                "export the merged policy (without --adapters), and merge other adapters with peft (merge_and_unload)"
            )
        stem, (blocks, own), (outputs, inputs) = name.removesuffix("weight"), part.path, part.groups
        into = tuple(range(len(inputs))), (len(inputs),)  # A [inputs, r] is stored as [r, inputs]
        out = (0,), tuple(range(1, 1 + len(outputs)))  # and B [r, outputs] as [outputs, r]
        for suffix, kind, groups in (("A", lora.A, into), ("B", lora.B, out)):
            path = (blocks, own + kind)
            found[f"base_model.model.{stem}lora_{suffix}.weight"] = Part(path, part.at, groups[::-1])
    return found


def load_adapters(
    path: str | pathlib.Path, config: PolicyConfig, mesh: Mesh | None = None
) -> tuple[Lora, dict[str, Any]]:
    """Read adapters that PEFT or `save_adapters` has written.

    Args:
        path: a directory with adapter_config.json and adapter_model.safetensors.
        config: of the policy that they are of; its own lora is not asked.
        mesh: where they go, by the sharding rules; None for the default device.

    Returns:
        (their rank, alpha and modules; the parameters that `krl.policy.trained` tells, float32).

    Raises:
        ValueError: as `check_adapters`.
    """
    config = dataclasses.replace(config, lora=check_adapters(path, config))
    assert config.lora is not None
    like = flatten_dict(lora.trained(config, abstract_params(config, mesh or first_device())))
    leaves: dict[tuple[str, ...], Any] = {}
    with safetensors.safe_open(pathlib.Path(path) / WEIGHTS, framework="np") as opened:
        for name, part in _names(config).items():
            at = part.path
            leaves[at] = read_part(opened.get_slice(name), part, like[at], leaves.get(at))
    return config.lora, unflatten_dict(leaves)


def check_adapters(path: str | pathlib.Path, config: PolicyConfig) -> Lora:
    """The rank, alpha and modules of the adapters in a directory, by its adapter_config.json and its tensors' headers.

    Args:
        path, config: as for `load_adapters`.

    Raises:
        ValueError: a file that is missing or cannot be read, a kind of adapter that is not supported, or tensors that
            are missing, unexpected or of another shape; the message names them.
    """
    path = pathlib.Path(path)
    rank, alpha = _read_fields(path / CONFIG)
    file = path / WEIGHTS
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            views = {name: opened.get_slice(name) for name in list(opened.keys())}
            stored = {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {file}: {error}; name a directory of adapters, whole") from None
    found = Lora(rank, alpha, _modules(file, config, list(stored)))
    config = dataclasses.replace(config, lora=found)
    like = flatten_dict(lora.trained(config, abstract_params(config, first_device())))
    for name, part in _names(config).items():
        if name not in stored:
            raise ValueError(f"{file}: {name} is missing; every layer must have the same adapters{_MERGE}")
        shape, (has, kind) = part_shape(part, like[part.path].shape), stored[name]
        if has != shape or kind not in STORED_TYPES:
            raise ValueError(
                f"{file}: {name} is {kind} of shape {has}; r={rank} and the policy ask for {shape}, "
                f"{' or '.join(STORED_TYPES)}"
            )
    return found


def _read_fields(file: pathlib.Path) -> tuple[int, float]:
    """(rank, alpha) of an adapter_config.json; refuses all that is no plain LoRA."""
    try:
        fields = json.loads(file.read_text())
        kind, rank, alpha = fields["peft_type"], fields["r"], fields["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        inside = next(file.parent.glob(f"*/{CONFIG}"), None)
        told = f"; {inside.parent} does: name it" if inside else ""
        raise ValueError(f"{file.parent} holds no adapters: cannot read {file} ({error!r}){told}") from None
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type {kind!r} is not supported; 'LORA' is")
    for name in fields.keys() - _ASIDE - {"r", "lora_alpha", "use_rslora"}:
        if fields[name] and fields[name] not in _PLAIN.get(name, ()):
            raise ValueError(f"{file}: {name}={fields[name]!r} is not supported{_MERGE}")
    if type(fields.get("use_rslora", False)) not in (bool, type(None)):
        raise ValueError(f"{file}: use_rslora={fields['use_rslora']!r} must be true or false")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not 0 < alpha < LARGEST:
        raise ValueError(f"{file}: r={rank!r} must be a whole number and lora_alpha={alpha!r} a number, above 0")
    return rank, float(alpha) * (math.sqrt(rank) if fields.get("use_rslora") else 1)


def _modules(file: pathlib.Path, config: PolicyConfig, names: list[str]) -> tuple[str, ...]:
    """Which weights the tensors of a file are adapters of."""
    every = dataclasses.replace(config, lora=Lora(1, 1.0, config.adaptable))
    known = {name: part.path[-1] for name, part in _names(every).items()}
    unexpected = [name for name in names if name not in known]
    if unexpected or not names:
        raise ValueError(
            f"{file}: {len(unexpected)} tensors that are no adapters of this policy ({few(unexpected)}); adapters may "
            f"be of {', '.join(config.adaptable)} in each of its {config.num_layers} layers{_MERGE}"
        )
    of = {known[name].removesuffix(lora.A).removesuffix(lora.B) for name in names}
    return tuple(name for name in MODULES if name in of)


def save_adapters(path: str | pathlib.Path, config: PolicyConfig, params: dict[str, Any], *, base: str = "") -> None:
    """Write adapters as a directory that `peft.PeftModel.from_pretrained` opens, float32.

    Args:
        path: a new or empty directory, which appears whole or not at all.
        config: of the policy, with lora.
        params: of the policy, or its adapters alone, on any devices.
        base: the checkpoint that they are adapters of, for base_model_name_or_path.

    Raises:
        ValueError: the policy has no adapters, or the directory holds something or cannot be written.
    """
    if config.lora is None:
        raise ValueError("the policy has no adapters (config.policy.lora_rank=0); write all of it")
    path, leaves, parts = check_new(path), flatten_dict(lora.trained(config, params)), _names(config)
    projections = {name.split(".")[-3] for name in parts}
    fields = {
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": config.lora.alpha, "lora_dropout": 0.0, "peft_type": "LORA",
        "r": config.lora.rank, "target_modules": sorted(projections), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    try:
        with appearing_whole(path) as partial:
            arrays = {name: write_part(leaves[part.path], part) for name, part in parts.items()}
            if partial is not None:
                safetensors.numpy.save_file(arrays, partial / WEIGHTS, metadata={"format": "pt"})
                (partial / WEIGHTS).chmod(0o644)
                (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write the adapters {path}: {error}") from None
