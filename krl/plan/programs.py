"""The programs of a step, compiled from shapes alone: what they hold on every device."""

import functools
import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from krl import policy
from krl.base.sharding import batch_devices, named_sharding
from krl.base.types import Prompts, Rollouts, TrainState
from krl.rollout.sampler import PROGRAMS, Asked, Work, decoding_axes, slots_of_a_cpu
from krl.rollout.serve import Options, Settings, State, drains
from krl.run.compiled import for_this_backend
from krl.run.setup import find_learning, find_rule, find_slots, prompts_of_a_step
from krl.run.update import policy_update


class Program(NamedTuple):
    """One compiled program, and what it asks of a device; GB are 1e9 bytes."""

    beside: float  # GB that a device holds meanwhile and the program does not see, such as the optimiser's moments
    arguments: float  # GB
    results: float  # GB, without those that take the place of arguments
    temporaries: float  # GB; all that it needs if it does not compile
    code: float  # GB
    compiles: bool  # False for want of memory
    compile_seconds: float

    @property
    def held(self) -> float:
        """GB at the worst moment."""
        return self.beside + self.arguments + self.results + self.temporaries + self.code


# ---------------------------------------------------------------- the rollout


class Sampler(NamedTuple):
    """What the sampler's programs are called with, as shapes."""

    options: Options
    inputs: tuple  # of "begin", after the sizes and the options
    given: Settings
    work: Work
    state: State
    queues: int  # each on devices of its own


def abstract_sampler(config: ConfigDict, policy_config: policy.PolicyConfig, params: dict, mesh: Mesh) -> Sampler:
    """The sampler of a config; to be called inside `jax.set_mesh(mesh)`.

    Args:
        config, policy_config: of the run; the policy's sizes.
        params: abstract, on the mesh of the update.
        mesh: that of decoding.
    """

    def by_heads(tree, rows):
        return jax.tree.map(
            lambda leaf: _array(mesh, leaf.shape, leaf.dtype, rows, *("kv_heads",) * (leaf.ndim == 4)), tree
        )

    sizes, prompts = config.sample, _prompts(config, mesh)
    rollouts, slots = config.alloc.budget, find_slots(config, policy_config, mesh)
    if slots is None and mesh.devices.flat[0].platform == "cpu":
        slots = slots_of_a_cpu(policy_config, params, config.data.max_prompt_tokens + sizes.max_new_tokens)
    options = Options(
        num_rollouts=rollouts, num_slots=min(slots or rollouts, rollouts), pad_id=0, eos_ids=(0,),
        max_new_tokens=sizes.max_new_tokens, limits=(sizes.top_k, sizes.top_p, sizes.min_p),
    )  # fmt: skip
    counts, expected = (_array(mesh, prompts.task_ids.shape, dtype) for dtype in (jnp.int32, jnp.float32))
    inputs = (params, Asked(prompts, counts, jax.eval_shape(jax.random.key, 0), 0, expected))
    work, state = PROGRAMS["begin"].eval_shape(policy_config, options, *inputs)
    weights = jax.tree.map(
        lambda leaf, axes: _array(mesh, leaf.shape, leaf.dtype, *axes), work.weights, decoding_axes(policy_config)
    )
    work = work.replace(
        weights=weights, prompts=by_heads(work.prompts, None), queue=by_heads(work.queue, "batch"),
        order=by_heads(work.order, None),
    )  # fmt: skip
    given = Settings(_array(mesh, (), jnp.float32))
    return Sampler(options, inputs, given, work, by_heads(state, "batch"), batch_devices(mesh))


