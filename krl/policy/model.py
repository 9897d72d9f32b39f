"""The decoder: a Flax Linen module behind pure functions, with an explicit key/value cache.

The architecture is the common one of Llama and Qwen: pre-norm blocks with RMS norms, rotary
positions, grouped-query attention and a gated SiLU unit; layers are scanned. Parameters are float32
and compute runs in `PolicyConfig.dtype`; norms, softmax and log-probabilities are float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from krl.sharding import constrain


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Sizes of the decoder; hashable, so that it can be a static argument."""

    vocab_size: int  # V
    embed_size: int = 64  # E
    num_layers: int = 2  # L
    num_heads: int = 4  # H
    num_kv_heads: int = 2  # K, divides H
    head_size: int = 16  # Q, even
    mlp_size: int = 256
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    dtype: str = "float32"  # of the computation; "bfloat16" on accelerators
    unroll: int = 1  # layers per iteration of the scan; more is faster for few small layers
    remat: bool = False  # recompute each layer in the backward pass

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} must be even for rotary positions")


class Cache(struct.PyTreeNode):
    """Keys and values of the tokens seen so far; every row has used the same number of columns."""

    keys: jax.Array  # [L, B, C, K, Q] in the compute dtype
    values: jax.Array  # [L, B, C, K, Q]
    mask: jax.Array  # [B, C] bool, True where a real token was written
    used: jax.Array  # [] int32, columns written


@functools.partial(jax.jit, static_argnames="config")
def init(config: PolicyConfig, key: jax.Array) -> dict:
    """Fresh float32 parameters. The key is consumed."""
    return nn.meta.unbox(_init_boxed(config, key))


def param_axes(config: PolicyConfig) -> dict:
    """The logical axis names of every parameter: the tree of `init` with PartitionSpec leaves."""
    return nn.get_partition_spec(jax.eval_shape(functools.partial(_init_boxed, config), jax.random.key(0)))


@functools.partial(jax.jit, static_argnames="config")
def apply(config: PolicyConfig, params: dict, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Next-token logits of whole sequences.

    Args:
        config: the decoder's sizes.
        params: from `init`.
        tokens: [B, T] int32.
        mask: [B, T] bool, True on real tokens, which may be padded on either side; None means all.

    Returns:
        [B, T, V] float32; undefined where the mask is False.
    """
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    return _logits(config, params, _hidden(config, params, tokens, mask))


def init_cache(config: PolicyConfig, rows: int, columns: int) -> Cache:
    """An empty cache for B = rows sequences of up to C = columns tokens, padding counted."""
    shape = (config.num_layers, rows, columns, config.num_kv_heads, config.head_size)
    return Cache(
        keys=jnp.zeros(shape, config.dtype),
        values=jnp.zeros(shape, config.dtype),
        mask=jnp.zeros((rows, columns), bool),
        used=jnp.int32(0),
    )


@functools.partial(jax.jit, static_argnames="config")
def decode(
    config: PolicyConfig, params: dict, tokens: jax.Array, mask: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Read T more tokens of every row and predict the one after.

    Args:
        config: the decoder's sizes.
        params: from `init`.
        tokens: [B, T] int32; a whole prompt (prefill) or one token (a decode step).
        mask: [B, T] bool, True on real tokens; the last column is the one that predicts.
        cache: with at least T free columns.

    Returns:
        (logits [B, V] float32 after the last column, the cache with T more columns used).
    """
    written = jax.lax.dynamic_update_slice(cache.mask, mask, (0, cache.used))
    positions = _positions(mask) + cache.mask.sum(axis=1, keepdims=True, dtype=jnp.int32)
    columns = jnp.arange(cache.mask.shape[1])
    past = columns[None, :] <= cache.used + jnp.arange(tokens.shape[1])[:, None]
    visible = past[None] & written[:, None, :]
    hidden, keys, values = _decoder(config, params, tokens, positions, visible, cache.keys, cache.values, cache.used)
    cache = Cache(keys=keys, values=values, mask=written, used=cache.used + tokens.shape[1])
    return _logits(config, params, hidden[:, -1]), cache


@functools.partial(jax.jit, static_argnames=("config", "start", "chunk"))
def token_logps(
    config: PolicyConfig,
    params: dict,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    start: int = 1,
    temperature: jax.Array | float = 1.0,
    chunk: int = 128,
) -> jax.Array:
    """Log-probability of each token given those before it.

    Logits exist for `chunk` positions at a time and are computed again in the backward pass, so no
    [B, T, V] array is ever made.

    Args:
        config: the decoder's sizes.
        params: from `init`.
        tokens: [B, T] int32.
        mask: [B, T] bool, True on real tokens; None means all.
        start: the first position to score, >= 1 because nothing predicts position 0; static.
        temperature: the logits are divided by it, > 0.
        chunk: positions whose logits are alive at a time, static.

    Returns:
        [B, T - start] float32, nats: column j scores tokens[:, start + j]. Undefined where the mask
        is False.
    """
    if not 1 <= start <= tokens.shape[1]:
        raise ValueError(f"start must be in [1, T={tokens.shape[1]}], got {start}")
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    hidden = _hidden(config, params, tokens, mask)[:, start - 1 : -1]
    targets = tokens[:, start:]

    def score(hidden, targets):
        logits = _logits(config, params, hidden) / temperature
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    rows, length = targets.shape
    if length <= chunk:
        return score(hidden, targets)
    padding = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(rows, -1, chunk, hidden.shape[-1])
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(rows, -1, chunk)
    by_chunk = (hidden.swapaxes(0, 1), targets.swapaxes(0, 1))
    logps = jax.lax.map(lambda pair: jax.checkpoint(score)(*pair), by_chunk)
    return logps.swapaxes(0, 1).reshape(rows, -1)[:, :length]


def _init_boxed(config: PolicyConfig, key: jax.Array) -> dict:
    tokens = jnp.zeros((1, 2), jnp.int32)
    visible = jnp.ones((1, 2, 2), bool)
    return Decoder(config).init(key, tokens, tokens, visible)["params"]


def _positions(mask: jax.Array) -> jax.Array:
    """[B, T] int32: each real token's index among the real tokens of its row."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def _hidden(config: PolicyConfig, params: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    visible = causal[None] & mask[:, None, :]
    return _decoder(config, params, tokens, _positions(mask), visible)[0]


def _decoder(config: PolicyConfig, params: dict, *inputs) -> Any:
    return Decoder(config).apply({"params": params}, *inputs)


def _logits(config: PolicyConfig, params: dict, hidden: jax.Array) -> jax.Array:
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    return jnp.matmul(hidden, head.astype(config.dtype), preferred_element_type=jnp.float32)


def _rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al., arXiv 2104.09864) on the halves of each head: [B, T, H, Q]."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Norm(nn.Module):
    """RMS norm over the last axis, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale * weight).astype(x.dtype)


