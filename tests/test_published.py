"""Published rules against what their papers and code say, worked by hand or by plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from krl import budget
from tests.test_rules import visited


def shown_by(wins, counts) -> budget.Shown:
    """What a pilot of some counts has shown."""
    wins, counts = np.array(wins), np.array(counts)
    return budget.Shown(jnp.int32(counts), jnp.float32(wins), jnp.float32(counts - wins))


def rounds(rule, prompts, total, n_min, n_max, group, outcomes):
    """All counts of the rounds of a rule; outcomes[i][j] is the reward of rollout j of prompt i."""
    belief, shown, all_counts = budget.init_belief(prompts), shown_by([0] * prompts, [0] * prompts), []
    for until in budget.rounds_of(rule, prompts, total, n_min, group):
        counts, info = budget.allocate(rule, belief, until, n_min, n_max, group=group, shown=shown)
        all_counts.append((np.asarray(counts), info))
        shown = shown_by([sum(outcomes[i][:n]) for i, n in enumerate(all_counts[-1][0])], counts)
    return all_counts


def test_a_rule_without_rounds_is_not_told_what_they_have_shown():
    belief = visited([[1, 0], [0, 0], [1, 1]])
    shown = shown_by([2, 0, 1], [2, 2, 2])
    counts = [budget.allocate("knapsack", belief, 24, 2, 16, shown=told)[0].tolist() for told in (None, shown)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("rule", sorted(filter(budget.has_rounds, budget.RULES)))
def test_rounds_add_up_and_take_nothing_back(rule):
    rng = np.random.default_rng(0)
    n_min, group = (0, 4) if budget.may_choose(rule) else (4, 1)
    for _ in range(5):
        outcomes = rng.random((20, 32)) < rng.beta(0.4, 0.4, (20, 1))
        shown = rounds(rule, 20, 160, n_min, 32, group, outcomes)
        until = budget.rounds_of(rule, 20, 160, n_min, group)
        assert [counts.sum() for counts, _ in shown] == list(until)
        assert until[-1] == 160
        for (before, _), (after, _) in itertools.pairwise(shown):
            assert (after >= before).all()
            assert (after % group == 0).all()


def test_what_fades_with_time_fades_once_in_several_rounds():
    belief = budget.init_belief(1, discount=1.0, fade=0.9).replace(
        successes=jnp.array([8.0]), failures=jnp.array([8.0]), visits=jnp.array([1]), last_step=jnp.array([0])
    )
    known = budget.take(belief, jnp.arange(1), 11)
    assert float(known.successes[0]) == pytest.approx(8 * 0.9**10)
    after = budget.observe(known, jnp.arange(1), jnp.zeros(2), jnp.zeros(2, int), jnp.ones(2, bool), 11)
    assert float(after.successes[0]) == pytest.approx(8 * 0.9**10)
    assert float(after.failures[0]) == pytest.approx(8 * 0.9**10 + 2)


def test_mopps_serves_what_is_nearest_to_a_half():
    known = budget.init_belief(8).replace(
        successes=jnp.array([500.0, 1e4, 5e3, 9e3, 0, 5e3, 9.9e3, 1e3]), failures=jnp.array([9500.0, 0, 5e3, 1e3, 1e4, 5e3, 1e2, 9e3])
    )  # fmt: skip
    counts, _ = budget.allocate("mopps", known, 16, 0, 16, group=8)
    assert counts.tolist() == [0, 0, 8, 0, 0, 8, 0, 0]
    # What was never sampled is anywhere: of many such prompts those drawn near a half, other ones at another time.
    new = budget.init_belief(4000)
    first, second = (
        budget.allocate("mopps", b, 400, 0, 16, group=4)[0] for b in (new, new.replace(recorded=new.recorded + 1))
    )
    assert (first > 0).sum() == (second > 0).sum() == 100
    assert ((first > 0) & (second > 0)).sum() < 15
    more = budget.allocate("mopps", known, 80, 0, 16, group=8)[0]
    assert sorted(more.tolist()) == [8] * 6 + [16] * 2


def test_pilot_commit_commits_between_an_eighth_and_three_quarters():
    wins = [0, 1, 2, 6, 7, 8, 0, 0, 0, 0]
    outcomes = [[j < w for j in range(8)] + [False] * 40 for w in wins]
    (pilot, _), (counts, info) = rounds("pilot_commit", 10, 96, 0, 48, 8, outcomes)
    assert pilot.tolist() == [8] * 6 + [0] * 4
    # 1, 2 and 6 of 8: three groups are wanted by each, and 48 rollouts are left, two each.
    assert counts.tolist() == [8, 24, 24, 24, 8, 8, 0, 0, 0, 0]
    assert int(info["committed"]) == 3
    outcomes[1], outcomes[2] = outcomes[0], outcomes[0]
    assert rounds("pilot_commit", 10, 96, 0, 48, 8, outcomes)[1][0].tolist() == [8, 8, 8, 32, 8, 8, 8, 8, 8, 0]


def test_pilot_commit_leaves_what_it_saw_solved():
    belief = visited([[1] * 8, [1] * 7 + [0], [], [1] * 8, []])
    counts, _ = budget.allocate("pilot_commit", belief, 24, 0, 32, group=8)
    assert counts.tolist() == [0, 8, 8, 0, 8]
    assert budget.allocate("pilot_commit", belief, 32, 0, 32, group=8)[0].tolist() == [8, 8, 8, 0, 8]


def test_reinforce_ada_goes_on_until_two_are_right_and_two_wrong():
    kinds = [[0] * 99, [1, 1, 0, 0] * 9, [1, 0, 0, 0] * 9, [1] * 99, [0, 1] * 40, *[[0] * 99] * 7]
    shown = rounds("reinforce_ada", 12, 40, 0, 32, 4, [[bool(x) for x in kind] for kind in kinds])
    counts = [counts.tolist() for counts, _ in shown]
    assert budget.rounds_of("reinforce_ada", 12, 40, 0, 4) == (20, 24, 32, 40)
    assert counts[0] == [4] * 5 + [0] * 7
    assert counts[1] == [8, 4, 4, 4, 4] + [0] * 7  # one group is left, for the first that needs it
    assert counts[2][:5] == [12, 4, 8, 4, 4]  # all that are active are offered one group before any other begins
    assert sum(counts[3]) == 40


def test_coba_prefers_the_rate_that_is_the_share_of_failures():
    groups = [[1] * w + [0] * (20 - w) for w in (1, 1, 2, 3, 4, 5, 8, 16)]
    p = np.array([sum(group) / 20 for group in groups])
    failing = 1 - p.mean()
    assert failing > 0.5
    tau = 3 + 9 * min(1, p.var() / 0.1667)
    value = lambda n: (1 - np.exp(-n / tau * p * (1 - p))) * stats.beta.pdf(p, 1 + 9 * failing, 10 - 9 * failing)  # noqa: E731
    wanted = np.full(8, 2)
    for _ in range(64 - 16):
        gains = np.where(wanted < 20, value(wanted + 1) - value(wanted), -1)
        wanted[gains.argmax()] += 1
    assert budget.allocate("coba", visited(groups), 64, 2, 20)[0].tolist() == wanted.tolist()
    assert wanted[7] == 20  # 0.8 succeeds as often as all fail
    strong = budget.allocate(
        "coba", visited([[0] * len(group) if sum(group) > 15 else [1] * 20 for group in groups]), 64, 2, 20
    )[0]
    assert strong.argmax() == 7  # few failures, so the hard one


def test_hora_maximises_the_hits_to_come():
    pilot = [0, 1, 2, 4]

    def hits(wins, more):
        missed = integrate.quad(lambda p: (1 - p) ** more * stats.beta.pdf(p, 1 + wins, 5 - wins), 0, 1)[0]
        return 1 - missed

    table = [[hits(wins, more) for more in range(13)] for wins in pilot]
    best = max(
        (c for c in itertools.product(range(13), repeat=4) if sum(c) == 24),
        key=lambda c: sum(table[i][n] for i, n in enumerate(c)),
    )
    counts, _ = budget.allocate("hora", budget.init_belief(4), 40, 4, 16, shown=shown_by(pilot, [4] * 4))
    assert (np.asarray(counts) - 4).tolist() == list(best)


def test_gvm_gives_nothing_more_where_nothing_succeeded():
    new = budget.init_belief(4)
    counts, _ = budget.allocate("gvm", new, 332, 8, 400, shown=shown_by([0, 1, 4, 8], [8] * 4))
    p = np.array([1 / 8, 4 / 8, 1])
    share = 1 / np.sqrt(p + 1e-3 / p)
    assert counts[0] == 8
    np.testing.assert_allclose(counts[1:] - 8, 300 * share / share.sum(), atol=1)
    assert budget.allocate("gvm", new, 40, 8, 400, shown=shown_by([0] * 4, [8] * 4))[0].tolist() == [10] * 4


@pytest.mark.parametrize("rule", ["mopps", "pilot_commit", "reinforce_ada"])
def test_rules_that_choose_prompts_refuse_to_serve_them_all(rule):
    with pytest.raises(ValueError, match="n_min=0"):
        budget.allocate(rule, budget.init_belief(4), 32, 2, 16)
    counts, _ = jax.jit(lambda b: budget.allocate(rule, b, 32, 0, 16, group=4))(budget.init_belief(16))
    assert counts.tolist() == [4] * 8 + [0] * 8 or rule == "mopps"
    assert counts.sum() == 32
