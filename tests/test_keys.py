"""Every key of configs/default.py, tried with another value than its default on a tiny policy.

The tables below have trials: keys with values, and for each key what must be true of a run that has them. A key that is
added to configs/default.py needs a line in one of them; the first test names those that have none. Most trials
take steps with what one set-up prepared (STEPS); what decides more than the steps is tried in whole runs (RUNS).
Settings that share code are tried in pairs at the end.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from krl import budget, hf, learn, policy, rollout
from krl import train as script
from krl.configs import default
from krl.configs.check import check, flatten
from krl.eval.command import measure
from krl.eval.held_out import measure_held_out
from krl.policy.experts import Experts
from krl.policy.model import abstract_params
from krl.run import data as run_data
from krl.run import learner as learner_module
from krl.run import optimizer as run_optimizer
from krl.run import setup
from krl.run.checkpoint import Checkpoints
from krl.run.clock import PhaseClock
from krl.run.guard import find_spike
from krl.run.log import read_rows
from krl.run.processes import join_processes
from krl.tasks import step_task_ids
from krl.tasks.operators import FUNCTIONS, operator_meanings
from tests import bpe, tiny

TINY: dict[str, Any] = {
    "steps": 2, "prompts_per_step": 4, "alloc.rule": "knapsack", "alloc.budget": 16, "alloc.n_min": 2, "alloc.n_max": 8, "alloc.prior_width": 32, "data.source": "operators",
    "data.reward": "tests.rewards:coin", "data.max_prompt_tokens": 8, "operators.num_operators": 3, "operators.num_warm": 20,
    "operators.num_train": 4, "operators.num_test": 4, "operators.wrong": 1.0, "tokenizer.vocab_size": 20, "policy.embed_size": 8, "policy.num_layers": 1,
    "policy.num_heads": 8, "policy.num_kv_heads": 4, "policy.head_size": 4, "policy.mlp_size": 12, "policy.unroll": 1,
    "sft.steps": 0, "sample.max_new_tokens": 5, "optim.learning_rate": 0.02, "optim.warmup_steps": 0, "optim.decay_steps": 0,
    "optim.micro_tokens": 96, "eval.every": 0, "eval.samples": 2,
}  # fmt: skip


class Trial(NamedTuple):
    """Keys tried together, which do not hide each other."""

    changes: dict[str, Any]  # of TINY
    true: dict[str, Callable[["Seen"], Any]]  # key -> what must hold of the run


@dataclasses.dataclass
class Seen:
    """What a run showed."""

    config: Any
    workdir: pathlib.Path
    plain: "Seen"  # the steps with TINY alone
    parts: setup.Setup
    begun: dict = dataclasses.field(default_factory=dict)  # parameters before the first step
    steps: list[tuple] = dataclasses.field(default_factory=list)  # (learner on the host, what else take_step returned)
    said: str = ""
    error: str = ""
    saved: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # directory and step of each checkpoint
    slots: set = dataclasses.field(default_factory=set)  # that the sampler was asked for
    layouts: list[dict] = dataclasses.field(default_factory=list)  # meshes that it ran on
    measured: tuple = ()  # the accuracy on held-out prompts, and the solved samples of each

    def __getattr__(self, name):
        """Of the first step: its learner, metrics, groups, or what it says of its rollouts."""
        learner, metrics, groups, each = self.steps[0]
        known = {"metrics": metrics, "learner": learner} | groups | each | vars(each["rollouts"])
        if name not in known:
            raise AttributeError(name)
        return known[name]

    @property
    def policy(self) -> policy.PolicyConfig:
        return self.parts.policy_config

    @property
    def moved(self) -> list[np.ndarray]:
        """How far each parameter went in the first step, in learning rates."""
        went = jax.tree.map(np.subtract, self.learner.state.params, self.begun)
        return [leaf / self.config.optim.learning_rate for leaf in jax.tree.leaves(went)]

    def rows(self, name: str) -> list[dict]:
        return read_rows(self.workdir / f"{name}.jsonl")

    def prompt(self, number: int = 0) -> str:
        """A training prompt as the policy reads it."""
        return self.parts.tokenizer.decode(self.parts.train.tokens[number][self.parts.train.mask[number]].tolist())

    def spelt(self, text: str) -> str:
        """What the tokenizer makes of a text."""
        return self.parts.tokenizer.decode(self.parts.tokenizer.encode_prompt(text))

    def learns(self) -> str:
        """The texts of supervised fine-tuning."""
        return " ".join(self.parts.tokenizer.decode(row.tolist()) for row in self.parts.pairs[0])

    def results(self) -> dict:
        return json.loads((self.workdir / "results.json").read_text())

    def by_group(self, function: Callable[[np.ndarray], np.ndarray], rewards: np.ndarray) -> np.ndarray:
        """A function of the rewards of each prompt's rollouts, in their places; 0 where a group's are all equal."""
        values = np.zeros_like(rewards)
        for group in (self.prompt_index == number for number in range(4)):
            if len(set(rewards[group])) > 1:
                values[group] = function(rewards[group])
        return values


# ---------------------------------------------------------------- what can be seen


def alike(run: Seen) -> bool:
    """The rollouts of each prompt are one, and without the key they are not."""
    different = lambda seen: sum(len(set(map(bytes, seen.tokens[seen.prompt_index == n]))) for n in range(4))  # noqa: E731
    return different(run) == 4 < different(run.plain)


def same_rollouts(run: Seen) -> bool:
    return np.array_equal(run.tokens, run.plain.tokens)


def same_steps(run: Seen) -> bool:
    """The key changes how something is computed, and nothing else."""
    mine, plain = (jax.tree.leaves(seen.learner.state.params) for seen in (run, run.plain))
    return same_rollouts(run) and all(np.allclose(a, b, atol=1e-3) for a, b in zip(mine, plain, strict=True))


def largest(arrays: Iterable[np.ndarray]) -> float:
    return max(float(np.abs(array).max()) for array in arrays)


def weights(run: Seen) -> float:
    return largest(jax.tree.leaves(run.learner.state.params))


def updates(run: Seen) -> int:
    return max(int(n) for _, n in optax.tree_utils.tree_get_all_with_path(run.learner.state.opt_state, "count"))


def moment_dtypes(run: Seen) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(run.learner.state.opt_state) if leaf.ndim}


def centred(rewards: np.ndarray) -> np.ndarray:
    return rewards - rewards.mean()


def sizes(run: Seen) -> dict:
    return {name: leaf.shape for name, leaf in run.begun["blocks"].items() if not isinstance(leaf, dict)}


def digits(run: Seen, rung: str) -> set[str]:
    """The digits of the operands of a kind of expression."""
    fields = run.parts.train.tasks.fields
    return {most for name, most in zip(fields["rung"], fields["digits"], strict=True) if name == rung}


def names(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def moved(run: Seen) -> np.ndarray:
    """How far fine-tuning moved the embedding of each token."""
    fresh = policy.init(run.policy, jax.random.key(run.config.seed))["embedding"]
    return np.abs(run.begun["embedding"] - fresh).max(axis=1)


def tuned(run: Seen) -> int:
    """Tokens whose embedding fine-tuning moved, by more than the decay of its weights."""
    return int((moved(run) > 1e-4).sum())


def right(run: Seen, texts: Iterable[str]) -> list[bool]:
    """Whether each text, a prompt and an answer of the operators, is what the operator's function gives."""
    found = (re.search(r"(\w)(\d{4})=(\d*)", text) for text in texts)
    meanings = operator_meanings(run.config.seed, run.config.operators.num_operators)
    return [
        FUNCTIONS[meanings[operator][0]](digits) == answer
        for operator, digits, answer in (f.groups() for f in found if f)
    ]


