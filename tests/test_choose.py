"""Rules that may give a prompt nothing: whole groups, exactly, for those that were not sampled for longest too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from krl import budget
from krl.budget.belief import PROVEN
from tests import tiny

allocate = jax.jit(budget.allocate, static_argnums=(0, 3, 4), static_argnames=("group", "explored"))
POWERS = {"knapsack": (1, 2), "knapsack_log": (0, 1)}


def believed(rng, tasks):
    """Beliefs of all kinds: never seen, always failed, always solved, sure and unsure; some may be hopeless."""
    failures = rng.integers(0, 30, tasks) * rng.integers(0, 2, tasks)
    successes = rng.integers(0, 30, tasks) * rng.integers(0, 2, tasks)
    barren = np.where(successes > 0, PROVEN, -rng.exponential(2.0, tasks))
    belief = budget.init_belief(tasks).replace(
        successes=jnp.float32(successes), failures=jnp.float32(failures), barren=jnp.float32(barren),
        last_step=jnp.int32(rng.integers(-1, 9, tasks)), hopeless=jnp.float32(special.logit(rng.uniform(0.01, 0.5))),
    )  # fmt: skip
    return belief, successes + 0.5, failures + 0.5


def expected_value(alpha, beta, n, powers):
    """E[p^i (1-p)^k (1 - p^n - (1-p)^n)] under Beta(alpha, beta), 0 for no rollout, in float64."""
    i, k = powers
    whole, won, lost = (
        special.betaln(alpha + i + a, beta + k + b) - special.betaln(alpha, beta) for a, b in ((0, 0), (n, 0), (0, n))
    )
    return np.where(n > 0, np.exp(whole) - np.exp(won) - np.exp(lost), 0.0)


def best_total(values, groups):
    """The largest sum of values [M, J + 1] over counts that sum to groups: a dynamic program over prompts."""
    best = np.full(groups + 1, -np.inf)
    best[0] = 0.0
    for row in values:
        tried = [
            np.concatenate([np.full(k, -np.inf), best[: groups + 1 - k]]) + value
            for k, value in enumerate(row[: groups + 1])
        ]
        best = np.max(tried, axis=0)
    return best[groups]


@pytest.mark.parametrize("rule", POWERS)
def test_whole_groups_are_worth_what_a_dynamic_program_finds(rule):
    rng = np.random.default_rng(3)
    for instance in range(150):
        group, most = (2, 3, 4, 5)[instance % 4], 24
        belief, alpha, beta = believed(rng, 7)
        groups = int(rng.integers(0, 7 * (most // group) + 1))
        counts = np.asarray(allocate(rule, belief, groups * group, 0, most, group=group)[0])
        assert counts.sum() == groups * group
        assert (counts % group == 0).all()
        assert 0 <= counts.min() <= counts.max() <= most
        alive = np.asarray(budget.possible(belief), np.float64)
        sizes = group * np.arange(most // group + 1)
        values = alive[:, None] * expected_value(alpha[:, None], beta[:, None], sizes, POWERS[rule])
        reached = values[np.arange(7), counts // group].sum()
        assert reached >= best_total(values, groups) * (1 - 1e-5) - 1e-9


@pytest.mark.parametrize("rule", sorted(filter(budget.may_choose, budget.RULES)))
def test_every_choosing_rule_spends_the_budget_in_groups(rule):
    rng = np.random.default_rng(0)
    solve = jax.jit(lambda belief, total: budget.allocate(rule, belief, total, 0, 12, group=4, explored=2)[0])
    for belief in [believed(rng, 9)[0] for _ in range(4)] + [budget.init_belief(9)]:
        for total in (0, 4, 20, 36, 9 * 12):
            counts = np.asarray(solve(belief, total))
            assert counts.sum() == total
            assert set(counts.tolist()) <= {0, 4, 8, 12}
    assert budget.allocate(rule, budget.init_belief(1), 8, 0, 12, group=4, explored=2)[0].tolist() == [8]


def test_a_users_value_is_exact_in_groups_too():
    belief, *_ = believed(np.random.default_rng(1), 6)
    rule = budget.value_rule(lambda p, n: p * jnp.log1p(n))
    counts = np.asarray(budget.allocate(rule, belief, 30, 0, 12, group=3)[0])
    p = np.asarray(budget.mean(belief), np.float64)
    values = p[:, None] * np.log1p(3 * np.arange(5))
    assert values[np.arange(6), counts // 3].sum() >= best_total(values, 10) * (1 - 1e-5)


def test_shares_below_one_group_are_kept_on_average():
    rng = np.random.default_rng(2)
    wins, tasks = rng.uniform(1, 39, 64), 64
    belief = budget.init_belief(tasks).replace(successes=jnp.float32(wins), failures=jnp.float32(40 - wins))
    rate = (wins + 0.5) / 41
    shares = 16 * np.sqrt(rate * (1 - rate)) / np.sqrt(rate * (1 - rate)).sum()  # about a quarter of a group each
    solve, given_to = jax.jit(lambda b: budget.allocate("variance", b, 64, 0, 64, group=4)[0]), np.zeros(tasks)
    for _ in range(400):
        order = rng.permutation(tasks)
        given_to[order] += np.asarray(solve(budget.take(belief, order))) / 4 / 400
    np.testing.assert_allclose(given_to, shares, atol=4 * np.sqrt(0.25 / 400))
    np.testing.assert_allclose(given_to[:32].sum(), shares[:32].sum(), rtol=0.03)


@pytest.mark.parametrize(("groups", "explored"), [(20, 0), tiny.slow(20, 3), tiny.slow(4, 1)])
def test_reach_serves_prompts_with_the_chances_that_it_states(groups, explored):
    rng = np.random.default_rng(5)
    tasks, turns = 48, 600
    belief = budget.init_belief(tasks).replace(
        successes=jnp.float32(rng.uniform(0, 30, tasks)), failures=jnp.float32(rng.uniform(0, 90, tasks))
    )
    chances = np.asarray(budget.reach_chances(belief, 4 * groups, group=4, explored=explored))
    served, last = np.zeros(tasks), np.full(tasks, -1)
    for turn in range(turns):
        order = rng.permutation(tasks)
        now = budget.take(belief.replace(last_step=jnp.int32(last)), order)
        counts = np.asarray(allocate("reach", now, 4 * groups, 0, 128, group=4, explored=explored)[0])
        served[order] += (counts > 0) / turns
        last[order[counts > 0]] = turn
    assert chances.max() > 3 * chances.min()
    # What is rare waits longest, so exploration favours it more than stated.
    np.testing.assert_allclose(served, chances, atol=0.12 if explored else 4 * np.sqrt(0.25 / turns))
    np.testing.assert_allclose(served.sum(), chances.sum(), rtol=0.03)


def test_uniform_serves_all_candidates_alike():
    belief, *_ = believed(np.random.default_rng(4), 24)
    solve, given_to = jax.jit(lambda b: budget.allocate("uniform", b, 36, 0, 36, group=4)[0]), np.zeros(24)
    for turn in range(200):
        counts = np.asarray(solve(belief.replace(recorded=belief.recorded.at[0].set(turn))))
        assert set(counts.tolist()) <= {0, 4}
        given_to += counts / 4 / 200
    np.testing.assert_allclose(given_to, 9 / 24, atol=0.06)
    assert budget.allocate("uniform", belief, 24 * 8, 0, 36, group=4)[0].tolist() == [8] * 24


@given(st.sampled_from((1, 4, 17)), st.integers(0, 12), st.sampled_from((0, 1, 3, 25)), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_those_that_wait_longest_get_a_group(tasks, groups, explored, seed):
    belief, *_ = believed(np.random.default_rng(seed), tasks)
    groups = min(groups, 4 * tasks)
    counts = np.asarray(allocate("reach", belief, 3 * groups, 0, 12, group=3, explored=explored)[0])
    assert counts.sum() == 3 * groups
    if not 0 < explored <= groups <= tasks - explored:
        return
    chosen = np.asarray(allocate("reach", belief, 3 * (groups - explored), 0, 12, group=3)[0])
    unserved = np.flatnonzero(chosen == 0)
    waiting = unserved[np.argsort(np.asarray(belief.last_step)[unserved], kind="stable")][:explored]
    expected = chosen.copy()
    expected[waiting] += 3
    assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize("reach", [0.003, 0.1, 1.0])
def test_reach_weighs_by_what_is_expected(reach):
    cases = [(0.5, 0.5), (0.5, 9.5), (0.01, 4.0), (30.0, 2.0), (4.0, 4.0), (0.2, 120.0), (300.0, 100.0)]
    belief = budget.init_belief(len(cases)).replace(
        prior_alpha=jnp.float32([a for a, _ in cases]), prior_beta=jnp.float32([b for _, b in cases])
    )
    weights = budget.reach_weights(belief, reach)
    for (a, b), weight in zip(cases, weights, strict=True):
        worth = lambda p: np.sqrt(p * (1 - p)) / (p + reach)  # noqa: E731
        density = stats.beta(a, b)
        if a >= 1:
            points = density.ppf([1e-6, 0.5, 1 - 1e-6])
            mean, _ = integrate.quad(lambda p: density.pdf(p) * worth(p), 0, 1, limit=2000, points=points)  # noqa: B023
        else:  # with p = t^(1/a) the density has no pole at 0
            inner = lambda t: worth(t ** (1 / a)) * (1 - t ** (1 / a)) ** (b - 1)  # noqa: B023, E731
            mean, _ = integrate.quad(inner, 0, 1, limit=2000, points=[1e-3**a, 0.1**a, 0.9**a])
            mean *= np.exp(special.gammaln(a + b) - special.gammaln(a + 1) - special.gammaln(b))
        assert float(weight) == pytest.approx(mean, rel=3e-3)


def test_reach_goes_from_rare_successes_to_the_variance():
    wins = jnp.array([1.0, 20.0, 200.0, 380.0])
    belief = budget.init_belief(4).replace(successes=wins, failures=400 - wins)
    rate = np.asarray(budget.mean(belief))
    rare, calm = (np.asarray(budget.reach_weights(belief, r)) for r in (0.003, 100.0))
    assert (np.diff(rare) < 0).all()  # the rarer, the more
    np.testing.assert_allclose(
        calm / calm.sum(), np.sqrt(rate * (1 - rate)) / np.sqrt(rate * (1 - rate)).sum(), atol=0.01
    )


def test_a_long_prompt_is_served_last_and_then_more():
    """Reading a prompt is paid for once: of two alike the shorter one is served, the longer one with more groups if at all."""
    belief = budget.init_belief(3, prompt_tokens=jnp.array([10, 10_000, 10])).replace(
        successes=jnp.full(3, 2.0), failures=jnp.full(3, 2.0), tokens=jnp.full(3, 40.0)
    )
    assert allocate("knapsack_tokens", belief, 8, 0, 32, group=4)[0].tolist() == [4, 0, 4]
    counts = np.asarray(allocate("knapsack_tokens", belief, 64, 0, 32, group=4)[0])
    assert counts[1] == 0 or counts[1] >= 8
    assert (
        allocate("knapsack_tokens", belief, 16, 2, 32)[0].tolist()
        == allocate("knapsack", belief, 16, 2, 32)[0].tolist()
    )


def test_what_cannot_be_chosen_is_refused():
    belief = budget.init_belief(4)
    with pytest.raises(ValueError, match="'vip' gives every prompt some; with n_min=0 take one of"):
        budget.allocate("vip", belief, 8, 0, 8, group=4)
    with pytest.raises(ValueError, match=r"2 to n_max=8 rollouts, got group=1"):
        budget.allocate("reach", belief, 8, 0, 8)
    with pytest.raises(ValueError, match="budget 10 cannot be met: it must be a multiple of group=4"):
        budget.allocate("reach", belief, 10, 0, 8, group=4)
    with pytest.raises(ValueError, match="4 prompts take 0 to 32 rollouts"):
        budget.allocate("reach", belief, 36, 0, 11, group=4)
    with pytest.raises(ValueError, match="need 0 <= n_min"):
        budget.allocate("reach", belief, 8, -1, 8, group=4)


# ---------------------------------------------------------------- what may be hopeless, and what time does


def visit(belief, groups, step, **options):
    """The belief after a step whose rewards are given for each task, an empty list for no visit."""
    index = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    rewards = jnp.array([reward for group in groups for reward in group], jnp.float32)
    everything = jnp.ones(len(index), bool)
    return budget.update(belief, jnp.arange(len(groups)), rewards, index, everything, step, **options)


def test_what_never_succeeds_is_likelier_to_be_hopeless():
    belief = budget.init_belief(3, discount=1.0, fade=1.0).replace(hopeless=jnp.float32(special.logit(0.2)))
    for step in range(3):
        belief = visit(belief, [[0] * 4, [0, 0, 1, 0], []], step, fit_prior=False, fit_discounts=False)
    # Bayes' rule with 12 failures in a row under Beta(1/2, 1/2)
    failed = stats.betabinom(12, 0.5, 0.5).pmf(0)
    expected = 0.8 * failed / (0.8 * failed + 0.2)
    np.testing.assert_allclose(budget.possible(belief), [expected, 1.0, 0.8], rtol=1e-5)
    np.testing.assert_allclose(budget.mean(belief)[0], expected * 0.5 / 13, rtol=1e-5)
    np.testing.assert_allclose(budget.prior_mean(belief), 0.8 * 0.5, rtol=1e-6)


def test_the_share_of_hopeless_prompts_is_found():
    rng = np.random.default_rng(0)
    rate = np.where(rng.random(600) < 0.3, 0.0, rng.beta(2, 2, 600))
    belief = budget.init_belief(600, discount=1.0, discount_mixed=1.0, fade=1.0)
    for step in range(8):
        belief = visit(belief, [(rng.random(4) < p).tolist() for p in rate], step, fit_discounts=False)
    assert (rate == 0).mean() - 0.12 < special.expit(float(belief.hopeless)) < (rate == 0).mean() + 0.04
    likely = np.asarray(budget.possible(belief))
    assert likely[rate == 0].max() < 0.45
    assert likely[rate > 0.2].min() > 0.9


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 1.0), (0.5, 2.0), (2.0, 98.0)])
def test_what_is_rare_is_not_taken_for_hopeless(alpha, beta):
    rng = np.random.default_rng(0)
    rate = rng.beta(alpha, beta, 1024)
    belief = budget.init_belief(1024)
    for step in range(48):
        seen = np.arange(64) + step % 16 * 64
        rewards = jnp.float32(rng.random(256) < np.repeat(rate[seen], 4))
        belief = budget.update(belief, seen, rewards, jnp.repeat(jnp.arange(64), 4), jnp.ones(256, bool), step)
    assert special.expit(float(belief.hopeless)) < 0.15
    never = np.asarray(belief.barren) < 0
    believed = np.asarray(budget.mean(budget.take(belief, jnp.arange(1024), 48)))
    assert believed[never].mean() > 0.4 * rate[never].mean()


def test_certainly_hopeless_prompts_are_told_apart_and_get_nothing():
    """float32 has no probability between 1e-8 and 1 away from 1, but it has logarithms."""
    belief = budget.init_belief(4).replace(hopeless=jnp.float32(4.0), barren=jnp.array([-20.0, -200.0, -1e5, 1e6]))
    possible = np.asarray(budget.possible(belief))
    assert possible[3] == 1
    assert possible[0] == pytest.approx(math.exp(-24), rel=1e-5)
    assert (np.diff(np.asarray(budget.allocate("knapsack", belief, 32, 0, 12, group=4)[0])[[2, 1, 0, 3]]) >= 0).all()
    prior = budget.init_prior("groups", 4).replace(failed=jnp.float32([3000, 10, -1, -1]), hopeless=jnp.float32(-1.4))
    before = budget.init_belief(3).replace(prior_alpha=jnp.float32(3.0), prior_beta=jnp.float32(6.0))
    likely = np.asarray(budget.possible(budget.inform(prior, before, jnp.array([[0], [1], [2]]))))
    assert likely[0] < 1e-5
    assert likely[0] < likely[1] < likely[2]


def test_a_record_moves_with_what_is_expected_of_its_kind():
    """Only under the predictor that it was made under: another one says nothing of the policy's move."""
    groups = jnp.array([[0], [1]])
    prior = budget.init_prior("groups", 2)
    prior = prior.replace(
        evidence=tuple(jnp.tile(jnp.float32(x), (6, 1)) for x in ([2.0, 180], [98.0, 20])),
        scores=prior.scores.at[2, 1].set(9.0),
    )
    belief = budget.init_belief(2, discount=1.0, discount_mixed=1.0, fade=1.0)
    known = budget.inform(prior, budget.take(belief, jnp.arange(2), 0), groups)
    wins = jnp.concatenate([jnp.arange(40) < 1, jnp.arange(40) < 36]).astype(jnp.float32)
    index, every = jnp.repeat(jnp.arange(2), 40), jnp.ones(80, bool)
    belief = budget.update(
        belief, jnp.arange(2), wins, index, every, 0, known=known, fit_prior=False, fit_discounts=False
    )
    plain = budget.take(belief, jnp.arange(2), 1)
    np.testing.assert_allclose(plain.successes, [1, 36])  # as it was seen, for whoever asks without the prior
    same = budget.inform(prior, plain, groups)
    np.testing.assert_allclose(same.successes, [1, 36], rtol=1e-5)
    learnt = prior.replace(evidence=tuple(jnp.tile(jnp.float32(x), (6, 1)) for x in ([52.0, 180], [48.0, 20])))
    moved = budget.inform(learnt, plain, groups)
    np.testing.assert_allclose(moved.successes, [1 + 40 * 0.5, 36], rtol=0.03)
    np.testing.assert_allclose(moved.successes + moved.failures, [40, 40], rtol=1e-6)
    np.testing.assert_allclose(moved.squares, moved.successes, rtol=1e-5)


