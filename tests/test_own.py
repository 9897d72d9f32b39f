"""What a notebook gives to `krl.train` in the place of a name, and what it gets back."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import krl
from krl import budget, policy
from krl.configs import arithmetic
from krl.eval.command import measure
from krl.policy.experts import Experts
from tests.command_line import config_with, rows, run_here, undrawn

POOL = {
    "alloc.n_min": 0,
    "alloc.candidates": 10,
    "alloc.group": 4,
    "alloc.explored": 0.0,
    "alloc.rule": "reach",
    "sft.steps": 2,
    "steps": 2,
}


def half(belief, rollouts, n_min, n_max, group):
    """A rule: all rollouts for the first prompts."""
    counts = jnp.where(jnp.arange(len(belief.visits)) < rollouts // n_max, n_max, 0)
    return counts, {"served": (counts > 0).sum()}


def digits(prompt, response, answer):
    """A reward: how many digits the response has, at most one of two."""
    return min(sum(map(str.isdigit, response)), 2) / 2


SURE = budget.Source(
    start=lambda spread: (jnp.zeros_like(spread), jnp.zeros_like(spread)),
    estimate=lambda evidence, spread, features, centre: (jnp.full(len(features), 0.25), jnp.zeros(len(features))),
    learn=lambda evidence, spread, memory, features, centre, wins, outcomes: evidence,
)


def test_a_rule_a_reward_and_a_prior(tmp_path, capfd):
    counted = []

    def reward(prompt, response, answer):
        counted.append(response)
        return digits(prompt, response, answer)

    def rule(belief, rollouts, n_min, n_max, group):
        return half(belief, rollouts, n_min, n_max, group)

    config = config_with(**POOL | {"eval.every": 0})
    with undrawn():
        result = krl.train(config, tmp_path / "work", rule=rule, reward=reward, prior=SURE)
    said = json.loads((tmp_path / "work" / "config.json").read_text())
    assert (said["alloc.rule"], said["data.reward"]) == ("rule given in Python", "reward given in Python")
    assert said["alloc.prior"] == "Source given in Python"
    assert (config.alloc.rule, config.data.reward, config.alloc.prior) == ("reach", "exact", "features")
    assert "without limits of time" in capfd.readouterr().out
    assert [row["counts"] for row in rows(tmp_path / "work", "groups")] == [[8, 8], [8, 8]]
    assert result.metrics["served"] == 2
    assert len(counted) == 32
    assert result.metrics["reward_mean"] == np.mean([digits("", text, "") for text in counted[16:]])
    assert {row["prior"][0] for row in rows(tmp_path / "work", "groups")} == {0.25} or result.metrics["prior_gain"] <= 0


def test_what_a_run_was_given_in_python_is_given_again_or_not_needed(tmp_path):
    """A function without a name of its own is not taken for another one; measuring needs neither rule nor prior."""
    own = {"rule": lambda *given, **more: half(*given, **more), "prior": SURE, "reward": lambda *_: 1.0}

    def rule(belief, rollouts, n_min, n_max, group):
        return half(belief, rollouts, n_min, n_max, group)

    result = run_here(tmp_path / "work", own=own | {"rule": rule}, **POOL | {"eval.every": 0})
    with undrawn(), pytest.raises(ValueError, match=r"rule given in Python'.*give it to krl.train again"):
        krl.train(result.config, tmp_path / "work")
    with undrawn():
        assert krl.train(result.config, tmp_path / "work", **own | {"rule": rule}).metrics["step"] == 2
    with pytest.raises(ValueError, match=r"give it to krl\.train again"):
        measure(result.config, tmp_path / "work")
    measured = measure(result.config, tmp_path / "work", reward=own["reward"])
    assert measured["held_out"]["avg@2"]["value"] == 1


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"rule": 3}, "rule= is a int; it takes a function, or a name"),
        ({"reward": 3}, "reward= is a int"),
        ({"prior": half}, r"prior= is a function; it takes a krl\.budget\.Source"),
        ({"policy": "DIR"}, r"policy= takes \(sizes, parameters\), such as \(result\.policy"),
        ({"rule": "unifrom"}, r"alloc\.rule='unifrom' must be one of"),
        ({"rule": lambda b, r, lo, hi: jnp.full(4, 4)}, r"the rule <lambda> must return \(counts, a dictionary"),
        ({"rule": lambda b, r, lo, hi: ([4, 4, 4, 4], {})}, "must return an array with a count for each of the 4"),
        ({"rule": lambda b, r, lo, hi: (jnp.full((4, 1), 4), {})}, r"it returned one of shape \[4, 1\]"),
        ({"rule": lambda b, r, lo, hi: (jnp.full(4, 4), {"x": jnp.ones(2)})}, "'x' is none"),
        ({"rule": lambda b, r, lo, hi: (jnp.full(4, 4), {"loss": 1.0})}, "'loss' beside the counts, a metric of krl's"),
        ({"rule": lambda b, r, lo, hi: (jnp.full(4, 4), {"step": 1.0})}, "'step' beside the counts, a metric of krl's"),
        (
            {"rule": lambda b, r, lo, hi: (jnp.full(4, 4), {"memory/x": 1.0})},
            "'memory/x' beside the counts, a metric of",
        ),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(tmp_path, own, why):
    with pytest.raises(ValueError, match=why):
        run_here(tmp_path, own=own, **{"sft.steps": 0, "eval.every": 0, "tokenizer.path": ""})


@pytest.mark.parametrize("ends", [(8, 12), (), (20, 16), (8.0, 16), 16])
def test_rounds_that_do_not_rise_to_the_budget_are_refused(ends):
    rule = budget.in_rounds(lambda *sizes: ends)(lambda belief, rollouts, n_min, n_max, shown: None)
    with pytest.raises(ValueError, match="the rounds of a rule must"):
        budget.rounds_of(rule, 4, 16, 2)


def test_a_name_and_a_rule_of_krl_are_what_the_config_would_name(tmp_path):
    for number, rule in enumerate(("reach", budget.RULES["reach"], "tests.test_own:half")):
        result = run_here(tmp_path / str(number), own={"rule": rule}, **POOL | {"alloc.reach": 0.3, "steps": 1})
        assert result.config.alloc.rule == (rule if isinstance(rule, str) else "reach")
    groups = [rows(tmp_path / str(number), "groups") for number in range(3)]
    assert groups[0] == groups[1] != groups[2]


def test_notebooks_see_what_train_takes():
    assert list(inspect.signature(krl.train).parameters) == ["config", "workdir", "rule", "reward", "prior", "policy"]
    with pytest.raises(
        ValueError, match=r"the configuration is a module; begin with krl\.configs\.default\.get_config"
    ):
        krl.train(arithmetic, "nowhere")


def test_names_of_ones_own(tmp_path):
    """`alloc.rule` and `alloc.prior` name what Python can import, as `data.reward` does."""
    own = {"alloc.rule": "tests.test_own:half", "alloc.prior": "tests.test_own:SURE"}
    run_here(tmp_path / "named", **POOL | own)
    run_here(tmp_path / "given", own={"rule": half, "prior": SURE}, **POOL)
    named, given = (rows(tmp_path / name, "groups") for name in ("named", "given"))
    assert named == given
    for key, value, why in (
        ("alloc.rule", "tests.test_own:quarter", "has no quarter"),
        ("alloc.rule", "no_such_module_here:rule", "cannot import no_such_module_here"),
        ("alloc.rule", "tests.test_own:POOL", "must be the name of a function; this is a dict"),
        ("alloc.prior", "mine", "one of .*'features'.* or look like package.module:function"),
    ):
        with pytest.raises(ValueError, match=why):
            run_here(tmp_path / "refused", **POOL | {key: value})
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match=r"is a function; it must be a krl\.budget\.Source"):
        run_here(tmp_path / "refused", **POOL | {"alloc.prior": "tests.test_own:half"})


@pytest.mark.slow
def test_the_policy_of_another_run(tmp_path):
    """It begins where that run ended, in parameters of its own, and goes on when it is given them again."""
    first = run_here(tmp_path / "first", steps=2, **{"eval.every": 1})
    keys = {"sft.steps": 0, "tokenizer.path": tmp_path / "first" / "policy", "eval.every": 1}
    own = {"policy": (first.policy, first.params)}
    run_here(tmp_path / "second", own=own, steps=1, **keys, **{"loss.kl_coefficient": 0.1})
    assert rows(tmp_path / "second")[0]["eval/accuracy"] == first.metrics["eval/accuracy"]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    again = {**keys, "loss.kl_coefficient": 0.1, "steps": 2}
    second = run_here(tmp_path / "second", own=own, **again)
    assert second.metrics["step"] == 2
    with undrawn(), pytest.raises(ValueError, match="give it to train again, policy="):
        krl.train(second.config, tmp_path / "second")
    assert measure(second.config, tmp_path / "second")["held_out"]["avg@2"]["value"] == pytest.approx(
        second.metrics["eval/accuracy"]
    )
    other, whole = (jax.tree.map(change, first.params) for change in (lambda x: x[..., :1], jnp.int32))
    for wrong, why in ((other, "the parameters are not those of the PolicyConfig"), (whole, "of type int32")):
        with pytest.raises(ValueError, match=why):
            run_here(tmp_path / "third", own={"policy": (first.policy, wrong)}, **keys)
    run_here(tmp_path / "third", own=own, **keys, **{"mesh.shape": (4,)})  # it is on one device
    assert rows(tmp_path / "third")[0]["eval/accuracy"] == pytest.approx(first.metrics["eval/accuracy"])
    with pytest.raises(ValueError, match=r"needs config\.tokenizer\.path"):
        run_here(tmp_path / "fourth", own=own, **{"sft.steps": 0})


@pytest.mark.slow
def test_a_mixture_of_experts_learns_on_a_mesh_as_on_one_device(tmp_path):
    start = run_here(tmp_path / "start", steps=0)
    config = dataclasses.replace(start.policy, num_kv_heads=2, experts=Experts(4, 2, normalised=True), qk_norm=True)
    params = policy.init(config, jax.random.key(0))
    keys = {"sft.steps": 4, "tokenizer.path": tmp_path / "start" / "policy", "mesh.axis_names": ("data", "model")}
    alone, split = (
        run_here(tmp_path / f"{shape}", own={"policy": (config, params)}, steps=0, **keys, **{"mesh.shape": shape})
        for shape in ((1, 1), (2, 2))
    )
    assert split.params["blocks"]["gate"].sharding.spec[1] == "model"
    assert not np.array_equal(alone.params["blocks"]["router"], params["blocks"]["router"])
    jax.tree.map(lambda leaf, other: np.testing.assert_allclose(leaf, other, atol=1e-5), alone.params, split.params)
    own = {"policy": (config, split.params)}
    learnt = run_here(tmp_path / "learnt", own=own, steps=1, **keys | {"sft.steps": 0}, **{"mesh.shape": (2, 2)})
    assert learnt.metrics["mismatch"] < 1e-4  # decoding computes what the update does
    assert not np.array_equal(learnt.params["blocks"]["down"], split.params["blocks"]["down"])


def test_what_is_handed_back(tmp_path):
    result = run_here(tmp_path / "work", steps=1)
    texts = ["1+2=", "3+4=", "1+2="]
    assert result.generate(texts, temperature=0) == result.generate(texts, temperature=0)
    likeliest = result.generate(texts, temperature=0)
    assert likeliest[0] == likeliest[2]
    assert likeliest == result.generate(texts, temperature=0, seed=1)
    assert len({tuple(result.generate(["1+2="] * 8, temperature=5.0, seed=seed)) for seed in range(3)}) == 3
    for wrong in ([], "1+2=", ["1" * 100, "1+2="]):
        with pytest.raises(ValueError, match=r"list of texts|more than config\.data\.max_prompt_tokens"):
            result.generate(wrong)
    assert result.tokenizer.decode(result.tokenizer.encode("1+2=")) == "1+2="
    assert result.policy.vocab_size == result.tokenizer.vocab_size
    with pytest.warns(DeprecationWarning, match=r"write \.metrics"):
        assert result["step"] == 1
