"""From a config to its tasks, the rewards of responses to them, and what priors go by."""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from krl import budget
from krl.base.types import Tokenizer
from krl.configs.check import parse_arguments
from krl.configs.named import IN_PYTHON
from krl.rewards.pool import VerifierPool
from krl.run.processes import say
from krl.tasks import SOURCES, EncodedTasks, TaskSet, encode_tasks, load_named, load_tasks
from krl.tasks.arithmetic import make_ladder
from krl.tasks.embedded import SPLITS
from krl.tasks.files import has_split
from krl.tasks.maze import make_mazes
from krl.tasks.operators import make_operators
from krl.tasks.reasoning_gym import draw_tasks


def _make_ladder(sizes: dict[str, int], *, seed: int, **rungs: int) -> dict[str, TaskSet]:
    """The arithmetic ladder without the rungs of no digits."""
    return make_ladder({name: digits for name, digits in rungs.items() if digits}, sizes, seed=seed)


# The embedded tasks: (sizes of the splits, seed, the other keys of the config's section of that name) -> splits.
EMBEDDED: dict[str, Callable[..., dict[str, TaskSet]]] = {
    "arithmetic": _make_ladder, "operators": make_operators, "maze": make_mazes, "reasoning_gym": draw_tasks,
}  # fmt: skip


def make_verifiers(config: ConfigDict, given: Callable[..., float] | None = None) -> VerifierPool:
    """The reward's worker processes; what they cannot import, a `given` one and a notebook's, is called in this one."""
    limits, name = config.verify, config.data.reward
    here = given is not None or "__main__:" in name or name.endswith(IN_PYTHON)
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
    if config.data.source in EMBEDDED:
        options = dict(config[config.data.source])
        sizes = {split: options.pop(f"num_{split}") for split in SPLITS}
        drawn = EMBEDDED[config.data.source](sizes, seed=config.seed, **options)
        return {"sft": drawn["warm"], "train": drawn["train"], "test": drawn["test"]}
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