def test_prompts_share_what_is_hopeless_about_them():
    """Of eight letters two are never solved; a prompt with one of them that was never sampled is given up too."""
    rng = np.random.default_rng(0)
    letter, digit = np.arange(160) % 8, rng.integers(8, 14, 160)
    rate, features = np.where(letter < 2, 0.0, 0.3), jnp.array(np.stack([letter, digit], axis=1))
    belief, prior = budget.init_belief(160), budget.init_prior("features", 14)
    learn, every = jax.jit(budget.learn_prior), jnp.ones(96, bool)
    for step in range(20):
        ids = rng.permutation(120)[:24]  # 40 are never sampled
        rewards = jnp.float32(rng.random(96) < np.repeat(rate[ids], 4))
        index = jnp.repeat(jnp.arange(24), 4)
        before = budget.take(belief, ids, step)
        known = budget.inform(prior, before, features[ids])
        prior = learn(prior, before, features[ids], rewards, index, every)
        belief = budget.update(belief, ids, rewards, index, every, step, known=known)
    known = budget.inform(prior, budget.take(belief, jnp.arange(160), 20), features)
    possible, unseen = np.asarray(budget.possible(known)), np.arange(160) >= 120
    assert possible[(letter < 2) & unseen].max() < 0.4
    assert possible[letter >= 2].min() > 0.7
    assert np.asarray(budget.mean(known))[letter < 2].max() < 0.01
    assert np.asarray(budget.mean(known))[(letter >= 2) & unseen].mean() == pytest.approx(0.3, abs=0.06)


