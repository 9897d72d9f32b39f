"""Rollout throughput: useful tokens a second, of responses that are equally long and of ragged ones.

    python -m benchmarks.rollout [--slots 8 16 128] [--rollouts 512 2048 8192] [--repeats 7]
    python -m benchmarks.rollout --path DIR --questions FILE [--slots 8 16 32 64] [--repeats 3]

A small Qwen 2 (4 layers, E 128, V 512, float32, fresh parameters), 16 prompts of 32 tokens, 128 rollouts of at most 128
tokens. "full": nothing ends a response. "ragged": 15 of the 512 tokens end it, so that lengths are about geometric with
a mean near 34. "counts": the same with 2 to 64 rollouts a prompt. With --path a checkpoint answers 16 questions of a
JSON Lines file 4 times each with 64 tokens, in float32 ("real"). Every measurement is one line of JSON.
docs/performance.md quotes them beside other samplers on the same work.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.runs import machine
from krl import hf, policy, rollout
from krl.base.types import Prompts, Rollouts

CONFIG = policy.PolicyConfig(
    vocab_size=512,
    embed_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    mlp_size=512,
    qkv_bias=True,
    unroll=4,
)
PROMPTS, PROMPT_TOKENS, ROLLOUTS, NEW_TOKENS = 16, 32, 128, 128
ENDS = tuple(range(2, 17))
UNEVEN = (64, 16, 8, *(4,) * 7, *(2,) * 6)
REGIMES = {"full": ((8,) * PROMPTS, ()), "ragged": ((8,) * PROMPTS, ENDS), "counts": (UNEVEN, ENDS)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[0], help="decoded at a time; 0 for the default")
    parser.add_argument("--rollouts", type=int, nargs="*", default=[], help="also so many ragged ones, multiples of 16")
    parser.add_argument("--path", help="a checkpoint's directory")
    parser.add_argument("--questions", type=pathlib.Path, help="a JSON Lines file with a field question, for --path")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if options.path:
        config, params = hf.load_hf(options.path)
        prompts, regimes, length = ask(options.path, options.questions), {"real": ((4,) * PROMPTS, ())}, 64
    else:
        config, params, length = CONFIG, policy.init(CONFIG, jax.random.key(0)), NEW_TOKENS
        tokens = np.random.default_rng(0).integers(32, 512, (PROMPTS, PROMPT_TOKENS)).astype(np.int32)
        prompts = Prompts(tokens, np.ones(tokens.shape, bool), np.arange(PROMPTS, dtype=np.int32))
        many = {f"ragged/{total}": ((total // PROMPTS,) * PROMPTS, ENDS) for total in options.rollouts}
        regimes = REGIMES | many
    for name, (counts, ends) in regimes.items():
        for slots in options.slots:
            generate = functools.partial(
                rollout.generate, config, params, prompts, jnp.array(counts), max_new_tokens=length, eos_ids=ends,
                num_slots=slots or None,
            )  # fmt: skip
            line = {"key": f"rollout/{name}", "slots": slots or "default", "unit": "tok/s"}
            print(json.dumps(line | measure(generate, options.repeats)), flush=True)


def ask(path: str, questions: pathlib.Path) -> Prompts:
    """The first questions of a file as the checkpoint's tokens."""
    tokenizer = hf.load_tokenizer(path)
    rows = questions.read_text().splitlines()[:PROMPTS]
    ids = [tokenizer.encode(json.loads(row)["question"]) for row in rows]
    tokens = np.full((PROMPTS, max(map(len, ids))), tokenizer.pad_id, np.int32)
    for row, real in zip(tokens, ids, strict=True):
        row[-len(real) :] = real
    lengths = np.array([len(real) for real in ids])
    mask = np.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
    return Prompts(tokens, mask, np.arange(PROMPTS, dtype=np.int32))


def measure(generate: Callable[..., Rollouts], repeats: int) -> dict:
    """Median and extremes over repeats with different random numbers, compilation apart."""
    rates, first = [], 0.0
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        useful = int(generate(jax.random.key(repeat)).lengths.sum())  # waits for the result
        seconds = time.perf_counter() - began
        if repeat:
            rates.append(round(useful / seconds))
        else:
            first = round(seconds, 2)
    spread = {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "samples": rates}
    return spread | {"first_call_seconds": first} | machine()


if __name__ == "__main__":
    main()
