"""The optimiser steps: policy gradients over micro-batches, and supervised learning."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from krl import policy
from krl.learn import policy_loss
from krl.masked import divide, masked_sum
from krl.sharding import constrain
from krl.types import Prompts, Rollouts, TrainState


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    decay_steps: int,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_clip: float,
) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm, which skips and counts non-finite gradients.

    Args:
        learning_rate: reached after a linear rise over warmup_steps updates.
        warmup_steps: updates.
        decay_steps: updates over which the rate then falls linearly to 0; 0 keeps it constant.
        beta1, beta2: decay of the moments, per update.
        weight_decay: decoupled, per update, times the learning rate.
        grad_clip: the largest global norm of a gradient.
    """
    rise = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    fall = optax.linear_schedule(learning_rate, 0.0 if decay_steps else learning_rate, decay_steps)
    schedule = optax.join_schedules([rise, fall], [warmup_steps])
    adamw = optax.adamw(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay)
    never_give_in = jnp.iinfo(jnp.int32).max
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(grad_clip), adamw), never_give_in)


def init_state(config: policy.PolicyConfig, optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """A training state whose optimiser moments lie on the mesh as their parameters do."""
    return jax.jit(functools.partial(_start, config, optimizer))(params)


def abstract_state(config: policy.PolicyConfig, optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """The shapes, dtypes and shardings of `init_state`'s result, for a checkpoint to be read into.

    Args:
        config, optimizer: as for `init_state`.
        params: a tree of jax.ShapeDtypeStruct with shardings.
    """
    start = functools.partial(_start, config, optimizer)
    placed = jax.jit(start).lower(params).compile().output_shardings
    shapes = jax.eval_shape(start, params)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, placed)


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
        "config", "optimizer", "num_updates", "micro_batch", "clip_low", "clip_high", "dual_clip", "importance_cap",
        "kl_coefficient",
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
    micro_batch: int,
    temperature: jax.Array | float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    importance_cap: float = 0.0,
    kl_coefficient: float = 0.0,
    reference: dict | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One pass over a step's rollouts in num_updates optimiser updates, each the token mean of its share.

    Rollouts whose advantage is zero have no gradient: they count in the token mean and are never run
    through the model, unless a penalty gives them one. That makes the number of micro-batches data, not
    a new compilation.

    Args:
        config: the policy's sizes.
        optimizer: from `make_optimizer`.
        state: donated.
        prompts: M prompts.
        rollouts: R rollouts of them.
        advantages: [R] float32, 0 on padding rows.
        key: shuffles the rollouts over the updates; consumed.
        num_updates: divides R.
        micro_batch: rollouts that go through the model at once; divides R / num_updates.
        temperature: what the rollouts were sampled with.
        clip_low, clip_high, dual_clip: see `krl.learn.policy_loss`.
        importance_cap: above 0, log-probabilities are computed again before the first update, ratios are
            taken to those, and tokens are weighted for what the sampler computed; 0 trusts the sampler.
        kl_coefficient: of the penalty for leaving the reference; 0 needs none and computes none.
        reference: the parameters to stay close to.

    Returns:
        (new state, metrics: float32 scalars). `loss` and `grad_norm` are means over the updates; the
        ratio and clip metrics are means over the tokens of the rollouts that were run.
    """
    num_rollouts = advantages.shape[0]
    shuffled = jax.random.permutation(key, num_rollouts)
    shares = shuffled.reshape(num_updates, num_rollouts // num_updates)
    loss: Callable = functools.partial(
        policy_loss, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_coefficient=kl_coefficient
    )
    idle = ~rollouts.mask if kl_coefficient else advantages == 0
    logps_of = functools.partial(_rollout_logps, config, prompts=prompts, rollouts=rollouts, temperature=temperature)
    score = functools.partial(_rescore, logps_of, rollouts=rollouts, idle=idle, micro_batch=micro_batch)
    known = {"old_logps": rollouts.logps}
    if importance_cap:
        known = {"old_logps": score(state.params), "sampler_logps": rollouts.logps}
        loss = functools.partial(loss, importance_cap=importance_cap)
    if kl_coefficient:
        known["reference_logps"] = score(reference)

    def loss_of(params: dict, rows: jax.Array):
        logps, response = logps_of(params, rows)
        compared = {name: values[rows] for name, values in known.items()}
        (loss_sum, _), metrics = loss(logps=logps, advantages=advantages[rows], mask=response, **compared)
        return loss_sum, metrics

    def update(state: TrainState, rows: jax.Array):
        (loss_sum, metrics), grads = _accumulate(loss_of, state.params, rows, idle[rows], micro_batch)
        tokens_in_share = jnp.where(rollouts.mask[rows], rollouts.lengths[rows], 0).sum(dtype=jnp.float32)
        state, grad_norm = apply_gradients(config, optimizer, state, grads, loss_sum, tokens_in_share)
        return state, (divide(loss_sum, tokens_in_share), grad_norm, metrics)

    state, (losses, grad_norms, metrics) = jax.lax.scan(update, state, shares)
    largest = metrics.pop("ratio_max")[0].max()
    means = {name: divide(total.sum(), count.sum()) for name, (total, count) in metrics.items()}
    return state, means | {"loss": losses.mean(), "grad_norm": grad_norms.mean(), "ratio_max": largest}


def _accumulate(loss_of, params, rows, idle, micro_batch):
    """((loss sum, metrics), gradients) of loss_of(params, rows) over the rows that are not idle, [b] bool."""
    rows = rows[jnp.argsort(idle, stable=True)]
    run = jax.value_and_grad(loss_of, has_aux=True)

    def one(index, total):
        chosen = jax.lax.dynamic_slice(rows, (index * micro_batch,), (micro_batch,))
        return _add_metrics(total, run(params, chosen))

    nothing = jax.eval_shape(run, params, rows[:micro_batch])
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing)
    return jax.lax.fori_loop(0, _batches(idle, micro_batch), one, nothing)


def _batches(idle, micro_batch):
    """How many micro-batches hold the rows that are not idle."""
    return (jnp.sum(~idle) + micro_batch - 1) // micro_batch


def _rollout_logps(config, params, rows, *, prompts, rollouts, temperature):
    """Log-probabilities [b, T] of the responses in some rows, [b] int32, and where they are real, [b, T] bool."""
    source = jnp.minimum(rollouts.prompt_index[rows], prompts.tokens.shape[0] - 1)
    response_mask = jnp.arange(rollouts.tokens.shape[1]) < rollouts.lengths[rows][:, None]
    tokens = jnp.concatenate([prompts.tokens[source], rollouts.tokens[rows]], axis=1)
    mask = jnp.concatenate([prompts.mask[source], response_mask], axis=1)
    tokens, mask = constrain(tokens, "batch", "length"), constrain(mask, "batch", "length")
    logps = policy.token_logps(
        config,
        params,
        tokens,
        mask,
        start=prompts.tokens.shape[1],
        temperature=jnp.where(temperature > 0, temperature, 1),
    )
    return logps, response_mask


def _rescore(logps_of, params, *, rollouts, idle, micro_batch):
    """Log-probabilities [R, T] of the rollouts that are not idle, [R] bool; 0 for the others."""
    order = jnp.argsort(idle, stable=True)

    def one(index, logps):
        rows = jax.lax.dynamic_slice(order, (index * micro_batch,), (micro_batch,))
        return logps.at[rows].set(logps_of(params, rows)[0])

    return jax.lax.fori_loop(0, _batches(idle, micro_batch), one, jnp.zeros_like(rollouts.logps))


def _add_metrics(total, more):
    """Sum two ((loss, metrics), grads) trees; a maximum stays a maximum."""
    summed = jax.tree.map(jnp.add, total, more)
    (_, metrics), _ = summed
    (_, before), _ = total
    (_, after), _ = more
    metrics["ratio_max"] = (jnp.maximum(before["ratio_max"][0], after["ratio_max"][0]), metrics["ratio_max"][1])
    return summed


def apply_gradients(
    config: policy.PolicyConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: dict,
    loss_sum: jax.Array,
    count: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """Divide summed gradients by their count and take an optimiser step.

    A loss that is not finite makes every gradient NaN, so that the optimiser skips the update.

    Returns:
        (new state, global norm of the gradient before clipping).
    """
    scale = jnp.where(jnp.isfinite(loss_sum), divide(jnp.float32(1), count), jnp.nan)
    grads = jax.tree.map(lambda grad: grad * scale, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = TrainState(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    return _lay_out(config, optimizer, new), optax.tree.norm(grads)


@functools.partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnames=("state",))
def supervised_update(
    config: policy.PolicyConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tokens: jax.Array,
    layout: jax.Array,
    target_mask: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of next-token cross-entropy on the target tokens, as a token mean.

    Args:
        config, optimizer, state: as for `policy_update`; the state is donated.
        tokens: [B, T] int32.
        layout: [B, T], which tokens belong together: bool, the mask of rows that hold one sequence each, or
            int32, the segments of packed rows. `krl.policy.apply` tells of both.
        target_mask: [B, T] bool, True on the tokens to learn; the first of a sequence is never learnt.

    Returns:
        (new state, {"loss", "grad_norm"}: float32 scalars, nats per token).
    """
    tokens, layout = constrain(tokens, "batch", "length"), constrain(layout, "batch", "length")
    mask, segments = (layout, None) if layout.dtype == bool else (None, layout)
    follows = (layout[:, 1:] == layout[:, :-1]) & (layout[:, 1:] != 0)  # the token before is of the same sequence

    def loss(params):
        logps = policy.token_logps(config, params, tokens, mask, segments)
        return masked_sum(-logps, target_mask[:, 1:] & follows)

    (loss_sum, count), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    state, grad_norm = apply_gradients(config, optimizer, state, grads, loss_sum, count)
    return state, {"loss": divide(loss_sum, count), "grad_norm": grad_norm}
