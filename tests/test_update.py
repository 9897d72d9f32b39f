"""The optimiser steps: micro-batches, skipped rollouts, devices and faults change nothing they should not."""

import gc
import re
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from krl import policy, rollout
from krl.base.sharding import make_mesh, named_sharding, tree_sharding
from krl.learn import policy_loss
from krl.learn.batches import accumulate
from krl.run.compiled import KEPT, for_this_backend
from krl.run.optimizer import apply_gradients, init_state, make_optimizer, skipped_updates
from krl.run.update import policy_update, supervised_update
from tests import tiny

OPTIONS = {
    "learning_rate": 0.01,
    "warmup_steps": 0,
    "decay_steps": 0,
    "beta1": 0.9,
    "beta2": 0.98,
    "weight_decay": 0.0,
    "grad_clip": 1.0,
}
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
OPTIMIZER = make_optimizer(**OPTIONS)
ROW_TOKENS = 9  # P + T
INDEX = np.repeat(np.arange(5), [5, 3, 4, 2, 2])  # the last two rows are padding
ADVANTAGES = np.random.default_rng(3).normal(size=16) * (np.arange(16) % 3 > 0) * (INDEX < 4)


def fresh_state():
    return init_state(tiny.CONFIG, OPTIMIZER, tiny.params())


def step(state=None, *, num_updates=1, micro_rows=4, advantages=ADVANTAGES, seed=0, temperature=1.0, **options):
    return policy_update(
        tiny.CONFIG, OPTIMIZER, fresh_state() if state is None else state, tiny.prompts(), tiny.rollouts(INDEX),
        jnp.asarray(advantages, jnp.float32), jax.random.key(seed),
        num_updates=num_updates, micro_tokens=micro_rows * ROW_TOKENS, temperature=temperature, **CLIPS, **options,
    )  # fmt: skip


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol), a, b)


def floats(metrics):
    """What an update says, but for how much it computed."""
    return {name: float(value) for name, value in metrics.items() if name != "shared_tokens"}


