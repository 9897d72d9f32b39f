"""Measure a policy: a run's newest checkpoint, or a Hugging Face checkpoint, on benchmarks.

    python eval.py --config configs/arithmetic.py --workdir runs/arithmetic [--config.eval.samples=32 ...]
    python eval.py --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --workdir runs/base \\
        --config.eval.sets=aime,amc,math500 [--config.eval.dir=FILES]

Measures the run in the work directory, at its newest checkpoint or with eval.best at its best one. Its keys must be the
config's but for those of the eval and verify sections; a work directory without a run measures config.policy.path.
Without eval.sets it takes the run's held-out tasks. Samples go to eval/{policy}/{set}.jsonl in the work directory, from
where the same command continues if it was stopped, and the table to results.json. In a notebook,
`measure(config, workdir)` does the same.
"""

import functools
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console

from krl import budget, hf, policy, rollout
from krl.base.digest import digest
from krl.base.sharding import make_mesh, reshape_mesh
from krl.base.types import Tokenizer
from krl.configs.check import FREE_KEYS, check, flatten
from krl.configs.named import IN_PYTHON
from krl.eval.estimates import table
from krl.eval.resume import evaluate_set
from krl.eval.sample import first_reward
from krl.hf.tokenizer import load_tokenizer
from krl.policy.model import abstract_params
from krl.rewards.functions import parse_rewards
from krl.rewards.pool import VerifierPool
from krl.rewards.verify import answer_key
from krl.run.checkpoint import Checkpoints, check_workdir, make_workdir, write_json
from krl.run.command import run_program
from krl.run.data import encode, load_task_sets, make_verifiers
from krl.run.learner import merged, read_frozen, with_adapters
from krl.run.log import progress
from krl.run.processes import first_before_others, is_first, place_whole, say
from krl.run.scoring import FaultWatch
from krl.run.setup import NAMES, find_slots, name_own
from krl.run.start import find_policy, fingerprint, say_ends
from krl.tasks import SOURCES, EncodedTasks, TaskSet, load_named
from krl.tasks.files import named_file

# The form in which two answers vote together, by the reward that compares them.
VOTES: dict[str, Callable[[str], str | None]] = {
    "exact": str.strip,
    "math_or_number": functools.partial(answer_key, last_number=True),
}


def measure(
    config: ConfigDict, workdir: str | pathlib.Path, *, reward: Callable[..., float] | None = None
) -> dict[str, dict[str, Any]]:
    """Measure the policy of a work directory, or of policy.path, and print the table.

    Args:
        config: every key of configs/default.py.
        workdir: of a run; without a run in it, where the samples go.
        reward: as `krl.train` takes it, instead of config.data.reward.

    Returns:
        The statistics by name of the set, see `krl.eval.estimates.summarize`; of several processes the first has them.

    Raises:
        ValueError: a config, data or samples of an earlier call that do not fit; the message says the fix.
    """
    # ---------------------------------------------------------------- what to measure
    workdir = pathlib.Path(workdir)
    config, own = name_own(config, {"reward": reward})
    check(config, NAMES, own | unused(config))
    has_run = (workdir / "config.json").exists()
    with first_before_others("load"):  # which may fill a cache
        if is_first():
            open_place(workdir, config, has_run=has_run)
        sets = load_sets(config)
    mesh = make_mesh(tuple(config.mesh.shape), tuple(config.mesh.axis_names))
    mesh = reshape_mesh(mesh, tuple(config.mesh.decode))  # there is no update
    with make_verifiers(config, own.get("reward")) as verifiers:
        return measure_sets(config, workdir if has_run else None, workdir, sets, mesh, verifiers)


def unused(config: ConfigDict) -> dict[str, Any]:
    """Something for what a run was given in Python and no measurement needs, its rule and its prior."""
    named = {"rule": (config.alloc.rule, budget.RULES["reach"]), "prior": (config.alloc.prior, budget.PRIORS["groups"])}
    return {name: any_one for name, (said, any_one) in named.items() if said.endswith(IN_PYTHON)}