class Block(nn.Module):
    """One decoder layer; the carry holds the residual stream and, when decoding, the whole cache."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, carry, layer, positions, visible, used):
        x, keys, values = carry
        attention, keys, values = self._attention(x, keys, values, layer, positions, visible, used)
        x = constrain(x + attention, "batch", "length", None)
        x = constrain(x + self._mlp(x), "batch", "length", None)
        return (x, keys, values), None

    def _weight(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], inputs: int) -> jax.Array:
        initial = nn.initializers.truncated_normal(inputs**-0.5)
        weight: Any = self.param(name, nn.with_logical_partitioning(initial, axes), shape)
        return weight.astype(self.config.dtype)

    def _attention(self, x, keys, values, layer, positions, visible, used):
        c = self.config
        x = Norm(c.norm_epsilon, name="attention_norm")(x)
        wide, narrow = (c.embed_size, c.num_heads, c.head_size), (c.embed_size, c.num_kv_heads, c.head_size)
        query = jnp.einsum("bte,ehq->bthq", x, self._weight("query", wide, ("embed", "heads", "head"), c.embed_size))
        key = jnp.einsum("bte,ekq->btkq", x, self._weight("key", narrow, ("embed", "kv_heads", "head"), c.embed_size))
        value = jnp.einsum(
            "bte,ekq->btkq", x, self._weight("value", narrow, ("embed", "kv_heads", "head"), c.embed_size)
        )
        query, key = _rotate(query, positions, c.rope_theta), _rotate(key, positions, c.rope_theta)
        if keys is not None:
            # The cache rides in the carry so that each layer writes its columns in place.
            keys = jax.lax.dynamic_update_slice(keys, key[None], (layer, 0, used, 0, 0))
            values = jax.lax.dynamic_update_slice(values, value[None], (layer, 0, used, 0, 0))
            key, value = keys[layer], values[layer]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])
        output = self._weight(
            "output", (c.num_heads, c.head_size, c.embed_size), ("heads", "head", "embed"), c.num_heads * c.head_size
        )
        return jnp.einsum("bthq,hqe->bte", mixed, output), keys, values

    def _mlp(self, x):
        c = self.config
        x = Norm(c.norm_epsilon, name="mlp_norm")(x)
        gate = x @ self._weight("gate", (c.embed_size, c.mlp_size), ("embed", "mlp"), c.embed_size)
        up = x @ self._weight("up", (c.embed_size, c.mlp_size), ("embed", "mlp"), c.embed_size)
        return (nn.silu(gate) * up) @ self._weight("down", (c.mlp_size, c.embed_size), ("mlp", "embed"), c.mlp_size)


class Decoder(nn.Module):
    """Embedding, scanned blocks, final norm; the output head is applied outside, where it is needed."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, tokens, positions, visible, keys: Any = None, values: Any = None, used: Any = None):
        c = self.config
        initial = nn.with_logical_partitioning(nn.initializers.normal(c.embed_size**-0.5), ("vocab", "embed"))
        embedding: Any = self.param("embedding", initial, (c.vocab_size, c.embed_size))
        if not c.tie_embeddings:
            initial = nn.with_logical_partitioning(nn.initializers.normal(c.embed_size**-0.5), ("embed", "vocab"))
            self.param("head", initial, (c.embed_size, c.vocab_size))
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False) if c.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=c.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x = constrain(embedding[tokens].astype(c.dtype), "batch", "length", None)
        carry = (x, keys, values)
        (x, keys, values), _ = blocks(c, name="blocks")(carry, jnp.arange(c.num_layers), positions, visible, used)
        return Norm(c.norm_epsilon, name="final_norm")(x), keys, values