def test_update_is_the_gradient_of_the_token_mean_over_all_rollouts():
    """Against plain code: every rollout at once, none skipped, optax without wrappers."""
    prompts, rollouts = tiny.prompts(), tiny.rollouts(INDEX)
    real = np.arange(4)[None, :] < np.asarray(rollouts.lengths)[:, None]
    source = np.minimum(INDEX, 3)

    def loss(params):
        tokens = jnp.concatenate([prompts.tokens[source], rollouts.tokens], axis=1)
        mask = jnp.concatenate([prompts.mask[source], jnp.array(real)], axis=1)
        logits = jax.nn.log_softmax(policy.apply(tiny.CONFIG, params, tokens, mask))
        logps = jnp.take_along_axis(logits[:, 4:-1], rollouts.tokens[..., None], axis=-1)[..., 0]
        (total, _), _ = policy_loss(logps, rollouts.logps, jnp.asarray(ADVANTAGES, jnp.float32), jnp.array(real))
        return total / real.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(tiny.params())
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01, b1=0.9, b2=0.98, weight_decay=0.0))
    updates, _ = plain.update(grads, plain.init(tiny.params()), tiny.params())
    state, metrics = step()
    assert float(metrics["loss"]) == pytest.approx(float(value), abs=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert_close(state.params, optax.apply_updates(tiny.params(), updates), atol=2e-4)


@pytest.mark.parametrize(("num_updates", "temperature"), [(1, 1.0), (2, 1.0), (1, 0.6), (1, 0.0)])
def test_the_mismatch_is_that_of_the_first_updates_rollouts(num_updates, temperature):
    """Against plain code with the parameters from before the step; greedy rollouts are scored at temperature 1."""
    prompts, rollouts, source = tiny.prompts(), tiny.rollouts(INDEX), np.minimum(INDEX, 3)
    real = np.arange(4)[None, :] < np.asarray(rollouts.lengths)[:, None]
    tokens = jnp.concatenate([prompts.tokens[source], rollouts.tokens], axis=1)
    mask = jnp.concatenate([prompts.mask[source], jnp.array(real)], axis=1)
    logits = jax.nn.log_softmax(policy.apply(tiny.CONFIG, tiny.params(), tokens, mask) / (temperature or 1))
    logps = jnp.take_along_axis(logits[:, 4:-1], rollouts.tokens[..., None], axis=-1)[..., 0]
    first = np.asarray(jax.random.permutation(jax.random.key(0), 16)).reshape(num_updates, -1)[0]
    which = [row for row in first if ADVANTAGES[row] and INDEX[row] < 4]
    apart = np.abs(np.asarray(logps - rollouts.logps))[which][real[which]]
    _, metrics = step(num_updates=num_updates, micro_rows=2, temperature=temperature)
    assert float(metrics["mismatch"]) == pytest.approx(apart.mean(), rel=1e-4)
    assert float(metrics["mismatch_max"]) == pytest.approx(apart.max(), rel=1e-4)
    _, metrics = step(num_updates=num_updates, advantages=np.zeros(16))
    assert np.isnan(metrics["mismatch"])


def test_micro_rowses_change_nothing():
    whole, metrics = step(micro_rows=16)
    parts, same = step(micro_rows=2)
    assert_close(parts.params, whole.params, atol=1e-4)
    assert_close(floats(same), floats(metrics), atol=1e-4)


PENALTIES = {"importance_cap": 2.0, "kl_coefficient": 0.1, "entropy_coefficient": 0.05}


@pytest.mark.parametrize("options", [{}, tiny.slow(PENALTIES), tiny.slow({"surrogate": "gspo"})])
def test_packed_rows_give_the_gradient_of_padded_rows_and_of_one_rollout_at_a_time(options):
    reference = jax.tree.map(lambda leaf: 0.9 * leaf, tiny.params()) if "kl_coefficient" in options else None
    packed, metrics = step(**options, reference=reference, num_updates=2, micro_rows=2)
    padded, same = step(**options, reference=reference, num_updates=2, micro_rows=16, packed=False)
    assert_close(packed.params, padded.params, atol=1e-4)
    assert floats(metrics) == pytest.approx(floats(same), rel=1e-4, abs=1e-5)
    single, same = step(**options, reference=reference, num_updates=2, micro_rows=1, packed=False)
    assert_close(single.params, padded.params, atol=1e-4)
    assert floats(metrics) == pytest.approx(floats(same), rel=1e-4, abs=1e-5)


def test_shared_tokens_are_the_prompts_that_another_rollout_has():
    lengths = np.asarray(tiny.rollouts(INDEX).lengths)
    two = np.where(np.arange(16) < 2, 1.0, 0.0)  # of the first prompt, which has 3 tokens
    _, metrics = step(advantages=two)
    assert float(metrics["shared_tokens"]) == pytest.approx(3 / (2 * 3 + lengths[:2].sum()))
    _, metrics = step(advantages=two, packed=False)
    assert float(metrics["shared_tokens"]) == 0
    _, metrics = step(advantages=np.zeros(16))
    assert float(metrics["shared_tokens"]) == 0


def test_an_entropy_bonus_is_the_mean_entropy_of_the_response_tokens():
    prompts, rollouts = tiny.prompts(), tiny.rollouts(INDEX)
    real = np.arange(4)[None, :] < np.asarray(rollouts.lengths)[:, None]
    source = np.minimum(INDEX, 3)
    tokens = jnp.concatenate([prompts.tokens[source], rollouts.tokens], axis=1)
    mask = jnp.concatenate([prompts.mask[source], jnp.array(real)], axis=1)
    logits = jax.nn.log_softmax(policy.apply(tiny.CONFIG, tiny.params(), tokens, mask))[:, 4:-1]
    entropy = -(jnp.exp(logits) * logits).sum(axis=-1)
    _, plain = step()
    _, metrics = step(entropy_coefficient=0.3)
    expected = float(plain["loss"]) - 0.3 * float(entropy[real].mean())
    assert float(metrics["loss"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_what_is_fastest_here_computes_the_same():
    plain, metrics = step()
    fast: Any = for_this_backend(
        policy_update, tiny.CONFIG, OPTIMIZER, num_updates=1, micro_tokens=4 * ROW_TOKENS, temperature=1.0, **CLIPS
    )
    arguments = (
        fresh_state(), tiny.prompts(), tiny.rollouts(INDEX), jnp.asarray(ADVANTAGES, jnp.float32), jax.random.key(0)
    )  # fmt: skip
    state, same = fast.lower(*arguments).compile(tiny.AS_FOR_USERS)(*arguments)
    assert_close(state.params, plain.params, atol=1e-4)
    assert_close(floats(same), floats(metrics), atol=1e-5)


def test_the_key_decides_which_rollouts_share_an_update():
    first, _ = step(num_updates=2, micro_rows=4, seed=0)
    second, _ = step(num_updates=2, micro_rows=4, seed=1)
    different = jax.tree.map(lambda a, b: float(abs(a - b).max()), first.params, second.params)
    assert max(jax.tree.leaves(different)) > 1e-4


def test_rollouts_without_advantage_are_not_run():
    """Their tokens may be anything: a NaN log-probability would show in the loss."""
    rollouts = tiny.rollouts(INDEX)
    idle = np.flatnonzero(ADVANTAGES == 0)
    poisoned = rollouts.replace(logps=rollouts.logps.at[idle].set(jnp.nan))
    assert len(idle) >= 4
    got, metrics = policy_update(
        tiny.CONFIG, OPTIMIZER, fresh_state(), tiny.prompts(), poisoned, jnp.asarray(ADVANTAGES, jnp.float32),
        jax.random.key(0), num_updates=1, micro_tokens=ROW_TOKENS, temperature=1.0, **CLIPS,
    )  # fmt: skip
    assert_close(got.params, step(micro_rows=1)[0].params, atol=1e-6)
    assert np.isfinite(float(metrics["loss"]))


def test_no_gradient_no_change():
    state, metrics = step(advantages=np.zeros(16))
    assert_close(state.params, tiny.params(), atol=0)
    assert float(metrics["grad_norm"]) == 0.0


def test_counts_do_not_recompile_and_the_state_keeps_its_layout():
    with jax.set_mesh(make_mesh((4, 2), ("fsdp", "model"))):
        state = fresh_state()
        layout = jax.tree.map(lambda leaf: leaf.sharding, state)
        state, _ = step(state)
        size = policy_update._cache_size()
        state, _ = step(state, advantages=ADVANTAGES * (np.arange(16) < 5))
        assert policy_update._cache_size() == size
        after = jax.tree.map(lambda leaf: leaf.sharding, state)
    same = jax.tree.map(lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), layout, after, state)
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_a_hundred_steps_of_changing_counts_and_lengths_compile_once():
    rng, state, programs = np.random.default_rng(0), fresh_state(), set()
    for number in range(100):
        counts = rng.multinomial(16, rng.dirichlet(np.ones(4)))
        drawn = rollout.generate(
            tiny.CONFIG, state.params, tiny.prompts(), jnp.array(counts), jax.random.key(number), max_new_tokens=4,
            eos_ids=tiny.EOS, num_rollouts=16, num_slots=4, expected_tokens=jnp.asarray(rng.random(4), jnp.float32),
        )  # fmt: skip
        advantages = jnp.asarray(rng.normal(size=16) * (rng.random(16) < rng.random()), jnp.float32)
        state, _ = policy_update(
            tiny.CONFIG, OPTIMIZER, state, tiny.prompts(), drawn, advantages, jax.random.key(number), num_updates=2,
            micro_tokens=2 * ROW_TOKENS, temperature=1.0, **CLIPS,
        )  # fmt: skip
        programs.add((policy_update._cache_size(), tiny.sampler_programs()))
    assert len(programs) == 1


@pytest.mark.parametrize(("shape", "names"), [((8,), ("data",)), tiny.slow((2, 2, 2), ("data", "fsdp", "model"))])
def test_eight_devices_equal_one(shape, names):
    alone, metrics = step()
    mesh = make_mesh(shape, names)
    shapes = jax.eval_shape(tiny.params)
    shardings = tree_sharding(mesh, policy.param_axes(tiny.CONFIG), shapes)
    with jax.set_mesh(mesh):
        state = init_state(tiny.CONFIG, OPTIMIZER, jax.device_put(tiny.params(), shardings))
        if "model" in names:
            assert not state.params["blocks"]["gate"].sharding.is_fully_replicated
            assert not state.opt_state.inner_state[1][0].mu["blocks"]["gate"].sharding.is_fully_replicated
        spread, same = step(state, micro_rows=8)
    assert_close(spread.params, alone.params, atol=2e-4)
    assert_close(floats(same), floats(metrics), atol=1e-4)


def test_gradients_travel_once_however_many_micro_batches_there_are():
    rows, weights = jnp.arange(32.0 * 3).reshape(32, 3), jnp.arange(3.0)

    def loss_of(weights, _, part):
        total = jnp.tanh(part @ weights).sum()
        return total, {"ratio_max": (part.max(), jnp.float32(part.size))}

    def total(weights, rows):
        return accumulate(loss_of, weights, (), rows, 24, 8)

    alone = jax.jit(total)(weights, rows)
    with jax.set_mesh(make_mesh((8,), ("data",))):
        compiled = jax.jit(total).lower(weights, rows).compile()
        assert_close(compiled(weights, rows), alone)
    computations = {text.split()[0].strip("%"): text for text in compiled.as_text().split("\n\n") if text}
    (loop,) = re.findall(r"body=%([\w.]+)", compiled.as_text())
    assert "all-reduce" not in computations[loop]
    assert "all-reduce" in compiled.as_text()


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    broken = np.where(np.arange(16) == 1, np.nan, ADVANTAGES)
    state, _ = step(advantages=broken)
    assert_close(state.params, tiny.params(), atol=0)
    assert skipped_updates(state) == (1, 1)
    state, _ = step(state, advantages=broken)
    assert skipped_updates(state) == (2, 2)
    state, _ = step(state)
    assert skipped_updates(state) == (0, 2)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_enough(bad, value):
    """The loss alone, or one number of one gradient."""
    grads = jax.tree.map(jnp.ones_like, tiny.params())
    if bad == "gradient":
        grads["blocks"]["gate"] = grads["blocks"]["gate"].at[1, 2, 3].set(value)
    loss = jnp.float32(value if bad == "loss" else 1.0)
    state, _ = jax.jit(apply_gradients, static_argnums=(0, 1))(
        tiny.CONFIG, OPTIMIZER, fresh_state(), grads, loss, jnp.float32(7)
    )
    assert_close(state.params, tiny.params(), atol=0)
    assert skipped_updates(state) == (1, 1)


def test_supervised_update_is_cross_entropy_on_the_targets():
    prompts = tiny.prompts(lengths=(5, 5, 3))
    target = np.zeros(prompts.mask.shape, bool)
    target[:, -2:] = True
    logits = policy.apply(tiny.CONFIG, tiny.params(), prompts.tokens, prompts.mask)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits[:, -3:-1], prompts.tokens[:, -2:]).mean()
    state, metrics = supervised_update(
        tiny.CONFIG, OPTIMIZER, fresh_state(), prompts.tokens, prompts.mask, jnp.array(target), micro_tokens=10
    )
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    for _ in range(5):
        state, later = supervised_update(
            tiny.CONFIG, OPTIMIZER, state, prompts.tokens, prompts.mask, jnp.array(target), micro_tokens=10
        )
    assert float(later["loss"]) < float(metrics["loss"])


def test_replicated_prompts_on_a_mesh_sample_the_same():
    def sample():
        return rollout.generate(
            tiny.CONFIG, tiny.params(), tiny.prompts(), jnp.array([5, 3, 4, 4]), jax.random.key(0),
            max_new_tokens=4, eos_ids=tiny.EOS,
        )  # fmt: skip

    alone = sample()
    mesh = make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        shardings = tree_sharding(mesh, policy.param_axes(tiny.CONFIG), jax.eval_shape(tiny.params))
        prompts = jax.device_put(tiny.prompts(), named_sharding(mesh))
        spread = rollout.generate(
            tiny.CONFIG, jax.device_put(tiny.params(), shardings), prompts, jnp.array([5, 3, 4, 4]),
            jax.random.key(0), max_new_tokens=4, eos_ids=tiny.EOS,
        )  # fmt: skip
    np.testing.assert_array_equal(spread.tokens, alone.tokens)
    np.testing.assert_allclose(spread.logps, alone.logps, atol=1e-5)


def test_importance_weights_come_from_log_probabilities_computed_again():
    """Against plain code: ratios of 1 in the first update, each token weighted by min(p / p_sampler, 2)."""
    prompts, rollouts = tiny.prompts(), tiny.rollouts(INDEX)
    real = np.arange(4)[None, :] < np.asarray(rollouts.lengths)[:, None]
    source = np.minimum(INDEX, 3)

    def loss(params):
        tokens = jnp.concatenate([prompts.tokens[source], rollouts.tokens], axis=1)
        mask = jnp.concatenate([prompts.mask[source], jnp.array(real)], axis=1)
        logits = jax.nn.log_softmax(policy.apply(tiny.CONFIG, params, tokens, mask))
        logps = jnp.take_along_axis(logits[:, 4:-1], rollouts.tokens[..., None], axis=-1)[..., 0]
        old = jax.lax.stop_gradient(logps)
        weight = jnp.minimum(jnp.exp(old - rollouts.logps), 2.0)
        return jnp.where(real, -jnp.exp(logps - old) * weight * ADVANTAGES[:, None], 0.0).sum() / real.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(tiny.params())
    _, metrics = step(importance_cap=2.0)
    assert float(metrics["loss"]) == pytest.approx(float(value), abs=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert 0 < float(metrics["importance_capped_fraction"]) < 1
    _, parts = step(importance_cap=2.0, micro_rows=1)
    assert_close(floats(parts), floats(metrics), atol=1e-4)


def test_a_penalty_to_the_policy_itself_is_zero_and_to_another_one_is_not():
    plain, metrics = step()
    same, penalised = step(kl_coefficient=0.5, reference=tiny.params())
    assert float(penalised["kl"]) == pytest.approx(0.0, abs=1e-6)
    assert_close(same.params, plain.params, atol=1e-4)
    _, far = step(kl_coefficient=0.5, reference=tiny.params(seed=1))
    assert float(far["kl"]) > 0.01
    assert float(far["loss"]) == pytest.approx(float(metrics["loss"]) + 0.5 * float(far["kl"]), rel=1e-4)


@pytest.mark.slow
def test_equal_settings_share_an_optimiser_and_its_programs_and_old_ones_are_let_go():
    def update_with(rate):
        optimizer = make_optimizer(
            learning_rate=rate, warmup_steps=0, decay_steps=0, beta1=0.9, beta2=0.98, weight_decay=0.0, grad_clip=1.0
        )
        return for_this_backend(supervised_update, tiny.CONFIG, optimizer, micro_tokens=64), optimizer.update

    first, again = update_with(0.25), update_with(0.25)
    assert first[0] is again[0]
    gone = weakref.ref(first[1])
    del first, again
    for number in range(KEPT + 1):
        update_with(0.5 + number)
    gc.collect()
    assert gone() is None
