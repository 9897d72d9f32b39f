"""The sampler: a few resident slots serve all rollouts of a step, in one jitted program.

A slot whose response has ended takes the next waiting rollout, so decode steps carry live rows however
ragged counts and lengths are. All slots write the same column of their caches at a step, and columns are
used again in turn: T of them hold a response wherever it began. Nothing is moved but on a refill, and memory is
that of the slots and the prompts, whatever R is.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from krl import policy
from krl.rollout.slots import make_slots
from krl.rollout.tokens import draw_tokens
from krl.sharding import RULES, batch_devices, constrain
from krl.types import Prompts, Rollouts

PREFILL_TOKENS = 16384  # prompt tokens that go through the policy at a time
CPU_CACHE = 4e6  # bytes of keys and values that a CPU holds near its cores; more slots than that make it slower
_SHRINK = 4  # how many times fewer slots go on when nothing waits and so few are live
_FEWEST = 16  # slots that are not shrunk further


def generate(
    config: policy.PolicyConfig,
    params: dict,
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
    first_sample: jax.Array | int = 0,
) -> Rollouts:
    """Sample counts[i] responses to prompt i.

    A rollout's random numbers come from fold_in(fold_in(key, task id), sample index), so the samples of
    a prompt do not depend on the other prompts, on R, on the slots or on the devices. Counts, temperature and expected lengths
    are data: changing them does not recompile.

    Args:
        config: the policy's sizes.
        params: the policy's parameters.
        prompts: M prompts, padded on the left; every prompt has at least one token.
        counts: [M] int32 >= 0, rollouts of each prompt.
        key: a typed PRNG key, consumed.
        max_new_tokens: T.
        eos_ids: tokens that end a response; they are part of it.
        pad_id: written after the end.
        num_rollouts: R, the number of rows; needed when counts are traced, else their sum.
        num_slots: S, rollouts that are decoded at a time, on all devices together; static. None for R; on a CPU
            for what CPU_CACHE holds, 8 at least.
        expected_tokens: [M] float32, expected response lengths; the longest begin first, so that few slots wait
            for the last one, and the devices get equal shares. None if nothing is known.
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_k, top_p, min_p: sample from the likeliest tokens only, see `krl.rollout.tokens.least_logit`; static.
        first_sample: the sample index of each prompt's first row, for a second round in the same step.

    Returns:
        Rollouts of R rows sorted by prompt.

    Raises:
        ValueError: counts do not fit the prompts, their sum exceeds num_rollouts, there are no slots, top_k is
            below 0, top_p is not in (0, 1] or min_p is not in [0, 1].
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
        num_slots = num_rollouts
        if jax.default_backend() == "cpu":
            num_slots = max(int(CPU_CACHE / slot_bytes(config, prompts.tokens.shape[1] + max_new_tokens)), 8)
    if num_slots < 1:
        raise ValueError(f"num_slots must be at least 1, got {num_slots}")
    if expected_tokens is None:
        expected_tokens = jnp.ones(counts.shape, jnp.float32)
    return _generate(
        config, params, prompts, counts, key, temperature, first_sample, expected_tokens,
        max_new_tokens, tuple(eos_ids), pad_id, num_rollouts, min(num_slots, num_rollouts),
        (top_k, top_p, min_p),
    )  # fmt: skip


