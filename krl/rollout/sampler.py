"""The sampler: a few resident slots serve all rollouts of a step.

A slot whose response has ended takes the next waiting rollout, so decode steps carry live rows however
ragged counts and lengths are. All slots write the same column of their caches at a step, and columns are
used again in turn: T of them hold a response wherever it began. Nothing is moved but on a refill, and memory is
that of the slots and the prompts, whatever R is, beside the responses themselves.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from krl import policy
from krl.base.sharding import RULES, batch_devices, constrain
from krl.base.types import Array, Prompts, Rollouts
from krl.rollout.serve import (
    Options,
    PromptCache,
    Queue,
    Responses,
    Settings,
    State,
    by_heads,
    cache_columns,
    decode_step,
    drain,
    drains,
    idle,
    serve,
    shrink,
)
from krl.rollout.slots import make_slots

PREFILL_TOKENS = 16384  # prompt tokens that go through the policy at a time
CPU_CACHE = 4e6  # bytes of keys and values that a CPU holds near its cores
_WATCHED = 4  # how many times a watcher is called while rollouts wait for a slot


# (rows [n] of the rollouts, their tokens [n, T], lengths [n]: host arrays, int32; whether the devices have finished
# what they are at, which is when it should return). Every row with a rollout comes once; of several processes, each
# sees those of its own devices.
Watch = Callable[[np.ndarray, np.ndarray, np.ndarray, Callable[[], bool]], None]


def generate(
    config: policy.PolicyConfig,
    params: dict[str, Any],
    prompts: Prompts,
    counts: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int = 0,
    num_rollouts: int | None = None,
    num_slots: int | None = None,
    expected_tokens: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_table: Array | None = None,
    first_sample: jax.Array | int = 0,
    watch: Watch | None = None,
) -> Rollouts:
    """Sample counts[i] responses to prompt i.

    A rollout's random numbers come from fold_in(fold_in(key, task id), sample index), so the samples of a prompt do not
    depend on the other prompts, on R, on the slots or on the devices. Counts, temperature and expected lengths are
    data: changing them does not recompile.

    Args:
        config, params: the policy's sizes and parameters.
        prompts: M prompts, padded on the left; every prompt has at least one token.
        counts: [M] int32 >= 0, rollouts of each prompt.
        key: a typed PRNG key, consumed.
        max_new_tokens: T.
        eos_ids: tokens that end a response; they are part of it.
        pad_id: written after the end.
        num_rollouts: R, the number of rows; needed when counts are traced, else their sum.
        num_slots: S, rollouts that are decoded at a time, on all devices together; static. None for R, or on a
            CPU for what `slots_of_a_cpu` gives.
        expected_tokens: [M] float32, expected response lengths; the longest begin first, so that few slots wait
            for the last one, and the devices get equal shares. None if nothing is known.
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_k, top_p, min_p: sample from the likeliest tokens only, see `krl.rollout.tokens.least_logit`; static.
        stop_table: [states, V] of the strings that end a response, see `krl.rollout.stop.make_table`; None for none.
        first_sample: [M] int32, or one for all: the sample index of each prompt's first row, for a later round of the
            same step.
        watch: called on the host with what has ended while the rest is decoded, see `Watch`; not inside jit.

    Returns:
        Rollouts of R rows sorted by prompt.

    Raises:
        ValueError: counts do not fit the prompts, their sum exceeds num_rollouts, which is not given though they are
            traced, there are no slots, top_k is below 0, top_p is not in (0, 1] or min_p is not in [0, 1].
    """
    if jnp.shape(counts) != prompts.tokens.shape[:1]:
        raise ValueError(f"counts must have shape [M] = [{prompts.tokens.shape[0]}], got {jnp.shape(counts)}")
    if not isinstance(counts, jax.core.Tracer):
        total = int(counts.sum())
        num_rollouts = total if num_rollouts is None else num_rollouts
        if total > num_rollouts:
            raise ValueError(f"the counts sum to {total} and num_rollouts is only {num_rollouts}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if top_k < 0 or not 0 <= min_p <= 1:
        raise ValueError(f"top_k must be at least 0 and min_p between 0 and 1, got {top_k} and {min_p}")
    if num_rollouts is None:
        raise ValueError("num_rollouts must be given when counts are traced")
    if num_slots is None:
        length = prompts.tokens.shape[1] + max_new_tokens
        num_slots = slots_of_a_cpu(config, params, length) if jax.default_backend() == "cpu" else max(num_rollouts, 1)
    if num_slots < 1:
        raise ValueError(f"num_slots must be at least 1, got {num_slots}")
    expected_tokens = jnp.ones(counts.shape) if expected_tokens is None else expected_tokens
    options = Options(
        num_rollouts=num_rollouts, num_slots=min(num_slots, num_rollouts), max_new_tokens=max_new_tokens,
        eos_ids=tuple(eos_ids), pad_id=pad_id, limits=(top_k, top_p, min_p),
    )  # fmt: skip
    if not num_rollouts or not len(prompts.tokens):
        return _nothing(options, counts)
    asked = Asked(prompts, counts, key, first_sample, expected_tokens)
    return _generate(config, options, watch, Settings(jnp.asarray(temperature), stop_table), params, asked)


def _nothing(options: Options, counts: jax.Array) -> Rollouts:
    """Rows without a rollout."""
    prompt_index, zeros, mask = make_slots(counts, options.num_rollouts)
    none = jnp.zeros((options.num_rollouts, options.max_new_tokens))
    tokens = jnp.full(none.shape, options.pad_id, jnp.int32)
    return Rollouts(prompt_index, zeros, mask, tokens, none, zeros, mask, none)


def slot_bytes(config: policy.PolicyConfig, length: int) -> int:
    """Bytes of the keys and values of a slot for prompts and responses of `length` tokens together."""
    size = jnp.dtype(config.dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * length * size


def slots_of_a_cpu(config: policy.PolicyConfig, params: dict[str, Any], length: int) -> int:
    """How many slots CPUs decode at a time, on all processes together.

    A step reads all parameters, whatever the slots. Where these fit into the caches near the cores that costs nothing,
    and slots should not drive each other's keys and values out: as many as have theirs in CPU_CACHE, 8 at least. Larger
    policies come from memory, and the more slots share them the better; keys and values get as much memory as they,
    unless config.sample.memory_gb or config.sample.slots says otherwise.

    Args:
        config, params: the policy's sizes and parameters.
        length: tokens of a prompt and a response, P + T.
    """
    read = sum(leaf.size for leaf in jax.tree.leaves(params)) * jnp.dtype(config.dtype).itemsize
    return jax.process_count() * max(int(max(CPU_CACHE, read) / slot_bytes(config, length)), 8)


def slots_in_memory(config: policy.PolicyConfig, length: int, memory_gb: float, mesh: Mesh) -> int:
    """How many slots, on all devices together, have their keys and values in so much memory of each device.

    Args:
        config: the policy's sizes.
        length: tokens of a prompt and a response, P + T.
        memory_gb: of each device, GB.
        mesh: the devices.

    Returns:
        A multiple of the devices that split rows; one each at least.
    """
    heads = math.prod(mesh.shape[name] for name in RULES["kv_heads"] if name in mesh.axis_names)
    return batch_devices(mesh) * max(1, int(memory_gb * 1e9 * heads / slot_bytes(config, length)))


class Asked(struct.PyTreeNode):
    """What is to be sampled; `generate` says more of each."""

    prompts: Prompts
    counts: jax.Array  # [M] int32
    key: jax.Array  # a typed PRNG key
    first_sample: jax.Array | int  # [M] int32, or one for all
    expected_tokens: jax.Array  # [M] float32


class Work(struct.PyTreeNode):
    """What the decoding of a step goes by."""

    weights: dict[str, Any]  # of the policy, in the compute dtype, whole on every device but for the axis "model"
    prompts: PromptCache
    queue: Queue  # of the devices, one after the other
    order: jax.Array  # [R'] int32, the row of each in the rollouts; R where there is none


def _generate(
    config: policy.PolicyConfig,
    options: Options,
    watch: Watch | None,
    given: Settings,
    params: dict[str, Any],
    asked: Asked,
) -> Rollouts:
    work, state = PROGRAMS["begin"](config, options, params, asked)
    slots, rows = _slots_each(options), len(work.order) // _devices()
    parts = _WATCHED if watch and rows > slots else 1
    known, before = np.zeros(len(work.order), bool), None
    targets = [slots + (rows - slots) * (part + 1) // parts for part in range(parts)]
    for name, amount in [("serve", until) for until in targets] + [("drain", fewer) for fewer in drains(slots)]:
        state, ended = PROGRAMS[name](config, options, given, work, state, amount)
        if name == "drain":
            state, ended = PROGRAMS["shrink"](amount, state)
        if watch and before:
            watch(*_newly_ended(work.order, known, *before), ended[1].is_ready)
        before = ended
    rollouts = PROGRAMS["collect"](options, asked, work.order, state.responses)
    if watch and before:
        watch(*_newly_ended(work.order, known, *before), rollouts.lengths.is_ready)
    return rollouts


def _newly_ended(
    order: Array, known: np.ndarray, tokens: jax.Array, lengths: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows [n], tokens [n, T], lengths [n]) of what this process's devices have ended; `known` [R'] takes them in."""
    order, none = np.asarray(order), np.zeros(0, np.int32)
    found = [(none, np.zeros((0, tokens.shape[1]), np.int32), none)]  # another process may have all the first copies
    for part, length in zip(tokens.addressable_shards, lengths.addressable_shards, strict=True):
        if part.replica_id == 0:
            length = np.asarray(length.data)
            new = (length > 0) & ~known[part.index[0]]
            known[part.index[0]] |= new
            found.append((order[part.index[0]][new], np.asarray(part.data)[new], length[new]))
    rows, responses, lengths_of = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, responses, lengths_of