def solutions(run: Seen) -> list[str]:
    """The training prompts with their answers."""
    tasks = run.parts.train.tasks
    return [prompt + str(answer) for prompt, answer in zip(tasks.prompts, tasks.answers, strict=True)]


def demonstrations(run: Seen) -> list[str]:
    """What fine-tuning shows."""
    return [run.parts.tokenizer.decode(row.tolist()) for row in run.parts.pairs[0]]


def served(run: Seen) -> list[list[int]]:
    """The prompts that each step gave rollouts to."""
    return [groups["task_ids"][np.asarray(groups["counts"]) > 0].tolist() for _, _, groups, _ in run.steps]


def chosen_again(run: Seen, reach: float = 0.01, explored: int = 0) -> bool:
    """From the second step on, the candidates that the belief before it has worth some rollouts got them."""
    candidates = run.config.alloc.candidates or 4
    rule = functools.partial(budget.RULES["reach"], reach=reach)
    for step, (learner, *_) in enumerate(run.steps[:-1], start=1):
        ids = step_task_ids(4, candidates, step, seed=run.config.seed)
        known = budget.take(learner.belief, ids, step)
        counts = np.asarray(budget.allocate(rule, known, 16, 0, 8, group=8, explored=explored)[0])
        if ids[counts > 0].tolist() != served(run)[step]:
            return False
    return True


def weighed_by_chances(run: Seen, reach: float) -> bool:
    """Advantages of the last step are rewards less their group's mean, times what each prompt stands for."""
    (learner, *_), last = run.steps[-2], run.steps[-1]
    ids, step = np.asarray(last[2]["task_ids"]), len(run.steps) - 1
    candidates = step_task_ids(4, run.config.alloc.candidates, step, seed=run.config.seed)
    known = budget.take(learner.belief, candidates, step)
    chances = dict(
        zip(
            candidates.tolist(), budget.reach_chances(known, 16, group=8, explored=1, reach=reach).tolist(), strict=True
        )
    )
    each, rollouts = last[3], last[3]["rollouts"]
    index, lengths = np.asarray(rollouts.prompt_index), np.asarray(rollouts.lengths, float)
    rewards = np.asarray(each["rewards"])
    centred_rewards = rewards - (np.bincount(index, rewards, len(ids)) / np.bincount(index, minlength=len(ids)))[index]
    stands_for = np.array([1 / chances[task] for task in ids])
    weights = (stands_for / np.bincount(index, lengths, len(ids)) / stands_for.sum())[index] * lengths.sum()
    apart = stands_for.max() > stands_for.min() and centred_rewards.any()
    return apart and np.allclose(each["advantages"], centred_rewards * weights, atol=1e-4)


LETTERS = set("abcdefghijklmnopqrstuvwxyz")
PLAIN = {"loss.average": "tokens", "loss.scale": "none"}  # advantages are rewards less their group's mean

POOL = {
    "steps": 3,
    "alloc.n_min": 0,
    "alloc.rule": "reach",
    "alloc.candidates": 3,
    "alloc.group": 8,
    "alloc.prior": "shared",
}