def measure_sets(
    config: ConfigDict, run: pathlib.Path | None, workdir: pathlib.Path, sets: dict[str, TaskSet],
    mesh: jax.sharding.Mesh, verifiers: VerifierPool,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The part of `measure` that needs verifiers.

    Args:
        config: as for `measure`.
        run: the work directory of the run to measure; None for policy.path.
        workdir: where samples and results go.
        sets: the tasks of each set.
        mesh: to sample on.
        verifiers: started.

    Returns, Raises:
        As `measure`.
    """
    tokenizer = load_tokenizer(run / "policy" if run else config.tokenizer.path or config.policy.path)
    encoded = {name: encode_set(config, tokenizer, name, tasks) for name, tasks in sets.items()}
    policy_config = find_policy(config, tokenizer, workdir)
    ends = rollout.find_ends(tokenizer, config.sample.stop, policy_config.vocab_size)
    identity, params = load_params(config, policy_config, run, mesh)

    # ---------------------------------------------------------------- measure it
    say(f"krl: measuring {identity}, {config.eval.samples} samples of each task")
    say_ends(config, ends, next(iter(encoded.values())))
    drawn = {
        "temperature": config.eval.temperature, "top_p": config.eval.top_p,
        "max_new_tokens": config.sample.max_new_tokens,
    }  # fmt: skip
    generate = functools.partial(
        rollout.generate, policy_config, eos_ids=ends.eos_ids, stop_table=ends.table, pad_id=tokenizer.pad_id,
        num_slots=find_slots(config, policy_config, mesh), **drawn,
    )  # fmt: skip
    settings = {
        "policy": identity, **drawn, "template": config.data.template, "reward": config.data.reward,
        "seed": config.seed, "stop": list(config.sample.stop),
    }  # fmt: skip
    results, hear = {}, FaultWatch(verifiers, config.verify.may_fail)
    main_reward = next(iter(parse_rewards(config.data.reward)))  # of several
    with jax.set_mesh(mesh):
        for name, tasks in encoded.items():
            key = jax.random.key(config.seed + 1)  # as train.py measures held-out tasks
            if name != "held_out":
                key = jax.random.fold_in(key, zlib.crc32(name.encode()))  # tasks of two sets share no numbers
            with progress(len(tasks), 0, name) as report:
                results[name] = evaluate_set(
                    name, generate, first_reward(verifiers), params, tasks, key,
                    tokenizer=ends, answer_key=VOTES.get(main_reward, answer_key), samples=config.eval.samples,
                    num_rollouts=config.alloc.budget, place=functools.partial(place_whole, mesh),
                    path=workdir / "eval" / identity.replace(" ", "_") / f"{name}.jsonl", settings=settings,
                    report=report, hear=hear,
                )  # fmt: skip
            if tasks.dropped:
                say(f"krl: {name}: {tasks.dropped} prompts longer than {config.data.max_prompt_tokens} tokens left out")
    with first_before_others("results"):  # which all wait for
        if is_first():
            write_json(workdir / "results.json", {"settings": settings, "sets": results})
            Console().print(table(results))
    return results


def open_place(workdir: pathlib.Path, config: ConfigDict, *, has_run: bool) -> None:
    """Refuse a work directory whose run has another config but for eval's keys; make one for policy.path."""
    if has_run:
        flat = flatten(config)
        check_workdir(workdir, flat, [*FREE_KEYS, *(key for key in flat if key.startswith("eval."))])
    elif config.policy.path:
        make_workdir(workdir)
    else:
        raise ValueError(
            f"{workdir} holds no run; give the --workdir of one, or a checkpoint with --config.policy.path=DIR"
        )


def load_sets(config: ConfigDict) -> dict[str, TaskSet]:
    """The tasks of each benchmark, or the held-out ones of the run."""
    names = [name.strip() for name in config.eval.sets.split(",") if name.strip()]
    if not names:
        return {"held_out": load_task_sets(config)["test"]}
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise ValueError(f"config.eval.sets names {unknown[0]!r}; the sets are {', '.join(SOURCES)}")
    folder = pathlib.Path(config.eval.dir) if config.eval.dir else None
    return {name: load_named(name, split="test", path=named_file(folder, name) if folder else "") for name in names}


def encode_set(config: ConfigDict, tokenizer: Tokenizer, name: str, tasks: TaskSet) -> EncodedTasks:
    """The tasks of a benchmark whose prompts fit; what is wrong with them is told with its name."""
    try:
        return encode(config, tokenizer, tasks, limit=config.eval.prompts)
    except ValueError as error:
        error.args = (f"{name}: {error}",)  # and it still says where it was raised
        raise


def load_params(
    config: ConfigDict, policy_config: policy.PolicyConfig, workdir: pathlib.Path | None, mesh: jax.sharding.Mesh
) -> tuple[str, dict[str, Any]]:
    """Words that identify the policy, and its parameters on the mesh; without a work directory, policy.path."""
    if workdir is None:
        path = pathlib.Path(config.policy.path)
        sizes, params = hf.load_hf(path, mesh)
        identity = f"checkpoint {fingerprint(path)}"
        if not config.policy.adapter:
            return identity, params
        params = merged(*with_adapters(config.policy.adapter, sizes, params, mesh))
        return f"{identity} with adapters {digest(params)}", params
    name, keep = ("best", 1) if config.eval.best else ("checkpoints", config.checkpoint.keep)
    directory, like = epath.Path(config.checkpoint.dir or workdir) / name, abstract_params(policy_config, mesh)
    with Checkpoints(directory, keep=keep) as checkpoints:
        restored = checkpoints.restore({"params": policy.trained(policy_config, like)}, move_aside=False)
    if restored is None:
        key, steps = ("eval", config.eval.every) if config.eval.best else ("checkpoint", config.checkpoint.every)
        raise ValueError(f"{directory} holds no checkpoint; train.py writes one every config.{key}.every={steps} steps")
    step, trees = restored
    undone = trees["about"].get("rollbacks", 0)  # steps that were taken again have the same numbers
    params = trees["params"]
    if policy_config.lora:
        place = directory.with_name("frozen")
        found = read_frozen(policy.frozen(policy_config, like), place) if place.exists() else None
        if found is None or found[1]["reference"] != trees["about"].get("reference"):
            raise ValueError(f"{place} does not hold what the adapters of this run stand on; bring it back")
        params = policy.join(found[0], params)
    return f"step {step}" + (f" after {undone} rollbacks" if undone else ""), params


def run_command() -> None:
    """The commands `krl-eval` and `python eval.py`."""
    run_program(measure, __doc__)
