"""A queue of rollouts served by a few slots, on one device or on a group of them that splits the policy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from krl import policy
from krl.base.sharding import constrain
from krl.base.types import Array
from krl.rollout.tokens import LEVELS, draw_tokens, random_numbers

REFILL = 8  # slots are refilled when so large a part of them idles, one in eight
SHRINK = 4  # how many times fewer slots go on when nothing waits and so few are live
FEWEST = 16  # slots that are not shrunk further
TILE = 16  # rows of a TPU's tiles, of 16 bits


class Options(NamedTuple):
    """What a program is compiled for."""

    num_rollouts: int  # R
    num_slots: int  # S, on all devices together
    max_new_tokens: int  # T
    eos_ids: tuple[int, ...]
    pad_id: int
    limits: tuple[int, float, float]  # top_k, top_p, min_p


class Settings(struct.PyTreeNode):
    """What decoding goes by that no program is compiled for, the same for all rollouts."""

    temperature: jax.Array | float  # [], the logits are divided by it
    # [states, V] int16 or int32, which strings end a response, see `krl.rollout.stop.make_table`; None for none
    stop_table: Array | None = None


class PromptCache(struct.PyTreeNode):
    """All but the last token of every prompt, read; the last one is a slot's first step."""

    cache: policy.Cache  # of P - 1 columns, and unused ones where that is many
    last: jax.Array  # [M] int32, the last tokens
    lengths: jax.Array  # [M] int32, tokens


class Queue(struct.PyTreeNode):
    """The rollouts that slots serve, in their order."""

    source: jax.Array  # [R] int32, the prompt of each; M (at the end) where there is no rollout
    keys: jax.Array  # [R] PRNG keys


class Slots(struct.PyTreeNode):
    """What S slots are at, and what has come out."""

    row: jax.Array  # [S] int32, the row of the queue that each serves or served last; R for none
    token: jax.Array  # [S] int32, to be read next
    position: jax.Array  # [S] int32, of that token in its sequence
    count: jax.Array  # [S] int32, tokens of the response so far
    start: jax.Array  # [S] int32, the step at which the response began
    live: jax.Array  # [S] bool
    ended: jax.Array  # [S] bool, by an end token or a stop string
    matched: jax.Array  # [S] int32, the row of the stop table that its response has led to
    uniform: jax.Array  # [S, T, LEVELS] float32 in [0, 1), the random numbers of its response
    tokens: jax.Array  # [S, T] int32, the responses; what step s drew is in column s modulo T
    logps: jax.Array  # [S, T] float32
    policy_logps: jax.Array  # [S, T] float32
    cache: policy.Cache  # P - 1 columns of the prompt, a few unused ones, T of the response


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
    next_row: jax.Array  # [1] int32, the first row of the queue that has no slot yet; of a mesh's queues side by side
    step: jax.Array  # [1] int32, the same