# Steps of the one set-up that TINY has.
STEPS = {
    "the sizes of a step": Trial(TINY, {
        "prompts_per_step": lambda run: len(run.task_ids) == 4,
        "alloc.budget": lambda run: run.counts.sum() == 16 == len(run.rewards),
        "alloc.n_min": lambda run: run.counts.min() >= 2 and len(run.counts) == 4,
        "data.reward": lambda run: set(run.rewards) == {0.0, 1.0},
        "data.max_prompt_tokens": lambda run: run.parts.train.tokens.shape == (4, 8),
        "sample.max_new_tokens": lambda run: run.tokens.shape == (16, 5),
        "alloc.prior_width": lambda run: run.parts.num_features == 32 and run.parts.features.max() <= 32,
        "steps": lambda run: len(run.steps) == 2,
        "data.source": lambda run: set(run.parts.train.tasks.fields) == {"operator"},
        "operators.num_operators": lambda run: len({prompt[0] for prompt in run.parts.train.tasks.prompts}) <= 3,
        "operators.num_train": lambda run: len(run.parts.train) == 4,
        "operators.num_test": lambda run: len(run.parts.test) == 4,
        "operators.wrong": lambda run: not any(right(run, solutions(run))),
        "tokenizer.vocab_size": lambda run: run.parts.tokenizer.vocab_size <= 20,
        "policy.embed_size": lambda run: run.begun["embedding"].shape == (run.policy.vocab_size, 8),
        "policy.num_layers": lambda run: all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(run.begun["blocks"])),
        "policy.num_heads": lambda run: (run.policy.num_heads, run.policy.num_kv_heads) == (8, 4),
        "policy.num_kv_heads": lambda run: sizes(run)["key"] == (1, 8, 4, 4),
        "policy.head_size": lambda run: sizes(run)["query"] == (1, 8, 8, 4),
        "policy.mlp_size": lambda run: sizes(run)["down"] == (1, 12, 8),
        "policy.unroll": lambda run: run.policy.unroll == 1,
        "optim.learning_rate": lambda run: 0.9 < largest(run.moved) < 3.0 and run.config.optim.learning_rate == 0.02,
        "optim.warmup_steps": lambda run: largest(run.moved) > 0.9,  # the first update has the whole rate
    }),
    "another seed": Trial({"seed": 1}, {
        "seed": lambda run: not same_rollouts(run) and list(run.task_ids) != list(run.plain.task_ids),
    }),
    "beliefs fade": Trial({
        "steps": 3, "alloc.discount": 0.75, "alloc.discount_mixed": 0.125, "alloc.fade": 0.5, "alloc.fit_discounts": False
    }, {
        "alloc.discount": lambda run: [metrics["discount"] for _, metrics, *_ in run.steps] == [0.75] * 3,
        "alloc.discount_mixed": lambda run: [metrics["discount_mixed"] for _, metrics, *_ in run.steps] == [0.125] * 3,
        "alloc.fade": lambda run: run.metrics["fade"] == 0.5,
        "alloc.fit_discounts": lambda run: run.plain.steps[1][1]["discount_mixed"] != 0.25,
    }),
    "some of the candidates": Trial(POOL, {
        "alloc.candidates": lambda run: run.metrics["candidates"] == 3 and len(run.task_ids) == 2 and chosen_again(run) and max(map(max, served(run))) <= 3,
        "alloc.group": lambda run: set(run.counts) == {8},
    }),
    "all candidates alike": Trial(POOL | PLAIN | {"alloc.reach": 0.5, "loss.average": "candidates"}, {
        "loss.average": lambda run: chosen_again(run, reach=0.5) and weighed_by_chances(run, reach=0.5),
    }),
    "rarer successes": Trial(POOL | {"alloc.reach": 0.5}, {"alloc.reach": lambda run: chosen_again(run, reach=0.5)}),
    "what waits": Trial(POOL | {"steps": 5, "alloc.candidates": 0, "alloc.explored": 0.5}, {
        "alloc.explored": lambda run: run.steps[4][1]["staleness_max"] <= 3 and chosen_again(run, explored=1),
    }),
    "scouts": Trial({"alloc.scouts": 4}, {  # shares of four successes beside Jeffreys' prior
        "alloc.scouts": lambda run: np.allclose(n := 5 * run.belief - 0.5, n.round(), atol=1e-4) and len(run.rewards) == 16,
    }),
    "groups have a prior each": Trial({"steps": 2, "alloc.prior": "groups", "alloc.prior_field": "operator"}, {
        "alloc.prior": lambda run: run.parts.num_features == len(set(run.parts.train.tasks.fields["operator"])),
        "alloc.prior_field": lambda run: run.parts.features.shape == (4, 1),
    }),
    "few tokens: k": Trial({"sample.top_k": 1, "sample.top_p": 0.7, "sample.slots": 4}, {"sample.top_k": alike}),
    "few tokens: p": Trial({"sample.top_p": 1e-6, "sample.min_p": 0.2, "sample.slots": 8}, {"sample.top_p": alike}),
    "few tokens: min p": Trial({"sample.min_p": 1.0, "sample.top_k": 3, "sample.slots": 2}, {"sample.min_p": alike}),
    "one slot": Trial({"sample.slots": 1}, {"sample.slots": lambda run: same_rollouts(run) and run.slots == {1}}),
    "memory of one slot": Trial({"sample.memory_gb": 1e-9}, {
        "sample.memory_gb": lambda run: same_rollouts(run) and run.slots == {1},
    }),
    "no deviation": Trial(PLAIN, {
        "loss.scale": lambda run: np.allclose(run.advantages, run.by_group(centred, run.rewards), atol=1e-5),
    }),
    "the others' mean": Trial(PLAIN | {"loss.leave_one_out": True}, {
        "loss.leave_one_out": lambda run: np.allclose(
            run.advantages, run.by_group(lambda r: centred(r) * len(r) / (len(r) - 1), run.rewards), atol=1e-5
        ),
    }),
    "advantages clipped": Trial(PLAIN | {"loss.advantage_clip": 0.125}, {
        "loss.advantage_clip": lambda run: np.abs(run.advantages).max() == 0.125,
    }),
    "long responses": Trial(PLAIN | {"loss.overlong_tokens": 5}, {
        "loss.overlong_tokens": lambda run: np.allclose(
            run.advantages, run.by_group(centred, run.rewards - run.lengths / 5), atol=1e-5
        ),
    }),
    "cut off": Trial({"loss.mask_truncated": True}, {
        "loss.mask_truncated": lambda run: not run.finished.all() and not run.advantages[~run.finished].any(),
    }),
    "constant": Trial(PLAIN | {"loss.average": "constant"}, {
        "loss.average": lambda run: np.allclose(
            run.advantages, run.by_group(centred, run.rewards) * run.lengths.sum() / (16 * 5), atol=1e-5
        ),
    }),
    "weights without gradient": Trial({"loss.surrogate": "cispo", "guard.loss": 1e-9}, {  # -A logp in place of -A, about
        "loss.surrogate": lambda run: same_rollouts(run) and abs(run.metrics["loss"] - run.plain.metrics["loss"]) > 0.01,
        "guard.loss": lambda run: "is beyond config.guard.loss=1e-09" in find_spike(run.metrics, run.config.guard),
    }),
    "no room": Trial({"loss.clip_low": 0.0, "loss.clip_high": 0.0, "loss.dual_clip": 1.0001, "loss.importance_cap": 0.5}, {
        "loss.clip_low": lambda run: run.metrics["clip_low_fraction"] > run.plain.metrics["clip_low_fraction"],
        "loss.clip_high": lambda run: run.metrics["clip_high_fraction"] > run.plain.metrics["clip_high_fraction"],
        "loss.dual_clip": lambda run: run.metrics["dual_clip_fraction"] > 0 == run.plain.metrics["dual_clip_fraction"],
        "loss.importance_cap": lambda run: np.isclose(run.metrics["importance_mean"], 0.5),  # the sampler is the learner
    }),
    "stay close, spread out": Trial({"guard.kl": 1e-9, "loss.kl_coefficient": 0.5, "loss.kl_estimator": "k1", "loss.entropy_coefficient": 2.0}, {
        "loss.kl_coefficient": lambda run: "kl" in run.metrics and "kl" not in run.plain.metrics,
        "guard.kl": lambda run: "is beyond config.guard.kl=1e-09" in find_spike(run.metrics, run.config.guard),
        "loss.kl_estimator": lambda run: run.metrics["kl"] < 0,  # "k2" and "k3" are never negative
        "loss.entropy_coefficient": lambda run: run.metrics["loss"] < run.plain.metrics["loss"] - 0.5,
    }),
    "signs": Trial({"optim.warmup_steps": 1000, "optim.beta1": 0.0, "optim.beta2": 0.0}, {  # one and two rates up or down
        "optim.beta1": lambda run: np.mean([(np.abs(1001 * m)[..., None] - [1, 3]).min() < 0.1 for m in run.moved]) > 0.5,
        "optim.beta2": lambda run: all(np.isclose(np.abs(1001 * m).max(), [1, 3], atol=0.05).any() for m in run.moved),
        "optim.warmup_steps": lambda run: largest(run.moved) < 4 / 1001,
    }),
    "cold, and weights decay": Trial({  # by all that they are, and nothing is learnt
        "sample.temperature": 0.001, "optim.weight_decay": 50.0, "optim.grad_clip": 1e-10,
    }, {
        "sample.temperature": lambda run: run.metrics["entropy"] < 0.2 < 1.0 < run.plain.metrics["entropy"],
        "optim.weight_decay": lambda run: weights(run) < 0.1 < largest(jax.tree.leaves(run.begun)),
        "optim.grad_clip": lambda run: weights(run) < 0.1 * run.config.optim.learning_rate,
    }),
    "four updates, all but one at rest": Trial({
        "optim.updates_per_step": 4, "optim.decay_steps": 1, "optim.moment_dtype": "bfloat16"
    }, {
        "optim.updates_per_step": lambda run: updates(run) == 4,
        "optim.moment_dtype": lambda run: moment_dtypes(run) == {"bfloat16", "float32"} and moment_dtypes(run.plain) == {"float32"},
        "optim.decay_steps": lambda run: 0.9 < largest(run.moved) < 1.1,
    }),
    "a row for each, few at a time": Trial({"optim.packed": False, "optim.micro_tokens": 13}, {
        "optim.packed": same_steps,
        "optim.micro_tokens": same_steps,
    }),
    "greedy evaluation": Trial({"eval.temperature": 0.0, "eval.samples": 4}, {
        "eval.temperature": lambda run: set(run.measured[1]) <= {0, 4},
        "eval.samples": lambda run: run.measured[0]["accuracy"] * 16 == pytest.approx(sum(run.measured[1])),
    }),
    "evaluation of likely tokens": Trial({"eval.top_p": 1e-6, "eval.samples": 4}, {
        "eval.top_p": lambda run: set(run.measured[1]) <= {0, 4},
    }),
    "a device each for two rows": Trial({"mesh.shape": (2, 1), "mesh.axis_names": ("fsdp", "model"), "mesh.decode": (1, 2)}, {
        "mesh.shape": lambda run: same_steps(run) and dict(run.parts.mesh.shape) == {"fsdp": 2, "model": 1},
        "mesh.axis_names": lambda run: run.parts.params["embedding"].sharding.shard_shape((20, 8)) == (20, 4),
        "mesh.decode": lambda run: run.layouts == [{"fsdp": 1, "model": 2}] * 2,
    }),
    "limits of a worker": Trial({  # of eight responses, two are refused their memory and one hangs
        "data.reward": "tests.rewards:tells_its_limits", "verify.workers": 1, "verify.item_seconds": 3.0, "verify.memory_gb": 1.0,
        "verify.environment": "KRL_TRIED", "steps": 1, "alloc.budget": 8,
    }, {
        "verify.workers": lambda run: run.metrics["verifier/timeouts"] > 0,
        "verify.item_seconds": lambda run: run.metrics["verifier/timeouts"] == 1,
        "verify.memory_gb": lambda run: sum(run.rewards == 0.25) == 2,
        "verify.environment": lambda run: sum(run.rewards == 1.0) == 5,
    }),
    "a worker's time is over": Trial({
        "data.reward": "tests.rewards:in_a_moment", "verify.workers": 1, "verify.batch_seconds": 0.5, "steps": 1, "alloc.budget": 8,
    }, {
        "verify.batch_seconds": lambda run: run.metrics["verifier/timeouts"] >= 4,
    }),
    "workers are replaced": Trial({
        "data.reward": "tests.rewards:nth", "verify.workers": 1, "verify.items_per_worker": 5, "steps": 1, "alloc.budget": 8,
    }, {
        "verify.items_per_worker": lambda run: run.rewards.max() == 5,
    }),
}  # fmt: skip

