"""Refuses a wrong configuration before anything is loaded or compiled, in one line with the fix."""

import ast
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from krl.configs.default import COLDEST, EMBEDDED, FREE_KEYS, KEYS
from krl.configs.named import find

__all__ = ["FREE_KEYS", "KINDS", "check", "check_keys", "did_you_mean", "flatten", "no_such_key", "parse_arguments"]


def flatten(config: ConfigDict) -> dict[str, Any]:
    """The configuration as {"section.key": value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


# What a key's value must be, by the type that it has in configs/default.py.
KINDS: dict[type, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text",
    tuple: "several values with commas, such as (2,4)"
}  # fmt: skip


def check_keys(config: ConfigDict) -> None:
    """Refuse a configuration whose keys are not those of configs/default.py, or whose values are of another type.

    Raises:
        ValueError: names the key, and one that it may be.
    """
    given = flatten(config)
    for key in sorted(given.keys() - KEYS.keys()):
        raise ValueError(no_such_key(key, KEYS))
    for key in sorted(KEYS.keys() - given.keys()):
        raise ValueError(f"there is no config.{key}; begin with krl.configs.default.get_config() and change values")
    for key, value in given.items():
        kind = type(KEYS[key].default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"config.{key}={value!r} must be {KINDS[kind]}")


def no_such_key(key: str, known: Iterable[str]) -> str:
    """That there is no such key, and which one was meant."""
    meant = did_you_mean(key, list(known))
    return f"unknown config key {key}{meant or '; krl/configs/default.py has all of them'}"


def did_you_mean(name: str, known: Sequence[str], before: str = "") -> str:
    """The known names that a wrong one is likely to be: those with the same last part, or else the most alike.

    >>> did_you_mean("alloc.bugdet", ["alloc.budget", "alloc.rule"])
    '; did you mean alloc.budget?'
    >>> did_you_mean("rule", ["alloc.budget", "alloc.rule"], "--config.")
    '; did you mean --config.alloc.rule?'
    """
    last = name.rpartition(".")[2]
    same = [one for one in known if one.rpartition(".")[2] == last]
    found = difflib.get_close_matches(name, same, 3, 0.0) or difflib.get_close_matches(name, known, 1)
    return f"; did you mean {' or '.join(before + one for one in found)}?" if found else ""


Need = Callable[[bool, str, str], None]  # (whether all is well, the key, what it must be)


class Names(NamedTuple):
    """What a config may name, from the rooms that have it."""

    rules: Mapping[str, Any]  # allocation rules
    may_choose: Callable[[Any], bool]  # whether a rule may give a prompt nothing
    must_choose: Callable[[Any], bool]  # whether it can do no other
    has_rounds: Callable[[Any], bool]  # whether it spends a step's budget in several rounds
    priors: Mapping[str, Any]  # those besides "shared"
    templates: Iterable[str]  # of prompts
    sources: Iterable[str]  # known data sets
    losses: Mapping[str, Iterable[str]]  # for some keys of config.loss the values they have


def check(config: ConfigDict, names: Names, own: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Check every value and combination.

    Args:
        config: the whole configuration.
        names: what it may name.
        own: what was given in Python instead of a name: "rule" and "prior".

    Raises:
        ValueError: names the key, what it is, and what it must be.
    """

    def need(condition: bool, key: str, must: str) -> None:
        if not condition:
            raise ValueError(f"config.{key}={flatten(config)[key]!r} must be {must}")

    check_keys(config)
    _check_sizes(config, need)
    for name, row in KEYS.items():
        need(row.range.holds(flatten(config)[name]), name, row.range.must)
    rule = own.get("rule") or find(config.alloc.rule, names.rules, "config.alloc.rule=")
    need(callable(rule), "alloc.rule", f"the name of a function; this is a {type(rule).__name__}")
    if "prior" not in own:
        find(config.alloc.prior, {"shared": None} | dict(names.priors), "config.alloc.prior=")
    _check_loss(config, need, names)
    _check_budget(config, need, names, rule)
    _check_mesh(config, need)
    kind = config.checkpoint.dir.partition("://")
    need(not kind[1] or kind[0] in ("gs", "s3", "az"), "checkpoint.dir", "a directory, or one in gs://, s3:// or az://")
    _check_data(config, need, names)