def _devices() -> int:
    """How many queues there are."""
    return batch_devices(jax.sharding.get_abstract_mesh())


def _slots_each(options: Options) -> int:
    """Slots of each queue."""
    return -(-options.num_slots // _devices())


def _each(function: Callable[[tuple[str, ...], Any, Any], State]) -> Callable[[Any, Any], State]:
    """A function of (batch axes, what is whole on all devices, what lies on those of a queue) for every queue."""
    batch_axes = tuple(name for name in RULES["batch"] if name in jax.sharding.get_abstract_mesh().axis_names)
    if _devices() == 1:
        return functools.partial(function, ())
    rows = PartitionSpec(batch_axes)
    return jax.shard_map(
        functools.partial(function, batch_axes), in_specs=(PartitionSpec(), rows), out_specs=rows,
        axis_names=set(batch_axes), check_vma=False
    )  # fmt: skip


def _begin(config: policy.PolicyConfig, options: Options, params: dict[str, Any], asked: Asked) -> tuple[Work, State]:
    """Deal the rollouts, read the prompts, and clear the slots."""
    prompts, key = asked.prompts, asked.key
    prompt_index, sample_index, mask = _numbered(asked, options.num_rollouts)
    order = constrain(_deal(jnp.append(asked.expected_tokens, 0)[prompt_index], mask, _devices()), None)
    source = jnp.append(prompt_index, prompts.tokens.shape[0])[order]  # M where no rollout is
    sample = jnp.append(sample_index, 0)[order]
    task = jnp.append(prompts.task_ids, 0)[source]
    keys = jax.vmap(lambda task, sample: jax.random.fold_in(jax.random.fold_in(key, task), sample))(task, sample)
    weights, queue = _for_decoding(config, params), Queue(source, keys)
    read = _prefill(config, weights, prompts)

    def cleared(_: tuple[str, ...], prompts: PromptCache, queue: Queue) -> State:
        return idle(config, options, _slots_each(options), prompts, queue)

    return Work(weights, read, queue, order), _each(cleared)(read, queue)


def _for_decoding(config: policy.PolicyConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters in the compute dtype, gathered once: whole on every device but for the axis "model"."""

    weights = policy.for_decoding(config, params)
    return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), weights, decoding_axes(config))


def decoding_axes(config: policy.PolicyConfig) -> dict[str, Any]:
    """The logical axes along which the parameters that decode are split: a tree with PartitionSpec leaves."""

    def split(axes: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(None if axis == "embed" else axis for axis in axes))

    axes = jax.tree.map(split, policy.param_axes(dataclasses.replace(config, lora=None)))  # they are merged
    one_layer = jax.tree.map(lambda axes: PartitionSpec(*axes[1:]), axes["blocks"])
    return axes | {"blocks": (one_layer,) * config.num_layers}


def _serve(
    config: policy.PolicyConfig, options: Options, given: Settings, work: Work, state: State, until: jax.Array | int
) -> State:
    def one(batch_axes: tuple[str, ...], whole: Any, rows: tuple[Queue, State]) -> State:
        weights, given, prompts, until = whole
        return serve(functools.partial(decode_step, config, options, weights, given), batch_axes, prompts, *rows, until)

    return _each(one)((work.weights, given, work.prompts, until), (work.queue, state))


def _drain(
    config: policy.PolicyConfig, options: Options, given: Settings, work: Work, state: State, most: jax.Array | int
) -> State:
    def one(batch_axes: tuple[str, ...], whole: Any, state: State) -> State:
        weights, given, most = whole
        return drain(functools.partial(decode_step, config, options, weights, given), batch_axes, state, most)

    return _each(one)((work.weights, given, most), state)


def _shrink(num_slots: int, state: State) -> State:
    return _each(lambda batch_axes, whole, state: shrink(state, num_slots))((), state)


def _numbered(asked: Asked, num_rollouts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(prompt_index [R], sample_index [R], mask [R]) of rollouts whose numbers begin at first_sample."""
    prompt_index, sample_index, mask = make_slots(asked.counts, num_rollouts)
    first = jnp.append(jnp.broadcast_to(asked.first_sample, asked.counts.shape), 0)[prompt_index]
    return prompt_index, jnp.where(mask, sample_index + first, 0), mask


def _collect(options: Options, asked: Asked, order: jax.Array, responses: Responses) -> Rollouts:
    """The responses in the order of their prompts."""
    prompt_index, sample_index, mask = _numbered(asked, options.num_rollouts)
    back = jnp.argsort(order)[: options.num_rollouts]
    responses = jax.tree.map(lambda part: part[back], responses)
    return Rollouts(
        prompt_index=prompt_index,
        sample_index=sample_index,
        mask=mask,
        tokens=constrain(responses.tokens, "batch", "length"),
        logps=constrain(responses.logps, "batch", "length"),
        lengths=responses.lengths,
        finished=responses.finished,
        policy_logps=constrain(responses.policy_logps, "batch", "length"),
    )


def _with_a_look(function: Callable[..., State]) -> Callable[..., tuple[State, tuple[jax.Array, jax.Array]]]:
    """The same, and what has ended as arrays of their own, since the state is given away."""

    def looked_at(*arguments: Any) -> tuple[State, tuple[jax.Array, jax.Array]]:
        state = function(*arguments)
        return state, (state.responses.tokens, state.responses.lengths)

    return looked_at


PROGRAMS = {  # that sample a step's rollouts one after the other; serve and drain are given the state away
    "begin": jax.jit(_begin, static_argnums=(0, 1)),
    "serve": jax.jit(_with_a_look(_serve), static_argnums=(0, 1), donate_argnums=4),
    "drain": jax.jit(_with_a_look(_drain), static_argnums=(0, 1), donate_argnums=4),
    "shrink": jax.jit(_with_a_look(_shrink), static_argnums=0),
    "collect": jax.jit(_collect, static_argnums=0),
}


def _deal(expected: jax.Array, mask: jax.Array, devices: int) -> jax.Array:
    """An order of rows: the devices' queues one after the other, each longest first and rows without a rollout last.

    Rows are dealt in turn, so that the queues take equally long; where they do not come out even, the number R stands
    for no row.

    Args:
        expected: [R] float32, expected lengths.
        mask: [R] bool, True on rollouts.
        devices: how many queues there are.
    """
    longest_first = jnp.lexsort((-expected, ~mask)).astype(jnp.int32)
    spare = -len(expected) % devices
    padded = jnp.concatenate([longest_first, jnp.full(spare, len(expected), jnp.int32)])
    return padded.reshape(-1, devices).T.reshape(-1)


# ---------------------------------------------------------------- prompts


def _prefill(config: policy.PolicyConfig, weights: dict[str, Any], prompts: Prompts) -> PromptCache:
    """Read every prompt once, PREFILL_TOKENS at a time, but a prompt on each device at least."""
    tokens, mask = jnp.asarray(prompts.tokens), jnp.asarray(prompts.mask)
    num_prompts, columns = tokens.shape[0], tokens.shape[1] - 1
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)
    at_once = max(PREFILL_TOKENS // max(columns, 1), 1)
    at_once = min(-(-at_once // _devices()) * _devices(), num_prompts)  # equally many for all devices

    def one(number: jax.Array, cache: policy.Cache) -> policy.Cache:
        """Some more prompts; where they do not come out even, the last ones have some of those before in them again."""
        begin = number * at_once

        def some(array: jax.Array) -> jax.Array:
            return constrain(jax.lax.dynamic_slice_in_dim(array[:, :columns], begin, at_once), "batch", "length")

        empty = policy.init_cache(config, at_once, cache_columns(columns))
        read = policy.read(config, weights, some(tokens), some(positions), empty, 0)[1]
        # Written where they stay: results that a loop stacks are kept twice while they are gathered and put in order.
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=begin, axis=0)
        return by_heads(jax.tree.map(put, cache, by_heads(read)))

    cache = by_heads(policy.init_cache(config, num_prompts, cache_columns(columns)))
    if columns:
        cache = jax.lax.fori_loop(0, -(-num_prompts // at_once), one, cache)
    return PromptCache(cache=cache, last=tokens[:, -1], lengths=mask.sum(axis=1, dtype=jnp.int32))
