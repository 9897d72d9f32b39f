"""The learner: what a run carries from step to step, where it starts from, and how it learns from a step's rollouts."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from krl import budget, learn
from krl.base.types import Rollouts, TrainState
from krl.rewards.functions import as_float32
from krl.run.checkpoint import Checkpoints, digest
from krl.run.optimizer import abstract_state, init_state
from krl.run.processes import place_whole, say
from krl.run.scoring import Verdicts
from krl.run.setup import Setup
from krl.run.start import start_params


class Learner(NamedTuple):
    """What a step changes and a checkpoint keeps."""

    state: TrainState
    belief: budget.Belief  # of the D training prompts
    prior: budget.Prior | None  # None where all prompts share one


def start_or_continue(
    config: ConfigDict, parts: Setup, checkpoints: Checkpoints, about: dict, should_stop: Callable[[], bool]
) -> tuple[int, Learner | None, dict | None]:
    """Read the newest checkpoint, or begin, after fine-tuning.

    Returns:
        (steps done, learner, parameters to stay close to). The learner is None if it should stop before
        fine-tuning was finished; the parameters are None without a penalty, and else about["reference"] tells them.
    """
    place, alloc = functools.partial(place_whole, parts.mesh), config.alloc
    kept = {name: alloc[name] for name in ("discount", "discount_mixed", "fade")}
    belief = place(budget.init_belief(len(parts.train), prompt_tokens=parts.train.mask.sum(axis=1), **kept))
    prior = None if parts.prior is None else place(budget.init_prior(parts.prior, parts.num_features))
    begins = checkpoints.latest_step() is None
    params: dict | None = {}
    if begins or config.loss.kl_coefficient:
        params = start_params(
            config, parts.policy_config, parts.mesh, parts.pairs, parts.cache, parts.given, should_stop=should_stop
        )
    if params is None:
        return 0, None, None
    reference = jax.tree.map(jnp.copy, params) if config.loss.kl_coefficient else None
    if reference is not None:
        about["reference"] = digest(reference)
    if begins:
        return 0, Learner(init_state(parts.policy_config, parts.optimizer, params), belief, prior), reference
    like = saved(Learner(abstract_state(parts.policy_config, parts.optimizer, parts.params), belief, prior))
    found = checkpoints.restore(like)
    assert found is not None  # latest_step has seen it
    first, trees = found
    was = about | trees["about"]
    if was["train"] != about["train"]:
        raise ValueError(
            f"the training prompts are not those of the run: {was['train']} at step {first}, {about['train']} now; "
            "what is believed of each would be of another one; bring its data back or choose another --workdir"
        )
    if was["test"] != about["test"]:
        raise ValueError(
            f"the held-out prompts are not those of the run: {was['test']} at step {first}, {about['test']} now; its "
            "evaluations would be of others; bring its data back or choose another --workdir"
        )
    if was["config_digest"] != about["config_digest"]:
        raise ValueError(
            f"{checkpoints.directory} has checkpoints of a run with another config; choose another "
            "config.checkpoint.dir"
        )
    if was.get("reference") != about.get("reference"):
        raise ValueError(
            "the policy that config.loss.kl_coefficient holds the run to is not the one that it began from: "
            f"{was['reference']} at step {first}, {about['reference']} now; bring back what config.policy.path or "
            "config.sft.dir held, or choose another --workdir"
        )
    say(f"krl: continuing from step {first}")
    state = TrainState(trees["params"], trees["opt_state"])
    return first, Learner(state, trees["belief"], trees.get("prior")), reference


def saved(learner: Learner) -> dict:
    """The trees of a checkpoint, apart so that an evaluation can read the parameters alone."""
    state, belief, prior = learner
    trees = {"params": state.params, "opt_state": state.opt_state, "belief": belief}
    return trees if prior is None else trees | {"prior": prior}


# ---------------------------------------------------------------- a step's rollouts, by the keys of the config


def rewards_to_compare(scale: str, said: Verdicts, *, summed: bool) -> np.ndarray:
    """A step's rewards as float32, [R], from which its advantages are right: see `krl.learn.fit_float32`.

    Raises:
        ValueError: a negative reward where advantages are divided by the mean one.
    """
    if scale != "mean":
        return learn.fit_float32(said.rewards, said.prompt_index, said.faults == 0, summed=summed)
    if (said.rewards[said.faults == 0] < 0).any():
        raise ValueError(
            f"a reward of {said.rewards[said.faults == 0].min():g}: config.loss.scale='mean' divides by the mean "
            "reward of a prompt and needs rewards of at least 0; set it to 'std' or 'none'"
        )
    return as_float32(said.rewards)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def find_advantages(
    loss: FrozenConfigDict, num_prompts: int, longest: int, rewards: jax.Array, rollouts: Rollouts,
    chances: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """The advantages of a step's rollouts, [R] float32, times their weights in the loss.

    Args:
        loss: config.loss.
        num_prompts: M.
        longest: the most tokens of a response.
        rewards, rollouts: R of each; a rollout that is not in the mask teaches nothing.
        chances: [M] float32, those with which the prompts were served, for the average "candidates".
    """
    groups, lengths = (rollouts.prompt_index, rollouts.mask, num_prompts), rollouts.lengths
    if loss.overlong_tokens:
        rewards = rewards - learn.overlong_penalty(lengths, longest, loss.overlong_tokens)
    values = learn.group_advantages(
        rewards, *groups, scale_by_std=loss.scale == "std", scale_by_mean=loss.scale == "mean",
        leave_one_out=loss.leave_one_out, clip=loss.advantage_clip or math.inf,
    )  # fmt: skip
    values = jnp.where(rollouts.finished, values, 0.0) if loss.mask_truncated else values
    return values * learn.token_weights(loss.average, lengths, *groups, longest, chances)