def test_evidence_fades_while_a_task_waits():
    belief = budget.init_belief(2, discount=1.0, discount_mixed=1.0, fade=0.9)
    belief = visit(belief, [[1, 0, 0, 0], [1, 1, 1, 0]], 4, fit_prior=False, fit_discounts=False)
    np.testing.assert_allclose(budget.take(belief, jnp.arange(2), 5).successes, [1, 3])  # the next step
    np.testing.assert_allclose(budget.take(belief, jnp.arange(2), 8).successes, 0.9**3 * np.array([1, 3]), rtol=1e-6)
    np.testing.assert_allclose(budget.take(belief, jnp.arange(2)).failures, [3, 1])
    later = visit(belief, [[1], []], 8, fit_prior=False, fit_discounts=False)
    np.testing.assert_allclose(later.successes, [0.9**3 + 1, 3], rtol=1e-6)


@pytest.mark.parametrize("drift", [0.0, 0.4])
def test_how_fast_it_fades_follows_the_data(drift):
    rng = np.random.default_rng(1)
    logit = rng.normal(0, 2, 400)
    belief = budget.init_belief(400, discount=1.0, discount_mixed=1.0, fade=0.97)
    for step in range(100):
        logit = logit + drift * rng.normal(0, 1, 400)
        seen = rng.permutation(400)[:40]
        rewards = (rng.random((40, 8)) < 1 / (1 + np.exp(-logit[seen, None]))).reshape(-1)
        index, every = jnp.repeat(jnp.arange(40), 8), jnp.ones(320, bool)
        belief = budget.update(belief, seen, jnp.float32(rewards), index, every, step)
    kept = float(belief.fade) ** 10 * float(belief.discount_mixed)  # of what a mixed group showed ten steps ago
    assert kept > 0.7 if drift == 0 else kept < 0.4


