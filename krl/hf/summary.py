"""What can be said of a checkpoint from its config.json alone."""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from krl.hf.config import SIZES, read_config, sees_images
from krl.policy.config import Lora, PolicyConfig
from krl.policy.model import init
from krl.policy.rotary import RopeScaling

_RANK = 32


def describe(path: str | pathlib.Path) -> str:
    """What a checkpoint is and what training it keeps on the devices, in one line, from its config.json alone.

    Args:
        path: a directory with config.json.

    Raises:
        ValueError: it is not supported; the message says why, as that of `read_config`.
    """
    config = read_config(path)
    options = [field for field in dataclasses.fields(PolicyConfig) if field.compare and field.name not in SIZES]
    values = {field.name: getattr(config, field.name) for field in options}
    unusual = [_in_words(field.name, values[field.name]) for field in options if values[field.name] != field.default]
    fields = json.loads(config.source)
    named = fields.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    made_as = [name for name in names if not name.endswith("ForCausalLM")]
    unusual += [f"made as {name}" for name in made_as]
    unusual += ["images, which are left out"] if sees_images(path) else []
    stored = f" in {config.stored_dtype}" if fields.get("dtype") or fields.get("torch_dtype") else ""
    size, active = _count(config), ""
    if experts := config.experts:
        idle = 3 * config.embed_size * config.mlp_size * (experts.count - experts.active) * config.num_layers
        active = f", of which a token goes through {_short(size - idle)}"
    adapters = _count(dataclasses.replace(config, lora=Lora(_RANK, _RANK, config.adaptable))) - size
    return (
        f"{fields['model_type']} is supported: {_short(size)} parameters{stored}{active}; {config.num_layers} layers; "
        f"unusual: {', '.join(unusual) or 'nothing'}; training keeps "
        f"{_short(16 * size)}B of parameters, gradients and moments, or {_short(2 * size + 16 * adapters)}B with "
        f"adapters of rank {_RANK}; python -m krl.plan says what a step takes besides"
    )


def _in_words(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if isinstance(value, tuple):
        return f"{name} in {sum(value)} of {len(value)} layers"
    if name == "experts":
        return f"{value.active} of {value.count} experts"
    return f"{name} {value.kind if isinstance(value, RopeScaling) else value}"


def _short(number: float) -> str:
    """Three digits and a thousand's letter."""
    for letter in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {letter}".rstrip()
        number /= 1000
    return f"{number:.3g} T"


def _count(config: PolicyConfig) -> int:
    """All parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init(config, jax.random.key(0)))))
