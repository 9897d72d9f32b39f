"""Refuses a wrong configuration before anything is loaded or compiled, in one line with the fix."""

import ast
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from krl.configs.default import EMBEDDED, FREE_KEYS, KEYS
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
        raise ValueError(no_such_key(key))
    for key in sorted(KEYS.keys() - given.keys()):
        raise ValueError(f"there is no config.{key}; begin with krl.configs.default.get_config() and change values")
    for key, value in given.items():
        kind = type(KEYS[key].default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"config.{key}={value!r} must be {KINDS[kind]}")


def no_such_key(key: str) -> str:
    """That there is no such key, and which one was meant."""
    meant = did_you_mean(key, list(KEYS))
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
    check_keys(config)
    flat = flatten(config)

    def need(condition: bool, key: str, must: str) -> None:
        if not condition:
            raise ValueError(f"config.{key}={flat[key]!r} must be {must}")

    for key, row in KEYS.items():
        _check_size(key, flat[key], need)
        need(row.range.holds(flat[key]), key, row.range.must)
    rule = own.get("rule") or find(config.alloc.rule, names.rules, "config.alloc.rule=")
    need(callable(rule), "alloc.rule", f"the name of a function; this is a {type(rule).__name__}")
    if "prior" not in own:
        find(config.alloc.prior, {"shared": None} | dict(names.priors), "config.alloc.prior=")
    _check_adapters(config, need)
    _check_loss(config, need, names)
    _check_budget(config, need, names, rule)
    _check_mesh(config, need)
    _check_data(config, need, names)


def _check_size(key: str, value: Any, need: Need) -> None:
    """The part about a number of any key: the devices have 32 bits for it; `need` refuses."""
    kind = type(KEYS[key].default)
    if kind is float:
        need(abs(value) < math.inf, key, "a finite number")  # nan is not less than anything
        need(abs(value) <= _LARGEST, key, f"at most {_LARGEST:g}")
    if kind is int:
        most = _LAST_SEED if key == "seed" else _LAST
        need(value <= most, key, f"at most {most}")


def _check_adapters(config: ConfigDict, need: Need) -> None:
    """The part about adapters; `need` refuses."""
    policy = config.policy
    must = "left empty: they are adapters of the checkpoint in policy.path, and there is none"
    need(not policy.adapter or bool(policy.path), "policy.adapter", must)
    must = "left empty with sft.steps and policy.lora_rank above 0: fine-tuning is of the policy without adapters"
    need(not (policy.adapter and policy.lora_rank and config.sft.steps), "policy.adapter", must)


def _check_loss(config: ConfigDict, need: Need, names: Names) -> None:
    """The part about sampling and learning; `need` refuses."""
    loss, alloc, longest = config.loss, config.alloc, config.sample.max_new_tokens
    for key, known in names.losses.items():
        need(loss[key] in known, f"loss.{key}", f"one of {sorted(known)}")
    must = "another one unless alloc.rule='reach' chooses prompts (alloc.n_min=0): only its probabilities are known"
    need(loss.average != "candidates" or (alloc.rule == "reach" and not alloc.n_min), "loss.average", must)
    need(loss.overlong_tokens <= longest, "loss.overlong_tokens", f"at most sample.max_new_tokens={longest}")
    must = (
        "0 with loss.scale='mean': the penalty makes rewards negative, and their mean is what advantages are divided by"
    )
    need(not loss.overlong_tokens or loss.scale != "mean", "loss.overlong_tokens", must)
    must = "0 unless loss.kl_coefficient is above 0: without it no divergence is computed"
    need(not config.guard.kl or loss.kl_coefficient > 0, "guard.kl", must)


def _check_budget(config: ConfigDict, need: Need, names: Names, rule: Any) -> None:
    """The part about the budget; `need` refuses."""
    alloc, prompts, updates = config.alloc, config.prompts_per_step, config.optim.updates_per_step
    must = "the field that names a prompt's group"
    need(alloc.prior != "groups" or bool(alloc.prior_field), "alloc.prior_field", must)
    must = "at most alloc.budget, or 65536: a table has a column for each"
    need(alloc.n_max <= max(alloc.budget, 65536), "alloc.n_max", must)
    need(alloc.n_min <= alloc.n_max, "alloc.n_min", f"at most alloc.n_max={alloc.n_max}")
    if alloc.n_min:
        must = "another one, or alloc.n_min must be 0: this rule chooses the prompts"
        need(not names.must_choose(rule), "alloc.rule", must)
        least, most = prompts * alloc.n_min, prompts * alloc.n_max
        of_least, of_most = f"prompts_per_step={prompts} x alloc.n_min={alloc.n_min}", f"x alloc.n_max={alloc.n_max}"
        must = f"between {least} ({of_least}) and {most} ({of_most})"
        need(least <= alloc.budget <= most, "alloc.budget", must)
    else:
        choosing = sorted(name for name, one in names.rules.items() if names.may_choose(one))
        must = f"one of {choosing}, or alloc.n_min at least 1: others give every prompt some"
        need(names.may_choose(rule), "alloc.rule", f"{must} (a rule of your own that may give nothing takes `group`)")
        _check_pool(alloc, need, names.has_rounds(rule))
    need(alloc.budget % updates == 0, "alloc.budget", f"a multiple of optim.updates_per_step={updates}")


