"""The learner: what a run carries from step to step, where it starts from, and how it learns from a step's rollouts."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

from krl import budget, hf, learn, policy
from krl.base.digest import digest
from krl.base.types import Rollouts, TrainState
from krl.policy.model import abstract_params
from krl.rewards.functions import as_float32
from krl.run.checkpoint import Checkpoints
from krl.run.lock import wait_for
from krl.run.log import progress
from krl.run.optimizer import abstract_state, init_state, make_optimizer
from krl.run.processes import any_process, is_first, place_whole, say, to_host
from krl.run.scoring import Verdicts
from krl.run.setup import Setup
from krl.run.sft import finetune
from krl.run.start import GIVEN, check_adapter, computed_by, fingerprint, make_cache

# What a checkpoint says of its run that must not have changed where the run continues -> the message where it has.
SAME = {
    "train": (
        "the training prompts are not those of the run: {was} at step {step}, {now} now; what is believed of each "
        "would be of another one; bring its data back or choose another --workdir"
    ),
    "test": (
        "the held-out prompts are not those of the run: {was} at step {step}, {now} now; its evaluations would be of "
        "others; bring its data back or choose another --workdir"
    ),
    "config_digest": ("{directory} has checkpoints of a run with another config; choose another config.checkpoint.dir"),
    "reference": (
        "the policy that config.loss.kl_coefficient or adapters hold the run to is not the one that it began from: "
        "{was} at step {step}, {now} now; bring back what config.policy.path, config.sft.dir or frozen/ held, or "
        "choose another --workdir"
    ),
}


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
        (steps done, learner, reference). The learner is None if it should stop before fine-tuning was finished. The
        reference are the parameters that adapters stand on, or else those that a penalty holds the policy close to, and
        None without either; its digest is put into about["reference"].
    """
    place, alloc = functools.partial(place_whole, parts.mesh), config.alloc
    kept = {name: alloc[name] for name in ("discount", "discount_mixed", "fade")}
    belief = place(budget.init_belief(len(parts.train), prompt_tokens=parts.train.mask.sum(axis=1), **kept))
    prior = None if parts.prior is None else place(budget.init_prior(parts.prior, parts.num_features))
    begins = checkpoints.latest_step() is None
    reference: dict | None = None
    penalty, adapted = config.loss.kl_coefficient, parts.policy_config.lora
    if begins or penalty or adapted:
        find = functools.partial(start_params, config, parts, should_stop)
        reference = find_frozen(parts, checkpoints.directory.with_name("frozen"), about, find) if adapted else find()
        if reference is None:
            return 0, None, None
        if penalty or adapted:
            about["reference"] = digest(reference)
    if begins:
        assert reference is not None
        if adapted:
            params = begin_adapters(config, parts)
        else:
            params = jax.tree.map(jnp.copy, reference) if penalty else reference  # a step gives its buffers away
        learner = Learner(init_state(parts.policy_config, parts.optimizer, params), belief, prior)
        return 0, learner, reference if penalty or adapted else None
    changed = policy.trained(parts.policy_config, parts.params)
    like = saved(Learner(abstract_state(parts.policy_config, parts.optimizer, changed), belief, prior))
    found = checkpoints.restore(like)
    assert found is not None  # latest_step has seen it
    first, trees = found
    was = about | trees["about"]
    for name, told in SAME.items():
        if was.get(name) != about.get(name):
            raise ValueError(
                told.format(was=was.get(name), now=about.get(name), step=first, directory=checkpoints.directory)
            )
    say(f"krl: continuing from step {first}")
    state = TrainState(trees["params"], trees["opt_state"])
    return first, Learner(state, trees["belief"], trees.get("prior")), reference


def saved(learner: Learner) -> dict:
    """The trees of a checkpoint, apart so that an evaluation can read the parameters alone."""
    state, belief, prior = learner
    trees = {"params": state.params, "opt_state": state.opt_state, "belief": belief}
    return trees if prior is None else trees | {"prior": prior}


