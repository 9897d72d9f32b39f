"""Updates and whole steps: useful tokens a second and seconds, of responses that are equally long and of ragged ones.

    python -m benchmarks.step [--repeats 5] [--rounds 1] [--peer COMMAND ...]
    python -m benchmarks.step --path DIR --questions FILE [--micro-tokens 2048] [--repeats 2] [--peer COMMAND ...]

The policy and the work of `benchmarks.rollout`. An update is one of 128 rollouts; "half" means that half of the prompts
have rewards that do not differ, which leaves them without a gradient. A step samples, decodes nothing, rewards the
parity of the tokens' sum, and updates. With --path a checkpoint answers 16 questions of a JSON Lines file 4 times each
with 64 tokens, in float32 ("real"). Useful tokens are those of prompts and responses, without padding. Every
measurement is one line of JSON. A peer is a command that prints such lines, `python benchmarks/peers.py step --ragged`
for one; rounds of both take turns.
"""

import argparse
import functools
import json
import pathlib
import shlex
import statistics
import subprocess
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rollout import CONFIG, ENDS, NEW_TOKENS, PROMPT_TOKENS, PROMPTS, ROLLOUTS, ask
from benchmarks.runs import machine
from krl import hf, learn, policy, rollout
from krl.base.types import Prompts, Rollouts, TrainState
from krl.run.compiled import for_this_backend
from krl.run.optimizer import init_state, make_optimizer
from krl.run.update import policy_update

OPTIMIZER = make_optimizer(
    learning_rate=1e-6, warmup_steps=0, decay_steps=0, beta1=0.9, beta2=0.98, weight_decay=0.01, grad_clip=1.0
)


class Work(NamedTuple):
    """Who samples what."""

    config: policy.PolicyConfig
    params: dict
    prompts: Prompts
    each: int  # rollouts of a prompt
    new_tokens: int  # of a response at most

    @property
    def groups(self) -> np.ndarray:
        """[R], the prompt of each rollout."""
        return np.repeat(np.arange(PROMPTS), self.each)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--micro-tokens", type=int, default=1024)
    parser.add_argument("--path", help="a checkpoint's directory")
    parser.add_argument("--questions", type=pathlib.Path, help="a JSON Lines file with a field question, for --path")
    parser.add_argument("--peer", action="append", default=[], help="a command that prints lines of JSON")
    options = parser.parse_args()
    if options.path:
        work = Work(*hf.load_hf(options.path), ask(options.path, options.questions), 4, 64)
    else:
        tokens = np.random.default_rng(0).integers(32, 512, (PROMPTS, PROMPT_TOKENS)).astype(np.int32)
        prompts = Prompts(tokens, np.ones(tokens.shape, bool), np.arange(PROMPTS, dtype=np.int32))
        params = policy.init(CONFIG, jax.random.key(0))
        work = Work(CONFIG, params, prompts, ROLLOUTS // PROMPTS, NEW_TOKENS)
    for _ in range(options.rounds):
        measure_updates(work, options)
        measure_steps(work, options)
        for command in options.peer:
            printed = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True, check=True).stdout
            print("\n".join(line for line in printed.splitlines() if line.startswith('{"key"')), flush=True)


def show(key: str, unit: str, samples: list[float], **more) -> None:
    """One line: the median and what it is the median of."""
    samples = [float(f"{sample:.4g}") for sample in samples]
    line = {"key": key, "system": "krl", "unit": unit, "median": statistics.median(samples), "samples": samples}
    print(json.dumps(line | more | machine()), flush=True)


def start(work: Work) -> TrainState:
    """A training state of its own: updates give its buffers away."""
    return jax.block_until_ready(init_state(work.config, OPTIMIZER, jax.tree.map(jnp.copy, work.params)))


def make_update(work: Work, micro_tokens: int):
    return for_this_backend(
        policy_update, work.config, OPTIMIZER, num_updates=1, micro_tokens=micro_tokens, temperature=1.0, clip_low=0.2,
        clip_high=0.28, dual_clip=10.0,
    )  # fmt: skip


def measure_updates(work: Work, options) -> None:
    """Made-up rollouts of given lengths and advantages."""
    rng, number = np.random.default_rng(0), len(work.groups)
    full = np.full(number, work.new_tokens)
    ragged = np.minimum(rng.geometric(len(ENDS) / CONFIG.vocab_size, number), work.new_tokens)
    advantages = rng.normal(size=number).astype(np.float32)
    update, state = make_update(work, options.micro_tokens), start(work)
    for name, lengths in {"real": full}.items() if options.path else {"full": full, "ragged": ragged}.items():
        real = np.arange(work.new_tokens) < lengths[:, None]
        rollouts = Rollouts(
            prompt_index=jnp.asarray(work.groups, jnp.int32), sample_index=jnp.zeros(number, jnp.int32),
            mask=jnp.ones(number, bool),
            tokens=jnp.asarray(np.where(real, rng.integers(2, 512, real.shape), 0), jnp.int32),
            logps=jnp.where(real, -6.2, 0.0), lengths=jnp.asarray(lengths, jnp.int32),
            finished=jnp.ones(number, bool),
        )  # fmt: skip
        useful = work.each * int(work.prompts.mask.sum()) + int(lengths.sum())
        for share, kept in (("", advantages), ("/half", np.where(work.groups % 2, advantages, 0))):
            rates = []
            for _ in range(options.repeats + 1):
                began = time.perf_counter()
                state, _ = jax.block_until_ready(
                    update(state, work.prompts, rollouts, jnp.asarray(kept), jax.random.key(0))
                )
                rates.append(useful / (time.perf_counter() - began))
            show(f"update/{name}{share}", "useful tok/s", rates[1:], micro_tokens=options.micro_tokens)


def measure_steps(work: Work, options) -> None:
    """Rollouts of 16 prompts, their rewards on the host, and the update."""
    update, counts = make_update(work, options.micro_tokens), jnp.full(PROMPTS, work.each)
    advantages_of = jax.jit(functools.partial(learn.group_advantages, num_prompts=PROMPTS))
    every = work.groups >= 0
    regimes = [("real", (), every)] if options.path else [("full", (), every), ("ragged/half", ENDS, work.groups % 2)]
    for name, ends, learns in regimes:
        state = start(work)
        took: list[float] = []
        for number in range(options.repeats + 2):
            began = time.perf_counter()
            rollouts = rollout.generate(
                work.config, state.params, work.prompts, counts, jax.random.key(number),
                max_new_tokens=work.new_tokens, eos_ids=ends,
            )  # fmt: skip
            real = np.arange(work.new_tokens) < np.asarray(rollouts.lengths)[:, None]
            rewards = np.where(learns, (np.asarray(rollouts.tokens) * real).sum(axis=1) % 2, 0.0).astype(np.float32)
            advantages = advantages_of(jnp.asarray(rewards), rollouts.prompt_index, rollouts.mask)
            state, _ = jax.block_until_ready(update(state, work.prompts, rollouts, advantages, jax.random.key(number)))
            took.append(time.perf_counter() - began)
        show(f"grpo_step/{name}", "s", took[2:], first_call_seconds=round(took[0], 2))


if __name__ == "__main__":
    main()