def serve(
    step: Callable[[State], State],
    batch_axes: tuple[str, ...],
    prompts: PromptCache,
    queue: Queue,
    state: State,
    until: jax.Array | int,
) -> State:
    """Decode until the first `until` rollouts of the queue have got a slot.

    Args:
        step: `decode_step` of a policy.
        batch_axes: of the mesh, over which other queues are served at the same time; () if this is the only one.
        prompts, queue, state: what has been read, what is to be served, and how far that is.
        until: [] int32.
    """
    at_once = max(len(state.slots.row) // REFILL, 1)
    num_given = (queue.source < len(prompts.last)).sum(dtype=jnp.int32)

    def waits(state: State) -> jax.Array:
        return _anywhere(batch_axes, state.next_row[0] < jnp.minimum(num_given, until))

    def cannot_refill(state: State) -> jax.Array:
        left = num_given - state.next_row[0]
        return ~_anywhere(batch_axes, (left > 0) & ((~state.slots.live).sum() >= jnp.minimum(at_once, left)))

    def decode_and_refill(state: State) -> State:
        return _refill(jax.lax.while_loop(cannot_refill, step, state), prompts, queue, at_once)

    return jax.lax.while_loop(waits, decode_and_refill, state)


def drain(step: Callable[[State], State], batch_axes: tuple[str, ...], state: State, most: jax.Array | int) -> State:
    """Decode, when nothing waits, until at most `most` slots are live; arguments as for `serve`."""

    def crowded(state: State) -> jax.Array:
        return _anywhere(batch_axes, state.slots.live.sum() > most)

    return jax.lax.while_loop(crowded, step, state)


def drains(num_slots: int) -> list[int]:
    """How many slots go on after each `drain` and `shrink`, until none does."""
    fewer = []
    while num_slots:
        num_slots = num_slots // SHRINK if num_slots // SHRINK >= FEWEST else 0
        fewer.append(num_slots)
    return fewer


def _anywhere(batch_axes: tuple[str, ...], flag: jax.Array) -> jax.Array:
    """Whether a flag is up on any device: they take equally many steps, as a mesh may split the policy over them."""
    return jax.lax.pmax(flag.astype(jnp.int32), batch_axes) > 0 if batch_axes else flag


def idle(config: policy.PolicyConfig, options: Options, num_slots: int, prompts: PromptCache, queue: Queue) -> State:
    """Idle slots, and nothing served."""
    num_rows, max_new_tokens = len(queue.source), options.max_new_tokens
    columns = cache_columns(prompts.cache.positions.shape[1] + max_new_tokens)
    zeros, no = jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_slots, bool)
    slots = Slots(
        row=jnp.full(num_slots, num_rows, jnp.int32), token=zeros, position=zeros, count=zeros, start=zeros, live=no,
        ended=no, matched=zeros,
        uniform=jnp.zeros((num_slots, max_new_tokens, LEVELS), jnp.float32),
        tokens=jnp.zeros((num_slots, max_new_tokens), jnp.int32),
        logps=jnp.zeros((num_slots, max_new_tokens), jnp.float32),
        policy_logps=jnp.zeros((num_slots, max_new_tokens), jnp.float32),
        cache=by_heads(policy.init_cache(config, num_slots, columns)),
    )  # fmt: skip
    responses = Responses(
        tokens=jnp.full((num_rows, max_new_tokens), options.pad_id, jnp.int32),
        logps=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
        policy_logps=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
        lengths=jnp.zeros(num_rows, jnp.int32),
        finished=jnp.zeros(num_rows, bool),
    )
    return State(slots=slots, responses=responses, next_row=jnp.zeros(1, jnp.int32), step=jnp.zeros(1, jnp.int32))


