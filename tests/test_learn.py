"""Advantages and loss against loops and hand-worked values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krl.learn import group_advantages, mixed_groups, policy_loss, weigh_prompts_alike


def advantages_by_loops(rewards, index, mask, scale):
    out = np.zeros(len(rewards))
    for group in set(index[mask]):
        rows = [j for j in range(len(rewards)) if mask[j] and index[j] == group]
        got = rewards[rows].astype(float)
        if len(rows) > 1 and got.max() != got.min():
            out[rows] = (got - got.mean()) / ((got.std(ddof=1) + 1e-6) if scale else 1.0)
    return out


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_advantages_equal_loops(seed, binary, scale):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 2, 24).astype(np.float32) if binary else rng.random(24).astype(np.float32)
    index, mask = rng.integers(0, 6, 24), rng.random(24) < 0.8
    got = group_advantages(jnp.array(rewards), jnp.array(index), jnp.array(mask), 6, scale_by_std=scale)
    np.testing.assert_allclose(got, advantages_by_loops(rewards, index, mask, scale), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_even_groups_and_singles_are_exactly_zero(reward):
    rewards = jnp.array([reward] * 7 + [1.0])
    index, mask = jnp.array([0] * 7 + [1]), jnp.ones(8, bool)
    assert (group_advantages(rewards, index, mask, 2) == 0).all()
    assert not mixed_groups(rewards, index, mask, 2).any()


def test_padding_changes_nothing_even_when_it_is_nan():
    rewards, index, mask = jnp.array([1.0, 0.0, 1.0]), jnp.array([0, 0, 0]), jnp.ones(3, bool)
    plain = group_advantages(rewards, index, mask, 2)
    padded = group_advantages(
        jnp.append(rewards, jnp.array([jnp.nan, 5.0])), jnp.append(index, jnp.array([2, 0])), jnp.append(mask, jnp.zeros(2, bool)), 2
    )  # fmt: skip
    np.testing.assert_array_equal(padded, np.append(plain, [0.0, 0.0]))


def test_permuting_rollouts_permutes_advantages():
    rng = np.random.default_rng(0)
    rewards, index = rng.random(20).astype(np.float32), np.sort(rng.integers(0, 4, 20))
    order = rng.permutation(20)
    mask = jnp.ones(20, bool)
    straight = group_advantages(jnp.array(rewards), jnp.array(index), mask, 4)
    shuffled = group_advantages(jnp.array(rewards[order]), jnp.array(index[order]), mask, 4)
    np.testing.assert_allclose(shuffled, np.asarray(straight)[order], rtol=1e-5, atol=1e-6)


def test_prompts_alike_make_the_token_mean_a_mean_over_prompts():
    rng = np.random.default_rng(3)
    index, lengths = np.repeat([0, 1, 3], [2, 7, 4]), rng.integers(1, 9, 13)
    advantages, per_token = rng.normal(size=13), rng.normal(size=13)  # any loss that is linear in the advantage
    mask = jnp.append(jnp.ones(13, bool), False)
    weighed = weigh_prompts_alike(
        jnp.append(jnp.asarray(advantages, jnp.float32), jnp.nan), jnp.append(lengths, 9), jnp.append(index, 1), mask, 5
    )
    assert weighed[-1] == 0
    token_mean = (np.asarray(weighed)[:13] * per_token * lengths).sum() / lengths.sum()
    each = [((advantages * per_token * lengths)[index == i].sum() / lengths[index == i].sum()) for i in (0, 1, 3)]
    np.testing.assert_allclose(token_mean, np.mean(each), rtol=1e-5)


def test_advantages_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"\[R\]"):
        group_advantages(jnp.ones(3), jnp.zeros(2, int), jnp.ones(3, bool), 1)


def loss_of(log_ratio, advantage, **clips):
    (total, count), metrics = policy_loss(
        jnp.array([[log_ratio - 1.0]]), jnp.array([[-1.0]]), jnp.array([advantage]), jnp.ones((1, 1), bool), **clips
    )
    assert float(count) == 1.0
    return float(total), metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.56),  # clipped at 1.28
        (0.5, 2.0, -1.0),  # a good rollout that fell is not clipped
        (0.5, -2.0, 1.6),  # clipped at 0.8
        (1.5, -2.0, 3.0),  # a bad rollout that rose is not clipped
        (50.0, -2.0, 20.0),  # until the dual clip at 10
        (3.0, 0.0, 0.0),
    ],
)
def test_loss_of_one_token(ratio, advantage, expected):
    total, _ = loss_of(np.log(ratio), advantage)
    assert total == pytest.approx(expected, rel=1e-4)


def test_clip_metrics_count_the_tokens_that_lost_their_gradient():
    logps = jnp.log(jnp.array([[1.5, 1.1, 1.5], [0.5, 0.5, 20.0]]))
    mask = jnp.array([[True, True, False], [True, True, True]])
    _, metrics = policy_loss(logps, jnp.zeros((2, 3)), jnp.array([1.0, -1.0]), mask)
    read = {name: float(total) for name, (total, _) in metrics.items()}
    assert read["clip_high_fraction"] == 1
    assert read["clip_low_fraction"] == 2
    assert read["dual_clip_fraction"] == 1
    assert read["ratio_max"] == pytest.approx(20.0, rel=1e-5)
    assert read["ratio_mean"] == pytest.approx(1.5 + 1.1 + 0.5 + 0.5 + 20.0, rel=1e-5)


def test_gradient_on_policy_is_the_policy_gradient():
    rng = np.random.default_rng(0)
    logps, advantages = jnp.array(rng.normal(size=(3, 4))), jnp.array([1.0, -0.5, 0.0])
    mask = jnp.array(rng.random((3, 4)) < 0.7)
    grads = jax.grad(lambda x: policy_loss(x, logps, advantages, mask)[0][0])(logps)
    np.testing.assert_allclose(grads, np.where(mask, -np.asarray(advantages)[:, None], 0.0), atol=1e-6)


def test_masked_tokens_may_be_anything():
    logps, old = jnp.array([[-1.0, jnp.nan]]), jnp.array([[-1.0, -jnp.inf]])
    mask = jnp.array([[True, False]])
    (total, count), _ = policy_loss(logps, old, jnp.array([1.0]), mask)
    assert (float(total), float(count)) == (-1.0, 1.0)


def test_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        policy_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(3), jnp.ones((2, 3), bool))


def test_advantages_are_clipped_after_scaling():
    rewards, mask = jnp.array([1.0] + [0.0] * 63), jnp.ones(64, bool)
    whole, cut = (group_advantages(rewards, jnp.zeros(64, int), mask, 1, clip=clip) for clip in (np.inf, 5.0))
    assert float(whole[0]) == pytest.approx(63 / 8, rel=1e-4)  # (1 - 1/64) / (1/8)
    np.testing.assert_array_equal(cut, np.clip(whole, -5, 5))


def test_importance_weights_multiply_each_token_before_the_sum():
    old = jnp.log(jnp.array([[0.5, 0.2, 0.9]]))
    sampler = jnp.log(jnp.array([[0.4, 0.05, jnp.nan]]))
    mask = jnp.array([[True, True, False]])

    def total(logps):
        return policy_loss(logps, old, jnp.array([2.0]), mask, sampler_logps=sampler, importance_cap=2.0)

    (loss, _), metrics = total(old)
    assert float(loss) == pytest.approx(-2.0 * (1.25 + 2.0), rel=1e-5)  # 0.2 / 0.05 = 4 is cut to 2
    assert float(metrics["importance_capped_fraction"][0]) == 1
    np.testing.assert_allclose(jax.grad(lambda x: total(x)[0][0])(old), [[-2.5, -4.0, 0.0]], rtol=1e-5)


def test_the_penalty_is_the_k3_estimate_and_reaches_tokens_without_advantage():
    logps, reference = jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.array([[0.25, jnp.nan]]))
    mask = jnp.array([[True, False]])

    def total(logps):
        options = {"reference_logps": reference, "kl_coefficient": 0.1}
        return policy_loss(logps, logps, jnp.array([0.0]), mask, **options)[0][0]

    assert float(total(logps)) == pytest.approx(0.1 * (0.5 - np.log(0.5) - 1), rel=1e-5)
    np.testing.assert_allclose(jax.grad(total)(logps), [[0.1 * (1 - 0.5), 0.0]], rtol=1e-5)