# Whole runs; HERE is a directory with the files of `files`.
RUNS = {
    "data of one's own": Trial({
        "data.source": "dataset", "data.path": "HERE/train.jsonl", "data.test_path": "HERE/test.jsonl", "data.prompt_field": "q",
        "data.answer_field": "a", "data.completion_field": "worked", "data.fields": "topic", "data.template": "Q{prompt}=",
        "data.max_train": 5, "tokenizer.byte_fallback": True, "tokenizer.vocab_size": 300, "sft.steps": 2, "sft.path": "HERE/pairs.jsonl",
        "sft.prompt_field": "asked", "sft.completion_field": "said", "sft.batch_size": 1, "sft.row_tokens": 24, "sft.save_every": 1,
        "sft.dir": "HERE/warm", "policy.tie_embeddings": False, "policy.dtype": "bfloat16", "policy.remat": "full", "policy.attention": "xla",
    }, {
        "data.source": lambda run: run.parts.train.tasks.prompts[0] == "0+3",
        "data.path": lambda run: all(prompt.endswith("+3") for prompt in run.parts.train.tasks.prompts),
        "data.test_path": lambda run: run.parts.test.tasks.prompts[0] == "0+4",
        "data.prompt_field": lambda run: run.parts.train.tasks.prompts[4] == "4+3",
        "data.answer_field": lambda run: run.parts.train.tasks.answers[4] == "7",
        "data.completion_field": lambda run: run.parts.train.tasks.completions[4] == "so 7",
        "data.fields": lambda run: run.parts.train.tasks.fields == {"topic": ("even", "odd", "even", "odd", "even")},
        "data.template": lambda run: run.prompt() == "Q0+3=",
        "data.max_train": lambda run: len(run.parts.train) == 5,
        "tokenizer.byte_fallback": lambda run: run.spelt("é") == "é" != run.plain.spelt("é"),
        "tokenizer.vocab_size": lambda run: 257 < run.parts.tokenizer.vocab_size <= 300,
        # The second update has the whole rate of 2e-3, half of them being the warm-up.
        "sft.steps": lambda run: "fine-tuning 2/2" in run.said and moved(run).max() > 1.5e-3,
        "sft.path": lambda run: "yes" in run.learns() and "so" not in run.learns(),
        "sft.prompt_field": lambda run: "Q1=" in run.learns(),
        "sft.completion_field": lambda run: "yes" in run.learns(),
        "sft.batch_size": lambda run: 1 < tuned(run) < len(set(run.parts.pairs[0].flat)),  # what two rows have in them
        "sft.row_tokens": lambda run: run.parts.pairs[0].shape[1] == 24,
        "sft.save_every": lambda run: {step for place, step in run.saved if "warm" in place} == {1, 2},
        "sft.dir": lambda run: list(pathlib.Path(run.config.sft.dir).glob("*/tokenizer.model")),
        "policy.tie_embeddings": lambda run: len(run.begun) == 1 + len(run.plain.begun),
        "policy.dtype": lambda run: run.policy.dtype == "bfloat16" and run.metrics["mismatch"] > 0,
        "policy.remat": lambda run: run.policy.remat == "full",
        "policy.attention": lambda run: run.policy.attention == "xla",
    }),
    "a checkpoint and a data set": Trial({
        "data.source": "dataset", "data.name": "HERE/hub", "data.subset": "hard", "data.train_split": "learn", "data.test_split": "check",
        "data.prompt_field": "q", "data.answer_field": "a", "data.max_prompt_tokens": 24, "data.template": "chat",
        "data.template_arguments": "name='third'", "policy.path": "HERE/qwen", "tokenizer.path": "HERE/other",
        "sample.stop": tuple(LETTERS),
    }, {
        "data.name": lambda run: run.parts.train.tasks.prompts[0] == "0+7",
        "data.subset": lambda run: run.parts.train.tasks.prompts[0].endswith("7"),
        "data.train_split": lambda run: len(run.parts.train) == 6,
        "data.test_split": lambda run: run.parts.test.tasks.prompts[0] == "0+8",
        "data.template": lambda run: run.prompt().endswith("user\n0+7\nassistant\n"),
        "data.template_arguments": lambda run: run.prompt().startswith("third"),
        "sample.stop": lambda run: LETTERS & set("".join(map(str, run.texts))) and not any(LETTERS & set(str(text)[:-1]) for text in run.texts),
        "data.max_prompt_tokens": lambda run: run.parts.train.tokens.shape[1] == 24,
        "policy.path": lambda run: (run.policy.vocab_size, run.policy.mlp_size) == (320, 32),
        "tokenizer.path": lambda run: "other" in (run.workdir / "policy/tokenizer_config.json").read_text(),
    }),
    "adapters": Trial({
        "policy.lora_rank": 2, "policy.lora_alpha": 5.0, "policy.lora_modules": ("query", "down"), "policy.dtype": "bfloat16",
    }, {
        "policy.lora_rank": lambda run: sizes(run)["query_lora_a"] == (1, 8, 2),
        "policy.lora_alpha": lambda run: run.policy.lora.scale == 2.5,
        "policy.lora_modules": lambda run: sorted(run.begun["blocks"]) == ["down_lora_a", "down_lora_b", "query_lora_a", "query_lora_b"],
    }),
    "adapters of a checkpoint": Trial({
        "data.source": "dataset", "data.path": "HERE/train.jsonl", "data.prompt_field": "q", "data.answer_field": "a",
        "data.max_prompt_tokens": 24, "policy.path": "HERE/qwen", "policy.adapter": "HERE/adapter", "policy.lora_rank": 3,
        "policy.lora_alpha": 6.0, "policy.lora_modules": ("gate",),
    }, {
        "policy.adapter": lambda run: bool((run.begun["blocks"]["gate_lora_b"] == 0.5).all()),
    }),
    "a mixture of experts": Trial({
        "data.source": "dataset", "data.path": "HERE/train.jsonl", "data.prompt_field": "q", "data.answer_field": "a",
        "data.max_prompt_tokens": 24, "policy.path": "HERE/mixture", "policy.balance": 1.0,
    }, {
        "policy.balance": lambda run: run.policy.balance == 1 and run.metrics["grad_norm"] > 1.85,  # 1.75 without
    }),
    "watched": Trial({
        "steps": 3, "eval.every": 1, "eval.prompts": 2, "eval.samples": 3, "checkpoint.every": 1, "checkpoint.keep": 3,
        "checkpoint.dir": "HERE/kept", "profile.steps": 1, "log.rollouts_gb": 0.0, "log.texts_every": 1, "log.wandb": "project",
        "log.mlflow": "file://HERE/mlflow", "eval.sets": "aime", "eval.dir": "HERE/sets", "eval.best": True, "stuck_seconds": 1e-9,
    }, {
        "steps": lambda run: [row["step"] for row in run.rows("metrics")] == [0, 1, 2, 3],
        "eval.every": lambda run: [row["step"] for row in run.rows("evaluations")] == [0, 1, 2, 3],
        "eval.prompts": lambda run: {len(row["solved"]) for row in run.rows("evaluations")} == {2},
        "eval.samples": lambda run: {row["samples"] for row in run.rows("evaluations")} == {3},
        "checkpoint.every": lambda run: [step for place, step in run.saved if place.endswith("kept/checkpoints")] == [1, 2, 3],
        "checkpoint.keep": lambda run: names(pathlib.Path(run.config.checkpoint.dir, "checkpoints")) == ["1", "2", "3"],
        "checkpoint.dir": lambda run: not (run.workdir / "checkpoints").exists(),
        "profile.steps": lambda run: list((run.workdir / "profile").rglob("*.trace.json.gz")),
        "log.rollouts_gb": lambda run: not (run.workdir / "rollouts").exists(),
        "log.texts_every": lambda run: b"rollouts/text_summary" in next((run.workdir / "tensorboard").iterdir()).read_bytes(),
        "log.wandb": lambda run: list((run.workdir / "wandb").rglob("*.wandb")),
        "log.mlflow": lambda run: list(pathlib.Path(run.config.log.mlflow.removeprefix("file://")).rglob("grad_norm")),
        "eval.sets": lambda run: run.results()["sets"].keys() == {"aime"},
        "eval.dir": lambda run: run.results()["sets"]["aime"]["tasks"] == 2,
        "eval.best": lambda run: run.results()["settings"]["policy"] == f"step {names(pathlib.Path(run.config.checkpoint.dir, 'best'))[0]}",
        "stuck_seconds": lambda run: "stuck in rollout" in run.said,
    }),
    "budgets of those that failed": Trial({
        "alloc.rule": "skip", "alloc.n_min": 3, "alloc.n_max": 5, "data.reward": "tests.rewards:nothing", "operators.num_warm": 7,
        "sft.steps": 1, "sft.learning_rate": 1e-30, "guard.rollbacks": 0, "operators.shown_well": 1.0, "operators.impossible": 1.0,
    }, {
        "alloc.rule": lambda run: run.steps[1][1]["skipped"] == 0.5,
        "alloc.n_min": lambda run: min(run.rows("groups")[1]["counts"]) == 3,
        "alloc.n_max": lambda run: max(run.rows("groups")[1]["counts"]) == 5,
        "operators.num_warm": lambda run: len(run.parts.pairs[0]) == 7,
        "operators.shown_well": lambda run: sum(right(run, demonstrations(run))) >= 6,
        "operators.impossible": lambda run: {text[-1] for text in solutions(run)} == {"?"},
        "sft.learning_rate": lambda run: tuned(run) == 0,
    }),
    "sums": Trial({
        "data.source": "arithmetic", "arithmetic.addition": 1, "arithmetic.subtraction": 1, "arithmetic.multiplication": 1,
        "arithmetic.two_step": 1, "arithmetic.num_warm": 9, "arithmetic.num_train": 40, "arithmetic.num_test": 30, "eval.prompts": 0,
        "tokenizer.vocab_size": 24, "sft.steps": 1,
    }, {
        "arithmetic.addition": lambda run: digits(run, "addition") == {"1"},
        "arithmetic.subtraction": lambda run: digits(run, "subtraction") == {"1"},
        "arithmetic.multiplication": lambda run: digits(run, "multiplication") == {"1"},
        "arithmetic.two_step": lambda run: digits(run, "two_step") == {"1"},
        "arithmetic.num_warm": lambda run: len(run.parts.pairs[0]) == 9,
        "arithmetic.num_train": lambda run: len(run.parts.train) + run.parts.train.dropped == 40,
        "arithmetic.num_test": lambda run: len(run.parts.test) + run.parts.test.dropped == 30,
        "eval.prompts": lambda run: len(run.parts.test) > 0,
    }),
    "mazes": Trial({
        "data.source": "maze", "maze.side": 3, "maze.num_warm": 9, "maze.num_train": 6, "maze.num_test": 5,
        "data.max_prompt_tokens": 10, "sft.steps": 1,
    }, {
        "maze.side": lambda run: {len(prompt) for prompt in run.parts.train.tasks.prompts} == {10},
        "maze.num_warm": lambda run: len(run.parts.pairs[0]) == 9,
        "maze.num_train": lambda run: len(run.parts.train) == 6,
        "maze.num_test": lambda run: len(run.parts.test) == 5,
    }),
    "puzzles": Trial({
        "data.source": "reasoning_gym", "data.reward": "reasoning_gym", "reasoning_gym.tasks": "gcd(max_value=9)",
        "reasoning_gym.num_warm": 9, "reasoning_gym.num_train": 6, "reasoning_gym.num_test": 5,
        "data.max_prompt_tokens": 120, "tokenizer.vocab_size": 64, "sft.steps": 1,
    }, {
        "reasoning_gym.tasks": lambda run: set(run.parts.train.tasks.fields["generator"]) == {"gcd"},
        "reasoning_gym.num_warm": lambda run: len(run.parts.pairs[0]) == 9,
        "reasoning_gym.num_train": lambda run: len(run.parts.train) == 6,
        "reasoning_gym.num_test": lambda run: len(run.parts.test) == 5,
    }),
    "a spike": Trial({"guard.ratio": 1e-9, "guard.rollbacks": 1}, {
        "guard.ratio": lambda run: "is beyond config.guard.ratio=1e-09" in run.error,
        "guard.rollbacks": lambda run: "after 1 rollbacks (config.guard.rollbacks=1)" in run.error,
    }),
    "rewards that fail": Trial({"data.reward": "tests.rewards:never", "verify.may_fail": True}, {
        "verify.may_fail": lambda run: [metrics["verifier/errors"] for _, metrics, *_ in run.steps] == [16, 16],
    }),
    "no number": Trial({"optim.learning_rate": 1e38, "max_bad_updates": 1}, {
        "max_bad_updates": lambda run: run.error.startswith(("1 updates in a row", "2 updates in a row")) and len(run.steps) < 3,
    }),
}  # fmt: skip

