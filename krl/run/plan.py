"""What a run needs of every device, before it costs anything: its real programs compiled ahead of time.

    python -m krl.run.plan --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --topology v5p:2x2x4

DIR needs no more than the checkpoint's config.json. A topology is one that `jax.experimental.topologies` knows for
TPUs, for which libtpu must be installed (`pip install "jax[tpu]"`) and no TPU be there; without it the programs are compiled for the
devices that are. Nothing is allocated.
"""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from configs.check import check
from configs.flags import define_flags, one_line_errors, parse_flags
from krl import policy, rollout
from krl.policy.attention import why_not
from krl.rollout.sampler import slot_bytes
from krl.run.setup import NAMES, abstract_params, computed_by, find_slots
from krl.run.update import abstract_state, make_optimizer, policy_update
from krl.sharding import batch_devices, make_mesh, named_sharding, reshape_mesh
from krl.types import Prompts, Rollouts


def main(_):
    """The command line."""
    with one_line_errors("krl.run.plan"):
        Console().print(show(plan(flags.FLAGS.config, flags.FLAGS.topology)))


def plan(config: ConfigDict, topology: str) -> dict[str, dict[str, float]]:
    """Compile the rollout and the update of a config.

    Args:
        config: every key of configs/default.py; policy.path needs a config.json only.
        topology: for example "v5p:2x2x4"; "" for the devices that are here.

    Returns:
        What a device holds, GB, by program and part.

    Raises:
        ValueError: the config cannot work, or the mesh does not fit the topology or the parameters.
    """
    check(config, **NAMES)
    mesh = find_mesh(config, topology)
    policy_config = find_sizes(config, on_tpu=bool(topology))
    with jax.set_mesh(mesh):
        params = abstract_params(policy_config, mesh)
        update = compile_update(config, policy_config, params, mesh)
    layout = reshape_mesh(mesh, tuple(config.mesh.decode))
    with jax.set_mesh(layout):
        slots = find_slots(config, policy_config, layout)
        return {"rollout": compile_rollout(config, policy_config, params, layout, slots), "update": update}


def find_sizes(config: ConfigDict, *, on_tpu: bool) -> policy.PolicyConfig:
    """The policy of a config, with the attention that "auto" would choose on the devices it is planned for."""
    if config.policy.path:
        found = policy.read_config(config.policy.path, **computed_by(config))
    else:
        sizes = {name: value for name, value in config.policy.items() if name != "path"}
        found = policy.PolicyConfig(vocab_size=config.tokenizer.vocab_size, **sizes)
    if not on_tpu or found.attention != "auto":
        return found
    length = config.data.max_prompt_tokens + config.sample.max_new_tokens
    query: Any = jax.ShapeDtypeStruct((1, length, found.num_heads, found.head_size), found.dtype)
    reason = why_not("splash", query, None, found.attention_softcap)
    return dataclasses.replace(found, attention="xla" if reason else "splash")


def find_mesh(config: ConfigDict, topology: str) -> Mesh:
    """The config's mesh over the devices of a topology, or those that are here."""
    shape, names = tuple(config.mesh.shape), tuple(config.mesh.axis_names)
    if not topology:
        return make_mesh(shape, names)
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    if math.prod(shape) != len(described.devices):
        raise ValueError(f"{topology} has {len(described.devices)} devices and config.mesh.shape is {shape}")
    grid = topologies.make_mesh(described, shape, names).devices
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def compile_rollout(config, policy_config, params, mesh, slots) -> dict[str, float]:
    """GB a device of one call of the sampler."""
    everywhere = named_sharding(mesh)
    prompts = _prompts(config, everywhere)
    counts = jax.ShapeDtypeStruct((config.prompts_per_step,), jnp.int32, sharding=everywhere)
    key = jax.eval_shape(jax.random.key, 0)
    generate = functools.partial(
        rollout.generate, policy_config, max_new_tokens=config.sample.max_new_tokens, eos_ids=(0,), num_slots=slots,
        num_rollouts=config.alloc.budget, temperature=config.sample.temperature,
    )  # fmt: skip
    held = _memory(jax.jit(generate), params, prompts, counts, key)
    length = config.data.max_prompt_tokens + config.sample.max_new_tokens
    slots = min(slots or config.alloc.budget, config.alloc.budget)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params)) * jnp.dtype(policy_config.dtype).itemsize / 1e9
    split = mesh.shape.get("model", 1)
    return held | {
        "parameters": _gb(params),
        "parameters for decoding": weights / split,
        "keys and values of slots": slot_bytes(policy_config, length) * slots / batch_devices(mesh) / split / 1e9,
        "keys and values of prompts": slot_bytes(policy_config, config.data.max_prompt_tokens) * config.prompts_per_step / split / 1e9,
        "slots": slots,
    }  # fmt: skip


