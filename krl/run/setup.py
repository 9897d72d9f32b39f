"""From a config to what a run needs: tasks, tokenizer, decoder, verifiers and the parameters of its first step.

Beside `krl.run.spend` and `krl.run.learner`, which are parts of a step, the only file below the programs that sees a
config; what it calls takes named arguments.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from krl import budget, learn, policy
from krl.configs import default
from krl.configs.check import FREE_KEYS, flatten, parse_arguments
from krl.configs.named import find, name_of
from krl.policy.hf import check_hf
from krl.policy.hf_config import config_json
from krl.policy.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, train_sentencepiece
from krl.rollout import Ends, find_ends, slots_in_memory
from krl.rollout.stop import describe_ends, missing_end
from krl.run.checkpoint import claim_workdir, digest, open_workdir
from krl.run.lock import wait_for
from krl.run.metrics import progress
from krl.run.processes import is_first, place_whole, say
from krl.run.sft import Pairs, encode_pairs, finetune, pack_pairs
from krl.run.update import make_optimizer
from krl.sharding import make_mesh, reshape_mesh, tree_sharding
from krl.tasks import SOURCES, TEMPLATES, EncodedTasks, TaskSet, encode_tasks, load_named, load_tasks, step_task_ids
from krl.tasks.arithmetic import make_ladder
from krl.tasks.files import has_split
from krl.tasks.maze import make_mazes
from krl.tasks.operators import make_operators
from krl.tasks.pool import VerifierPool

NAMES: dict[str, Any] = {  # what a config may name
    "rules": budget.RULES, "may_choose": budget.may_choose, "must_choose": budget.must_choose, "has_rounds": budget.has_rounds,
    "priors": budget.PRIORS, "templates": TEMPLATES, "sources": SOURCES,
    "averages": learn.AVERAGES, "scales": learn.SCALES, "surrogates": learn.SURROGATES,
    "kl_estimators": learn.KL_ESTIMATORS,
}  # fmt: skip


GIVEN = "(given)"  # config.policy.path of a run whose policy was given in Python


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
    served: int  # M, those that it can serve; C where every prompt gets some
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
    verifiers = make_verifiers(config, own.get("reward"))
    try:  # its processes must not outlive what is refused after they were started
        return _set_up(config, workdir, own, mesh, verifiers)
    except BaseException:
        verifiers.close()
        raise


def _set_up(
    config: ConfigDict, workdir: pathlib.Path, own: Mapping[str, Any], mesh: jax.sharding.Mesh, verifiers: VerifierPool
) -> Setup:  # fmt: skip
    """The part of `set_up` that needs the verifiers to be there."""
    tasks = load_task_sets(config)
    folder = pathlib.Path(config.sft.dir or workdir / "sft")
    tokenizer = load_tokenizer(find_tokenizer(config, tasks["sft"], folder, workdir))
    given = own.get("policy")
    policy_config = find_policy(config, tokenizer, workdir, given[0] if given else None)
    ends = find_ends(tokenizer, config.sample.stop, policy_config.vocab_size)
    train = encode(config, tokenizer, tasks["train"])
    test = encode(config, tokenizer, tasks["test"], limit=config.eval.prompts)
    rule = find_rule(config, own.get("rule"))
    candidates, served = prompts_of_a_step(config, rule, len(train))
    step_task_ids(len(train), candidates, 0, seed=config.seed)  # refuses too few prompts
    most = candidates * (
        config.alloc.n_max if config.alloc.n_min else config.alloc.n_max // config.alloc.group * config.alloc.group
    )
    if config.alloc.budget > most:
        raise ValueError(
            f"config.alloc.budget={config.alloc.budget} must be at most {most}: {candidates} prompts take no more, "
            f"with alloc.n_max={config.alloc.n_max}"
        )
    features, num_features = find_features(config, train)
    pairs = find_pairs(config, encode(config, tokenizer, tasks["sft"]), tokenizer) if config.sft.steps else None
    params = abstract_params(policy_config, mesh)
    abstract_params(
        policy_config, reshape_mesh(mesh, tuple(config.mesh.decode))
    )  # refuses a layout that does not divide them
    claim_workdir(workdir, flatten(config), config_json(policy_config, policy_config.stored_dtype), tokenizer)
    return Setup(
        mesh=mesh, verifiers=verifiers, tokenizer=tokenizer, ends=ends, policy_config=policy_config, params=params,
        train=train, test=test, features=features, num_features=num_features, pairs=pairs,
        cache=sft_cache(folder, config, policy_config.vocab_size, pairs or ()), optimizer=find_optimizer(config),
        rule=rule, prior=find_prior(config, own.get("prior")), candidates=candidates, served=served, given=given,
    )  # fmt: skip


# ---------------------------------------------------------------- tasks and their rewards


def name_own(config: ConfigDict, own: Mapping[str, Any]) -> ConfigDict:
    """The config of a run with what was given in Python, which it names; the one that it was given stays as it is."""
    config = copy.deepcopy(config)
    for key, name in {"alloc.rule": "rule", "alloc.prior": "prior", "data.reward": "reward"}.items():
        if name in own:
            config.update_from_flattened_dict({key: name_of(own[name])})
    if "policy" in own:
        config.policy.path = GIVEN
    return config


def make_verifiers(config: ConfigDict, given: Callable[..., float] | None = None) -> VerifierPool:
    """The reward's worker processes; what they cannot import, a `given` one and a notebook's, is called in this one."""
    limits, name = config.verify, config.data.reward
    here = given is not None or "__main__:" in name
    if here:
        say(
            f"krl: the reward {name} is called in this process, without limits of time and memory; worker processes "
            "with limits call one that a file has and config.data.reward names"
        )
    return VerifierPool(
        given or name, workers=0 if here else limits.workers, item_seconds=limits.item_seconds,
        batch_seconds=limits.batch_seconds, items_per_worker=limits.items_per_worker, memory_gb=limits.memory_gb,
        environment=[name.strip() for name in limits.environment.split(",") if name.strip()],
    )  # fmt: skip


def load_task_sets(config: ConfigDict) -> dict[str, TaskSet]:
    """The tasks for "sft", "train" and "test"."""
    if config.data.source == "arithmetic":
        c = config.arithmetic
        rungs = {name: c[name] for name in ("addition", "subtraction", "multiplication", "two_step") if c[name]}
        ladder = make_ladder(rungs, {"warm": c.num_warm, "train": c.num_train, "test": c.num_test}, seed=config.seed)
        return {"sft": ladder["warm"], "train": ladder["train"], "test": ladder["test"]}
    if config.data.source == "operators":
        o = config.operators
        sizes = {"warm": o.num_warm, "train": o.num_train, "test": o.num_test}
        drawn = make_operators(
            sizes, seed=config.seed, num_operators=o.num_operators, shown_well=o.shown_well, impossible=o.impossible,
            wrong=o.wrong
        )  # fmt: skip
        return {"sft": drawn["warm"], "train": drawn["train"], "test": drawn["test"]}
    if config.data.source == "maze":
        m = config.maze
        sizes = {"warm": m.num_warm, "train": m.num_train, "test": m.num_test}
        mazes = make_mazes(sizes, seed=config.seed, side=m.side)
        return {"sft": mazes["warm"], "train": mazes["train"], "test": mazes["test"]}
    data, sft, source = config.data, config.sft, SOURCES.get(config.data.name)
    further = [name.strip() for name in data.fields.split(",") if name.strip()]

    def read(split: str, path: str, limit: int) -> TaskSet:
        fields = further if split == "train" else ()
        if source:
            return load_named(data.name, split=split, path=path, limit=limit, fields=fields)
        return load_tasks(
            name=data.name, subset=data.subset, split=data[f"{split}_split"], path=path, prompt_field=data.prompt_field,
            answer_field=data.answer_field, completion_field=data.completion_field, limit=limit, fields=fields,
        )  # fmt: skip

    train = read("train", data.path, data.max_train)
    if len(train) < 2:
        raise ValueError("the training data has a single row; a run needs some to train on and some to hold out")
    subset, held_out = (source.subset, "test") if source else (data.subset, data.test_split)
    in_path = held_out != data.train_split and has_split(data.path, subset=subset, split=held_out)
    test_path = data.test_path or (data.path if in_path else "")
    on_hub = not data.path and (not source or "test" in source.splits)
    if test_path or on_hub:
        test = read("test", test_path, 0)
    else:
        kept = len(train) - min(config.eval.prompts or len(train) // 10, len(train) // 2)
        train, test = train.take(range(kept)), train.take(range(kept, len(train)))
    if not sft.path:
        return {"sft": train, "train": train, "test": test}
    pairs = load_tasks(
        name="", subset="", split="train", path=sft.path, prompt_field=sft.prompt_field, answer_field="",
        completion_field=sft.completion_field, limit=0,
    )  # fmt: skip
    return {"sft": pairs, "train": train, "test": test}


def encode(config: ConfigDict, tokenizer: Tokenizer, tasks: TaskSet, *, limit: int = 0) -> EncodedTasks:
    """The tasks whose prompts fit, at most `limit` of them (0 keeps all), in the config's template."""
    return encode_tasks(
        tasks, tokenizer, template=config.data.template, max_prompt_tokens=config.data.max_prompt_tokens, limit=limit,
        arguments=parse_arguments(config.data.template_arguments),
    )  # fmt: skip


