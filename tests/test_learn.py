"""Advantages and loss against loops and hand-worked values."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krl.base.masked import segment_moments
from krl.learn import (
    KL_ESTIMATORS,
    SCALES,
    SURROGATES,
    fit_float32,
    group_advantages,
    mixed_groups,
    overlong_penalty,
    policy_loss,
    token_weights,
)


def advantages_by_loops(rewards, index, mask, scale):
    out = np.zeros(len(rewards))
    for group in set(index[mask]):
        rows = [j for j in range(len(rewards)) if mask[j] and index[j] == group]
        got = rewards[rows].astype(float)
        if len(rows) > 1 and got.max() != got.min():
            by = {"std": got.std(ddof=1) + 1e-6, "none": 1.0, "mean": got.mean()}[scale]
            out[rows] = (got - got.mean()) / by
    return out


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(SCALES))
def test_advantages_equal_loops(seed, binary, scale):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 2, 24).astype(np.float32) if binary else rng.random(24).astype(np.float32)
    index, mask = rng.integers(0, 6, 24), rng.random(24) < 0.8
    got = group_advantages(
        jnp.array(rewards),
        jnp.array(index),
        jnp.array(mask),
        6,
        scale_by_std=scale == "std",
        scale_by_mean=scale == "mean",
    )
    np.testing.assert_allclose(got, advantages_by_loops(rewards, index, mask, scale), rtol=2e-4, atol=2e-5)


def test_divided_by_the_mean_every_success_of_a_rare_kind_counts_more():
    rewards = jnp.array([1.0, 0, 0, 0, 1, 1, 1, 0])
    index, mask = jnp.repeat(jnp.arange(2), 4), jnp.ones(8, bool)
    got = group_advantages(rewards, index, mask, 2, scale_by_mean=True)
    np.testing.assert_allclose(got, [3, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1], rtol=1e-6)


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


CHANCES = (1.0, 0.1, 0.0, 0.25, 0.5)
AVERAGES = {
    "tokens": lambda sums, lengths, index: sums.sum() / lengths.sum(),
    "sequences": lambda sums, lengths, index: (sums / lengths).mean(),
    "prompts": lambda sums, lengths, index: np.mean([sums[index == i].sum() / lengths[index == i].sum() for i in (0, 1, 3)]),
    "candidates": lambda sums, lengths, index: np.average(
        [sums[index == i].sum() / lengths[index == i].sum() for i in (0, 1, 3)], weights=[1 / CHANCES[i] for i in (0, 1, 3)]
    ),
    "constant": lambda sums, lengths, index: sums.sum() / (13 * 9),
}  # fmt: skip


@pytest.mark.parametrize("average", AVERAGES)
def test_weights_make_the_token_mean_another_mean(average):
    rng = np.random.default_rng(3)
    index, lengths = np.repeat([0, 1, 3], [2, 7, 4]), rng.integers(1, 9, 13)
    losses = [rng.normal(size=length) for length in lengths]  # of any surrogate, proportional to the advantage
    sums = np.array([loss.sum() for loss in losses])
    mask = jnp.append(jnp.ones(13, bool), False)
    weights = token_weights(average, jnp.append(lengths, 9), jnp.append(index, 1), mask, 5, 9, jnp.array(CHANCES))
    assert weights[-1] == 0
    token_mean = (np.asarray(weights)[:13] * sums).sum() / lengths.sum()
    np.testing.assert_allclose(token_mean, AVERAGES[average](sums, lengths, index), rtol=1e-5)


def test_weights_by_chances_undo_an_uneven_choice():
    """Prompts served with probabilities c, weighed by 1 / c, have the mean of all prompts."""
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.1, 1.0, 60)
    worth = 2 + 3 * chances + rng.normal(size=60)  # what is served more often is worth more
    ones, index = jnp.ones(60, jnp.int32), jnp.arange(60)
    found: dict[str, list] = {"candidates": [], "prompts": []}
    for _ in range(500):
        served = rng.random(60) < chances
        for average, means in found.items():
            weights = token_weights(average, ones, index, jnp.asarray(served), 60, 1, jnp.float32(chances))
            means.append((np.asarray(weights) * worth).sum() / served.sum())
    assert abs(np.mean(found["candidates"]) - worth.mean()) < 0.05 < 0.3 < np.mean(found["prompts"]) - worth.mean()
    with pytest.raises(ValueError, match="needs the chances"):
        token_weights("candidates", ones, index, jnp.asarray(served), 60, 1)


def test_leaving_one_out_compares_with_the_mean_of_the_others():
    rewards, index = np.array([1.0, 0.0, 0.5, 0.2, 1.0, 0.7]), np.array([0, 0, 0, 1, 1, 2])
    mask = jnp.ones(6, bool)
    got = group_advantages(
        jnp.asarray(rewards, jnp.float32), jnp.array(index), mask, 3, scale_by_std=False, leave_one_out=True
    )
    expected = [1 - 0.25, 0 - 0.75, 0.5 - 0.5, 0.2 - 1.0, 1.0 - 0.2, 0.0]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_rollout_without_a_reward_is_left_out_of_advantages_and_weights():
    rewards, index = jnp.array([-1.0, -1.0, 0.0, -1.0, 1.0, 0.0, 9.0]), jnp.array([0, 0, 0, 0, 1, 1, 1])
    scored = jnp.array([True, True, False, True, True, True, False])
    got = group_advantages(rewards, index, scored, 2)
    np.testing.assert_allclose(got, [0, 0, 0, 0, 0.5**0.5, -(0.5**0.5), 0], rtol=1e-5)
    assert (got[:4] == 0).all()
    lengths = jnp.array([2, 2, 50, 2, 3, 3, 50])
    weights = token_weights("sequences", lengths, index, scored, 2, 60)
    np.testing.assert_allclose(
        weights * lengths, [12 / 5] * 2 + [0] + [12 / 5] * 3 + [0], rtol=1e-6
    )  # 12 tokens, five rollouts


def exact(rewards, scale=True, leave_one_out=False):
    """A group's advantages in Python's rational numbers, but for the root."""
    values = [Fraction(float(reward)) for reward in rewards]
    mean, size = sum(values) / len(values), len(values)
    deviations = [value - mean for value in values]
    if leave_one_out:
        deviations = [each * size / (size - 1) for each in deviations]
    if not scale:
        return [float(each) for each in deviations]
    variance = sum((value - mean) ** 2 for value in values) / (size - 1)
    unit = max(abs(value) for value in values)
    std = math.sqrt(variance / unit**2) * float(unit)
    return [float(each / Fraction(std + 1e-6)) for each in deviations]


SIZES = ([3e38, -3e38, 1e38], [1e19, 2e19, 4e19, 3e19], [1e25, 0, 0], [1e-20, 2e-20, 0.0], [1e-3, 2e-3, 0.0], [1e6, 1e6 + 1, 1e6], [-1e6 - 1, -1e6])  # fmt: skip


@pytest.mark.parametrize("rewards", SIZES, ids=str)
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_advantages_of_rewards_of_any_size_are_exact(rewards, leave_one_out):
    rewards = np.array(rewards, np.float32)
    others = np.array([1.0, 0.0, 1.0], np.float32)  # another group has its own size
    values = jnp.concatenate([rewards, others])
    index, mask = jnp.array([1] * len(rewards) + [0] * 3), jnp.ones(len(values), bool)
    got = group_advantages(values, index, mask, 3, leave_one_out=leave_one_out)
    np.testing.assert_allclose(got[:-3], exact(rewards, leave_one_out=leave_one_out), rtol=3e-6, atol=0)
    np.testing.assert_allclose(got[-3:], exact(others, leave_one_out=leave_one_out), rtol=3e-6)


def test_advantages_of_rewards_of_0_and_1_have_the_bits_of_the_plain_formula():
    rng = np.random.default_rng(0)
    for size in (2, 3, 7, 16, 100):
        rewards = jnp.array(rng.integers(0, 2, size), jnp.float32).at[0].set(1.0).at[1].set(0.0)
        index, mask = jnp.zeros(size, int), jnp.ones(size, bool)
        _, mean, squares = segment_moments(rewards, index, 1)
        plain = (rewards - mean[index]) / (jnp.sqrt(squares / (size - 1)) + 1e-6)[index]
        np.testing.assert_array_equal(group_advantages(rewards, index, mask, 1), plain)


def test_rewards_that_float32_cannot_tell_apart_are_moved_and_the_others_stay():
    rewards = np.array(
        [1e9, 1e9 + 1, 1e9, 0.1, 0.3, 1e300, 2e300, -1.7e308, 1.7e308, 1e300, 1e300, 0.1 + 0.2, 0.3, 1e9 + 1, 5.0]
    )
    index = np.array([4, 4, 4, 2, 2, 7, 7, 0, 0, 1, 1, 3, 3, 5, 4])
    scored = np.arange(15) < 14
    fitted = fit_float32(rewards, index, scored)
    assert fitted.dtype == np.float32
    assert fitted[:3].tolist() == [-0.5, 0.5, -0.5]
    assert fitted[3:5].tolist() == np.array([0.1, 0.3], np.float32).tolist()
    assert fitted[9] == fitted[10] == np.finfo(np.float32).max
    assert fitted[11] == fitted[12]  # what differs in the last digit of float64 alone was meant to be equal
    assert fitted[14] == 0.0
    got = group_advantages(jnp.asarray(fitted), jnp.asarray(index), jnp.asarray(scored), 8)
    np.testing.assert_allclose(got[:3], exact([0, 1, 0]), rtol=1e-5)
    np.testing.assert_allclose(got[5:9], np.array([-1, 1, -1, 1]) * 0.5**0.5, rtol=1e-5)
    assert (got[9:] == 0).all()
    whole = np.random.default_rng(0).random(100)
    np.testing.assert_array_equal(fit_float32(whole, np.arange(100) % 9, np.ones(100, bool)), whole.astype(np.float32))
    assert fit_float32(np.zeros(0), np.zeros(0, int), np.zeros(0, bool)).shape == (0,)


@pytest.mark.parametrize("rewards", [[1e16, 1e16 + 2], [1e20, 1e20 + 1e5], [-1e300, -1e300 * (1 + 2**-52)]])
def test_whole_rewards_that_float64_tells_apart_differ(rewards):
    rewards, index, scored = np.array(rewards), np.zeros(2, int), np.ones(2, bool)
    got = group_advantages(jnp.asarray(fit_float32(rewards, index, scored)), jnp.asarray(index), jnp.asarray(scored), 1)
    half = 0.5**0.5 * np.sign(rewards[1] - rewards[0])
    np.testing.assert_allclose(got, [-half, half], rtol=1e-5)
    summed = fit_float32(rewards, index, scored, summed=True)  # where it may be an error of rounding
    assert summed[0] == summed[1]


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


def loss_by_loops(
    logps, old, advantages, mask, sequences, surrogate, sampler=None, reference=None, estimator="k3", entropies=None
):
    """Every token by itself, in float64, with clips 0.2, 0.28 and 3, a cap of 2, and coefficients 0.1 and 0.2."""
    total = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        advantage = advantages[b, t]
        ratio = np.exp(logps[b, t] - old[b, t])
        if surrogate == "gspo":
            mine = mask & (sequences == sequences[b, t])
            ratio = np.prod(np.exp(logps[mine] - old[mine])) ** (1 / mine.sum())
        if surrogate == "cispo":
            loss = -min(ratio, 1.28) * advantage * logps[b, t]
        else:
            loss = -min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            loss = min(loss, 3.0 * -advantage) if advantage < 0 else loss
        if sampler is not None:
            loss *= min(np.exp(old[b, t] - sampler[b, t]), 2.0)
        if reference is not None:
            d = reference[b, t] - logps[b, t]
            loss += 0.1 * {"k1": -d, "k2": d * d / 2, "k3": np.exp(d) - 1 - d}[estimator]
        if entropies is not None:
            loss -= 0.2 * entropies[b, t]
        total += loss
    return total


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_loss_of_packed_rows_is_that_of_loops_and_its_gradient_that_of_finite_differences(surrogate, estimator):
    rng = np.random.default_rng(len(surrogate) + len(estimator))
    sequences = np.array([[0, 0, 0, 3, 3, 3, 3], [7, 7, 9, 9, 9, 9, 9], [14] * 7])
    mask = rng.random((3, 7)) < 0.8
    logps, old, sampler, reference = rng.uniform(-3, -0.1, (4, 3, 7))
    advantages = np.array([1.5, -0.7, 0.0, 2.0, -1.0])[np.unique(sequences, return_inverse=True)[1].reshape(3, 7)]
    entropies = rng.random((3, 7))

    def loss(logps):
        return policy_loss(
            logps, jnp.array(old), jnp.array(advantages), jnp.array(mask), surrogate=surrogate, dual_clip=3.0,
            sequences=jnp.array(sequences), sampler_logps=jnp.array(sampler), reference_logps=jnp.array(reference),
            kl_coefficient=0.1, kl_estimator=estimator, entropies=jnp.array(entropies), entropy_coefficient=0.2,
        )[0]  # fmt: skip

    def by_loops(logps):
        return loss_by_loops(
            logps, old, advantages, mask, sequences, surrogate, sampler, reference, estimator, entropies
        )

    with jax.enable_x64(True):
        (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.array(logps))
        assert count == mask.sum()
        np.testing.assert_allclose(total, by_loops(logps), rtol=1e-5)
    for b, t in np.ndindex(3, 7):
        step = np.zeros((3, 7))
        step[b, t] = 1e-6
        if surrogate == "cispo":  # the factor has no gradient: hold it still
            factor = np.minimum(np.exp(logps - old), 1.28) * np.minimum(np.exp(old - sampler), 2.0) * advantages
            slope = -factor[b, t] * mask[b, t]

            def held(moved):
                still = 0 * advantages
                return loss_by_loops(moved, moved, still, mask, sequences, "ppo", sampler, reference, estimator)

            slope += (held(logps + step) - held(logps - step)) / 2e-6
        else:
            slope = (by_loops(logps + step) - by_loops(logps - step)) / 2e-6
        assert gradient[b, t] == pytest.approx(slope, abs=1e-4)


def test_rows_of_one_rollout_need_no_sequence_numbers():
    rng = np.random.default_rng(1)
    logps, old = jnp.asarray(rng.uniform(-3, -0.1, (2, 3, 5)), jnp.float32)
    advantages, mask = jnp.array([1.0, -1.0, 0.5]), jnp.arange(5) < jnp.array([[5], [2], [0]])
    plain, _ = policy_loss(logps, old, advantages, mask, surrogate="gspo")
    numbered, _ = policy_loss(
        logps, old, advantages, mask, surrogate="gspo", sequences=jnp.full((3, 5), 4) * jnp.arange(3)[:, None]
    )
    by_token, _ = policy_loss(logps, old, jnp.repeat(advantages[:, None], 5, axis=1), mask, surrogate="gspo")
    assert float(plain[0]) == pytest.approx(float(numbered[0]), rel=1e-6)
    assert float(plain[0]) == pytest.approx(float(by_token[0]), rel=1e-6)


@pytest.mark.parametrize("wrong", [{"surrogate": "trpo"}, {"kl_estimator": "k9"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match="must be one of"):
        loss_of(0.0, 1.0, **wrong)


def test_a_buffer_of_the_whole_limit_penalises_every_token():
    assert overlong_penalty(jnp.array([0, 1, 4]), 4, 4).tolist() == [0.0, 0.25, 1.0]
