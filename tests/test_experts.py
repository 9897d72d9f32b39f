"""Mixtures of experts: what a token sees, and the loss that balances them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from krl import policy
from krl.base.sharding import make_mesh
from krl.policy import model
from krl.policy.experts import Experts, apply_experts, balanced
from krl.run.optimizer import init_state
from krl.run.update import supervised_update
from tests import tiny

CONFIG = dataclasses.replace(tiny.CONFIG, experts=Experts(4, 2))
TOKENS = np.random.default_rng(0).integers(3, 16, (4, 9)).astype(np.int32)


def penalty(scores, chosen, real):
    """X sum_x f_x P_x of the [N, X] scores and the [N, X] choices of tokens, per real token."""
    share = (chosen * real[:, None]).sum(0) / (chosen * real[:, None]).sum()
    return scores.shape[1] * (share * (scores * real[:, None]).sum(0) / real.sum()).sum()


def choices(scores, active):
    return scores >= np.sort(scores, axis=-1)[:, -active][:, None]


def gradient_of_balance(config, params, tokens, mask=None, segments=None):
    """Of the balancing loss alone: the other loss is zero whatever the parameters are."""
    return jax.jit(jax.grad(lambda params: 0 * policy.token_logps(config, params, tokens, mask, segments).sum()))(
        params
    )


def assert_close(got, expected):
    jax.tree.map(lambda leaf, other: np.testing.assert_allclose(leaf, other, atol=1e-5, rtol=1e-4), got, expected)


def test_an_expert_is_a_unit_and_a_token_sees_its_own_alone():
    """Against every expert computed for every token."""
    experts, keys = Experts(5, 2), jax.random.split(jax.random.key(0), 5)
    x, scores = jax.random.normal(keys[0], (2, 7, 4)), jax.nn.softmax(jax.random.normal(keys[1], (2, 7, 5)))
    gate, up = (jax.random.normal(key, (5, 4, 3)) for key in keys[2:4])
    down = jax.random.normal(keys[4], (5, 3, 4))
    each = jnp.einsum(
        "btxm,xme->btxe", jnp.tanh(jnp.einsum("bte,xem->btxm", x, gate)) * jnp.einsum("bte,xem->btxm", x, up), down
    )
    best = jnp.argsort(scores, axis=-1)[..., -2:]
    kept = jnp.where(jax.nn.one_hot(best, 5).sum(2) > 0, scores, 0)
    for normalised in (False, True):
        weights = kept / kept.sum(-1, keepdims=True) if normalised else kept
        expected = jnp.einsum("btxe,btx->bte", each, weights)
        got = apply_experts(dataclasses.replace(experts, normalised=normalised), x, scores, gate, up, down, jnp.tanh)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_balance_adds_the_gradient_of_the_formula_to_every_real_token():
    scores = jax.nn.softmax(jax.random.normal(jax.random.key(0), (3, 7, 5)))
    real = np.arange(7)[None, :] < np.array([7, 2, 0])[:, None]
    chosen = choices(np.asarray(scores).reshape(-1, 5), 2)

    def expected(scores):
        return 0.3 * real.sum() * penalty(scores.reshape(-1, 5), chosen, real.ravel()) + jnp.sin(scores).sum()

    got = jax.grad(lambda scores: jnp.sin(balanced(Experts(5, 2), 0.3, scores, real)).sum())(scores)
    np.testing.assert_allclose(got, jax.grad(expected)(scores), atol=1e-6)
    np.testing.assert_array_equal(balanced(Experts(5, 2), 0.3, scores, real), scores)
    even = jnp.full((1, 4, 2), 0.5)
    assert penalty(even[0], np.eye(2)[[0, 1, 0, 1]], np.ones(4)) == pytest.approx(1)
    nothing = jax.grad(lambda scores: balanced(Experts(5, 2), 0.3, scores, 0 * real > 0).sum())(scores)
    np.testing.assert_array_equal(nothing, 1)


def test_the_gradient_of_a_policy_is_that_of_the_mean_over_layers_of_the_formula(monkeypatch):
    """Against the difference of the formula along a direction, from the scores that its layers have."""
    config, params, seen = dataclasses.replace(CONFIG, balance=0.7), tiny.params(config=CONFIG), []
    got = gradient_of_balance(config, params, TOKENS)

    def watched(experts, coefficient, scores, real):
        jax.debug.callback(
            lambda scores: seen.append(np.asarray(scores, np.float64).reshape(-1, 4)), scores, ordered=True
        )
        return scores

    watch_scores(monkeypatch, watched)

    def layers_of(step):
        seen.clear()
        moved = jax.tree.map(lambda leaf, slope: leaf + step * slope, params, direction)
        model.Decoder(config).apply({"params": moved}, TOKENS, columns)
        jax.effects_barrier()
        return seen[:]

    columns = jnp.broadcast_to(jnp.arange(9), TOKENS.shape)
    length = float(jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(got))))
    direction = jax.tree.map(lambda leaf: leaf / length, got)
    chosen = [choices(scores, 2) for scores in layers_of(0.0)]
    assert len(chosen) == 2

    def loss(step):
        every = np.ones(TOKENS.size)
        return (
            0.7
            / 2
            * TOKENS.size
            * sum(penalty(scores, own, every) for scores, own in zip(layers_of(step), chosen, strict=True))
        )

    assert (loss(0.0003) - loss(-0.0003)) / 0.0006 == pytest.approx(length, rel=0.01)


def test_balance_sees_real_tokens_alone_however_they_lie():
    config, params = dataclasses.replace(CONFIG, balance=0.7), tiny.params(config=CONFIG)
    alone = gradient_of_balance(config, params, TOKENS[:, :4].reshape(-1, 4))
    assert any(leaf.any() for leaf in jax.tree.leaves(alone))
    for before, after in ((5, 0), (0, 5)):
        mask = np.pad(np.ones((4, 4), bool), ((0, 0), (before, after)))
        assert_close(gradient_of_balance(config, params, np.pad(TOKENS[:, :4], ((0, 0), (before, after))), mask), alone)
    packed = np.pad(TOKENS[:, :4].reshape(2, 8), ((0, 0), (0, 3)))
    segments = np.array([[3] * 4 + [1] * 4 + [0] * 3] * 2, np.int32)
    assert_close(gradient_of_balance(config, params, packed, None, segments), alone)


def test_balance_is_the_same_on_eight_devices():
    config, params = dataclasses.replace(CONFIG, balance=0.7), tiny.params(config=CONFIG)
    expected = gradient_of_balance(config, params, TOKENS)
    mesh = make_mesh((2, 2, 2), ("data", "fsdp", "model"))
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params(config, mesh))
        got = gradient_of_balance(config, jax.device_put(params, shardings), TOKENS)
    assert_close(got, expected)


@pytest.mark.slow
def test_experts_that_learn_with_balance_are_used_more_evenly():
    """A router that prefers two experts for every token: what learning makes of it without the loss and with it."""
    params, optimizer = policy.init(CONFIG, jax.random.key(0)), optax.apply_if_finite(optax.adam(0.02), 1)
    params["embedding"] += 1.0  # what all tokens have
    params["blocks"]["router"] = params["blocks"]["router"].at[..., :2].add(0.5)
    assert use_of_experts(CONFIG, params).max() == 0.5
    everything, spread = np.ones(TOKENS.shape, bool), []
    for coefficient in (0.0, 1.0):
        config = dataclasses.replace(CONFIG, balance=coefficient)
        state = init_state(config, optimizer, jax.tree.map(jnp.copy, params))
        for _ in range(40):
            batch = (jnp.asarray(part) for part in (TOKENS, everything, everything))
            state, _ = supervised_update(config, optimizer, state, *batch, micro_tokens=18)
        spread.append(use_of_experts(config, state.params).std())
    assert spread[1] < spread[0] / 2


def watch_scores(patch, watched):
    """Let a function see the scores of every layer; newer versions of Flax would take its effect for an output."""
    patch.setattr(model, "balanced", watched)
    patch.setattr(model.nn, "scan", functools.partial(model.nn.scan, check_constancy_invariants=False))


def use_of_experts(config, params):
    """[X] how often each was chosen, over all layers."""
    seen = []

    def watched(experts, coefficient, scores, real):
        jax.debug.callback(lambda scores: seen.append(choices(np.asarray(scores).reshape(-1, 4), 2).sum(0)), scores)
        return scores

    with pytest.MonkeyPatch.context() as patch:
        watch_scores(patch, watched)
        columns = jnp.broadcast_to(jnp.arange(9), TOKENS.shape)
        watching = dataclasses.replace(config, balance=1.0)
        model.Decoder(watching).apply({"params": params}, TOKENS, columns)
        jax.effects_barrier()
    return sum(seen) / sum(map(np.sum, seen))


def test_balance_is_refused_without_experts():
    with pytest.raises(ValueError, match=r"balance 0\.1 is of experts, and the policy has none"):
        dataclasses.replace(tiny.CONFIG, balance=0.1)
    with pytest.raises(ValueError, match="balance -1"):
        dataclasses.replace(CONFIG, balance=-1)
