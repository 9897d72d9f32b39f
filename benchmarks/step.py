"""Updates and whole steps: useful tokens a second and seconds, of responses that are equally long and of ragged ones.

    python -m benchmarks.step [--repeats 5] [--rounds 1] [--peer COMMAND ...]

The policy and the work of `benchmarks.rollout`. An update is one of 128 rollouts; "half" means that half of the prompts
have rewards that do not differ, which leaves them without a gradient. A step samples, decodes nothing, rewards the
parity of the tokens' sum, and updates. Useful tokens are those of prompts and responses, without padding. Every
measurement is one line of JSON. A peer is a command that prints such lines, `python benchmarks/peers.py step --ragged`
for one; rounds of both take turns.
"""

import argparse
import functools
import json
import shlex
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rollout import CONFIG, ENDS, NEW_TOKENS, PROMPT_TOKENS, PROMPTS, ROLLOUTS
from benchmarks.runs import machine
from krl import learn, policy, rollout
from krl.base.types import Prompts, Rollouts
from krl.run.compiled import for_this_backend
from krl.run.optimizer import init_state, make_optimizer
from krl.run.update import policy_update

OPTIMIZER = make_optimizer(
    learning_rate=1e-6, warmup_steps=0, decay_steps=0, beta1=0.9, beta2=0.98, weight_decay=0.01, grad_clip=1.0
)
GROUPS = np.repeat(np.arange(PROMPTS), ROLLOUTS // PROMPTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--micro-tokens", type=int, default=1024)
    parser.add_argument("--peer", action="append", default=[], help="a command that prints lines of JSON")
    options = parser.parse_args()
    for _ in range(options.rounds):
        measure_updates(options)
        measure_steps(options)
        for command in options.peer:
            printed = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True, check=True).stdout
            print("\n".join(line for line in printed.splitlines() if line.startswith('{"key"')), flush=True)


def show(key: str, unit: str, samples: list[float], **more) -> None:
    """One line: the median and what it is the median of."""
    samples = [float(f"{sample:.4g}") for sample in samples]
    line = {"key": key, "system": "krl", "unit": unit, "median": statistics.median(samples), "samples": samples}
    print(json.dumps(line | more | machine()), flush=True)


def start():
    """A fresh training state and the prompts."""
    params = policy.init(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(32, 512, (PROMPTS, PROMPT_TOKENS)).astype(np.int32)
    prompts = Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.arange(PROMPTS, dtype=jnp.int32))
    return jax.block_until_ready(init_state(CONFIG, OPTIMIZER, params)), prompts


def make_update(micro_tokens: int):
    return for_this_backend(
        policy_update, CONFIG, OPTIMIZER, num_updates=1, micro_tokens=micro_tokens, temperature=1.0, clip_low=0.2,
        clip_high=0.28, dual_clip=10.0,
    )  # fmt: skip


def measure_updates(options) -> None:
    """Made-up rollouts of given lengths and advantages."""
    rng = np.random.default_rng(0)
    ragged = np.minimum(rng.geometric(len(ENDS) / CONFIG.vocab_size, ROLLOUTS), NEW_TOKENS)
    advantages = rng.normal(size=ROLLOUTS).astype(np.float32)
    update, (state, prompts) = make_update(options.micro_tokens), start()
    for name, lengths in (("full", np.full(ROLLOUTS, NEW_TOKENS)), ("ragged", ragged)):
        real = np.arange(NEW_TOKENS) < lengths[:, None]
        rollouts = Rollouts(
            prompt_index=jnp.asarray(GROUPS, jnp.int32), sample_index=jnp.zeros(ROLLOUTS, jnp.int32),
            mask=jnp.ones(ROLLOUTS, bool),
            tokens=jnp.asarray(np.where(real, rng.integers(2, 512, real.shape), 0), jnp.int32),
            logps=jnp.where(real, -6.2, 0.0), lengths=jnp.asarray(lengths, jnp.int32),
            finished=jnp.ones(ROLLOUTS, bool),
        )  # fmt: skip
        useful = ROLLOUTS * PROMPT_TOKENS + int(lengths.sum())
        for share, kept in (("", advantages), ("/half", np.where(GROUPS % 2, advantages, 0))):
            rates = []
            for _ in range(options.repeats + 1):
                began = time.perf_counter()
                state, _ = jax.block_until_ready(update(state, prompts, rollouts, jnp.asarray(kept), jax.random.key(0)))
                rates.append(useful / (time.perf_counter() - began))
            show(f"update/{name}{share}", "useful tok/s", rates[1:], micro_tokens=options.micro_tokens)


def measure_steps(options) -> None:
    """Rollouts of 16 prompts, 8 each, their rewards on the host, and the update."""
    update, counts = make_update(options.micro_tokens), jnp.full(PROMPTS, ROLLOUTS // PROMPTS)
    advantages_of = jax.jit(functools.partial(learn.group_advantages, num_prompts=PROMPTS))
    for name, ends, learns in (("full", (), GROUPS >= 0), ("ragged/half", ENDS, GROUPS % 2 > 0)):
        state, prompts = start()
        took: list[float] = []
        for number in range(options.repeats + 2):
            began = time.perf_counter()
            rollouts = rollout.generate(
                CONFIG, state.params, prompts, counts, jax.random.key(number), max_new_tokens=NEW_TOKENS, eos_ids=ends
            )
            real = np.arange(NEW_TOKENS) < np.asarray(rollouts.lengths)[:, None]
            rewards = np.where(learns, (np.asarray(rollouts.tokens) * real).sum(axis=1) % 2, 0.0).astype(np.float32)
            advantages = advantages_of(jnp.asarray(rewards), rollouts.prompt_index, rollouts.mask)
            state, _ = jax.block_until_ready(update(state, prompts, rollouts, advantages, jax.random.key(number)))
            took.append(time.perf_counter() - began)
        show(f"grpo_step/{name}", "s", took[2:], first_call_seconds=round(took[0], 2))


if __name__ == "__main__":
    main()