def cache_columns(tokens: int) -> int:
    """Columns of a cache that holds so many tokens.

    A TPU keeps an array whose next to last axis is not a multiple of its tiles in another order than attention reads
    it, and copies all caches at the beginning and end of every program, which takes their memory twice. Where caches
    are short, a few columns more would cost more.
    """
    return -(-tokens // TILE) * TILE if tokens >= 8 * TILE else tokens


def by_heads(cache: policy.Cache) -> policy.Cache:
    """Keys and values split along "model" from the start: parts of a step hand them on in this layout."""
    axes = {4: (None, "kv_heads", None, None), 2: (None, None)}
    return jax.tree.map(lambda leaf: constrain(leaf, *axes[leaf.ndim]), cache)


def decode_step(
    config: policy.PolicyConfig, options: Options, weights: dict[str, Any], given: Settings, state: State
) -> State:
    """One more token in every live slot.

    Args:
        config, options: the policy's sizes; what the program is compiled for.
        weights: from `krl.policy.for_decoding`.
        given: temperature and stop table.
        state: of the queue.
    """
    slots, turn = state.slots, state.step[0] % state.slots.tokens.shape[1]
    top_k, top_p, min_p = options.limits
    column = slots.cache.positions.shape[1] - slots.tokens.shape[1] + turn
    position = jnp.where(slots.live, slots.position, -1)
    logits, cache = policy.decode(config, weights, slots.token[:, None], position[:, None], slots.cache, column)
    uniform = jnp.take_along_axis(slots.uniform, slots.count[:, None, None], axis=1)[:, 0]
    token, logp, policy_logp = draw_tokens(
        constrain(logits, "batch", None), uniform, temperature=given.temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    count, matched = slots.count + slots.live, slots.matched
    over = jnp.isin(token, jnp.array(options.eos_ids, jnp.int32))
    if given.stop_table is not None:
        matched = given.stop_table[matched, token].astype(jnp.int32)
        over |= matched == len(given.stop_table) - 1  # the last row is of responses that hold a string
    over &= slots.live

    def note(whole: jax.Array, new: jax.Array) -> jax.Array:
        # a slot that idles keeps what it has until it is handed out, however long that takes
        old = jax.lax.dynamic_slice_in_dim(whole, turn, 1, axis=1)
        return jax.lax.dynamic_update_slice(whole, jnp.where(slots.live[:, None], new[:, None], old), (0, turn))

    slots = slots.replace(
        token=token,
        position=slots.position + 1,
        count=count,
        live=slots.live & ~over & (count < slots.tokens.shape[1]),
        ended=slots.ended | over,
        matched=matched,
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

    def written(whole: jax.Array, part: jax.Array) -> jax.Array:
        new = part[chosen]
        if part.ndim == 2:
            new = jnp.where(real, jnp.take_along_axis(new, columns, axis=1), whole[row])
        return whole.at[row].set(new, mode="drop")

    done = Responses(slots.tokens, slots.logps, slots.policy_logps, lengths=slots.count, finished=slots.ended)
    return jax.tree.map(written, responses, done)


def _refill(state: State, prompts: PromptCache, queue: Queue, at_once: int) -> State:
    """Hand out what up to at_once idle slots have done, and give them the next rows of the queue."""
    slots, num_slots, num_rows = state.slots, len(state.slots.row), len(queue.source)
    chosen = jnp.nonzero(~slots.live, size=at_once, fill_value=num_slots)[0]
    responses = _hand_out(state, chosen, slots.row.at[chosen].get(mode="fill", fill_value=num_rows))
    row = jnp.where(chosen < num_slots, state.next_row + jnp.cumsum(chosen < num_slots) - 1, num_rows)
    prompt = queue.source.at[row].get(mode="fill", fill_value=len(prompts.last))
    given = prompt < len(prompts.last)
    row, prompt = jnp.where(given, row, num_rows), jnp.where(given, prompt, 0)

    def put(whole: jax.Array, part: jax.Array | int) -> jax.Array:
        return whole.at[chosen].set(part, mode="drop")

    def put_prompt(whole: jax.Array, part: jax.Array) -> jax.Array:
        return whole.at[chosen, :, : part.shape[2]].set(part[prompt], mode="drop")

    left = slots.cache.positions.shape[1] - prompts.cache.positions.shape[1]
    nothing = jnp.full((at_once, left), -1, jnp.int32)
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
        start=put(slots.start, state.step[0]),
        live=put(slots.live, given),
        ended=put(slots.ended, False),
        matched=put(slots.matched, 0),
        uniform=put(slots.uniform, random_numbers(queue.keys[jnp.minimum(row, num_rows - 1)], slots.tokens.shape[1])),
        cache=cache,
    )
    return state.replace(slots=slots, responses=responses, next_row=state.next_row + given.sum(dtype=jnp.int32))


def shrink(state: State, num_slots: int) -> State:
    """Hand out what idle slots have done, and keep the live ones, num_slots at most."""
    slots, num_rows = state.slots, len(state.responses.lengths)
    responses = _hand_out(state, jnp.arange(len(slots.row)), jnp.where(slots.live, num_rows, slots.row))
    kept = jnp.nonzero(slots.live, size=num_slots, fill_value=0)[0]
    there = jnp.arange(num_slots) < slots.live.sum()
    slots = jax.tree.map(lambda leaf: leaf[kept], slots)
    slots = slots.replace(live=there, row=jnp.where(there, slots.row, num_rows))
    return state.replace(slots=slots, responses=responses)
