"""The optimiser steps: policy gradients and supervised learning, over micro-batches of rows packed with sequences."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from krl import learn, policy
from krl.base.masked import divide, masked_sum
from krl.base.sharding import constrain
from krl.base.types import Prompts, Rollouts, TrainState
from krl.learn.batches import accumulate, map_rows
from krl.learn.pack import Columns, fill_columns, place_rollouts, rollout_tokens, rows_at_once
from krl.policy.attention import has_branches
from krl.run.optimizer import Waiting, apply_gradients


@functools.partial(
    jax.jit,
    static_argnames=("config", "optimizer", "num_updates", "micro_tokens", "packed", *learn.Loss._fields),
    donate_argnames=("state",),
)
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
    reference: dict | None = None,
    **options: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One pass over a step's rollouts in num_updates optimiser updates, each on its share of them.

    Prompts and responses lie packed in rows, so that computation follows real tokens, and several rollouts lie behind
    their prompt (where attention can, see `has_branches`). Rollouts whose advantage is zero count in the mean and are
    never run through the model, unless a penalty or bonus gives them a gradient. That makes the number of micro-batches
    data, not a new compilation.

    The loss is a mean over all tokens of the step: an update minimises num_updates times its share's part of it.

    Args:
        config, optimizer, state: the policy's sizes; from `make_optimizer`; donated.
        prompts, rollouts: M prompts, R rollouts of them.
        advantages: [R] float32, 0 on padding rows; what `krl.learn.token_weights` makes of them is another mean.
        key: shuffles the rollouts over the updates; consumed.
        num_updates: divides R.
        micro_tokens: tokens that go through the model at once, in whole rows, as many on every device.
        packed: False gives every rollout a row of its own; the gradient is the same.
        temperature: what the rollouts were sampled with.
        reference: the parameters to stay close to; not used with a kl_coefficient of 0. Of a policy with adapters,
            those that they stand on, in any case.
        options: the fields of `krl.learn.Loss`, but importance_cap is 0 by default: that trusts the sampler. Above 0,
            log-probabilities are computed again before the first update, for the ratios.

    Returns:
        (new state, metrics: float32 scalars). `loss` and `grad_norm` are means over the updates, and of an optimiser
        that waits `updated`, the share of them that were made. Of the tokens of the rollouts that were run,
        `shared_tokens` is the share that are prompts which another rollout of the row has. The ratio and clip metrics
        are over the response tokens of rollouts with an advantage, `mismatch` over those run in the first update.
    """
    loss = learn.Loss(**{"importance_cap": 0.0} | options)
    run = rollouts.mask & ((advantages != 0) | bool(loss.kl_coefficient or loss.entropy_coefficient))
    shares = jax.random.permutation(key, advantages.shape[0]).reshape(num_updates, -1)
    longest = prompts.tokens.shape[1] + rollouts.tokens.shape[1]
    shared = packed and has_branches(config.attention, longest, config.head_size)
    rows, num_rows, micro_rows = place_rollouts(
        prompts, rollouts, run, shares, micro_tokens, packed=packed, shared=shared
    )
    scores_of = functools.partial(_scores, config, temperature=temperature, packed=packed, shared=shared)
    frozen, drawn = (reference or {}) if config.lora else {}, (prompts, rollouts, advantages)

    def score(params: dict) -> jax.Array:
        one = lambda place: scores_of(params, fill_columns(place, *drawn), entropy=False)[0]  # noqa: E731
        return map_rows(one, rows, num_rows, micro_rows)

    fixed = {"old_logps": score(policy.join(frozen, state.params))} if loss.importance_cap else {}
    if reference is not None and loss.kl_coefficient:
        fixed["reference_logps"] = score(reference)
    separate = rollout_tokens(prompts, rollouts, run)
    saved = divide(separate - (rows.rollout >= 0).sum(dtype=jnp.float32), separate) if shared else jnp.float32(0)
    tokens_in_share = jnp.where(rollouts.mask, rollouts.lengths, 0).sum(dtype=jnp.float32) / num_updates

    def update(state: TrainState, share):
        members, rows, num_rows, fixed = share
        given, loss_of = (frozen, drawn), functools.partial(_loss, loss, scores_of)
        (loss_sum, metrics), grads = accumulate(loss_of, state.params, given, (rows, fixed), num_rows, micro_rows)
        learnt = (rollouts.mask & (advantages != 0))[members].sum(dtype=jnp.float32)
        state, grad_norm = apply_gradients(config, optimizer, state, grads, loss_sum, tokens_in_share, learnt)
        of_update = {"loss": divide(loss_sum, tokens_in_share), "grad_norm": grad_norm}
        if isinstance(state.opt_state.inner_state, Waiting):
            of_update["updated"] = (state.opt_state.inner_state.parts == 0).astype(jnp.float32)
        return state, (of_update, metrics)

    state, (of_updates, metrics) = jax.lax.scan(update, state, (shares, rows, num_rows, fixed))
    return state, _means(metrics) | jax.tree.map(jnp.mean, of_updates) | {"shared_tokens": saved}