def _check_pool(alloc: ConfigDict, need: Need, has_rounds: bool) -> None:
    """The part about prompts that may get nothing; `need` refuses."""
    need(2 <= alloc.group <= alloc.n_max, "alloc.group", f"from 2 to alloc.n_max={alloc.n_max}")
    need(alloc.budget % alloc.group == 0, "alloc.budget", f"a multiple of alloc.group={alloc.group} with alloc.n_min=0")
    need(alloc.scouts == 0, "alloc.scouts", "0 with alloc.n_min=0: they sample every prompt")
    must = f"at least 1 with the rule {alloc.rule!r}, which reads all of them"
    need(alloc.candidates > 0 or not has_rounds, "alloc.candidates", must)
    served = alloc.budget // alloc.group
    must = f"0 for all of the data, or at least alloc.budget / alloc.group = {served}"
    need(alloc.candidates == 0 or alloc.candidates >= served, "alloc.candidates", must)


def _check_mesh(config: ConfigDict, need: Need) -> None:
    """The part about devices; `need` refuses."""
    prompts, shape, decode, names = (
        config.prompts_per_step,
        config.mesh.shape,
        config.mesh.decode,
        config.mesh.axis_names,
    )
    need(len(shape) > 0, "mesh.shape", "the devices along one axis or more, such as (1,)")
    need(len(shape) == len(names), "mesh.shape", f"as long as mesh.axis_names={names}")
    must = f"() or as many devices as mesh.shape={shape} along as many axes"
    alike = len(decode) == len(shape) and math.prod(decode) == math.prod(shape)
    need(not decode or alike, "mesh.decode", must)
    rows = math.prod(size for size, name in zip(shape, names, strict=True) if name in ("data", "fsdp"))
    must = f"a multiple of the {rows} devices that split rows in mesh.shape"
    scouted = prompts * config.alloc.scouts
    need(scouted % rows == 0, "alloc.scouts", f"such that prompts_per_step={prompts} times it is {must}")
    need(config.alloc.budget % rows == 0, "alloc.budget", must)
    need(not config.sft.steps or config.sft.batch_size % rows == 0, "sft.batch_size", must)


def _check_data(config: ConfigDict, need: Need, names: Names) -> None:
    """The part about where prompts come from; `need` refuses."""
    data, sft, flat = config.data, config.sft, flatten(config)
    need(not sft.path or bool(sft.completion_field), "sft.completion_field", "the field of sft.path with completions")
    must = f"one of {sorted(names.templates)} or a text with {{prompt}} in it"
    need(data.template in names.templates or "{prompt}" in data.template, "data.template", must)
    arguments = parse_arguments(data.template_arguments)
    must = f"left empty: data.template={data.template!r} is no chat template ('chat' and 'chat_boxed' are)"
    need(not arguments or data.template in ("chat", "chat_boxed"), "data.template_arguments", must)
    system = arguments.get("system_prompt", "")
    need(isinstance(system, str), "data.template_arguments", "such that system_prompt is a text")
    if data.source in EMBEDDED:
        _check_embedded(config, need)
    elif data.name in names.sources:
        must = f"left empty: data.name={data.name!r} is known with its fields (data.name='' reads any file)"
        for key in ("data.subset", "data.prompt_field", "data.answer_field", "data.completion_field"):
            need(not flat[key], key, must)
    else:
        need(bool(data.name or data.path), "data.name", "a data set, or set data.path to a local file")
        need(bool(data.prompt_field), "data.prompt_field", "the field of a row with the question")


def _check_embedded(config: ConfigDict, need: Need) -> None:
    """The part about tasks that are made; `need` refuses."""
    source, flat = config.data.source, flatten(config)
    for key in _OF_DATA:
        need(not flat[key], key, f"left empty: data.source={source!r} reads no data; set it to 'dataset'")
    ladder = config.arithmetic
    some = any((ladder.addition, ladder.subtraction, ladder.multiplication, ladder.two_step))
    must = "at least 1 where no other kind of expression is: subtraction, multiplication and two_step are 0"
    need(source != "arithmetic" or some, "arithmetic.addition", must)
    made = config.tokenizer.path or config.policy.path
    warm = config[source].num_warm > 0 or bool(made and not config.sft.steps)
    need(warm, f"{source}.num_warm", "at least 1: the tokenizer is trained on them")
    enough = not config.alloc.n_min or config[source].num_train >= config.prompts_per_step
    need(enough, f"{source}.num_train", f"at least prompts_per_step={config.prompts_per_step}")


def parse_arguments(text: str) -> dict[str, object]:
    """The values of Python keyword arguments, which must be literals; nothing is run.

    Raises:
        ValueError: config.data.template_arguments is anything else.

    >>> parse_arguments("enable_thinking=False, system_prompt='Reply in French.'")
    {'enable_thinking': False, 'system_prompt': 'Reply in French.'}
    """
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError("no keyword arguments")
        names = [keyword.arg for keyword in call.keywords]  # None is that of **
        if None in names or len(set(names)) < len(names):
            raise ValueError("without a name, or with one that is there twice")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"config.data.template_arguments={text!r} must be Python keyword arguments with literal values, each once, "
            "such as enable_thinking=False, system_prompt='Reply in French.'"
        ) from None


_OF_DATA = (  # what embedded tasks do not read
    "data.name", "data.subset", "data.path", "data.test_path", "data.prompt_field", "data.answer_field",
    "data.completion_field", "data.fields", "data.max_train", "sft.path",
)  # fmt: skip
_LARGEST = 3e38  # of a float32, nearly
_LAST = 2**31 - 1  # of an int32
_LAST_SEED = 2**32 - 2  # JAX drops the bits above the 32nd; evaluations take the seed after it