# What train.py and eval.py do before anything else, with keys of the section "distributed".
JOINS = {
    "distributed.processes": ({"processes": 2}, "config.distributed.processes=2 needs config.distributed.coordinator"),
    "distributed.process": ({"processes": 2, "coordinator": "h:1", "process": 2}, "config.distributed.process in 0..1; got 'h:1' and 2"),
    "distributed.coordinator": ({"processes": 2, "coordinator": "here"}, "config.distributed.coordinator='here' must be host:port"),
}  # fmt: skip


# ---------------------------------------------------------------- trying


def make_config(changes: dict[str, Any], here: pathlib.Path | None = None):
    """TINY with changes, as train.py checks it."""
    placed = {k: v.replace("HERE", str(here)) if isinstance(v, str) else v for k, v in (TINY | changes).items()}
    config = default.get_config()
    config.update_from_flattened_dict(placed)
    check(config, setup.NAMES)
    return config


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


@functools.cache
def optimizer_of(told: str) -> optax.GradientTransformation:
    """One optimiser for equal configs, whose updates are compiled once."""
    config = default.get_config()
    config.update_from_flattened_dict(json.loads(told))
    return setup.find_optimizer(config)


STARTS: dict = {}  # what one set-up begins from: a policy and its optimiser for each seed, mesh and optimiser