def whole_policy(parts: Setup, learner: Learner, reference: dict | None) -> dict:
    """The parameters of the policy: what a run changes, and what its adapters stand on."""
    return policy.join(reference or {}, learner.state.params) if parts.policy_config.lora else learner.state.params


def find_frozen(parts: Setup, directory: epath.Path, about: dict, begin: Callable[[], dict | None]) -> dict | None:
    """What the adapters of a run stand on: kept in a directory of its own, so that checkpoints need not hold it.

    Args:
        parts: of the run.
        directory: whose only checkpoint it is; written if there is none.
        about: the run, of which config_digest is kept beside it.
        begin: makes the float32 parameters of the first step; None if it should stop before.

    Raises:
        ValueError: the directory is another run's, or does not hold what was written.
    """
    like = policy.frozen(parts.policy_config, parts.params)
    # All processes decide alike, though the first to come makes the directory.
    if any_process(directory.exists()) and (found := read_frozen(like, directory)):
        params, was = found
        if was.get("config_digest") != about["config_digest"]:
            raise ValueError(SAME["config_digest"].format(directory=directory))
        return params
    if (begun := begin()) is None:
        return None
    narrow = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), begun, like)
    with Checkpoints(directory, keep=1) as kept:
        kept.save(0, {"params": narrow}, {"config_digest": about["config_digest"], "reference": digest(narrow)})
    return narrow


def read_frozen(like: dict, directory: epath.Path) -> tuple[dict, dict] | None:
    """What `find_frozen` has written in a directory, placed as `like`, and about it; None if there is nothing.

    Raises:
        ValueError: it cannot be read, or is not what was written.
    """
    with Checkpoints(directory, keep=1) as kept:
        found = kept.restore({"params": like}, move_aside=False)
    if found is None:
        return None
    params, about = found[1]["params"], found[1]["about"]
    if digest(params) != about.get("reference"):
        raise ValueError(f"{directory} does not hold what was written there; remove it, and the run writes it again")
    return params, about


def begin_adapters(config: ConfigDict, parts: Setup) -> dict:
    """The adapters of the first step: those in config.policy.adapter, or fresh ones."""
    sizes = parts.policy_config
    if config.policy.adapter:
        check_adapter(config, sizes)  # it may be another than when the run was set up
        return hf.load_adapters(config.policy.adapter, sizes, parts.mesh)[1]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, policy.trained(sizes, parts.params))
    fresh = jax.jit(lambda key: policy.trained(sizes, policy.init(sizes, key)), out_shardings=shardings)
    return fresh(jax.random.key(config.seed))