def find_features(config: ConfigDict, tasks: EncodedTasks) -> tuple[np.ndarray, int]:
    """What the prior goes by: features [D, F] int32 of the training prompts, and how many different ones.

    A prior of the user's own goes by the labels of alloc.prior_field where that is given, or else by hashed features.
    """
    fields, name = tasks.tasks.fields, config.alloc.prior_field
    if config.alloc.prior == "shared":
        return np.zeros((len(tasks), 0), np.int32), 0
    if config.alloc.prior in ("features", "gaussian_process") or not name:
        width = config.alloc.prior_width
        return budget.hash_features(tasks.tokens, tasks.mask, fields, width=width), width
    if name not in fields:
        raise ValueError(
            f"config.alloc.prior_field={name!r} is none of the training data's fields {sorted(fields)}; "
            "name it in config.data.fields too"
        )
    return budget.number_groups(fields[name])


# ---------------------------------------------------------------- tokenizer and decoder


def find_tokenizer(config: ConfigDict, tasks: TaskSet, folder: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """The tokenizer of a run that has begun, or the config's, the policy's, or one trained on the texts."""
    if (workdir / "config.json").exists():
        return workdir / "policy"
    if config.policy.path == GIVEN and not config.tokenizer.path:
        raise ValueError("a policy that is given to train needs config.tokenizer.path, the directory of its tokenizer")
    if config.policy.path not in ("", GIVEN):
        try:
            policy.read_config(config.policy.path)
        except ValueError as error:
            raise ValueError(f"config.policy.path={config.policy.path!r}: {error}") from None
    if config.tokenizer.path or config.policy.path:
        return pathlib.Path(config.tokenizer.path or config.policy.path)
    frame = config.data.template if "{prompt}" in config.data.template else "{prompt}"
    prompts = [frame.replace("{prompt}", prompt) for prompt in tasks.prompts]
    texts = [p + c for p, c in zip(prompts, tasks.completions or tasks.prompts, strict=True)]
    size, fallback = config.tokenizer.vocab_size, config.tokenizer.byte_fallback
    file = folder / _digest(json.dumps([size, fallback, texts]).encode()) / "tokenizer.model"
    if not file.exists():
        _make_cache(file.parent)
        train_sentencepiece(texts, file, vocab_size=size, byte_fallback=fallback)
    return file


def find_policy(
    config: ConfigDict, tokenizer: Tokenizer, workdir: pathlib.Path, given: policy.PolicyConfig | None = None
) -> policy.PolicyConfig:
    """The decoder of a run: the one that was given, its checkpoint's, or one of the config's sizes."""
    if config.policy.path:
        if (workdir / "config.json").exists():
            found = policy.read_config(workdir / "policy", **computed_by(config))
        elif given:
            found = dataclasses.replace(given, **computed_by(config))
        else:
            found, _ = check_hf(config.policy.path, **computed_by(config))
        check_vocabulary(tokenizer, found.vocab_size)
        row = config.data.max_prompt_tokens + config.sample.max_new_tokens
        longest = json.loads(found.source or "{}").get("max_position_embeddings") or row
        if row > longest:
            say(f"krl: rows of {row} tokens are longer than the {longest} that the checkpoint was made for")
        return found
    return sized_policy(config, tokenizer.vocab_size)


def sized_policy(config: ConfigDict, vocab_size: int) -> policy.PolicyConfig:
    """The decoder of the config's own sizes."""
    sizes = {name: value for name, value in config.policy.items() if name != "path"}
    try:
        return policy.PolicyConfig(vocab_size=vocab_size, **sizes)
    except ValueError as error:
        raise ValueError(f"config.policy: {error}") from None


def say_ends(config: ConfigDict, ends: Ends, prompts: EncodedTasks) -> None:
    """Tell what ends a response, and warn where the chat template's end of a turn does not."""
    say(f"krl: {describe_ends(ends)}")
    warning = missing_end(ends, prompts.tokens[prompts.mask], chat=config.data.template.startswith("chat"))
    if warning:
        say(f"krl: {warning}")


def find_rule(config: ConfigDict, given: budget.Rule | None = None) -> budget.Rule:
    """The rule that was given, or that the config names."""
    named = given or budget.find_rule(config.alloc.rule)
    return _with_reach(named, config.alloc.reach) if config.alloc.rule == "reach" else named


@functools.cache
def _with_reach(rule: budget.Rule, reach: float) -> budget.Rule:
    """The rule "reach" with an r; the same function for the same r, so that it is compiled once."""
    return functools.partial(rule, reach=reach)


def find_prior(config: ConfigDict, given: budget.Source | None = None) -> budget.Source | None:
    """The source of priors that was given, or that the config names; None for one that all prompts share."""
    return given or find(config.alloc.prior, {"shared": None} | budget.PRIORS, "config.alloc.prior=")


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


def find_slots(config: ConfigDict, policy_config: policy.PolicyConfig, mesh: jax.sharding.Mesh) -> int | None:
    """S, rollouts that are decoded at a time; None for the sampler's own choice."""
    if config.sample.slots or not config.sample.memory_gb:
        return config.sample.slots or None
    length = config.data.max_prompt_tokens + config.sample.max_new_tokens
    return slots_in_memory(policy_config, length, config.sample.memory_gb, mesh)


def computed_by(config: ConfigDict) -> dict[str, Any]:
    """The options of a decoder that are about its computation and not its checkpoint."""
    return {name: config.policy[name] for name in ("dtype", "unroll", "remat", "attention")}


def abstract_params(policy_config: policy.PolicyConfig, mesh: jax.sharding.Mesh) -> dict:
    """The shapes, dtypes and shardings of a policy's parameters, for a checkpoint to be read into."""
    shapes = jax.eval_shape(lambda: policy.init(policy_config, jax.random.key(0)))
    shardings = tree_sharding(mesh, policy.param_axes(policy_config), shapes)
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)