def start_once(function: Callable, *key) -> Any:
    """What a function returns, from the first call with this key; a copy, since a step gives it away."""
    if key not in STARTS:
        STARTS[key] = function()
    return jax.tree.map(jnp.copy, STARTS[key])


def spy_on_sampler(seen: Seen):
    """Note what the sampler is asked for."""
    generate = rollout.generate

    def spy(*arguments, num_slots, **options):
        seen.slots.add(num_slots)
        seen.layouts.append(dict(jax.sharding.get_abstract_mesh().shape))
        return generate(*arguments, num_slots=num_slots, **options)

    return mock.patch.object(rollout, "generate", spy)


def take_steps(config, parts: setup.Setup, plain: Seen | None = None) -> Seen:
    """The steps of a config after the set-up of TINY, and an evaluation if it has eval keys of its own."""
    features, num_features = run_data.find_features(config, parts.train)
    mesh = setup.make_mesh(tuple(config.mesh.shape), tuple(config.mesh.axis_names))
    if mesh != parts.mesh:
        parts = dataclasses.replace(parts, mesh=mesh, params=abstract_params(parts.policy_config, mesh))
    if config.verify.workers:
        parts = dataclasses.replace(parts, verifiers=run_data.make_verifiers(config))
    optimizer = optimizer_of(json.dumps({f"optim.{key}": value for key, value in config.optim.items()}))
    parts = dataclasses.replace(
        parts, features=features, num_features=num_features, optimizer=optimizer, learning=setup.find_learning(config),
        **setup.find_budget(config, len(parts.train)),
    )  # fmt: skip
    seen = Seen(config, pathlib.Path(), plain, parts)  # type: ignore[arg-type]
    nothing: Any = SimpleNamespace(latest_step=lambda: None)
    start_params = learner_module.start_params
    starts: Any = {
        "start_params": lambda *args, **options: start_once(lambda: start_params(*args, **options), config.seed, mesh),
        "init_state": lambda *args: start_once(lambda: run_optimizer.init_state(*args), config.seed, mesh, optimizer),
    }
    with (
        jax.set_mesh(mesh),
        mock.patch.multiple(learner_module, **starts),
        spy_on_sampler(seen),
        parts.verifiers if config.verify.workers else contextlib.nullcontext(),
    ):
        _, learner, reference = learner_module.start_or_continue(config, parts, nothing, {}, lambda: False)
        seen.begun = on_host(learner.state.params)
        for step in range(config.steps):
            learner, *rest = script.take_step(config, parts, learner, step, 0, reference)
            seen.steps.append((on_host(learner), *on_host(rest)))
        if config.eval.samples != TINY["eval.samples"]:
            hear = script.FaultWatch(parts.verifiers, config.verify.may_fail)
            seen.measured = measure_held_out(config, parts, learner.state.params, hear)
    check_finite(seen)
    return seen


