"""The optimiser steps: policy gradients and supervised learning, over micro-batches of rows packed with sequences."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec

from krl import policy
from krl.learn import AVERAGES, KL_ESTIMATORS, SURROGATES, policy_loss
from krl.masked import divide, masked_sum
from krl.run.pack import pack
from krl.sharding import batch_devices, constrain, named_sharding
from krl.types import Prompts, Rollouts, TrainState

KEPT = 16  # programs that a process keeps for later runs of the same config, as in a notebook


@functools.lru_cache(KEPT)
def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    decay_steps: int,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_clip: float,
    wait_for: int = 0,
) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm, which skips and counts non-finite gradients; one object for equal values.

    Args:
        learning_rate: reached after a linear rise over warmup_steps updates.
        warmup_steps: updates.
        decay_steps: updates over which the rate then falls linearly to 0; 0 keeps it constant.
        beta1, beta2: decay of the moments, per update.
        weight_decay: decoupled, per update, times the learning rate.
        grad_clip: the largest global norm of a gradient.
        wait_for: an update waits until the rollouts with an advantage are so many, and is then along the mean gradient.
    """
    rise = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    fall = optax.linear_schedule(learning_rate, 0.0 if decay_steps else learning_rate, decay_steps)
    schedule = optax.join_schedules([rise, fall], [warmup_steps])
    adamw = optax.adamw(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay)
    never_give_in = jnp.iinfo(jnp.int32).max
    optimizer = optax.chain(optax.clip_by_global_norm(grad_clip), adamw)
    return optax.apply_if_finite(_wait(optimizer, wait_for) if wait_for else optimizer, never_give_in)


class Waiting(struct.PyTreeNode):
    """What an optimiser that waits for more rollouts keeps."""

    inner: Any
    grads: Any  # sums of gradients since its last update
    parts: jax.Array  # [] float32, how many these are
    rollouts: jax.Array  # [] float32, with an advantage


def _wait(inner: optax.GradientTransformationExtraArgs, enough: int) -> optax.GradientTransformationExtraArgs:
    """Updates along the mean of gradients that together have `enough` rollouts with an advantage, and none before."""

    def init(params):
        return Waiting(inner.init(params), jax.tree.map(jnp.zeros_like, params), jnp.float32(0), jnp.float32(0))

    def update(grads, state: Waiting, params=None, *, rollouts, **_):
        grads = jax.tree.map(jnp.add, state.grads, grads)
        parts, rollouts = state.parts + 1, state.rollouts + rollouts

        def now():
            updates, new = inner.update(jax.tree.map(lambda grad: grad / parts, grads), state.inner, params)
            return updates, init(params).replace(inner=new)

        def later():
            nothing = jax.tree.map(jnp.zeros_like, params)
            return nothing, Waiting(state.inner, grads, parts, rollouts)

        return jax.lax.cond(rollouts >= enough, now, later)

    return optax.GradientTransformationExtraArgs(init, update)


_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}  # all products to YNNPACK


def shared_jit(function: Callable, *arguments: Any, donate: tuple[int, ...] = (), **options: Any) -> Callable:
    """A function with some arguments bound, compiled once for all runs of this process that bind the same.

    Args:
        function: defined at the top of a file.
        arguments, options: hashable; what is left are arrays.
        donate: which of these are given away.
    """
    return _shared_jit(_named_functions(), function, donate, *arguments, **options)


@functools.lru_cache(KEPT)
def _shared_jit(_, function, donate, *arguments, **options) -> Callable:
    return jax.jit(functools.partial(function, *arguments, **options), donate_argnums=donate)


def _named_functions() -> tuple[Callable, ...]:
    """What names among the arguments stand for: a program is another one after a notebook has replaced one of these."""
    return (*AVERAGES.values(), *SURROGATES.values(), *KL_ESTIMATORS.values())