# ---------------------------------------------------------------- supervised fine-tuning


def sft_cache(folder: pathlib.Path, config: ConfigDict, vocab_size: int, pairs: Sequence[np.ndarray]) -> pathlib.Path:
    """The directory of the fine-tuned policy that belongs to this config and to what these files held, and to no other.

    Args:
        folder: that it lies in.
        config: of the run.
        vocab_size: V of the policy.
        pairs: from `find_pairs`; they say all that fine-tuning sees of data, template and tokenizer.
    """
    flat = flatten(config)
    chosen = {k: flat[k] for k in sorted(flat) if k.startswith(("seed", "policy.", "sft.")) and k not in FREE_KEYS}
    told = [f"{part.dtype} {part.shape}" for part in pairs]
    return folder / _digest(json.dumps([chosen, vocab_size, told]).encode(), *map(np.ascontiguousarray, pairs))


def fingerprint(path: pathlib.Path) -> str:
    """A digest of all that is in a checkpoint's config.json and safetensors."""

    def of_file(file: pathlib.Path) -> bytes:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "blake2b").digest()

    files = sorted([path / "config.json", *path.glob("*.safetensors")])
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to other threads
        return _digest(*(file.name.encode() for file in files), *pool.map(of_file, files))


def _digest(*parts: Any) -> str:
    """Of bytes and arrays, one after the other."""
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _make_cache(directory: pathlib.Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {directory}: {error}; choose another config.sft.dir") from None


def find_pairs(config: ConfigDict, encoded: EncodedTasks, tokenizer: Tokenizer) -> Pairs:
    """The rows of supervised fine-tuning."""
    if not config.sft.row_tokens:
        return encode_pairs(encoded, tokenizer, config.sample.max_new_tokens)
    pairs, left_out = pack_pairs(encoded, tokenizer, config.sft.row_tokens)
    say(f"krl: {len(encoded) - left_out} pairs for fine-tuning in {len(pairs[0])} rows, {left_out} too long")
    return pairs


def start_params(
    config: ConfigDict,
    policy_config: policy.PolicyConfig,
    mesh: jax.sharding.Mesh,
    pairs: Pairs | None,
    cache: pathlib.Path,
    given: tuple[policy.PolicyConfig, dict] | None,
    *,
    should_stop: Callable[[], bool],
) -> dict | None:
    """The parameters of the first step, fine-tuned if there are pairs; to be called inside `jax.set_mesh(mesh)`.

    Args:
        config: of the run.
        policy_config, mesh, pairs, cache, given: as in `Setup`. Of runs that share the cache one fine-tunes, and others wait.
        should_stop: whether fine-tuning should save and leave, asked before each update.

    Returns:
        The parameters on the mesh; None if it should stop before they were finished.

    Raises:
        ValueError: the checkpoint in policy.path is another than the run began from.
        FloatingPointError: too many updates of fine-tuning in a row were not finite.
    """
    if config.policy.path == GIVEN:
        params = copy_params(given, policy_config, mesh)
    elif config.policy.path:
        found, params = policy.load_hf(config.policy.path, mesh)
        if dataclasses.replace(found, **computed_by(config)) != policy_config:
            raise ValueError(f"{config.policy.path} is not what this run began from; choose another --workdir")
    else:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(policy_config, mesh))
        initialise = jax.jit(policy.init, static_argnums=0, out_shardings=shardings)
        params = initialise(policy_config, jax.random.key(config.seed))
    if pairs is None:
        return params
    if config.policy.path:
        began = digest(params) if given else fingerprint(pathlib.Path(config.policy.path))
        cache = cache.with_name(f"{cache.name}_{began}")
    if is_first():
        _make_cache(cache)
    lock = wait_for(cache.with_name(f"{cache.name}.running"), f"the fine-tuning in {cache}", should_stop)
    with lock as ours, progress(config.sft.steps, 0, "fine-tuning") as show:
        if not ours:
            return None
        params, finished = finetune(
            policy_config, params, pairs, cache, steps=config.sft.steps, batch_size=config.sft.batch_size,
            micro_tokens=config.optim.micro_tokens, learning_rate=config.sft.learning_rate, warmup_steps=20,
            decay_steps=0, seed=config.seed,
            save_every=config.sft.save_every, max_bad_updates=config.max_bad_updates, should_stop=should_stop,
            place=functools.partial(place_whole, mesh),
            report=lambda step, loss: show(step, f"loss {loss:.3f}"),
        )  # fmt: skip
    return params if finished else None


