"""The prior of each prompt from its features, against NumPy and exact conjugate results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import betaln, expit, logit

from krl.base.sharding import make_mesh
from krl.budget import prior as priors
from krl.budget.belief import init_belief, take, update

INFORM, LEARN, UPDATE = map(jax.jit, (priors.inform, priors.learn_prior, update))  # once for all tests


def known(num_prompts, alpha=0.5, beta=0.5, successes=0.0, failures=0.0):
    belief = take(init_belief(num_prompts), jnp.arange(num_prompts))
    fill = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (num_prompts,))  # noqa: E731
    return belief.replace(
        prior_alpha=jnp.float32(alpha), prior_beta=jnp.float32(beta), successes=fill(successes), failures=fill(failures)
    )


def dense(features, width):
    """[M, W] with a 1 where a prompt has a feature."""
    return (features[:, :, None] == np.arange(width)).sum(axis=1).astype(float)


def rollouts(wins, outcomes):
    """Rewards, prompt index and mask of groups with so many successes, and a padding row that must not count."""
    wins, outcomes = np.asarray(wins, int), np.asarray(outcomes, int)
    rewards = np.concatenate([np.arange(n) < w for w, n in zip(wins, outcomes, strict=True)]).astype(np.float32)
    index = np.repeat(np.arange(len(wins)), outcomes)
    return jnp.append(rewards, 1.0), jnp.append(index, 0).astype(jnp.int32), jnp.arange(len(rewards) + 1) < len(rewards)


def drawn(num_prompts=40, width=30, per_prompt=5, seed=0):
    rng = np.random.default_rng(seed)
    features = np.array([rng.choice(width, per_prompt, replace=False) for _ in range(num_prompts)], np.int32)
    features[::3, -1] = width  # some have fewer
    outcomes = rng.integers(0, 9, num_prompts).astype(np.float32)
    return features, rng.binomial(outcomes.astype(int), 0.3).astype(np.float32), outcomes


def test_a_group_without_forgetting_is_the_conjugate_beta(monkeypatch):
    monkeypatch.setattr(priors, "SLOW_MEMORY", 1.0)
    source = priors.PRIORS["groups"]
    spread, centre = jnp.full(3, 0.25), 0.2
    evidence = source.start(spread)
    groups = jnp.array([[0], [1], [0], [2]])
    for wins, outcomes in (([1.0, 2, 3, 0], [4.0, 2, 8, 0]), ([0.0, 1, 1, 0], [2.0, 4, 2, 0])):
        evidence = source.learn(evidence, spread, 1.0, groups, centre, jnp.array(wins), jnp.array(outcomes))
    rates, unsure = source.estimate(evidence, spread, groups, centre)
    # Beta(0.8 + 5, 3.2 + 11), Beta(0.8 + 3, 3.2 + 3), and the start where nothing was seen.
    np.testing.assert_allclose(rates, [5.8 / 20, 3.8 / 10, 5.8 / 20, 0.2], rtol=1e-6)
    np.testing.assert_allclose(unsure, [1 / 20, 1 / 10, 1 / 20, 1 / 4], rtol=1e-6)


def test_the_regression_finds_the_mode_that_dense_newton_finds(monkeypatch):
    monkeypatch.setattr(priors, "NEWTON_STEPS", 6)
    monkeypatch.setattr(priors, "SOLVER_STEPS", 6)
    features, wins, outcomes = drawn()
    width, memory, centre = 30, 0.9, 0.3
    spread = np.linspace(0.2, 0.8, width)
    rng = np.random.default_rng(1)
    before, precision = rng.normal(0, 0.3, width), rng.uniform(2, 5, width)
    got = priors.PRIORS["features"].learn(
        (jnp.asarray(before, jnp.float32), jnp.asarray(precision, jnp.float32)), jnp.asarray(spread), memory,
        jnp.asarray(features), centre, jnp.asarray(wins), jnp.asarray(outcomes),
    )  # fmt: skip

    x, weights = dense(features, width), before.copy()
    for _ in range(50):
        rate = expit(logit(centre) + x @ weights)
        slope = x.T @ (wins - outcomes * rate) - precision * (weights - before)
        weights += np.linalg.solve(np.diag(precision) + (x.T * (outcomes * rate * (1 - rate))) @ x, slope)
    rate = expit(logit(centre) + x @ weights)
    learnt = precision + x.T @ (outcomes * rate * (1 - rate))
    mixed = np.where((wins > 0) & (wins < outcomes), outcomes, 0.0)
    kept = 0.995 * memory ** ((x.T @ mixed) / np.maximum(x.T @ outcomes, 1e-9))
    forgotten = kept * learnt + (1 - kept) / spread
    np.testing.assert_allclose(got[1], forgotten, rtol=2e-3)
    np.testing.assert_allclose(got[0], kept * learnt * weights / forgotten, atol=2e-3)


def test_the_gaussian_process_is_the_posterior_over_all_prompts():
    features, wins, outcomes = drawn()
    width, centre = 30, 0.3
    spread = np.linspace(0.2, 0.8, width)
    before = np.random.default_rng(3).normal(0, 0.3, width)
    outcomes[5], wins[5] = 0.0, 0.0  # not sampled
    got, _ = priors.PRIORS["gaussian_process"].learn(
        (jnp.asarray(before, jnp.float32), jnp.zeros(width)), jnp.asarray(spread), 1.0,
        jnp.asarray(features), centre, jnp.asarray(wins), jnp.asarray(outcomes),
    )  # fmt: skip
    x = dense(features, width)
    seen = np.arange(len(x)) != 5
    kernel, rate = x * spread @ x.T, (wins + 0.5) / (outcomes + 1)
    noise = np.diag(1 / (outcomes[seen] * (rate * (1 - rate))[seen]))
    expected, observed = x @ before, logit(rate) - logit(centre)
    gain = kernel[:, seen] @ np.linalg.inv(kernel[np.ix_(seen, seen)] + noise)
    np.testing.assert_allclose(x @ np.asarray(got), expected + gain @ (observed - expected)[seen], rtol=1e-3, atol=1e-3)


def test_the_only_label_is_believed_as_the_first_of_two():
    """The upper half of the features, which a source may trust less, never has all of them."""
    outcomes, labels = rollouts([3, 1], [4, 4]), jnp.zeros((2, 1), jnp.int32)
    beliefs = [
        priors.inform(
            priors.learn_prior(priors.init_prior("groups", width), known(2), labels, *outcomes), known(2), labels
        )
        for width in (1, 2)
    ]
    jax.tree.map(np.testing.assert_array_equal, *beliefs)


def test_scores_are_the_log_likelihood_of_outcomes_before_they_are_learnt_from():
    features, wins, outcomes = drawn()
    rng = np.random.default_rng(2)
    belief = known(40, 0.6, 1.4, rng.uniform(0, 3, 40), rng.uniform(0, 3, 40))
    prior = priors.init_prior("features", 30)
    after = priors.learn_prior(prior, belief, jnp.asarray(features), *rollouts(wins, outcomes))

    x, s, f = dense(features, 30), np.asarray(belief.successes), np.asarray(belief.failures)
    for c, (_, spread) in enumerate(priors.SETTINGS):
        spreads = spread * np.where(np.arange(30) < 15, 1, priors.FURTHER_SHARE)
        for k, most in enumerate(priors.STRENGTHS):
            strength = 1 / (0.3 * 0.7 * x @ spreads + 1 / most)
            a, b = 0.3 * strength + s, 0.7 * strength + f
            expected = (betaln(a + wins, b + outcomes - wins) - betaln(a, b)).sum()
            np.testing.assert_allclose(after.scores[c, k], expected, rtol=1e-4)
    a, b = 0.6 + s, 1.4 + f
    np.testing.assert_allclose(
        after.shared_score, (betaln(a + wins, b + outcomes - wins) - betaln(a, b)).sum(), rtol=1e-4
    )


def test_few_steps_of_the_regression_come_close(monkeypatch):
    """Evidence comes step after step, so what a step leaves unsolved the next ones solve."""
    features, wins, outcomes = drawn()
    source, spread = priors.PRIORS["features"], jnp.full(30, 1.0)

    def rates():
        evidence = source.start(spread)
        for _ in range(4):
            evidence = source.learn(
                evidence, spread, 0.9, jnp.asarray(features), 0.3, jnp.asarray(wins), jnp.asarray(outcomes)
            )
        return np.asarray(source.estimate(evidence, spread, jnp.asarray(features), 0.3)[0])

    few = rates()
    monkeypatch.setattr(priors, "NEWTON_STEPS", 20)
    monkeypatch.setattr(priors, "SOLVER_STEPS", 20)
    np.testing.assert_allclose(few, rates(), atol=0.05)


@pytest.mark.parametrize("fit_discounts", [False, True])
def test_beliefs_that_were_taken_outlive_a_donated_one(fit_discounts):
    """A step asks what was known before it after the belief of all tasks has been given away."""
    belief = init_belief(8).replace(prior_alpha=jnp.float32(0.75), discount=jnp.float32(0.875))
    taken = take(belief, jnp.arange(3))
    give_away = jax.jit(lambda belief: update(belief, jnp.arange(2), *rollouts([1, 0], [2, 2]), fit_discounts=fit_discounts), donate_argnums=0)  # fmt: skip
    give_away(belief)
    assert [float(taken.prior_alpha), float(taken.discount), float(taken.discount_mixed)] == [0.75, 0.875, 0.25]
    assert taken.successes.tolist() == [0, 0, 0]


@pytest.mark.parametrize("source", sorted(priors.PRIORS))
def test_nothing_learnt_is_the_common_prior(source):
    belief = known(4, 0.7, 2.1, 3.0, 1.0)
    told = priors.inform(priors.init_prior(source, 5), belief, jnp.array([[0], [1], [4], [5]]))
    np.testing.assert_allclose(told.prior_alpha, np.full(4, 0.7))
    np.testing.assert_allclose(told.prior_beta, np.full(4, 2.1))
    np.testing.assert_array_equal(told.successes, belief.successes)


def test_no_prior_is_certain():
    prior = priors.init_prior("features", 4)
    weights, precision = prior.evidence
    sure = prior.replace(evidence=(weights + 50.0, precision), scores=prior.scores.at[0, 0].set(1.0))
    told = priors.inform(sure, known(3, 0.5, 0.5, 0.0, 0.0), jnp.array([[0], [1], [3]]))
    rate = told.prior_alpha / (told.prior_alpha + told.prior_beta)
    np.testing.assert_allclose(1 - rate, 1e-4, rtol=1e-2)


def test_a_record_moves_with_what_is_expected_of_its_kind():
    """Outcomes of a time when half was expected, seen when a quarter is; of no time, or of one of the settings."""
    belief = known(5, 0.7, 2.1, jnp.array([3.0, 3, 3, 1, 0]), jnp.array([1.0, 1, 1, 7, 2]))
    belief = belief.replace(prior_of=jnp.array([-1, 0, 3, 1, 0]), prior_then=jnp.full(5, 0.5))
    told = priors.inform(priors.init_prior("groups", 5), belief, jnp.arange(5)[:, None])
    np.testing.assert_allclose(told.successes, [3, 2, 2, 0, 0], atol=1e-4)  # n / 4 less, and none less than 0
    np.testing.assert_allclose(told.failures, [1, 2, 2, 8, 2], atol=1e-4)


@pytest.mark.parametrize("source", sorted(priors.PRIORS))
def test_prompts_without_outcomes_teach_nothing(source):
    features, _, _ = drawn()
    features = features[:, :1] if source == "groups" else features
    prior = priors.init_prior(source, 31)
    after = priors.learn_prior(prior, known(40), jnp.asarray(features), *rollouts(np.zeros(40), np.zeros(40)))
    np.testing.assert_allclose(after.evidence[0], prior.evidence[0], atol=1e-7)
    np.testing.assert_allclose(after.evidence[1], prior.evidence[1], rtol=1e-6)
    assert not after.scores.any()


def predicted(source, features, rates, *, steps=60, prompts=32, each=8, seed=0, informative=True):
    """Nats per visit of a source's prior and of the common one, over the visits of a run whose rates hold still."""
    rng = np.random.default_rng(seed)
    num_tasks = len(rates)
    features = features if informative else features[rng.permutation(num_tasks)]
    belief, prior = init_belief(num_tasks), priors.init_prior(source, int(features.max()) + 1)
    total = np.zeros(2)
    for step in range(steps):
        ids = rng.choice(num_tasks, prompts, replace=False)
        rewards = (rng.random((prompts, each)) < rates[ids, None]).astype(np.float32)
        wins, outcomes = rewards.sum(axis=1), np.full(prompts, each)
        before, known_features = take(belief, jnp.asarray(ids)), jnp.asarray(features[ids])
        for number, told in enumerate((INFORM(prior, before, known_features), before)):
            a = np.asarray(told.prior_alpha + told.successes)
            b = np.asarray(told.prior_beta + told.failures)
            total[number] += (betaln(a + wins, b + outcomes - wins) - betaln(a, b)).sum()
        index = jnp.repeat(jnp.arange(prompts), each)
        groups = jnp.asarray(rewards).reshape(-1), index, jnp.ones(len(index), bool)
        prior = LEARN(prior, before, known_features, *groups)
        belief = UPDATE(belief, jnp.asarray(ids), *groups, step)
    return total / (steps * prompts)


