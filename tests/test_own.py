"""What a notebook gives to `krl.train` in the place of a name, and what it gets back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import krl
from krl import budget
from krl.eval.command import measure
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
    assert (said["alloc.rule"], said["data.reward"]) == ("tests.test_own:rule", "tests.test_own:reward")
    assert said["alloc.prior"] == "a Source given in Python"
    assert (config.alloc.rule, config.data.reward, config.alloc.prior) == ("reach", "exact", "features")
    assert "without limits of time" in capfd.readouterr().out
    assert [row["counts"] for row in rows(tmp_path / "work", "groups")] == [[8, 8], [8, 8]]
    assert result.metrics["served"] == 2
    assert len(counted) == 32
    assert result.metrics["reward_mean"] == np.mean([digits("", text, "") for text in counted[16:]])
    assert {row["prior"][0] for row in rows(tmp_path / "work", "groups")} == {0.25} or result.metrics["prior_gain"] <= 0


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
        ("alloc.prior", "mine", "one of .*'features'.* or look like package.module:function"),
    ):
        with pytest.raises(ValueError, match=why):
            run_here(tmp_path / "refused", **POOL | {key: value})
    assert not (tmp_path / "refused").exists()


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
    other = jax.tree.map(lambda leaf: leaf[..., :1], first.params)
    with pytest.raises(ValueError, match="the parameters are not those of the PolicyConfig"):
        run_here(tmp_path / "third", own={"policy": (first.policy, other)}, **keys)
    with pytest.raises(ValueError, match=r"needs config\.tokenizer\.path"):
        run_here(tmp_path / "fourth", own=own, **{"sft.steps": 0})


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