def _check_loss(config: ConfigDict, need: Need, names: Names) -> None:
    """The part about sampling and learning; `need` refuses."""
    loss, alloc, longest = config.loss, config.alloc, config.sample.max_new_tokens
    need(not 0 < config.eval.temperature < COLDEST, "eval.temperature", f"0 or at least {COLDEST}")
    for key in ("optim.beta1", "optim.beta2"):
        need(flatten(config)[key] < 1, key, "below 1: at 1 a moment never moves, and its correction divides by zero")
    for key, known in names.losses.items():
        need(loss[key] in known, f"loss.{key}", f"one of {sorted(known)}")
    must = "another one unless alloc.rule='reach' chooses prompts (alloc.n_min=0): only its probabilities are known"
    need(loss.average != "candidates" or (alloc.rule == "reach" and not alloc.n_min), "loss.average", must)
    need(loss.overlong_tokens <= longest, "loss.overlong_tokens", f"at most sample.max_new_tokens={longest}")
    must = (
        "0 with loss.scale='mean': the penalty makes rewards negative, and their mean is what advantages are divided by"
    )
    need(not loss.overlong_tokens or loss.scale != "mean", "loss.overlong_tokens", must)
    texts = all(isinstance(text, str) and text for text in config.sample.stop)
    need(texts, "sample.stop", "texts with something in them, such as ('<|im_end|>',)")
    must = "0 unless loss.kl_coefficient is above 0: without it no divergence is computed"
    need(not config.guard.kl or loss.kl_coefficient > 0, "guard.kl", must)


def _check_budget(config: ConfigDict, need: Need, names: Names, rule: Any) -> None:
    """The part about the budget; `need` refuses."""
    alloc, updates = config.alloc, config.optim.updates_per_step
    must = "the field that names a prompt's group"
    need(alloc.prior != "groups" or bool(alloc.prior_field), "alloc.prior_field", must)
    must = "at most alloc.budget, or 65536: a table has a column for each"
    need(alloc.n_max <= max(alloc.budget, 65536), "alloc.n_max", must)
    need(alloc.prior_width <= 1 << 24, "alloc.prior_width", f"at most {1 << 24}: each is a parameter of the prior")
    need(alloc.n_min <= alloc.n_max, "alloc.n_min", f"at most alloc.n_max={alloc.n_max}")
    if alloc.n_min:
        must = "another one, or alloc.n_min must be 0: this rule chooses the prompts"
        need(not names.must_choose(rule), "alloc.rule", must)
        _check_sum(config, need)
    else:
        choosing = sorted(name for name, one in names.rules.items() if names.may_choose(one))
        must = f"one of {choosing}, or alloc.n_min at least 1: others give every prompt some"
        need(names.may_choose(rule), "alloc.rule", f"{must} (a rule of your own that may give nothing takes `group`)")
        _check_pool(config, need, names.has_rounds(rule))
    need(alloc.budget % updates == 0, "alloc.budget", f"a multiple of optim.updates_per_step={updates}")


def _check_sum(config: ConfigDict, need: Need) -> None:
    """The part about how many rollouts a step's prompts can take where every one gets some; `need` refuses."""
    prompts, alloc = config.prompts_per_step, config.alloc
    least, most = prompts * alloc.n_min, prompts * alloc.n_max
    need(
        least <= alloc.budget <= most,
        "alloc.budget",
        f"between {least} (prompts_per_step={prompts} x alloc.n_min={alloc.n_min}) and {most} (x "
        f"alloc.n_max={alloc.n_max})",
    )


def _check_pool(config: ConfigDict, need: Need, has_rounds: bool) -> None:
    """The part about prompts that may get nothing; `need` refuses."""
    alloc = config.alloc
    need(2 <= alloc.group <= alloc.n_max, "alloc.group", f"from 2 to alloc.n_max={alloc.n_max}")
    need(alloc.budget % alloc.group == 0, "alloc.budget", f"a multiple of alloc.group={alloc.group} with alloc.n_min=0")
    need(alloc.budget >= alloc.group, "alloc.budget", f"at least alloc.group={alloc.group}")
    need(alloc.scouts == 0, "alloc.scouts", "0 with alloc.n_min=0: they sample every prompt")
    need(
        alloc.candidates > 0 or not has_rounds,
        "alloc.candidates",
        f"at least 1 with the rule {alloc.rule!r}, which reads all of them",
    )
    served = alloc.budget // alloc.group
    need(
        alloc.candidates == 0 or alloc.candidates >= served,
        "alloc.candidates",
        f"0 for all of the data, or at least alloc.budget / alloc.group = {served}",
    )


def _check_sizes(config: ConfigDict, need: Need) -> None:
    """The part about numbers of any key: the devices have 32 bits for each; `need` refuses."""
    for key, (usual, *_) in KEYS.items():
        value = flatten(config)[key]
        if type(usual) is float:
            need(abs(value) < math.inf, key, "a finite number")  # nan is not less than anything
            need(abs(value) <= _LARGEST, key, f"at most {_LARGEST:g}")
        if type(usual) is int:
            most = _LAST_SEED if key == "seed" else _LAST
            need(value <= most, key, f"at most {most}")