def compile_rollout(policy_config: policy.PolicyConfig, sampler: Sampler, kept: float) -> dict[str, Program]:
    """The sampler's programs; to be called inside `jax.set_mesh` of the mesh of decoding.

    Args:
        policy_config, sampler: the policy's sizes; from `abstract_sampler`.
        kept: GB of parameters, optimiser and reference.
    """
    options, work, state = sampler.options, sampler.work, sampler.state
    alive, slots = kept + gigabytes((work, state)), len(state.slots.row) // sampler.queues
    return {
        "prefill": _compile(PROGRAMS["begin"], kept, policy_config, options, *sampler.inputs),
        "decode": _compile(PROGRAMS["serve"], alive, policy_config, options, sampler.given, work, state, 0),
        "shrink": _compile(PROGRAMS["shrink"], alive, drains(slots)[0], state),
    }


# ---------------------------------------------------------------- the update


def compile_update(
    config: ConfigDict, policy_config: policy.PolicyConfig, optimizer: Any, learner: TrainState,
    reference: dict[str, Any] | None, mesh: Mesh, *, here: bool
) -> Program:  # fmt: skip
    """`policy_update` on a step's rollouts; to be called inside `jax.set_mesh(mesh)`.

    Args:
        config, policy_config, optimizer: of the run; the policy's sizes.
        learner, reference: the training state, and the parameters that it began with or None, abstract.
        mesh: of the update.
        here: whether the devices are this process's own.
    """
    options = find_learning(config)
    if here:
        update = for_this_backend(policy_update, policy_config, optimizer, **options)
    else:
        update = jax.jit(functools.partial(policy_update, policy_config, optimizer, **options), donate_argnums=0)
    return _compile(
        update, gigabytes(learner) + gigabytes(reference), learner, _prompts(config, mesh), _rollouts(config, mesh),
        _array(mesh, (config.alloc.budget,), jnp.float32), jax.eval_shape(jax.random.key, 0), reference=reference,
    )  # fmt: skip


# ---------------------------------------------------------------- shapes and programs


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))


def _prompts(config: ConfigDict, mesh: Mesh) -> Prompts:
    _, served = prompts_of_a_step(
        config, find_rule(config), max(config.alloc.candidates, config.alloc.budget)
    )  # of enough data
    shape = (served, config.data.max_prompt_tokens)
    return Prompts(_array(mesh, shape, jnp.int32), _array(mesh, shape, bool), _array(mesh, shape[:1], jnp.int32))


def _rollouts(config: ConfigDict, mesh: Mesh) -> Rollouts:
    rows, each = (config.alloc.budget,), (config.alloc.budget, config.sample.max_new_tokens)
    array = functools.partial(_array, mesh)
    return Rollouts(
        prompt_index=array(rows, jnp.int32), sample_index=array(rows, jnp.int32), mask=array(rows, bool),
        tokens=array(each, jnp.int32), logps=array(each, jnp.float32), policy_logps=array(each, jnp.float32),
        lengths=array(rows, jnp.int32), finished=array(rows, bool),
    )  # fmt: skip


def gigabytes(tree: Any) -> float:
    """GB a device holds of a tree of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves) / 1e9


def _compile(jitted: Any, alive: float, *arguments: Any, **named: Any) -> Program:
    """Compile a program that runs while `alive` GB are in memory, its own arguments among them."""
    began, lowered = time.perf_counter(), jitted.lower(*arguments, **named)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:  # XLA for TPUs refuses what does not fit
        used = re.search(r"Used ([\d.]+)([MG]) of|temporaries \(([\d.]+)([MG])\)", str(error))
        if not used:
            raise
        number, unit = used[1] or used[3], used[2] or used[4]
        needed = float(number) * {"M": 2**20, "G": 2**30}[unit] / 1e9
        return Program(0, 0, 0, needed, 0, False, time.perf_counter() - began)
    found = compiled.memory_analysis()
    given = found.argument_size_in_bytes / 1e9
    return Program(
        beside=max(alive - given, 0), arguments=given, temporaries=found.temp_size_in_bytes / 1e9,
        results=(found.output_size_in_bytes - found.alias_size_in_bytes) / 1e9,
        code=found.generated_code_size_in_bytes / 1e9,
        compiles=True, compile_seconds=time.perf_counter() - began,
    )  # fmt: skip
