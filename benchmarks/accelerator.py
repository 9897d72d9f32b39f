"""How near an accelerator's limits decoding and updates come, and whether its attention kernel is right.

    python -m benchmarks.accelerator [--toy]

Decoding: 256 slots of a random bfloat16 model of Qwen 2.5 1.5B's shape, against the time that reading its parameters
and keys and values once a step takes at the device's bandwidth. Update: rows of 2048 tokens, packed and not, against
the dense bfloat16 peak. Attention: the kernel that "auto" chooses against XLA's, values and gradients; and every way
to attend within packed rows. Every measurement is one line of JSON. --toy is for any machine, with sizes that say
nothing about speed.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.budget import seconds
from benchmarks.runs import machine
from krl import policy, rollout
from krl.base.types import Prompts, Rollouts
from krl.plan.roofline import ACCELERATORS
from krl.policy.attention import attend_rows
from krl.run.compiled import for_this_backend
from krl.run.optimizer import init_state, make_optimizer
from krl.run.update import policy_update

LARGE = policy.PolicyConfig(
    vocab_size=151936, embed_size=1536, num_layers=28, num_heads=12, num_kv_heads=2, head_size=128, mlp_size=8960,
    qkv_bias=True, dtype="bfloat16", remat="dots",
)  # fmt: skip
TOY = policy.PolicyConfig(vocab_size=512, embed_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(arguments)
    config = TOY if options.toy else LARGE
    check_attention(config, length=64 if options.toy else 1024)
    compare_packed(config, rows=2 if options.toy else 16, length=64 if options.toy else 2048)
    measure_decoding(
        config, rows=16 if options.toy else 256, prompt=8 if options.toy else 128, new=16 if options.toy else 256
    )
    for packed in (True, False):
        measure_update(config, rows=4 if options.toy else 16, length=64 if options.toy else 2048, packed=packed)


def show(key: str, **found) -> None:
    print(json.dumps({"key": key} | found | {"device": jax.devices()[0].device_kind} | machine()), flush=True)


def of_limit(needed: float, limit: str, took: float) -> float | None:
    """The share of a limit of the device that was reached; None for a device that is not known."""
    known = ACCELERATORS.get(jax.devices()[0].device_kind)
    return known and round(needed / getattr(known, limit) / took, 3)


def check_attention(config: policy.PolicyConfig, length: int) -> None:
    """The largest differences to XLA's attention relative to its largest entry."""
    shapes = [
        (2, length, heads, config.head_size) for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    ]
    arrays = [jax.random.normal(jax.random.key(i), shape, config.dtype) for i, shape in enumerate(shapes)]
    scale = config.head_size**-0.5

    def run(kernel):
        attend = functools.partial(attend_rows, segments=None, kernel=kernel, scale=scale)
        loss = lambda *arrays: jnp.square(attend(*arrays).astype(jnp.float32)).mean()  # noqa: E731
        return attend(*arrays), *jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    pairs = zip(run("auto"), run("xla"), strict=True)
    apart = [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs]
    show("attention", kernel="auto", apart=apart, right=max(apart) < 0.05)