def check_finite(seen: Seen) -> None:
    for learner, metrics, *_ in seen.steps:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learner))
        assert all(np.isfinite(metrics[name]) for name in ("loss", "grad_norm", "entropy"))
        assert np.isfinite(metrics["reward_mean"]) or seen.config.verify.may_fail


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Seen:
    """Two steps with TINY alone, and what was set up for them."""
    config = make_config({})
    parts = setup.set_up(config, tmp_path_factory.mktemp("plain"))
    seen = take_steps(config, parts)
    seen.plain = seen
    return seen


@pytest.fixture
def spied(monkeypatch) -> Callable[[Any, pathlib.Path, Seen], Seen]:
    """A whole run, whose parts and steps are noted."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(script.report, "of_a_run", lambda workdir: "")
    monkeypatch.setattr(PhaseClock, "_give_up", lambda clock, name: print(f"stuck in {name}"))
    set_up, take_step, save = script.set_up, script.take_step, Checkpoints.save

    def run(config, workdir: pathlib.Path, plain: Seen) -> Seen:
        seen = Seen(config, workdir, plain, plain.parts)

        def set_up_seen(*arguments):
            seen.parts = set_up(*arguments)
            return seen.parts

        def take_step_seen(config, parts, learner, *arguments):
            seen.begun = seen.begun or on_host(learner.state.params)
            learner, *rest = take_step(config, parts, learner, *arguments)
            seen.steps.append((on_host(learner), *on_host(rest)))
            return learner, *rest

        def save_seen(checkpoints, step, *arguments, **options):
            seen.saved.append((str(checkpoints.directory), step))
            return save(checkpoints, step, *arguments, **options)

        monkeypatch.setattr(script, "set_up", set_up_seen)
        monkeypatch.setattr(script, "take_step", take_step_seen)
        monkeypatch.setattr(Checkpoints, "save", save_seen)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                script.train(config, workdir)
            except FloatingPointError as error:
                seen.error = str(error)
            if config.eval.sets:
                measure(config, workdir)
        seen.said = said.getvalue()
        return seen

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """HERE: data in files and as a data set, a checkpoint, and a tokenizer that says that it is another."""
    here = tmp_path_factory.mktemp("here")
    for name in ("hub", "qwen", "mixture", "other", "sets"):
        (here / name).mkdir()

    def write(name: str, rows: Iterable[dict]) -> None:
        (here / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sums(number: int, count: int = 6) -> list[dict]:
        topics = ("even", "odd")
        return [{"q": f"{n}+{number}", "a": f"{n + number}", "worked": f"so {n + number}", "topic": topics[n % 2]} for n in range(count)]  # fmt: skip

    write("train.jsonl", sums(3, 10))
    write("test.jsonl", sums(4))
    write("pairs.jsonl", [{"asked": f"{n}", "said": f"yes {letter}"} for n, letter in enumerate("ABCDEFGHIJ")])
    write("sets/aime.jsonl", [{"problem": problem, "answer": "1"} for problem in ("a", "b")])
    for name, number in (("easy_learn", 5), ("easy_check", 6), ("hard_learn", 7), ("hard_check", 8)):
        write(f"hub/{name}.jsonl", sums(number))
    about = [{"config_name": level, "data_files": [{"split": split, "path": f"{level}_{split}.jsonl"} for split in ("learn", "check")]} for level in ("easy", "hard")]  # fmt: skip
    (here / "hub" / "README.md").write_text(f"---\nconfigs: {json.dumps(about)}\n---\n")
    bpe.write_qwen(here / "qwen")
    adapted = hf.read_config(here / "qwen", lora=policy.Lora(3, 6.0, ("gate",)))
    fresh = policy.trained(adapted, policy.init(adapted, jax.random.key(0)))
    hf.save_adapters(here / "adapter", adapted, jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), fresh))
    bpe.write_qwen(here / "mixture", qkv_bias=False, qk_norm=True, experts=Experts(3, 2))
    bpe.write_qwen(here / "other")
    told = json.loads((here / "other" / "tokenizer_config.json").read_text())
    told["chat_template"] = "{{ name or 'other' }} " + bpe.CHATML.replace("<|im_start|>", "").replace("<|im_end|>", "")
    (here / "other" / "tokenizer_config.json").write_text(json.dumps(told))
    return here


def holds(seen: Seen, trial: Trial) -> None:
    """Every line of a trial is true of its run, and the run is the one that was asked for."""
    for key, true in trial.true.items():
        assert true(seen), f"config.{key}={flatten(seen.config)[key]!r} is not what the run shows"


# ---------------------------------------------------------------- tests


def test_every_key_is_tried_with_another_value_than_its_default():
    usual = flatten(default.get_config())
    trials = [*STEPS.values(), *RUNS.values()]
    missing = usual.keys() - {key for trial in trials for key in trial.true} - JOINS.keys()
    assert not missing, (
        f"no trial of {sorted(missing)}; add each, with what must be true of a run, to STEPS or RUNS above"
    )
    for trial in trials:
        for key in trial.true:
            assert (TINY | trial.changes)[key] != usual[key], f"config.{key} is tried with its default"


# What keys do that only these try, only `make slow` tries.
LONG = {
    "a device each for two rows",
    "limits of a worker",
    "data of one's own",
    "a mixture of experts",
    "watched",
    "mazes",
    "puzzles",
}


def in_time(trials: dict[str, Trial]) -> list:
    return [tiny.slow(name) if name in LONG else name for name in trials]


@pytest.mark.parametrize("name", in_time(STEPS))
def test_steps_show_what_the_config_says(name, plain, monkeypatch):
    monkeypatch.setenv("KRL_TRIED", "1")
    trial = STEPS[name]
    seen = plain if trial.changes is TINY else take_steps(make_config(trial.changes), plain.parts, plain)
    holds(seen, trial)


@pytest.mark.parametrize("name", in_time(RUNS))
def test_runs_show_what_the_config_says(name, plain, spied, files, tmp_path):
    config = make_config(RUNS[name].changes, files)
    seen = spied(config, tmp_path, plain)
    if not seen.error:
        check_finite(seen)
    holds(seen, RUNS[name])
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded == json.loads(json.dumps(flatten(config)))


@pytest.mark.parametrize("key", JOINS)
def test_what_names_no_cluster_is_refused(key):
    changes, message = JOINS[key]
    config = default.get_config()
    config.distributed.update(changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        join_processes(config.distributed)


# ---------------------------------------------------------------- in pairs


def pairwise(choices: dict[str, tuple]) -> list[dict[str, Any]]:
    """Few rows in which every two values of two keys meet, greedily and always the same."""
    everything = [tuple(zip(choices, row, strict=True)) for row in itertools.product(*choices.values())]
    left = {pair for row in everything for pair in itertools.combinations(row, 2)}
    rows = []
    while left:
        best = max(everything, key=lambda row: sum(pair in left for pair in itertools.combinations(row, 2)))
        left -= set(itertools.combinations(best, 2))
        rows.append(dict(best))
    return rows


def test_pairs_meet_in_few_rows():
    choices = {"a": (1, 2, 3), "b": (1, 2, 3), "c": (1, 2), "d": (1, 2)}
    rows = pairwise(choices)
    assert len(rows) == 9  # three times three is the least
    for (a, first), (b, second) in itertools.combinations(choices.items(), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(first, second))


BELIEFS = {
    "alloc.prior": ("shared", *budget.PRIORS), "alloc.fit_discounts": (True, False), "alloc.scouts": (0, 4), "alloc.n_min": (2, 1)
}  # fmt: skip
BUDGETS = pairwise({"alloc.rule": tuple(budget.RULES)} | BELIEFS)


@pytest.mark.slow
@pytest.mark.parametrize("changes", BUDGETS)
def test_rules_priors_and_discounts_go_together(changes, plain):
    if budget.must_choose(changes["alloc.rule"]):
        changes = changes | {"alloc.n_min": 0, "alloc.scouts": 0}
    seen = take_steps(make_config(changes | {"alloc.prior_field": "operator"}), plain.parts, plain)
    for learner, _, groups, _ in seen.steps:
        assert groups["counts"].sum() == 16
        assert groups["counts"].min() >= changes["alloc.n_min"]
        assert groups["counts"].max() <= 8
        assert ((groups["belief"] >= 0) & (groups["belief"] <= 1)).all()
        assert (learner.prior is None) == (changes["alloc.prior"] == "shared")
    assert (seen.learner.belief.discount == 0.5) or changes["alloc.fit_discounts"]


GRADIENTS = {
    "loss.surrogate": tuple(learn.SURROGATES), "loss.kl_estimator": tuple(learn.KL_ESTIMATORS), "loss.entropy_coefficient": (0.0, 0.1),
    "loss.importance_cap": (0.0, 2.0), "loss.overlong_tokens": (0, 2), "loss.mask_truncated": (False, True),
}  # fmt: skip
OF_ALL = tuple(average for average in learn.AVERAGES if average != "candidates")
LOSSES = pairwise({"loss.average": OF_ALL} | GRADIENTS)


@pytest.mark.slow
@pytest.mark.parametrize("changes", LOSSES)
def test_surrogates_averages_and_penalties_go_together(changes, plain):
    seen = take_steps(make_config(changes | {"loss.kl_coefficient": 0.1}), plain.parts, plain)
    for _, metrics, *_ in seen.steps:
        assert metrics["grad_norm"] > 0
        assert (metrics["kl"] >= 0) or changes["loss.kl_estimator"] == "k1"
        assert ("importance_mean" in metrics) == (changes["loss.importance_cap"] > 0)


@pytest.mark.slow
def test_rollouts_do_not_depend_on_slots_whatever_limits_them(plain):
    limits = {"sample.top_k": 5, "sample.top_p": 0.8, "sample.min_p": 0.1, "sample.temperature": 0.7, "steps": 1}
    few, many = (take_steps(make_config(limits | {"sample.slots": slots}), plain.parts, plain) for slots in (4, 16))
    np.testing.assert_array_equal(few.tokens, many.tokens)
    assert not same_rollouts(few)


MESHES = [
    ((1, 2), ("data", "model"), (2, 1)), ((2, 2), ("data", "fsdp"), (4, 1)), ((4, 1), ("fsdp", "model"), (2, 2)), ((2,), ("data",), (2,)),
    ((1, 2), ("data", "model"), ()), ((2, 1, 1), ("data", "fsdp", "model"), (1, 1, 2)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "axes", "decode"), MESHES)
def test_meshes_to_train_and_to_decode_change_nothing(shape, axes, decode, plain):
    changes = {"mesh.shape": shape, "mesh.axis_names": axes, "mesh.decode": decode}
    seen = take_steps(make_config(changes), plain.parts, plain)
    assert same_steps(seen)
