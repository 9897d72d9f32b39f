"""From a config to what a run needs, before anything is computed.

`krl.run.data` has the part about tasks and rewards, `krl.run.start` that about the policy. What a config's values are
for is decided here, in these two, and in the parts of a step, `krl.run.spend` and `krl.run.learner`; what these call
takes named arguments.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from krl import budget, learn, policy
from krl.base.sharding import make_mesh, reshape_mesh
from krl.base.types import Tokenizer
from krl.configs import default
from krl.configs.check import FREE_KEYS, Names, flatten
from krl.configs.named import find, name_of
from krl.hf.config import config_json
from krl.hf.tokenizer import load_tokenizer
from krl.policy.model import abstract_params
from krl.rewards.pool import VerifierPool
from krl.rewards.verify import REWARDS
from krl.rollout import Ends, find_ends, slots_in_memory
from krl.run.checkpoint import claim_workdir, open_workdir
from krl.run.data import encode, find_features, load_task_sets, make_verifiers
from krl.run.optimizer import make_optimizer
from krl.run.processes import is_first
from krl.run.sft import Pairs
from krl.run.start import GIVEN, check_given, find_pairs, find_policy, find_tokenizer, sft_cache
from krl.tasks import SOURCES, TEMPLATES, EncodedTasks, step_task_ids

NAMES = Names(
    rules=budget.RULES, may_choose=budget.may_choose, must_choose=budget.must_choose, has_rounds=budget.has_rounds,
    priors=budget.PRIORS, templates=TEMPLATES, sources=SOURCES,
    losses={"average": learn.AVERAGES, "scale": learn.SCALES, "surrogate": learn.SURROGATES,
            "kl_estimator": learn.KL_ESTIMATORS},
)  # fmt: skip

# What a notebook may give instead of a name: the key of the name, krl's own, what it must be, and that in words.
OWN: dict[str, tuple[str, Mapping[str, Any], Callable[[Any], bool], str]] = {
    "rule": ("alloc.rule", budget.RULES, callable, "a function"),
    "prior": ("alloc.prior", budget.PRIORS, lambda given: isinstance(given, budget.Source), "a krl.budget.Source"),
    "reward": ("data.reward", REWARDS, callable, "a function"),
}

_bound = functools.cache(functools.partial)  # the same function for the same r of a rule, so that it is compiled once


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a config becomes before anything is computed."""

    mesh: jax.sharding.Mesh
    verifiers: VerifierPool  # a context, to be entered once
    tokenizer: Tokenizer
    ends: Ends  # what ends a response
    policy_config: policy.PolicyConfig
    params: dict  # shapes, dtypes and shardings of the policy's parameters
    train: EncodedTasks  # the D prompts of the steps
    test: EncodedTasks  # the held-out ones
    features: np.ndarray  # [D, F] int32, what the prior of a training prompt goes by
    num_features: int  # how many different ones there are
    pairs: Pairs | None  # of supervised fine-tuning, None without one
    cache: pathlib.Path  # directory of the policy fine-tuned for this config on these pairs
    optimizer: optax.GradientTransformation  # of the policy
    rule: budget.Rule  # from what is known of prompts to their counts
    prior: budget.Source | None  # None where all prompts share one
    candidates: int  # C, prompts that a step chooses from
    served: int  # M, rows for those that it serves; C where every prompt gets some. Some may have a count of 0
    bounds: dict[str, int]  # what `krl.budget.allocate` is told of counts
    learning: dict[str, Any]  # what `krl.run.update.policy_update` is told of passes and loss
    given: tuple[policy.PolicyConfig, dict] | None  # a policy to begin from that is in no directory