@pytest.fixture(scope="module")
def skills():
    """2000 prompts of 20 skills whose rates differ: [D, 1] labels, [D, 6] features with the skill among them, [D]."""
    rng = np.random.default_rng(5)
    skill = rng.integers(0, 20, 2000)
    noise = 20 + rng.integers(0, 40, (2000, 5))
    rates = expit(rng.normal(0, 3, 20))[skill]
    return skill[:, None].astype(np.int32), np.concatenate([skill[:, None], noise], axis=1).astype(np.int32), rates


def test_what_prompts_share_is_learnt(skills):
    groups, features, rates = skills
    of_groups, common = predicted("groups", groups, rates)
    of_features, _ = predicted("features", features, rates)
    assert of_groups > common + 0.4
    assert of_features > of_groups - 0.15


@pytest.mark.parametrize("source", sorted(priors.PRIORS))
def test_shuffled_features_are_never_worse_than_the_common_prior(skills, source):
    groups, features, rates = skills
    chosen = groups if source == "groups" else features
    told, common = predicted(source, chosen, rates, informative=False)
    assert told > common - 0.01


def test_hashed_features_do_not_depend_on_padding_or_order():
    tokens = np.array([[1, 2, 3], [1, 2, 4], [5, 6, 3], [7, 6, 3]])
    mask = np.ones((4, 3), bool)
    padded = priors.hash_features(np.pad(tokens, ((0, 0), (2, 0)), constant_values=9), np.pad(mask, ((0, 0), (2, 0))), {}, width=4096)  # fmt: skip
    plain = priors.hash_features(tokens, mask, {}, width=4096)
    np.testing.assert_array_equal(padded, plain)
    swapped = priors.hash_features(tokens[::-1], mask, {}, width=4096)
    np.testing.assert_array_equal(swapped[::-1], plain)
    shared = lambda a, b: len(set(plain[a]) & set(plain[b]) - {4096})  # noqa: E731
    assert shared(0, 1) == 3  # 1, 2 and "1 2"; the length, which all have, is left out
    assert shared(0, 2) == 1
    assert shared(2, 3) == 3