def for_this_backend(update: Callable, *arguments: Any, **options: Any) -> Callable:
    """An update compiled with what is fastest where it runs; donates its state.

    On a CPU matrix products go to the library that computes them fastest; elsewhere nothing is special.

    Args:
        update: `policy_update` or `supervised_update`.
        arguments, options: what stays the same from step to step, hashable; the state and what follows are left.
    """
    return _for_this_backend(_named_functions(), update, *arguments, **options)


@functools.lru_cache(KEPT)
def _for_this_backend(_, update, *arguments, **options) -> Callable:
    on_cpu = jax.default_backend() == "cpu" and _accepted(_CPU_OPTIONS)
    bound = functools.partial(update, *arguments, **options)
    return jax.jit(bound, donate_argnums=0, compiler_options=_CPU_OPTIONS if on_cpu else None)


def _accepted(options: dict[str, str]) -> bool:
    """Whether this version of XLA knows these options, which are experimental."""
    try:
        jax.jit(jnp.negative, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def init_state(config: policy.PolicyConfig, optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """A training state whose optimiser moments lie on the mesh as their parameters do."""
    return shared_jit(_start, config, optimizer)(params)


def abstract_state(config: policy.PolicyConfig, optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """The shapes, dtypes and shardings of `init_state`'s result, for a checkpoint to be read into.

    Args:
        config, optimizer: as for `init_state`.
        params: a tree of jax.ShapeDtypeStruct with shardings.
    """
    shapes = jax.eval_shape(functools.partial(_start, config, optimizer), params)
    whole = named_sharding(jax.tree.leaves(params)[0].sharding.mesh)

    def at(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer, lambda leaf, param: at(leaf, param.sharding), shapes.opt_state, params,
        transform_non_params=lambda leaf: at(leaf, whole),
    )  # fmt: skip
    return TrainState(params=params, opt_state=opt_state)


def _start(config: policy.PolicyConfig, optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    return _lay_out(config, optimizer, TrainState(params=params, opt_state=optimizer.init(params)))


def _lay_out(config: policy.PolicyConfig, optimizer: optax.GradientTransformation, state: TrainState) -> TrainState:
    """Constrain parameters and moments to the sharding rules, so that steps keep one layout."""
    axes = policy.param_axes(config)

    def place(leaf, logical):
        return constrain(leaf, *logical)

    opt_state = optax.tree_utils.tree_map_params(optimizer, place, state.opt_state, axes)
    return TrainState(params=jax.tree.map(place, state.params, axes), opt_state=opt_state)


def skipped_updates(state: TrainState) -> tuple[int, int]:
    """(updates skipped in a row until now, updates skipped in all) because a gradient was not finite."""
    return int(state.opt_state.notfinite_count), int(state.opt_state.total_notfinite)


@functools.partial(
    jax.jit,
    static_argnames=(
        "config", "optimizer", "num_updates", "micro_tokens", "packed", "surrogate", "clip_low", "clip_high",
        "dual_clip", "importance_cap", "kl_coefficient", "kl_estimator", "entropy_coefficient",
    ),
    donate_argnames=("state",),
)  # fmt: skip
def policy_update(
    config: policy.PolicyConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    prompts: Prompts,
    rollouts: Rollouts,
    advantages: jax.Array,
    key: jax.Array,
    *,
    num_updates: int,
    micro_tokens: int,
    packed: bool = True,
    temperature: jax.Array | float,
    surrogate: str = "ppo",
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    importance_cap: float = 0.0,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coefficient: float = 0.0,
    reference: dict | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One pass over a step's rollouts in num_updates optimiser updates, each on its share of them.

    Prompts and responses lie packed in rows of P + T columns, so that computation follows real tokens. Rollouts whose
    advantage is zero count in the mean and are never run through the model, unless a penalty or bonus gives them a
    gradient. That makes the number of micro-batches data, not a new compilation.

    The loss is a mean over all tokens of the step: an update minimises num_updates times its share's part of it.

    Args:
        config, optimizer: the policy's sizes; from `make_optimizer`.
        state: donated.
        prompts: M prompts.
        rollouts: R rollouts of them.
        advantages: [R] float32, 0 on padding rows; what `krl.learn.token_weights` makes of them is another mean.
        key: shuffles the rollouts over the updates; consumed.
        num_updates: divides R.
        micro_tokens: tokens that go through the model at once, in whole rows, as many on every device.
        packed: False gives every rollout a row of its own; the gradient is the same.
        temperature: what the rollouts were sampled with.
        surrogate, clip_low, clip_high, dual_clip: see `krl.learn.policy_loss`.
        importance_cap: above 0, log-probabilities are computed again before the first update, for the ratios, and
            tokens are weighted for what the sampler computed; 0 trusts the sampler.
        kl_coefficient, kl_estimator: of the penalty for leaving the reference; 0 needs none and computes none.
        entropy_coefficient: of the bonus for entropy; 0 computes none.
        reference: the parameters to stay close to.

    Returns:
        (new state, metrics: float32 scalars). `loss` and `grad_norm` are means over the updates, and of an optimiser
        that waits `updated`, the share of them that were made; the ratio and clip metrics are over the tokens of the
        rollouts that were run, `mismatch` over those of the first update.
    """
    run = rollouts.mask & ((advantages != 0) | bool(kl_coefficient or entropy_coefficient))
    shares = jax.random.permutation(key, advantages.shape[0]).reshape(num_updates, -1)
    rows, num_rows, micro_rows = _rows(prompts, rollouts, run, shares, micro_tokens, packed)
    scores_of = functools.partial(_scores, config, temperature=temperature, packed=packed)
    drawn = (prompts, rollouts, advantages)
    loss_of = functools.partial(
        _loss, scores_of, surrogate=surrogate, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
        importance_cap=importance_cap,
        kl_coefficient=kl_coefficient, kl_estimator=kl_estimator, entropy_coefficient=entropy_coefficient,
    )  # fmt: skip

    def score(params: dict) -> jax.Array:
        one = lambda place: scores_of(params, _columns(place, *drawn), entropy=False)[0]  # noqa: E731
        return _map_rows(one, rows, num_rows, micro_rows)

    known = {"old_logps": score(state.params)} if importance_cap else {}
    if reference is not None and kl_coefficient:
        known["reference_logps"] = score(reference)
    tokens_in_share = jnp.where(rollouts.mask, rollouts.lengths, 0).sum(dtype=jnp.float32) / num_updates

    def update(state: TrainState, share):
        members, rows, num_rows, known = share
        (loss_sum, metrics), grads = _accumulate(loss_of, state.params, drawn, (rows, known), num_rows, micro_rows)
        learnt = (rollouts.mask & (advantages != 0))[members].sum(dtype=jnp.float32)
        state, grad_norm = apply_gradients(config, optimizer, state, grads, loss_sum, tokens_in_share, learnt)
        of_update = {"loss": divide(loss_sum, tokens_in_share), "grad_norm": grad_norm}
        if isinstance(state.opt_state.inner_state, Waiting):
            of_update["updated"] = (state.opt_state.inner_state.parts == 0).astype(jnp.float32)
        return state, (of_update, metrics)

    state, (of_updates, metrics) = jax.lax.scan(update, state, (shares, rows, num_rows, known))
    return state, _means(metrics) | {name: values.mean() for name, values in of_updates.items()}


def _loss(scores_of, params: dict, drawn, part, *, importance_cap, entropy_coefficient, **options):
    """(loss sum, metrics) of some rows: where their rollouts stand, and [W, C] log-probabilities computed before.

    What was drawn is (prompts, rollouts, advantages).
    """
    place, known = part
    columns = _columns(place, *drawn)
    logps, entropies = scores_of(params, columns, entropy=bool(entropy_coefficient))
    known = known | {"sampler_logps" if importance_cap else "old_logps": columns.logps}
    (loss_sum, _), metrics = policy_loss(
        logps=logps, advantages=columns.advantages, mask=columns.response, sequences=columns.sequences,
        importance_cap=importance_cap, entropies=entropies, entropy_coefficient=entropy_coefficient, **known, **options,
    )  # fmt: skip
    apart = jnp.where(columns.response, jnp.abs(logps - columns.logps), 0.0)
    mismatch = masked_sum(apart, columns.response)
    return loss_sum, metrics | {"mismatch": mismatch, "mismatch_max": (apart.max(initial=0.0), mismatch[1])}


def _means(metrics):
    """What the (sum, count) pairs of U updates are in the mean; a maximum stays a maximum.

    The mismatch is the first update's: later ones have other parameters than the sampler had. It is NaN where nothing
    was run.
    """
    first = {k: jax.tree.map(lambda x: x[:1], v) for k, v in metrics.items() if k.startswith("mismatch")}
    unseen = first["mismatch"][1].sum() == 0
    means = {}
    for name, (total, count) in (metrics | first).items():
        means[name] = total.max() if name.endswith("_max") else divide(total.sum(), count.sum())
    return means | {name: jnp.where(unseen, jnp.nan, means[name]) for name in first}


# ---------------------------------------------------------------- from rollouts to rows


class Place(struct.PyTreeNode):
    """Which token of which rollout stands in each column of W rows."""

    rollout: jax.Array  # [W, C] int32 in [0, R); -1 where a column is padding
    position: jax.Array  # [W, C] int32, of the token in its prompt and response; undefined on padding


class Columns(struct.PyTreeNode):
    """The tokens of W rows and what the loss knows of each; all arrays are [W, C]."""

    tokens: jax.Array  # int32
    segments: jax.Array  # int32, the rollout's number from 1 on, 0 on padding
    sequences: jax.Array  # int32 in [0, W C), a number for each rollout
    response: jax.Array  # bool, True on response tokens
    logps: jax.Array  # float32, the sampler's, of the whole distribution
    advantages: jax.Array  # float32


def _rows(prompts, rollouts, run, shares, micro_tokens, packed) -> tuple[Place, jax.Array, int]:
    """Where the rollouts to run, [R] bool, stand in the rows of each of U shares, [U, R / U] int32.

    Returns:
        (place with leaves [U, W, C], num_rows [U] int32 of each share that hold rollouts, rows of a micro-batch).
    """
    row_tokens = prompts.tokens.shape[1] + rollouts.tokens.shape[1]
    micro_rows = rows_at_once(micro_tokens, row_tokens, shares.shape[1])
    size = -(-shares.shape[1] // micro_rows) * micro_rows
    taken = _prompt_lengths(prompts)[_prompt_of(prompts, rollouts)] + rollouts.lengths
    taken = jnp.where(run, taken if packed else row_tokens, 0)
    places = jax.vmap(lambda share: pack(taken[share], size, row_tokens))(shares)
    rollout = jax.vmap(lambda share, sequence: jnp.where(sequence >= 0, share[sequence], -1))(shares, places.sequence)
    return Place(rollout, places.position), places.num_rows, micro_rows


def rows_at_once(micro_tokens: int, row_tokens: int, num_rows: int) -> int:
    """Rows of row_tokens columns in a micro-batch: equally many for every device of the mesh, one at least."""
    devices = batch_devices(jax.sharding.get_abstract_mesh())
    most = -(-num_rows // devices)
    return devices * max(1, min(micro_tokens // (row_tokens * devices), most))


def _prompt_of(prompts: Prompts, rollouts: Rollouts) -> jax.Array:
    """The prompt of each rollout, [R] int32; any on padding rows."""
    return jnp.minimum(rollouts.prompt_index, prompts.tokens.shape[0] - 1)


def _prompt_lengths(prompts: Prompts) -> jax.Array:
    return jnp.asarray(prompts.mask).sum(axis=1, dtype=jnp.int32)


def _columns(place: Place, prompts, rollouts, advantages) -> Columns:
    """Fill the columns of some rows."""
    which = jnp.maximum(place.rollout, 0)
    prompt = _prompt_of(prompts, rollouts)[which]
    padding = prompts.tokens.shape[1] - _prompt_lengths(prompts)[prompt]
    column = padding + place.position  # in the padded layout of prompts and responses
    time = column - prompts.tokens.shape[1]
    real = (place.rollout >= 0) & (time < rollouts.lengths[which])
    asked, answered = jnp.asarray(prompts.tokens).at[prompt, column], rollouts.tokens.at[which, jnp.maximum(time, 0)]
    logps = rollouts.logps if rollouts.policy_logps is None else rollouts.policy_logps
    begin = jnp.arange(place.position.size).reshape(place.position.shape) - place.position
    return Columns(
        tokens=jnp.where(time < 0, asked.get(mode="clip"), answered.get(mode="clip")),
        segments=jnp.where(real, which + 1, 0),
        sequences=begin,
        response=real & (time >= 0) & (place.position > 0),
        logps=logps.at[which, jnp.maximum(time, 0)].get(mode="clip"),
        advantages=advantages[which],
    )


def _scores(config, params, columns: Columns, *, temperature, packed, entropy):
    """Log-probabilities [W, C] of the tokens of some rows, 0 for the first of each, and entropies or None."""
    tokens, segments = constrain(columns.tokens, "batch", "length"), constrain(columns.segments, "batch", "length")
    layout = {"segments": segments} if packed else {"mask": segments > 0}
    temperature = jnp.where(temperature > 0, temperature, 1)
    scores = policy.token_logps(config, params, tokens, **layout, temperature=temperature, entropy=entropy)
    logps, entropies = (jnp.pad(part, ((0, 0), (1, 0))) for part in (scores if entropy else (scores, scores)))
    return logps, entropies if entropy else None


# ---------------------------------------------------------------- micro-batches


def _accumulate(loss_of, params, source, rows, num_rows, micro_rows):
    """((loss sum, metrics), gradients) of loss_of(params, source, rows) over the first num_rows of a tree of [W, ...].

    On a mesh that splits rows alone, devices add up what they find in their own rows of all micro-batches and meet once
    at the end: gradients do not travel for each micro-batch. (Beside other axes XLA cannot compile that.)
    """
    run, mesh = jax.value_and_grad(loss_of, has_aux=True), jax.sharding.get_abstract_mesh()
    apart = 1 < mesh.size == mesh.shape.get("data")

    def add_up(params, source, batches, num_batches):
        def one(index, total):
            return _add_metrics(total, run(params, source, jax.tree.map(lambda leaf: leaf[index], batches)))

        nothing = jax.eval_shape(run, params, source, jax.tree.map(lambda leaf: leaf[0], batches))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing)
        total = jax.lax.fori_loop(0, num_batches, one, nothing)
        return _meet(total, "data") if apart else total

    if apart:
        whole, split = PartitionSpec(), PartitionSpec(None, "data")
        add_up = jax.shard_map(add_up, in_specs=(whole, whole, split, whole), out_specs=whole, check_vma=False)
    batches = jax.tree.map(lambda leaf: leaf.reshape(-1, micro_rows, *leaf.shape[1:]), rows)
    return add_up(params, source, batches, _batches(num_rows, micro_rows))


def _map_rows(function, rows, num_rows, micro_rows):
    """function(some rows), [micro_rows, C], for the first num_rows [U] of each share of a tree of [U, W, ...].

    Returns:
        [U, W, C], 0 for the other rows.
    """

    def of_share(share):
        rows, num_rows = share

        def one(index, whole):
            part = function(_part(rows, index, micro_rows))
            return jax.lax.dynamic_update_slice_in_dim(whole, part, index * micro_rows, 0)

        nothing = jnp.zeros(jax.tree.leaves(rows)[0].shape, jnp.float32)
        return jax.lax.fori_loop(0, _batches(num_rows, micro_rows), one, nothing)

    return jax.lax.map(of_share, (rows, num_rows))


def _part(rows: Any, index: jax.Array | int, micro_rows: int) -> Any:
    """A micro-batch of a tree of [W, ...]."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index * micro_rows, micro_rows), rows)


def _batches(num_rows, micro_rows):
    """How many micro-batches hold the rows."""
    return (num_rows + micro_rows - 1) // micro_rows


def _add_metrics(total, more):
    """Sum two ((loss, metrics), grads) trees; a maximum stays a maximum."""
    summed, ((_, before), _), ((_, after), _) = jax.tree.map(jnp.add, total, more), total, more
    return _with_largest(summed, lambda name: jnp.maximum(before[name][0], after[name][0]))


def _meet(total, axis):
    """Sum a ((loss, metrics), grads) tree over the devices along a mesh axis; a maximum stays a maximum."""
    (_, metrics), _ = total
    return _with_largest(jax.lax.psum(total, axis), lambda name: jax.lax.pmax(metrics[name][0], axis))


def _with_largest(summed, largest):
    """A summed tree with largest(name) in the place of each sum of maxima."""
    (_, metrics), _ = summed
    for name in (name for name in metrics if name.endswith("_max")):
        metrics[name] = (largest(name), metrics[name][1])
    return summed


def apply_gradients(
    config: policy.PolicyConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: dict,
    loss_sum: jax.Array,
    count: jax.Array,
    rollouts: jax.Array | float = jnp.inf,
) -> tuple[TrainState, jax.Array]:
    """Divide summed gradients by their count and take an optimiser step, or wait for more of the rollouts that teach.

    A loss that is not finite makes every gradient NaN, so that the optimiser skips the update.

    Returns:
        (new state, global norm of the gradient before clipping).
    """
    scale = jnp.where(jnp.isfinite(loss_sum), divide(jnp.float32(1), count), jnp.nan)
    grads = jax.tree.map(lambda grad: grad * scale, grads)
    step = optax.with_extra_args_support(optimizer).update
    updates, opt_state = step(grads, state.opt_state, state.params, rollouts=rollouts)
    new = TrainState(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    return _lay_out(config, optimizer, new), optax.tree.norm(grads)


@functools.partial(jax.jit, static_argnames=("config", "optimizer", "micro_tokens"), donate_argnames=("state",))
def supervised_update(
    config: policy.PolicyConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tokens: jax.Array,
    layout: jax.Array,
    target_mask: jax.Array,
    *,
    micro_tokens: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of next-token cross-entropy on the target tokens, as a token mean.

    Args:
        config, optimizer, state: as for `policy_update`; the state is donated.
        tokens: [B, T] int32.
        layout: [B, T], which tokens belong together: bool, the mask of rows that hold one sequence each, or
            int32, the segments of packed rows. `krl.policy.apply` tells of both.
        target_mask: [B, T] bool, True on the tokens to learn; the first of a sequence is never learnt.
        micro_tokens: tokens that go through the model at once, in whole rows, as many on every device.

    Returns:
        (new state, {"loss", "grad_norm"}: float32 scalars, nats per token).
    """
    micro_rows = rows_at_once(micro_tokens, tokens.shape[1], tokens.shape[0])
    more = -tokens.shape[0] % micro_rows
    rows = [jnp.pad(part, ((0, more), (0, 0))) for part in (tokens, layout, target_mask)]

    def loss_of(params, _, part):
        tokens, layout, target_mask = (constrain(part, "batch", "length") for part in part)
        mask, segments = (layout, None) if layout.dtype == bool else (None, layout)
        logps = policy.token_logps(config, params, tokens, mask, segments)
        return masked_sum(-logps, target_mask[:, 1:] & _follows(layout))[0], {}

    (loss_sum, _), grads = _accumulate(loss_of, state.params, (), rows, tokens.shape[0], micro_rows)
    count = (target_mask[:, 1:] & _follows(layout)).sum(dtype=jnp.float32)
    state, grad_norm = apply_gradients(config, optimizer, state, grads, loss_sum, count)
    return state, {"loss": divide(loss_sum, count), "grad_norm": grad_norm}


def _follows(layout: jax.Array) -> jax.Array:
    """Where the token before is of the same sequence, [B, T - 1] bool."""
    return (layout[:, 1:] == layout[:, :-1]) & (layout[:, 1:] != 0)