def set_up(config: ConfigDict, workdir: pathlib.Path, own: Mapping[str, Any] = MappingProxyType({})) -> Setup:
    """Load what a run needs, refuse what cannot work, and make the work directory the run's own.

    Args:
        config: of the run, checked.
        workdir: created if missing.
        own: what was given in Python instead of a name in the config, see `krl.train.train`.

    Raises:
        ValueError: data, tokenizer, policy or work directory do not fit the config; the message says the fix.
    """
    mesh = make_mesh(tuple(config.mesh.shape), tuple(config.mesh.axis_names))
    if is_first():
        open_workdir(workdir, flatten(config), FREE_KEYS)
    verifiers, given = make_verifiers(config, own.get("reward")), own.get("policy")
    with contextlib.ExitStack() as refused:  # its processes must not outlive what is refused from here on
        refused.callback(verifiers.close)
        tasks, folder = load_task_sets(config), pathlib.Path(config.sft.dir or workdir / "sft")
        tokenizer = load_tokenizer(find_tokenizer(config, tasks["sft"], folder, workdir))
        policy_config = find_policy(config, tokenizer, workdir, given[0] if given else None)
        ends = find_ends(tokenizer, config.sample.stop, policy_config.vocab_size)
        train = encode(config, tokenizer, tasks["train"])
        test = encode(config, tokenizer, tasks["test"], limit=config.eval.prompts)
        spending = find_budget(config, len(train), own)
        features, num_features = find_features(config, train)
        pairs = find_pairs(config, encode(config, tokenizer, tasks["sft"]), tokenizer) if config.sft.steps else None
        params = abstract_params(policy_config, mesh)
        if given:
            check_given(given[1], abstract_params(dataclasses.replace(policy_config, lora=given[0].lora), mesh))
        decode = reshape_mesh(mesh, tuple(config.mesh.decode))
        abstract_params(policy_config, decode)  # refuses a layout that does not divide them
        claim_workdir(workdir, flatten(config), config_json(policy_config, policy_config.stored_dtype), tokenizer)
        refused.pop_all()
    return Setup(
        mesh=mesh, verifiers=verifiers, tokenizer=tokenizer, ends=ends, policy_config=policy_config, params=params,
        train=train, test=test, features=features, num_features=num_features, pairs=pairs,
        cache=sft_cache(folder, config, policy_config.vocab_size, pairs or ()), optimizer=find_optimizer(config),
        learning=find_learning(config), given=given, **spending,
    )  # fmt: skip


def name_own(config: ConfigDict, own: Mapping[str, Any]) -> tuple[ConfigDict, dict[str, Any]]:
    """The config of a run, which names what was given in Python, and what of that has no name to be found by.

    The config that was given stays as it is.

    Raises:
        ValueError: what was given is of another kind.
    """
    if not isinstance(config, ConfigDict):
        raise ValueError(f"the configuration is a {type(config).__name__}; begin with krl.configs.default.get_config()")
    config, left = copy.deepcopy(ConfigDict(config) if isinstance(config, FrozenConfigDict) else config), {}
    for name, (key, known, fits, words) in OWN.items():
        given = own.get(name)
        if given is None:
            continue
        if not isinstance(given, str) and not fits(given):
            raise ValueError(f"{name}= is a {type(given).__name__}; it takes {words}, or a name")
        said = given if isinstance(given, str) else name_of(given, known)
        config.update_from_flattened_dict({key: said})
        if not isinstance(given, str) and said not in known:
            left[name] = given
    given = own.get("policy")
    if given is not None:
        pair = isinstance(given, tuple) and len(given) == 2
        if not pair or not isinstance(given[0], policy.PolicyConfig) or not isinstance(given[1], Mapping):
            raise ValueError("policy= takes (sizes, parameters), such as (result.policy, result.params)")
        config.policy.path = GIVEN
        left["policy"] = given
    return config, left