def _check_mesh(config: ConfigDict, need: Need) -> None:
    """The part about devices; `need` refuses."""
    prompts, alloc, mesh = config.prompts_per_step, config.alloc, config.mesh
    for key, sizes in (("mesh.shape", mesh.shape), ("mesh.decode", mesh.decode)):
        need(all(type(size) is int and size >= 1 for size in sizes), key, "whole numbers of at least 1")
    need(len(mesh.shape) > 0, "mesh.shape", "the devices along one axis or more, such as (1,)")
    need(len(mesh.shape) == len(mesh.axis_names), "mesh.shape", f"as long as mesh.axis_names={mesh.axis_names}")
    rows = 1
    for size, name in zip(mesh.shape, mesh.axis_names, strict=True):
        rows *= size if name in ("data", "fsdp") else 1
    need(
        not mesh.decode or (len(mesh.decode) == len(mesh.shape) and math.prod(mesh.decode) == math.prod(mesh.shape)),
        "mesh.decode",
        f"() or as many devices as mesh.shape={mesh.shape} along as many axes",
    )
    need(
        prompts * alloc.scouts % rows == 0,
        "alloc.scouts",
        f"such that prompts_per_step={prompts} times it is a multiple of the {rows} devices that split rows in "
        "mesh.shape",
    )
    for key in ("alloc.budget", "sft.batch_size") if config.sft.steps else ("alloc.budget",):
        need(flatten(config)[key] % rows == 0, key, f"a multiple of the {rows} devices that split rows in mesh.shape")


def _check_data(config: ConfigDict, need: Need, names: Names) -> None:
    """The part about where prompts come from; `need` refuses."""
    sft = config.sft
    need(not sft.path or bool(sft.completion_field), "sft.completion_field", "the field of sft.path with completions")
    template = config.data.template
    need(
        template in names.templates or "{prompt}" in template,
        "data.template",
        f"one of {sorted(names.templates)} or a text with {{prompt}} in it",
    )
    try:
        arguments = parse_arguments(config.data.template_arguments)
    except ValueError as error:
        raise ValueError(f"config.data.template_arguments={config.data.template_arguments!r} {error}") from None
    need(
        not arguments or template in ("chat", "chat_boxed"),
        "data.template_arguments",
        f"left empty: data.template={template!r} is no chat template ('chat' and 'chat_boxed' are)",
    )
    need(
        isinstance(arguments.get("system_prompt", ""), str),
        "data.template_arguments",
        "such that system_prompt is a text",
    )
    if config.data.source in EMBEDDED:
        for key in _OF_DATA:
            need(
                not flatten(config)[key],
                key,
                f"left empty: data.source={config.data.source!r} reads no data; set it to 'dataset'",
            )
        kinds = ("addition", "subtraction", "multiplication", "two_step")
        need(
            config.data.source != "arithmetic" or any(config.arithmetic[kind] for kind in kinds),
            "arithmetic.addition",
            "at least 1 where no other kind of expression is: subtraction, multiplication and two_step are 0",
        )
        made = config.tokenizer.path or config.policy.path
        warm = f"{config.data.source}.num_warm"
        need(
            flatten(config)[warm] > 0 or bool(made and not sft.steps),
            warm,
            "at least 1: the tokenizer is trained on them",
        )
        key, fewest = f"{config.data.source}.num_train", config.prompts_per_step if config.alloc.n_min else 1
        why = "prompts_per_step=" if config.alloc.n_min else ""
        need(flatten(config)[key] >= fewest, key, f"at least {why}{fewest}")
    elif config.data.name in names.sources:
        for key in ("data.subset", "data.prompt_field", "data.answer_field", "data.completion_field"):
            known = f"left empty: data.name={config.data.name!r} is known with its fields (data.name='' reads any file)"
            need(not flatten(config)[key], key, known)
    else:
        need(bool(config.data.name or config.data.path), "data.name", "a data set, or set data.path to a local file")
        need(bool(config.data.prompt_field), "data.prompt_field", "the field of a row with the question")


def parse_arguments(text: str) -> dict[str, object]:
    """The values of Python keyword arguments, which must be literals; nothing is run.

    Raises:
        ValueError: the text is anything else; the message goes on after the text.

    >>> parse_arguments("enable_thinking=False, system_prompt='Reply in French.'")
    {'enable_thinking': False, 'system_prompt': 'Reply in French.'}
    """
    must = "must be Python keyword arguments, such as enable_thinking=False, system_prompt='Reply in French.'"
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: it has a null character
        raise ValueError(must) from None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
        raise ValueError(must)
    arguments: dict[str, object] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError(f"{must}, each once" if keyword.arg else must)
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ValueError(
                f"must give {keyword.arg} a literal: a text in quotes, a number, True, False or None"
            ) from None
    return arguments


_OF_DATA = (  # what embedded tasks do not read
    "data.name", "data.subset", "data.path", "data.test_path", "data.prompt_field", "data.answer_field",
    "data.completion_field", "data.fields", "data.max_train", "sft.path",
)  # fmt: skip
_LARGEST = 3e38  # of a float32, nearly
_LAST = 2**31 - 1  # of an int32
_LAST_SEED = 2**32 - 2  # JAX drops the bits above the 32nd; evaluations take the seed after it
