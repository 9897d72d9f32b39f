"""The optimiser, its state on the mesh, and one step of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from krl import policy
from krl.base.masked import divide
from krl.base.sharding import constrain, named_sharding
from krl.base.types import TrainState
from krl.run.compiled import KEPT


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
    moment_dtype: str = "float32",
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
        moment_dtype: "float32" or "bfloat16", what the first moment is kept in; the second is of the gradients' type.
        wait_for: an update waits until the rollouts with an advantage are so many, and is then along the mean gradient.
    """
    rise = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    fall = optax.linear_schedule(learning_rate, 0.0 if decay_steps else learning_rate, decay_steps)
    schedule = optax.join_schedules([rise, fall], [warmup_steps])
    adamw = optax.adamw(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay, mu_dtype=moment_dtype)
    optimizer = optax.chain(optax.clip_by_global_norm(grad_clip), adamw)
    never = jnp.iinfo(jnp.int32).max  # does it take an update that is not finite: `refuse_bad_updates` ends the run
    return optax.apply_if_finite(_wait(optimizer, wait_for) if wait_for else optimizer, never)


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_state(config: policy.PolicyConfig, optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """A training state whose optimiser moments lie on the mesh as their parameters do."""
    return lay_out(config, optimizer, TrainState(params=params, opt_state=optimizer.init(params)))


def abstract_state(config: policy.PolicyConfig, optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """The shapes, dtypes and shardings of `init_state`'s result, for a checkpoint to be read into.

    Args:
        config, optimizer: as for `init_state`.
        params: a tree of jax.ShapeDtypeStruct with shardings.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(init_state, config, optimizer), params)
    whole = named_sharding(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, lambda leaf, param: leaf.update(sharding=param.sharding), shapes.opt_state, params,
        transform_non_params=lambda leaf: leaf.update(sharding=whole),
    )  # fmt: skip
    return TrainState(params=params, opt_state=opt_state)


def lay_out(config: policy.PolicyConfig, optimizer: optax.GradientTransformation, state: TrainState) -> TrainState:
    """Constrain parameters and moments to the sharding rules, so that steps keep one layout."""
    axes = policy.trained(config, policy.param_axes(config))
    place = lambda leaf, logical: constrain(leaf, *logical)  # noqa: E731
    opt_state = optax.tree_utils.tree_map_params(optimizer, place, state.opt_state, axes)
    return TrainState(params=jax.tree.map(place, state.params, axes), opt_state=opt_state)


def skipped_updates(state: TrainState) -> tuple[int, int]:
    """(updates skipped in a row until now, updates skipped in all) because a gradient was not finite."""
    return int(state.opt_state.notfinite_count), int(state.opt_state.total_notfinite)


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
    return lay_out(config, optimizer, new), optax.tree.norm(grads)