def copy_params(
    given: tuple[policy.PolicyConfig, dict] | None, policy_config: policy.PolicyConfig, mesh: jax.sharding.Mesh
) -> dict:
    """A copy, on the mesh, of the parameters of a policy that was given: a step gives its buffers away.

    Raises:
        ValueError: there is none, or it is not the policy that the run began from.
    """
    if given is None:
        raise ValueError("this run began from a policy that was given in Python; give it to train again, policy=")
    like = abstract_params(policy_config, mesh)
    if jax.tree.map(jnp.shape, given[1]) != jax.tree.map(jnp.shape, like):
        raise ValueError("policy=: the parameters are not those of the PolicyConfig that was given with them")
    return jax.tree.map(
        lambda leaf, at: jax.device_put(jnp.array(leaf, at.dtype, copy=True), at.sharding), given[1], like
    )


def find_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of the policy."""
    optim = config.optim
    return make_optimizer(
        learning_rate=optim.learning_rate, warmup_steps=optim.warmup_steps, decay_steps=optim.decay_steps,
        beta1=optim.beta1, beta2=optim.beta2, weight_decay=optim.weight_decay, grad_clip=optim.grad_clip,
        wait_for=config.alloc.budget // optim.updates_per_step if config.alloc.rule == "dynamic" else 0,
    )  # fmt: skip


def about_run(config: ConfigDict, parts: Setup) -> dict:
    """What a checkpoint says of its run: the config, a digest of its keys that may not change, and the prompts."""
    flat = json.loads(json.dumps(flatten(config)))
    bound = json.dumps({key: flat[key] for key in sorted(flat.keys() - set(FREE_KEYS))})
    digest = hashlib.blake2b(bound.encode(), digest_size=8).hexdigest()
    return {"config": flat, "config_digest": digest, "train": parts.train.identity(), "test": parts.test.identity()}