def slot_bytes(config: policy.PolicyConfig, length: int) -> int:
    """Bytes of the keys and values of a slot for prompts and responses of `length` tokens together."""
    size = jnp.dtype(config.dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * length * size


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


@functools.partial(jax.jit, static_argnums=(0, 8, 9, 10, 11, 12, 13))
def _generate(
    config,
    params,
    prompts,
    counts,
    key,
    temperature,
    first_sample,
    expected_tokens,
    max_new_tokens,
    eos_ids,
    pad_id,
    num_rollouts,
    num_slots,
    limits,
):
    prompt_index, sample_index, mask = make_slots(counts, num_rollouts)
    sample_index = jnp.where(mask, sample_index + first_sample, 0)
    if not num_rollouts:
        none = jnp.zeros((0, max_new_tokens))
        return Rollouts(prompt_index, sample_index, mask, none.astype(jnp.int32), none, sample_index, mask, none)
    mesh = jax.sharding.get_abstract_mesh()
    devices, batch_axes = batch_devices(mesh), tuple(name for name in RULES["batch"] if name in mesh.axis_names)
    order = _deal(jnp.append(expected_tokens, 0)[prompt_index], mask, devices)
    source = jnp.append(prompt_index, prompts.tokens.shape[0])[order]  # M where no rollout is
    sample = jnp.append(sample_index, 0)[order]
    task = jnp.append(prompts.task_ids, 0)[source]
    keys = jax.vmap(lambda task, sample: jax.random.fold_in(jax.random.fold_in(key, task), sample))(task, sample)

    layers = policy.for_decoding(config, params)
    serve = functools.partial(
        _serve, config, num_slots=-(-num_slots // devices), max_new_tokens=max_new_tokens, pad_id=pad_id,
        eos_ids=eos_ids, limits=limits, batch_axes=batch_axes if devices > 1 else (),
    )  # fmt: skip
    if devices > 1:  # every device has a queue and slots of its own, and all have all prompts
        rows = PartitionSpec(batch_axes)
        serve = jax.shard_map(
            serve, in_specs=(PartitionSpec(),) * 3 + (rows, rows), out_specs=rows, axis_names=set(batch_axes), check_vma=False
        )  # fmt: skip
    served = serve(layers, _prefill(config, layers, prompts), jnp.asarray(temperature), source, keys)
    back = jnp.argsort(order)[:num_rollouts]
    responses: Responses = jax.tree.map(lambda part: part[back], served)
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


class PromptCache(struct.PyTreeNode):
    """All but the last token of every prompt, read; the last one is a slot's first step."""

    cache: policy.Cache  # [M, K, P - 1, Q] and [M, P - 1]
    last: jax.Array  # [M] int32, the last tokens
    lengths: jax.Array  # [M] int32, tokens


def _prefill(config: policy.PolicyConfig, layers: dict, prompts: Prompts) -> PromptCache:
    """Read every prompt once, PREFILL_TOKENS at a time."""
    tokens, mask = jnp.asarray(prompts.tokens), jnp.asarray(prompts.mask)
    num_prompts, columns = tokens.shape[0], tokens.shape[1] - 1
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)
    at_once = min(max(PREFILL_TOKENS // max(columns, 1), 1), num_prompts)
    spare = -num_prompts % at_once

    def cut(array):
        array = jnp.pad(array[:, :columns], ((0, spare), (0, 0)), constant_values=-1)
        return array.reshape(-1, at_once, columns)

    def one(chunk):
        tokens, positions = (constrain(part, "batch", "length") for part in chunk)
        empty = policy.init_cache(config, at_once, columns)
        return policy.read(config, layers, jnp.maximum(tokens, 0), positions, empty, 0)[1]

    if columns:
        read = jax.lax.map(one, (cut(tokens), cut(positions)))
        cache = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_prompts], read)
    else:
        cache = policy.init_cache(config, num_prompts, 0)
    return PromptCache(cache=cache, last=tokens[:, -1], lengths=mask.sum(axis=1, dtype=jnp.int32))


# ---------------------------------------------------------------- slots


class Slots(struct.PyTreeNode):
    """What S slots are at, and what has come out."""

    row: jax.Array  # [S] int32, the row of the queue that each serves or served last; R for none
    token: jax.Array  # [S] int32, to be read next
    position: jax.Array  # [S] int32, of that token in its sequence
    count: jax.Array  # [S] int32, tokens of the response so far
    start: jax.Array  # [S] int32, the step at which the response began
    live: jax.Array  # [S] bool
    ended: jax.Array  # [S] bool, by an end token
    uniform: jax.Array  # [S, T] float32 in [0, 1), the random numbers of its response
    tokens: jax.Array  # [S, T] int32, the responses; what step s drew is in column s modulo T
    logps: jax.Array  # [S, T] float32
    policy_logps: jax.Array  # [S, T] float32
    cache: policy.Cache  # P - 1 + T columns


class Responses(struct.PyTreeNode):
    """The responses of a queue of R rows."""

    tokens: jax.Array  # [R, T] int32
    logps: jax.Array  # [R, T] float32
    policy_logps: jax.Array  # [R, T] float32
    lengths: jax.Array  # [R] int32
    finished: jax.Array  # [R] bool


class State(struct.PyTreeNode):
    """The whole state of a queue that is being served."""

    slots: Slots
    responses: Responses
    next_row: jax.Array  # [] int32, the first row of the queue that has no slot yet
    step: jax.Array  # [] int32


def _serve(
    config: policy.PolicyConfig,
    layers: dict,
    prompts: PromptCache,
    temperature: jax.Array,
    source: jax.Array,
    keys: jax.Array,
    *,
    num_slots: int,
    max_new_tokens: int,
    pad_id: int,
    eos_ids: tuple[int, ...],
    limits: tuple[int, float, float],
    batch_axes: tuple[str, ...],
) -> "Responses":
    """Serve a queue: the prompts of its rows, [R] int32, M (at its end) where there is no rollout."""
    at_once = max(num_slots // 8, 1)
    num_waiting = (source < len(prompts.last)).sum(dtype=jnp.int32)
    top_k, top_p, min_p = limits
    draw = functools.partial(draw_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    step: Callable = functools.partial(_step, config, layers, draw, jnp.array(eos_ids, jnp.int32))

    def anywhere(flag):  # devices take equally many steps, since they compute together where a mesh splits the model
        return jax.lax.pmax(flag.astype(jnp.int32), batch_axes) > 0 if batch_axes else flag

    def waits(state):
        return anywhere(state.next_row < num_waiting)

    def can_refill(state):
        left = num_waiting - state.next_row
        return anywhere((left > 0) & ((~state.slots.live).sum() >= jnp.minimum(at_once, left)))

    def refill_and_decode(state):
        state = _refill(state, prompts, source, keys, at_once)
        return jax.lax.while_loop(lambda state: waits(state) & ~can_refill(state), step, state)

    state = _idle(config, prompts, len(source), num_slots, max_new_tokens, pad_id)
    state = jax.lax.while_loop(waits, refill_and_decode, state)
    while num_slots:  # nothing waits any more: go on with ever fewer slots, then until the last one ends
        fewer = num_slots // _SHRINK if num_slots // _SHRINK >= _FEWEST else 0
        crowded = functools.partial(lambda most, state: anywhere(state.slots.live.sum() > most), fewer)
        state = jax.lax.while_loop(crowded, step, state)
        state = _shrink(state, fewer)
        num_slots = fewer
    return state.responses


def _idle(config, prompts: PromptCache, num_rows: int, num_slots: int, max_new_tokens: int, pad_id: int) -> State:
    """Idle slots, and nothing served."""
    columns = prompts.cache.positions.shape[1] + max_new_tokens
    zeros, no = jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_slots, bool)
    slots = Slots(
        row=jnp.full(num_slots, num_rows, jnp.int32), token=zeros, position=zeros, count=zeros, start=zeros, live=no,
        ended=no, uniform=jnp.zeros((num_slots, max_new_tokens), jnp.float32),
        tokens=jnp.zeros((num_slots, max_new_tokens), jnp.int32), logps=jnp.zeros((num_slots, max_new_tokens), jnp.float32),
        policy_logps=jnp.zeros((num_slots, max_new_tokens), jnp.float32),
        cache=policy.init_cache(config, num_slots, columns),
    )  # fmt: skip
    responses = Responses(
        tokens=jnp.full((num_rows, max_new_tokens), pad_id, jnp.int32),
        logps=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
        policy_logps=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
        lengths=jnp.zeros(num_rows, jnp.int32),
        finished=jnp.zeros(num_rows, bool),
    )
    return State(slots=slots, responses=responses, next_row=jnp.int32(0), step=jnp.int32(0))


def _uniform(keys: jax.Array, length: int) -> jax.Array:
    """[c, length] float32 in [0, 1) from [c] keys; the first ones are the same for any length."""
    number = jnp.arange(length)
    return jax.vmap(lambda key: jax.vmap(lambda at: jax.random.uniform(jax.random.fold_in(key, at)))(number))(keys)


def _step(config, layers, draw, ends, state: State) -> State:
    """One more token in every live slot."""
    slots, turn = state.slots, state.step % state.slots.tokens.shape[1]
    column = slots.cache.positions.shape[1] - slots.tokens.shape[1] + turn
    position = jnp.where(slots.live, slots.position, -1)
    logits, cache = policy.decode(config, layers, slots.token[:, None], position[:, None], slots.cache, column)
    uniform = jnp.take_along_axis(slots.uniform, slots.count[:, None], axis=1)[:, 0]
    token, logp, policy_logp = draw(constrain(logits, "batch", None), uniform)
    count, over = slots.count + slots.live, slots.live & jnp.isin(token, ends)

    def note(whole, new):  # a slot that idles keeps what it has until it is handed out, however long that takes
        old = jax.lax.dynamic_slice_in_dim(whole, turn, 1, axis=1)
        return jax.lax.dynamic_update_slice(whole, jnp.where(slots.live[:, None], new[:, None], old), (0, turn))

    slots = slots.replace(
        token=token,
        position=slots.position + 1,
        count=count,
        live=slots.live & ~over & (count < slots.tokens.shape[1]),
        ended=slots.ended | over,
        tokens=note(slots.tokens, token),
        logps=note(slots.logps, logp),
        policy_logps=note(slots.policy_logps, policy_logp),
        cache=cache,
    )
    return state.replace(slots=slots, step=state.step + 1)


def _hand_out(state: State, chosen: jax.Array, row: jax.Array) -> Responses:
    """The responses of some slots written to their rows; beyond the queue's end nothing is written."""
    slots, responses = state.slots, state.responses
    order = jnp.arange(slots.tokens.shape[1])
    columns = (slots.start[chosen][:, None] + order) % len(order)
    real = order < slots.count[chosen][:, None]

    def written(whole, part):
        return whole.at[row].set(
            jnp.where(real, jnp.take_along_axis(part[chosen], columns, axis=1), whole[row]), mode="drop"
        )

    return Responses(
        tokens=written(responses.tokens, slots.tokens),
        logps=written(responses.logps, slots.logps),
        policy_logps=written(responses.policy_logps, slots.policy_logps),
        lengths=responses.lengths.at[row].set(slots.count[chosen], mode="drop"),
        finished=responses.finished.at[row].set(slots.ended[chosen], mode="drop"),
    )


def _refill(state: State, prompts: PromptCache, source: jax.Array, keys: jax.Array, at_once: int) -> State:
    """Hand out what up to at_once idle slots have done, and give them the next rows of the queue."""
    slots, num_slots, num_rows = state.slots, len(state.slots.row), len(source)
    chosen = jnp.nonzero(~slots.live, size=at_once, fill_value=num_slots)[0]
    responses = _hand_out(state, chosen, slots.row.at[chosen].get(mode="fill", fill_value=num_rows))
    row = jnp.where(chosen < num_slots, state.next_row + jnp.cumsum(chosen < num_slots) - 1, num_rows)
    prompt = source.at[row].get(mode="fill", fill_value=len(prompts.last))
    given = prompt < len(prompts.last)
    row, prompt = jnp.where(given, row, num_rows), jnp.where(given, prompt, 0)

    def put(whole, part):
        return whole.at[chosen].set(part, mode="drop")

    def put_prompt(whole, part):
        return whole.at[chosen, :, : part.shape[2]].set(part[prompt], mode="drop")

    nothing = jnp.full((at_once, slots.tokens.shape[1]), -1, jnp.int32)
    cache = policy.Cache(
        keys=jax.tree.map(put_prompt, slots.cache.keys, prompts.cache.keys),
        values=jax.tree.map(put_prompt, slots.cache.values, prompts.cache.values),
        positions=put(slots.cache.positions, jnp.concatenate([prompts.cache.positions[prompt], nothing], axis=1)),
    )
    slots = slots.replace(
        row=put(slots.row, row),
        token=put(slots.token, prompts.last[prompt]),
        position=put(slots.position, prompts.lengths[prompt] - 1),
        count=put(slots.count, 0),
        start=put(slots.start, state.step),
        live=put(slots.live, given),
        ended=put(slots.ended, False),
        uniform=put(slots.uniform, _uniform(keys[jnp.minimum(row, num_rows - 1)], slots.tokens.shape[1])),
        cache=cache,
    )
    return State(
        slots=slots, responses=responses, next_row=state.next_row + given.sum(dtype=jnp.int32), step=state.step
    )


def _shrink(state: State, num_slots: int) -> State:
    """Hand out what idle slots have done, and keep the live ones, num_slots at most."""
    slots, num_rows = state.slots, len(state.responses.lengths)
    responses = _hand_out(state, jnp.arange(len(slots.row)), jnp.where(slots.live, num_rows, slots.row))
    kept = jnp.nonzero(slots.live, size=num_slots, fill_value=0)[0]
    there = jnp.arange(num_slots) < slots.live.sum()
    slots = jax.tree.map(lambda leaf: leaf[kept], slots)
    slots = slots.replace(live=there, row=jnp.where(there, slots.row, num_rows))
    return state.replace(slots=slots, responses=responses)