def start_params(config: ConfigDict, parts: Setup, should_stop: Callable[[], bool]) -> dict | None:
    """The float32 parameters that a run begins with, fine-tuned if there are pairs, without the adapters it trains.

    Args:
        config, parts: of the run, inside `jax.set_mesh(parts.mesh)`. Of runs that share `parts.cache` one fine-tunes,
            and others wait.
        should_stop: whether fine-tuning should save and leave, asked before each update.

    Returns:
        The parameters on the mesh; None if it should stop before they were finished.

    Raises:
        ValueError: the checkpoint in policy.path is another than the run began from.
        FloatingPointError: too many updates of fine-tuning in a row were not finite.
    """
    path, adapter, cache = config.policy.path, config.policy.adapter, parts.cache
    sizes = dataclasses.replace(parts.policy_config, lora=None)
    like = abstract_params(sizes, parts.mesh)
    if path == GIVEN:
        params = copy_params(parts.given, parts.mesh)
    elif path:
        found, params = hf.load_hf(path, parts.mesh)
        if dataclasses.replace(found, **computed_by(config)) != parts.policy_config:
            raise ValueError(f"{path} is not what this run began from; choose another --workdir")
    else:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        initialise = jax.jit(policy.init, static_argnums=0, out_shardings=shardings)
        params = initialise(sizes, jax.random.key(config.seed))
    if adapter and not parts.policy_config.lora:
        params = merged(*with_adapters(adapter, sizes, params, parts.mesh))
    if parts.pairs is None:
        return params
    if path:
        began = digest(params) if path == GIVEN or adapter else fingerprint(pathlib.Path(path))
        cache = cache.with_name(f"{cache.name}_{began}")
    if is_first():
        make_cache(cache)
    optimizer = make_optimizer(
        learning_rate=config.sft.learning_rate, warmup_steps=min(20, config.sft.steps // 2), decay_steps=0, beta1=0.9,
        beta2=0.98, weight_decay=0.01, grad_clip=1.0,
    )  # fmt: skip
    lock = wait_for(cache.with_name(f"{cache.name}.running"), f"the fine-tuning in {cache}", should_stop)
    with lock as ours, progress(config.sft.steps, 0, "fine-tuning") as show:
        if not ours:
            return None
        params, finished = finetune(
            sizes, optimizer, params, parts.pairs, cache, steps=config.sft.steps,
            batch_size=config.sft.batch_size, micro_tokens=config.optim.micro_tokens, seed=config.seed,
            save_every=config.sft.save_every, max_bad_updates=config.max_bad_updates, should_stop=should_stop,
            place=functools.partial(place_whole, parts.mesh), report=lambda step, loss: show(step, f"loss {loss:.3f}"),
        )  # fmt: skip
    return params if finished else None


merged = jax.jit(policy.merge, static_argnums=0)


def with_adapters(
    path: str, sizes: policy.PolicyConfig, params: dict, mesh: jax.sharding.Mesh
) -> tuple[policy.PolicyConfig, dict]:
    """A policy and the adapters in a directory beside it."""
    lora, adapters = hf.load_adapters(path, sizes, mesh)
    return dataclasses.replace(sizes, lora=lora), policy.join(params, adapters)


def copy_params(given: tuple[policy.PolicyConfig, dict] | None, mesh: jax.sharding.Mesh) -> dict:
    """A copy of the parameters of a policy that was given, its adapters merged, on the mesh: a step gives buffers away.

    Raises:
        ValueError: there is none.
    """
    if given is None:
        raise ValueError("this run began from a policy that was given in Python; give it to train again, policy=")

    def copied(leaf: Any, at: jax.ShapeDtypeStruct) -> jax.Array:
        elsewhere = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable  # split over processes
        whole = np.asarray(to_host(leaf) if elsewhere else leaf)  # whatever mesh it is on
        return jnp.copy(jax.device_put(whole.astype(at.dtype), at.sharding))

    sizes, params = given
    params = jax.tree.map(copied, params, abstract_params(sizes, mesh))
    return merged(sizes, params) if sizes.lora else params


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def find_advantages(
    loss: FrozenConfigDict, num_prompts: int, rewards: jax.Array, rollouts: Rollouts,
    chances: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """The advantages of a step's rollouts, [R] float32, times their weights in the loss.

    Args:
        loss: config.loss.
        num_prompts: M.
        rewards, rollouts: R of each; a rollout that is not in the mask teaches nothing.
        chances: [M] float32, those with which the prompts were served, for the average "candidates".
    """
    groups = rollouts.prompt_index, rollouts.mask, num_prompts
    lengths, longest = rollouts.lengths, rollouts.tokens.shape[1]
    if loss.overlong_tokens:
        rewards = rewards - learn.overlong_penalty(lengths, longest, loss.overlong_tokens)
    values = learn.group_advantages(
        rewards, *groups, scale_by_std=loss.scale == "std", scale_by_mean=loss.scale == "mean",
        leave_one_out=loss.leave_one_out, clip=loss.advantage_clip or math.inf,
    )  # fmt: skip
    values = jnp.where(rollouts.finished, values, 0.0) if loss.mask_truncated else values
    return values * learn.token_weights(loss.average, lengths, *groups, longest, chances)