def compare_packed(config: policy.PolicyConfig, rows: int, length: int, each: int = 8) -> None:
    """Attention of rows that hold `each` rollouts, forward and backward, by every kernel that might compute it."""
    lengths = np.random.default_rng(0).multinomial(length - each, [1 / each] * each, size=rows) + 1
    segments = jnp.array([np.repeat(np.arange(1, each + 1), row) for row in lengths], jnp.int32)
    starts = np.cumsum(lengths, axis=1) - lengths
    shapes = [(rows, length, heads, config.head_size) for heads in (config.num_heads, config.num_kv_heads)]
    packed = [jax.random.normal(jax.random.key(i), shapes[i > 0], jnp.bfloat16) for i in range(3)]
    # The same rollouts, each in a row of its own as long as the longest.
    first = (starts + np.arange(rows)[:, None] * length).ravel()
    index = np.minimum(first[:, None] + np.arange(lengths.max()), rows * length - 1)
    alone = [array.reshape(-1, *array.shape[2:])[index] for array in packed]
    own = np.arange(lengths.max()) < lengths.ravel()[:, None]
    scale = config.head_size**-0.5

    def by_rows(*arrays):
        return attend_rows(*arrays, None, kernel="auto", scale=scale)

    def by_xla(*arrays):
        return attend_rows(*arrays, segments, kernel="xla", scale=scale)

    def by_cudnn(*arrays):  # what JAX does not offer in public yet
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        sizes, offsets = jnp.array(lengths, jnp.int32), jnp.array(np.pad(starts, ((0, 0), (0, 1)), constant_values=-1))
        layout = {"q_seqlen": sizes, "kv_seqlen": sizes, "q_offsets": offsets, "kv_offsets": offsets}
        return dot_product_attention(*arrays, **layout, scale=scale, mask_type=MaskType.PADDING_CAUSAL)

    def by_tokamax(*arrays):
        import tokamax

        mask = segments[:, None, :, None] == segments[:, None, None, :]
        return tokamax.dot_product_attention(*arrays, mask=mask, scale=scale, is_causal=True)

    expected = np.asarray(by_xla(*packed), np.float32).reshape(rows * length, -1)[index][own]
    for name, attend, arrays in (
        ("xla, packed", by_xla, packed), ("auto, a row each", by_rows, alone), ("cudnn, packed", by_cudnn, packed),
        ("tokamax, packed", by_tokamax, packed),
    ):  # fmt: skip
        both = jax.jit(
            jax.value_and_grad(lambda *arrays, of=attend: of(*arrays).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        )
        try:
            got = np.asarray(attend(*arrays), np.float32)
            got = got if arrays is alone else got.reshape(rows * length, -1)[index]
            apart = float(np.abs(got.reshape(*index.shape, -1)[own] - expected).max() / np.abs(expected).max())
            _, took = seconds(functools.partial(both, *arrays), repeats=10)
        except Exception as error:  # the next kernel is tried, whatever this one lacks
            show("packed attention", kernel=name, fails=f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            show("packed attention", kernel=name, seconds=took, apart=apart, right=apart < 0.05)


def measure_decoding(config: policy.PolicyConfig, rows: int, prompt: int, new: int) -> None:
    """A slot for every rollout, all of one length."""
    params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), policy.init(config, jax.random.key(0)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tokens = jnp.ones((rows // 8, prompt), jnp.int32)
    prompts = Prompts(tokens, tokens > 0, jnp.arange(rows // 8, dtype=jnp.int32))
    sample = functools.partial(
        rollout.generate, config, params, prompts, jnp.full(rows // 8, 8), max_new_tokens=new, eos_ids=(),
        num_slots=rows,
    )  # fmt: skip
    _, took = seconds(lambda: sample(jax.random.key(1)), repeats=3)
    cached = rollout.sampler.slot_bytes(config, prompt + new) * rows  # all columns are read at every step
    reached = of_limit(new * (size + cached), "bandwidth", took)
    show("decode", rows=rows, tokens_per_second=round(rows * new / took), of_bandwidth=reached)


def measure_update(config: policy.PolicyConfig, rows: int, length: int, *, packed: bool) -> None:
    """One update of rollouts that fill their rows."""
    optimizer = make_optimizer(
        learning_rate=1e-6, warmup_steps=0, decay_steps=0, beta1=0.9, beta2=0.98, weight_decay=0.0, grad_clip=1.0
    )
    state = init_state(config, optimizer, policy.init(config, jax.random.key(0)))
    asked = length // 8
    tokens = jnp.ones((rows, asked), jnp.int32)
    prompts = Prompts(tokens, tokens > 0, jnp.arange(rows, dtype=jnp.int32))
    shape = (rows, length - asked)
    rollouts = Rollouts(
        prompt_index=jnp.arange(rows), sample_index=jnp.zeros(rows, jnp.int32), mask=jnp.ones(rows, bool),
        tokens=jnp.ones(shape, jnp.int32), logps=jnp.zeros(shape), lengths=jnp.full(rows, shape[1]),
        finished=jnp.ones(rows, bool),
    )  # fmt: skip
    update = for_this_backend(
        policy_update, config, optimizer, num_updates=1, micro_tokens=4 * length, packed=packed, temperature=1.0,
        clip_low=0.2, clip_high=0.28, dual_clip=10.0,
    )  # fmt: skip

    def step():
        nonlocal state
        state, metrics = update(state, prompts, rollouts, jnp.ones(rows), jax.random.key(0))
        return metrics

    _, took = seconds(step, repeats=3)
    products = sum(leaf.size for leaf in jax.tree.leaves(state.params["blocks"]))  # norms are nothing beside them
    attention = 2 * config.num_layers * config.num_heads * config.head_size * length  # causal: half of the keys
    operations = 6 * (products + config.vocab_size * config.embed_size) + 3 * attention
    reached = of_limit(rows * length * operations, "flops", took)
    show("update", packed=packed, tokens_per_second=round(rows * length / took), of_peak=reached)


if __name__ == "__main__":
    main()