def test_a_field_is_a_feature_and_rare_ones_are_cut_first():
    tokens, mask = np.arange(12).reshape(6, 2), np.ones((6, 2), bool)
    labels = {"subject": tuple("aabbcd")}
    features = priors.hash_features(tokens, mask, labels, width=512)
    assert features.shape == (6, 1)
    assert features[0] == features[1] != features[2]
    assert features[4] == features[5] == 512  # of one prompt alone, so none
    most = priors.hash_features(
        np.array([[1, 2], [1, 2], [1, 3]]), np.ones((3, 2), bool), {"s": "aab"}, width=512, most=2
    )
    assert most.shape == (3, 2)


@pytest.mark.parametrize("source", sorted(priors.PRIORS))
def test_eight_devices_learn_what_one_learns(source):
    features, wins, outcomes = drawn()
    features = features[:, :1] if source == "groups" else features
    prior, belief = priors.init_prior(source, 32), known(40, 0.6, 1.4)
    arguments = (belief, jnp.asarray(features), *rollouts(wins, outcomes))
    mesh = make_mesh((8,), ("data",))
    whole, rows = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",)))
    spread = [jax.device_put(prior, whole)]
    for leaf in jax.tree.leaves(arguments):
        splits = leaf.ndim and leaf.shape[0] % 8 == 0
        spread.append(jax.device_put(leaf, rows if splits else whole))
    placed = jax.tree.unflatten(jax.tree.structure((prior, *arguments)), jax.tree.leaves(spread))
    for alone, shared in zip(jax.tree.leaves(LEARN(prior, *arguments)), jax.tree.leaves(LEARN(*placed)), strict=True):
        np.testing.assert_allclose(shared, alone, rtol=2e-4, atol=2e-4)