def find_budget(config: ConfigDict, num_tasks: int, own: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The parts of a run that its counts follow from, as `Setup` has them.

    Raises:
        ValueError: the data has too few prompts for a step, or these take fewer rollouts than the budget.
    """
    alloc, rule = config.alloc, find_rule(config, own.get("rule"))
    candidates, served = prompts_of_a_step(config, rule, num_tasks)
    explored = max(round(alloc.explored * served), math.ceil(alloc.explored))  # one at least of a share above 0
    found = {
        "rule": rule, "candidates": candidates, "served": served,
        "bounds": {"n_min": alloc.n_min, "n_max": alloc.n_max, "group": alloc.group, "explored": explored},
        "prior": own.get("prior") or find_prior(alloc.prior),
    }  # fmt: skip
    step_task_ids(num_tasks, candidates, 0, seed=config.seed)  # refuses too few prompts
    unit = 1 if alloc.n_min else alloc.group
    most = candidates * (alloc.n_max // unit * unit)
    if alloc.budget > most:
        raise ValueError(
            f"config.alloc.budget={alloc.budget} must be at most {most}: {candidates} prompts take no more, "
            f"with alloc.n_max={alloc.n_max}"
        )
    return found


def find_prior(name: str) -> budget.Source | None:
    """The source of priors of a name; None for "shared", one that all prompts share."""
    found = find(name, {"shared": None} | budget.PRIORS, "config.alloc.prior=")
    if found is not None and not isinstance(found, budget.Source):
        raise ValueError(f"config.alloc.prior={name!r} is a {type(found).__name__}; it must be a krl.budget.Source")
    return found


def find_rule(config: ConfigDict, given: budget.Rule | None = None) -> budget.Rule:
    """The rule that was given, or that the config names."""
    named = given or budget.find_rule(config.alloc.rule)
    return _bound(named, reach=config.alloc.reach) if config.alloc.rule == "reach" else named


def prompts_of_a_step(config: ConfigDict, rule: budget.Rule, num_tasks: int) -> tuple[int, int]:
    """(C, M): the prompts that a step chooses from, and that it can serve; the same where every prompt gets some."""
    if config.alloc.n_min:
        return config.prompts_per_step, config.prompts_per_step
    candidates = min(config.alloc.candidates or num_tasks, num_tasks)
    if budget.has_rounds(rule):
        return candidates, candidates  # which of them are served is not known before the first round
    return candidates, min(config.alloc.budget // config.alloc.group, candidates)


def describe_step(config: ConfigDict, candidates: int, served: int) -> str:
    """How many prompts and rollouts a step has, for the line at the start."""
    rollouts = f"{config.alloc.budget} rollouts a step"
    if config.alloc.n_min:
        return f"{served} prompts and {rollouts}"
    asked = config.prompts_per_step
    unused = asked != default.get_config().prompts_per_step  # a config that was made for alloc.n_min above 0
    return f"up to {served} of {candidates} prompts and {rollouts}" + unused * (
        f" (prompts_per_step={asked} is not used with alloc.n_min=0: alloc.candidates and alloc.group take its place)"
    )


def describe_policy(parts: Setup) -> str:
    """How many parameters there are, for the line at the start."""
    size, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (parts.params, policy.trained(parts.policy_config, parts.params))
    )
    return f"{size:,} parameters" + f", of which {trained:,} in adapters are trained" * (trained < size)


def find_slots(config: ConfigDict, policy_config: policy.PolicyConfig, mesh: jax.sharding.Mesh) -> int | None:
    """S, rollouts that are decoded at a time; None for the sampler's own choice."""
    if config.sample.slots or not config.sample.memory_gb:
        return config.sample.slots or None
    length = config.data.max_prompt_tokens + config.sample.max_new_tokens
    return slots_in_memory(policy_config, length, config.sample.memory_gb, mesh)


def find_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of the policy."""
    optim = config.optim
    return make_optimizer(
        learning_rate=optim.learning_rate, warmup_steps=optim.warmup_steps, decay_steps=optim.decay_steps,
        beta1=optim.beta1, beta2=optim.beta2, weight_decay=optim.weight_decay, grad_clip=optim.grad_clip,
        moment_dtype=optim.moment_dtype,
        wait_for=config.alloc.budget // optim.updates_per_step if config.alloc.rule == "dynamic" else 0,
    )  # fmt: skip


def find_learning(config: ConfigDict) -> dict[str, Any]:
    """What `krl.run.update.policy_update` is told of its passes and its loss."""
    optim = config.optim
    passes = {"num_updates": optim.updates_per_step, "micro_tokens": optim.micro_tokens, "packed": optim.packed}
    loss = {name: config.loss[name] for name in learn.Loss._fields}
    return passes | {"temperature": config.sample.temperature} | loss


def about_run(config: ConfigDict, parts: Setup) -> dict:
    """What a checkpoint says of its run: the config, a digest of its keys that may not change, and the prompts."""
    flat = json.loads(json.dumps(flatten(config)))
    bound = json.dumps({key: flat[key] for key in sorted(flat.keys() - set(FREE_KEYS))})
    digest = hashlib.blake2b(bound.encode(), digest_size=8).hexdigest()
    return {"config": flat, "config_digest": digest, "train": parts.train.identity(), "test": parts.test.identity()}
