"""A policy, prompts and rollouts small enough to compile in seconds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from krl import policy
from krl.base.types import Prompts, Rollouts
from krl.rollout import sampler

CONFIG = policy.PolicyConfig(
    vocab_size=16, embed_size=8, num_layers=2, num_heads=4, num_kv_heads=2, head_size=4, mlp_size=16
)
EOS = (1,)

# What undoes the quick compilations of tests, for those that look at the compiled program or compare it.
AS_FOR_USERS: dict[str, int | bool] = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if jax.__version_info__ < (0, 11):  # later ones have no other emitters and do not know this
    AS_FOR_USERS["xla_cpu_use_fusion_emitters"] = True


def slow(*values):
    """A case of `parametrize` that `make slow` tries and `make test` does not."""
    return pytest.param(*values, marks=pytest.mark.slow)


def params(seed: int = 0, config: policy.PolicyConfig = CONFIG) -> dict:
    """Random parameters, larger than a fresh model's so that logits differ clearly."""
    return jax.tree.map(lambda leaf: 2.0 * leaf, policy.init(config, jax.random.key(seed)))


def prompts(lengths=(3, 1, 5, 4), seed: int = 0) -> Prompts:
    """Left-padded prompts of the given lengths; task ids are 10, 11, ..."""
    rng = np.random.default_rng(seed)
    width = max(lengths)
    mask = np.arange(width)[None, :] >= width - np.array(lengths)[:, None]
    tokens = np.where(mask, rng.integers(3, 16, mask.shape), 0)
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), 10 + jnp.arange(len(lengths), dtype=jnp.int32))


def rollouts(prompt_index, length: int = 4, seed: int = 0, num_prompts: int = 4) -> Rollouts:
    """Random responses; rows whose prompt index is num_prompts are padding."""
    rng = np.random.default_rng(seed)
    index = np.asarray(prompt_index)
    mask = index < num_prompts
    lengths = np.where(mask, rng.integers(1, length + 1, index.shape), 0)
    real = np.arange(length)[None, :] < lengths[:, None]
    return Rollouts(
        prompt_index=jnp.asarray(index, jnp.int32),
        sample_index=jnp.zeros(index.shape, jnp.int32),
        mask=jnp.asarray(mask),
        tokens=jnp.asarray(np.where(real, rng.integers(3, 16, real.shape), 0), jnp.int32),
        logps=jnp.asarray(np.where(real, rng.uniform(-4, -1, real.shape), 0), jnp.float32),
        lengths=jnp.asarray(lengths, jnp.int32),
        finished=jnp.asarray(mask),
    )


def sampler_programs() -> int:
    """How many programs the sampler has compiled and still has."""
    return sum(program._cache_size() for program in sampler.PROGRAMS.values())