def compile_update(config, policy_config, params, mesh) -> dict[str, float]:
    """GB a device of one call of `policy_update`."""
    everywhere, optim, loss = named_sharding(mesh), config.optim, config.loss
    optimizer = make_optimizer(
        learning_rate=optim.learning_rate, warmup_steps=optim.warmup_steps, decay_steps=optim.decay_steps,
        beta1=optim.beta1, beta2=optim.beta2, weight_decay=optim.weight_decay, grad_clip=optim.grad_clip,
    )  # fmt: skip
    state = abstract_state(policy_config, optimizer, params)
    rows, length = config.alloc.budget, config.sample.max_new_tokens
    batch: Any = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
    rollouts = Rollouts(
        prompt_index=batch((rows,), jnp.int32), sample_index=batch((rows,), jnp.int32), mask=batch((rows,), bool),
        tokens=batch((rows, length), jnp.int32), logps=batch((rows, length), jnp.float32),
        policy_logps=batch((rows, length), jnp.float32), lengths=batch((rows,), jnp.int32), finished=batch((rows,), bool),
    )  # fmt: skip
    update = functools.partial(
        policy_update, policy_config, optimizer, num_updates=optim.updates_per_step, micro_tokens=optim.micro_tokens,
        packed=optim.packed, temperature=config.sample.temperature, surrogate=loss.surrogate, clip_low=loss.clip_low,
        clip_high=loss.clip_high, dual_clip=loss.dual_clip, importance_cap=loss.importance_cap,
        kl_coefficient=loss.kl_coefficient, kl_estimator=loss.kl_estimator, entropy_coefficient=loss.entropy_coefficient,
    )  # fmt: skip
    key = jax.eval_shape(jax.random.key, 0)
    advantages = batch((rows,), jnp.float32)
    held = _memory(
        jax.jit(update, donate_argnums=0), state, _prompts(config, everywhere), rollouts, advantages, key,
        reference=params if loss.kl_coefficient else None,
    )  # fmt: skip
    return held | {"parameters": _gb(params), "optimizer": _gb(state.opt_state)}


def _prompts(config, everywhere) -> Prompts:
    shape = (config.prompts_per_step, config.data.max_prompt_tokens)
    array: Any = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
    return Prompts(array(shape, jnp.int32), array(shape, bool), array(shape[:1], jnp.int32))


def _memory(jitted, *arguments, **named) -> dict[str, float]:
    began = time.perf_counter()
    found = jitted.lower(*arguments, **named).compile().memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes / 1e9,
        "results": (found.output_size_in_bytes - found.alias_size_in_bytes) / 1e9,
        "temporaries": found.temp_size_in_bytes / 1e9,
        "program": found.generated_code_size_in_bytes / 1e9,
        "seconds to compile": time.perf_counter() - began,
    }


def _gb(tree) -> float:
    """GB a device holds of a tree of abstract arrays."""
    return (
        sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        / 1e9
    )


def show(held: dict[str, dict[str, float]]) -> Table:
    """The plan as a table, a row for each part."""
    table = Table("GB on each device", *held)
    others = {"slots": "slots, a number", "seconds to compile": "compilation, seconds"}
    for part in dict.fromkeys(part for program in held.values() for part in program):
        table.add_row(
            others.get(part, part), *(f"{program[part]:.4g}" if part in program else "" for program in held.values())
        )
    return table


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_string("topology", "", "of TPUs to compile for, such as v5p:2x2x4; none for the devices that are here")
    app.run(main, flags_parser=parse_flags)