def test_settings_that_never_see_two_rates_stay_finite():
    """Prompts that always or never succeed push weights outwards without end; steps are bounded, so nothing overflows."""
    features = jnp.arange(40)[:, None] % 4 + jnp.array([0, 10])
    wins, outcomes = np.where(np.arange(40) % 4 < 2, 60, 0), np.full(40, 60)
    prior = priors.init_prior("features", 32)
    for _ in range(30):
        prior = LEARN(prior, known(40, 1.0, 1.0), features, *rollouts(wins, outcomes))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(prior))
    told = priors.inform(prior, known(40, 1.0, 1.0), features)
    rate = told.prior_alpha / (told.prior_alpha + told.prior_beta)
    assert (rate[:2] > 0.95).all()
    assert (rate[2:4] < 0.05).all()


def test_functions_are_a_prior_and_those_of_another_one_with_the_same_name_are_not_mistaken_for_it(monkeypatch):
    """In a notebook a cell is run again; what was compiled of its last version must not be used."""
    groups, features = priors.PRIORS["groups"], jnp.array([[0], [1], [2]])

    def told(rate):
        sure = groups._replace(estimate=lambda evidence, spread, features, centre: (jnp.full(3, rate), jnp.zeros(3)))
        monkeypatch.setitem(priors.PRIORS, "mine", sure)
        prior = priors.init_prior("mine", 3).replace(shared_score=jnp.float32(-1.0))
        assert prior.source is priors.init_prior(sure, 3).source is sure
        belief = INFORM(prior, known(3), features)
        return belief.prior_alpha / (belief.prior_alpha + belief.prior_beta)

    np.testing.assert_allclose(told(0.25), [0.25] * 3, rtol=1e-6)
    np.testing.assert_allclose(told(0.75), [0.75] * 3, rtol=1e-6)


def test_unknown_sources_and_empty_priors_are_refused():
    with pytest.raises(ValueError, match="features"):
        priors.init_prior("shared", 4)
    with pytest.raises(ValueError, match="num_features=0"):
        priors.init_prior("groups", 0)
