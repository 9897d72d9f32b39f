"""From a config to the policy that a run begins with: its tokenizer, its sizes, and what it is fine-tuned on."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from krl import hf, policy
from krl.base.types import Tokenizer
from krl.configs.check import FREE_KEYS, flatten
from krl.hf.tokenizer import check_vocabulary, train_sentencepiece
from krl.hf.weights import adapters_of, check_hf
from krl.rollout import Ends
from krl.rollout.stop import describe_ends, missing_end
from krl.run.processes import say
from krl.run.sft import Pairs, encode_pairs, pack_pairs
from krl.tasks import EncodedTasks, TaskSet

GIVEN = "(given)"  # config.policy.path of a run whose policy was given in Python
_OF_ADAPTERS = tuple(f"policy.{name}" for name in ("adapter", "lora_rank", "lora_alpha", "lora_modules"))


def find_tokenizer(config: ConfigDict, tasks: TaskSet, folder: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """The tokenizer of a run that has begun, or the config's, the policy's, or one trained on the texts."""
    if (workdir / "config.json").exists():
        return workdir / "policy"
    if config.policy.path == GIVEN and not config.tokenizer.path:
        raise ValueError("a policy that is given to train needs config.tokenizer.path, the directory of its tokenizer")
    if config.policy.path not in ("", GIVEN):
        try:
            hf.read_config(config.policy.path)
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
        make_cache(file.parent)
        train_sentencepiece(texts, file, vocab_size=size, byte_fallback=fallback)
    return file


def find_policy(
    config: ConfigDict, tokenizer: Tokenizer, workdir: pathlib.Path, given: policy.PolicyConfig | None = None
) -> policy.PolicyConfig:
    """The decoder of a run: the one that was given, its checkpoint's, or one of the config's sizes."""
    if config.policy.path:
        if (workdir / "config.json").exists():
            found = hf.read_config(workdir / "policy", **computed_by(config))
        elif given:
            found = dataclasses.replace(given, **computed_by(config))
        else:
            found, _ = check_hf(config.policy.path, **computed_by(config))
            if hf.sees_images(config.policy.path):
                say(f"krl: {config.policy.path} also sees images; its language model alone is read and trained")
        if config.policy.adapter and not (workdir / "config.json").exists():
            check_adapter(config, found)
        check_vocabulary(tokenizer, found.vocab_size)
        row = config.data.max_prompt_tokens + config.sample.max_new_tokens
        longest = json.loads(found.source or "{}").get("max_position_embeddings") or row
        if found.longest and row > found.longest:
            raise ValueError(
                f"data.max_prompt_tokens and sample.max_new_tokens make rows of {row} tokens; beyond {found.longest} "
                "the checkpoint stretches its positions by another rule, which is not supported: make them shorter"
            )
        if row > longest:
            say(f"krl: rows of {row} tokens are longer than the {longest} that the checkpoint was made for")
        return found
    return sized_policy(config, tokenizer.vocab_size)


def check_adapter(config: ConfigDict, sizes: policy.PolicyConfig) -> None:
    """Refuse a directory of adapters that a run cannot begin from."""
    found = hf.check_adapters(config.policy.adapter, sizes)
    if sizes.lora and found != sizes.lora:
        keys = f"lora_rank={found.rank}, lora_alpha={found.alpha!r} and lora_modules={found.modules}"
        raise ValueError(
            f"config.policy.adapter={config.policy.adapter!r} goes on with policy.{keys} alone: give these, or "
            "policy.lora_rank=0 to merge it"
        )


def sized_policy(config: ConfigDict, vocab_size: int) -> policy.PolicyConfig:
    """The decoder of the config's own sizes."""
    apart = ("policy.path", *_OF_ADAPTERS)
    sizes = {name: value for name, value in config.policy.items() if f"policy.{name}" not in apart}
    try:
        return policy.PolicyConfig(vocab_size=vocab_size, **sizes | computed_by(config))
    except ValueError as error:
        raise ValueError(f"config.policy: {error}") from None


def computed_by(config: ConfigDict) -> dict[str, Any]:
    """The options of a decoder that are about its computation and not its checkpoint, and its adapters."""
    computation = {name: config.policy[name] for name in ("dtype", "unroll", "remat", "attention", "balance")}
    return computation | adapters_of(flatten(config))


def say_ends(config: ConfigDict, ends: Ends, prompts: EncodedTasks) -> None:
    """Tell what ends a response, and warn where the chat template's end of a turn does not."""
    say(f"krl: {describe_ends(ends)}")
    warning = missing_end(ends, prompts.tokens[prompts.mask], chat=config.data.template.startswith("chat"))
    if warning:
        say(f"krl: {warning}")


# ---------------------------------------------------------------- what its parameters begin from


def sft_cache(folder: pathlib.Path, config: ConfigDict, vocab_size: int, pairs: Sequence[np.ndarray]) -> pathlib.Path:
    """The directory of the fine-tuned policy that belongs to this config and to what these files held, and to no other.

    Args:
        folder: that it lies in.
        config: of the run.
        vocab_size: V of the policy.
        pairs: from `find_pairs`; they say all that fine-tuning sees of data, template and tokenizer.
    """
    flat = flatten(config)
    left_out = (*FREE_KEYS, *_OF_ADAPTERS)  # fine-tuning is of the policy without adapters
    chosen = {k: flat[k] for k in sorted(flat) if k.startswith(("seed", "policy.", "sft.")) and k not in left_out}
    told = [f"{part.dtype} {part.shape}" for part in pairs]
    return folder / _digest(json.dumps([chosen, vocab_size, told]).encode(), *map(np.ascontiguousarray, pairs))


def find_pairs(config: ConfigDict, encoded: EncodedTasks, tokenizer: Tokenizer) -> Pairs:
    """The rows of supervised fine-tuning."""
    if not config.sft.row_tokens:
        return encode_pairs(encoded, tokenizer, config.sample.max_new_tokens)
    pairs, left_out = pack_pairs(encoded, tokenizer, config.sft.row_tokens)
    say(f"krl: {len(encoded) - left_out} pairs for fine-tuning in {len(pairs[0])} rows, {left_out} too long")
    return pairs


def check_given(params: Any, like: dict) -> None:
    """Refuse the parameters of a policy that was given in Python if they are not floats of the shapes of `like`.

    Raises:
        ValueError: they are not; the message says the fix.
    """
    wanted, has = (jax.tree.map(jnp.shape, tree) for tree in (like, params))
    if wanted != has:
        raise ValueError(
            "policy=: the parameters are not those of the PolicyConfig given with them, or not of the policy that "
            "this run began with; give it that one, or choose another workdir"
        )
    kinds = {jnp.result_type(leaf) for leaf in jax.tree.leaves(params)}
    wrong = [kind.name for kind in kinds if not jnp.issubdtype(kind, jnp.floating)]
    if wrong:
        raise ValueError(f"policy=: parameters of type {min(wrong)}; they must be floating-point numbers")


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


def make_cache(directory: pathlib.Path) -> None:
    """Make a directory of fine-tuning, or say which key moves it to where it can be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {directory}: {error}; choose another config.sft.dir") from None