def _loss(loss: learn.Loss, scores_of: Callable, params: dict, given: tuple, part: tuple) -> tuple[jax.Array, dict]:
    """(loss sum, metrics) of some rows: where their rollouts stand, and [W, C] log-probabilities computed before.

    What is given are parameters that are not trained, and what was drawn: (prompts, rollouts, advantages).
    """
    (place, fixed), (frozen, drawn) = part, given
    columns = fill_columns(place, *drawn)
    logps, entropies = scores_of(policy.join(frozen, params), columns, entropy=bool(loss.entropy_coefficient))
    fixed = fixed | {"sampler_logps" if loss.importance_cap else "old_logps": columns.logps}
    (loss_sum, _), metrics = learn.policy_loss(
        logps=logps, advantages=columns.advantages, mask=columns.response, sequences=columns.sequences,
        entropies=entropies, **fixed, **loss._asdict(),
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


def _scores(config, params, columns: Columns, *, temperature, packed, shared, entropy):
    """Log-probabilities [W, C] of the response tokens of some rows, anything for others, and entropies or None."""
    tokens, segments = jax.tree.map(lambda part: constrain(part, "batch", "length"), (columns.tokens, columns.segments))
    number = segments.number
    layout = {"mask": number > 0} if not packed else {"segments": segments if shared else number}
    temperature = jnp.where(temperature > 0, temperature, 1)
    scores = policy.token_logps(
        config, params, tokens, **layout, temperature=temperature, entropy=entropy, wanted=columns.response
    )
    return jax.tree.map(lambda part: jnp.pad(part, ((0, 0), (1, 0))), scores if entropy else (scores, None))


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
    follows = (layout[:, 1:] == layout[:, :-1]) & (layout[:, 1:] != 0)  # the token before is of the same sequence
    learnt = target_mask[:, 1:] & follows
    rows = [jnp.pad(part, ((0, more), (0, 0))) for part in (tokens, layout, learnt)]

    def loss_of(params, _, part):
        tokens, layout, learnt = (constrain(part, "batch", "length") for part in part)
        mask, segments = (layout, None) if layout.dtype == bool else (None, layout)
        logps = policy.token_logps(config, params, tokens, mask, segments, wanted=jnp.pad(learnt, ((0, 0), (1, 0))))
        return masked_sum(-logps, learnt)[0], {}

    (loss_sum, _), grads = accumulate(loss_of, state.params, (), rows, tokens.shape[0], micro_rows)
    count = learnt.sum(dtype=jnp.float32)
    state, grad_norm = apply_gradients(config, optimizer, state, grads, loss_sum, count)
    return state, {"loss": divide(loss_sum, count), "grad_norm": grad_norm}
