"""Rollout throughput: useful tokens a second, of responses that are equally long and of ragged ones.

    python -m benchmarks.rollout [--slots 8 16 128] [--rollouts 512 2048 8192] [--repeats 7]

A small Qwen 2 (4 layers, E 128, V 512, float32, fresh parameters), 16 prompts of 32 tokens, 128 rollouts of at most 128
tokens. "full": nothing ends a response. "ragged": 15 of the 512 tokens end it, so that lengths are about geometric with
a mean near 34. "counts": the same with 2 to 64 rollouts a prompt. Every measurement is one line of JSON.
docs/performance.md quotes them beside other samplers on the same work.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.runs import machine
from krl import policy, rollout
from krl.base.types import Prompts

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
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    params = policy.init(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(32, 512, (PROMPTS, PROMPT_TOKENS)).astype(np.int32)
    prompts = Prompts(tokens, np.ones(tokens.shape, bool), np.arange(PROMPTS, dtype=np.int32))
    many = {f"ragged/{total}": ((total // PROMPTS,) * PROMPTS, ENDS) for total in options.rollouts}
    for name, (counts, ends) in (REGIMES | many).items():
        for slots in options.slots:
            print(json.dumps({"key": f"rollout/{name}", "slots": slots or "default", "unit": "tok/s"} | measure(
                params, prompts, jnp.array(counts), ends, slots or None, options.repeats
            )), flush=True)  # fmt: skip


def measure(params: dict, prompts: Prompts, counts: jax.Array, ends: tuple, slots: int | None, repeats: int) -> dict:
    """Median and extremes over repeats with different random numbers, compilation apart."""
    rates, first = [], 0.0
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        rollouts = rollout.generate(
            CONFIG, params, prompts, counts, jax.random.key(repeat), max_new_tokens=NEW_TOKENS, eos_ids=ends,
            num_slots=slots
        )  # fmt: skip
        useful = int(rollouts.lengths.sum())  # waits for the result
        seconds = time.perf_counter() - began
        if repeat:
            rates.append(round(useful / seconds))
        else:
            first = round(seconds, 2)
    spread = {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "samples": rates}
    return spread | {"first_call_seconds": first} | machine()


if __name__ == "__main__":
    main()