# ---------------------------------------------------------------- what a step must not do


def test_a_pool_of_as_many_prompts_as_groups_explores_too():
    good = np.arange(128) < 8
    belief = budget.init_belief(128).replace(
        successes=jnp.float32(5 * good), failures=jnp.float32(np.where(good, 5, 400)), last_step=127 - jnp.arange(128)
    )
    rest = np.asarray(budget.allocate("knapsack", belief, 512 - 6 * 4, 0, 128, group=4)[0])
    longest = np.flatnonzero(rest == 0)[-6:]  # the last rows were not sampled for longest
    explored, _ = budget.allocate("knapsack", belief, 512, 0, 128, group=4, explored=6)
    assert explored.tolist() == (rest + 4 * np.isin(np.arange(128), longest)).tolist()


@pytest.mark.parametrize("prompts", [10_000, 100_000])
def test_shares_are_fair_in_large_pools(prompts):
    rng = np.random.default_rng(0)
    weights, light = np.where(np.arange(prompts) < prompts // 2, 1.0, 3.0).astype(np.float32), 0.0
    solve = jax.jit(lambda w: budget.in_proportion(w, 512, 0, 64, 4))
    for _ in range(20):
        order = rng.permutation(prompts)
        light += np.asarray(solve(jnp.asarray(weights[order])))[order < prompts // 2].sum() / 512 / 20
    assert light == pytest.approx(0.25, abs=0.05)


def test_a_share_of_a_tenth_of_a_group_is_served_in_a_tenth_of_the_turns():
    """Of fifty groups, which a hundred prompts share, one has a fifth of the others' weight."""
    solve = jax.jit(lambda turn: budget.in_proportion(jnp.ones(100).at[37].set(0.2), 200, 0, 64, 4, turn))
    served = [int(solve(turn)[37] > 0) for turn in range(400)]
    assert np.mean(served) == pytest.approx(0.1, abs=0.03)


def test_prompts_without_a_reward_were_sampled_all_the_same():
    belief = budget.init_belief(2)
    none = jnp.zeros(8, bool)
    after = budget.update(
        belief, jnp.arange(2), jnp.zeros(8), jnp.repeat(jnp.arange(2), 4), none, 5, sampled=jnp.array([True, False])
    )
    assert after.last_step.tolist() == [5, -1]
    assert after.visits.tolist() == [0, 0]


def test_records_fade_through_a_visit_without_a_reward():
    belief = budget.init_belief(1).replace(successes=jnp.float32([4]), last_step=jnp.int32([0]), fade=jnp.float32(0.5))
    none, ids, index = jnp.zeros(4, bool), jnp.arange(1), jnp.zeros(4, jnp.int32)
    visited = budget.update(
        belief, ids, jnp.zeros(4), index, none, 9, sampled=jnp.array([True]), fit_prior=False, fit_discounts=False
    )
    assert visited.last_step.tolist() == [9]
    for step in (10, 12):
        left, alone = (budget.take(one, ids, step).successes for one in (visited, belief))
        np.testing.assert_allclose(left, alone, rtol=1e-6)


def test_the_variance_of_what_may_be_hopeless_is_that_of_its_mean():
    belief = budget.init_belief(3).replace(hopeless=jnp.float32([4.0, -1, -9]), barren=jnp.zeros(3))
    mean = np.asarray(budget.mean(belief))
    np.testing.assert_allclose(budget.reward_variance(belief), mean * (1 - mean), rtol=1e-5)
