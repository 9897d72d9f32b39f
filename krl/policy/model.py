"""The decoder: a Flax Linen module behind pure functions, with an explicit key/value cache.

One module covers the families of docs/models.md: blocks of grouped-query attention and a gated unit with RMS norms and
rotary positions, and what these families add to it as options of `PolicyConfig`. Layers are scanned over whole rows and
unrolled over a cache; what tells them apart is data (`Layer`). Parameters are float32 and compute runs in
`PolicyConfig.dtype`; norms, softmax, rotations and log-probabilities are float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from krl.base.sharding import constrain, tree_sharding
from krl.base.types import Layout, Segments
from krl.policy import lora
from krl.policy.attention import attend_cached, attend_rows
from krl.policy.config import ACTIVATIONS, REMAT, PolicyConfig
from krl.policy.experts import Experts, apply_experts, balanced
from krl.policy.rotary import Rotations, frequencies, rotate
from krl.policy.scores import Options, token_scores


class Cache(struct.PyTreeNode):
    """Keys and values of tokens read before, and where in its sequence each of them stands.

    Every layer has arrays of its own: a slice of one array for all layers would be copied at every step.
    """

    keys: tuple[jax.Array, ...]  # L arrays [B, K, C, Q] in the compute dtype
    values: tuple[jax.Array, ...]  # the same
    positions: jax.Array  # [B, C] int32, -1 where a column holds nothing


@functools.partial(jax.jit, static_argnames="config")
def init(config: PolicyConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, with adapters if the config has any: see `adapt`. The key is consumed."""
    params: dict[str, Any] = nn.meta.unbox(_init_boxed(dataclasses.replace(config, lora=None), key))
    return adapt(config, params, key) if config.lora else params


@functools.partial(jax.jit, static_argnames="config")
def adapt(config: PolicyConfig, params: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """The parameters of a policy with fresh adapters beside them, with which it computes what it did.

    Args:
        config: with lora.
        params: float32, of the policy without adapters; what is frozen becomes of the compute dtype, but for norms.
        key: of the adapters.
    """
    fresh: dict[str, Any] = nn.meta.unbox(_init_boxed(config, key))
    kept = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, lora.frozen(config, fresh))
    return lora.join(kept, lora.trained(config, fresh))


def kept_dtype(config: PolicyConfig) -> Any:
    """The type of parameters that are neither norms nor adapters: what is frozen needs no more than compute takes."""
    return jnp.dtype(config.dtype) if config.lora else jnp.float32


@functools.cache  # it traces the whole decoder, and set-up and updates ask several times
def param_axes(config: PolicyConfig) -> dict[str, Any]:
    """The logical axis names of every parameter: the tree of `init` with PartitionSpec leaves, not to be changed."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0))))


def abstract_params(config: PolicyConfig, mesh: Mesh) -> dict[str, Any]:
    """The shapes, dtypes and shardings of the parameters, for a checkpoint to be read into."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    shardings = tree_sharding(mesh, param_axes(config), shapes)
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings)


@functools.partial(jax.jit, static_argnames="config")
def apply(
    config: PolicyConfig,
    params: dict[str, Any],
    tokens: jax.Array,
    mask: jax.Array | None = None,
    segments: Layout = None,
) -> jax.Array:
    """Next-token logits of whole rows.

    Args:
        config: the decoder's sizes.
        params: from `init` or `krl.hf.load_hf`.
        tokens: [B, T] int32.
        mask: [B, T] bool, True on the real tokens of a row, which lie together and may be padded on
            both sides; None means all.
        segments: [B, T] int32 in place of the mask, for rows packed with several sequences: each is a
            run of columns with a number of its own in the row, and padding has number 0. Or `Segments`.

    With config.balance gradients also hold that of the loss that balances experts, whatever is made of the result:
    see `krl.policy.experts.balanced`.

    Returns:
        [B, T, V] float32; undefined on padding.
    """
    hidden, back = _hidden(config, params, tokens, mask, segments)
    return _logits(config, params, back(hidden))


def init_cache(config: PolicyConfig, rows: int, columns: int) -> Cache:
    """An empty cache for B = rows sequences of up to C = columns tokens each."""
    shape = (rows, config.num_kv_heads, columns, config.head_size)
    empty = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))
    return Cache(keys=empty, values=empty, positions=jnp.full((rows, columns), -1, jnp.int32))


def for_decoding(config: PolicyConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as `decode` reads them: adapters merged, in the compute dtype but for norms, apart for each layer.

    Args:
        config: the decoder's sizes.
        params: from `init` or `krl.hf.load_hf`.
    """

    def cast(leaf: jax.Array) -> jax.Array:
        return leaf if leaf.ndim == 1 else leaf.astype(config.dtype)

    def of_layer(layer: int) -> dict[str, Any]:
        block = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])
        return jax.tree.map(cast, lora.merge_layer(config, block, jnp.dtype(config.dtype)))

    layers = tuple(of_layer(layer) for layer in range(config.num_layers))
    return jax.tree.map(cast, {name: part for name, part in params.items() if name != "blocks"}) | {"blocks": layers}


@functools.partial(jax.jit, static_argnames="config")
def decode(
    config: PolicyConfig,
    params: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    column: jax.Array | int,
) -> tuple[jax.Array, Cache]:
    """Read T more tokens of every row and predict the one after.

    A token sees those of its row that the cache holds up to its own position, in whatever columns.

    Args:
        config: the decoder's sizes.
        params: from `for_decoding`.
        tokens: [B, T] int32; a whole prompt (prefill) or one token (a decode step).
        positions: [B, T] int32, where each token stands in its row's sequence; -1 for padding.
        cache: what came before.
        column: [] int32, the first of the T columns that are written, the same for all rows.

    Returns:
        (logits [B, V] float32 after the last token, the cache with it); undefined after padding.
    """
    hidden, cache = read(config, params, tokens, positions, cache, column)
    return _logits(config, params, hidden[:, -1]), cache


def read(
    config: PolicyConfig,
    params: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    column: jax.Array | int,
) -> tuple[jax.Array, Cache]:
    """`decode` without its prediction: (hidden states [B, T, E], the cache)."""
    held = jax.lax.dynamic_update_slice(cache.positions, positions, (0, column))
    behind = positions[:, :, None] - held[:, None, :]
    visible = (behind >= 0) & (held >= 0)[:, None, :]
    recent = visible & (behind < config.window)
    x: Any = _embed(config, params["embedding"], tokens)
    written: list[Any] = []
    for number, block in enumerate(params["blocks"]):
        layer = jax.tree.map(lambda kinds, at=number: kinds[at], layers(config))
        stored = (cache.keys[number], cache.values[number], column, recent if layer.slides else visible)
        applied: Any = Block(config).apply({"params": block}, x, layer, positions, None, stored)
        x, columns = applied
        written.append(columns)
    hidden: Any = Norm(config).apply({"params": params["final_norm"]}, x)
    keys, values = zip(*written, strict=True)
    return _scaled(hidden, 1 / config.logit_divisor), Cache(keys=keys, values=values, positions=held)


@functools.partial(jax.jit, static_argnames=("config", "start", "chunk", "entropy"))
def token_logps(
    config: PolicyConfig,
    params: dict[str, Any],
    tokens: jax.Array,
    mask: jax.Array | None = None,
    segments: Layout = None,
    *,
    start: int = 1,
    temperature: jax.Array | float = 1.0,
    chunk: int = 128,
    entropy: bool = False,
    wanted: jax.Array | None = None,
) -> Any:
    """Log-probability of each token given those before it.

    Logits exist for about `chunk` tokens at a time and are computed again in the backward pass, so no
    [B, T, V] array is ever made. With config.balance gradients also hold that of the loss that balances experts,
    whatever is made of the result: see `krl.policy.experts.balanced`.

    Args:
        config: the decoder's sizes.
        params: from `init` or `krl.hf.load_hf`.
        tokens: [B, T] int32.
        mask, segments: as for `apply`. The first token of a packed sequence has no meaningful score.
        start: the first position to score, >= 1 because nothing predicts position 0; static.
        temperature: the logits are divided by it, > 0.
        chunk: tokens, over all rows of a device, whose logits are alive at a time; static.
        entropy: also return the entropy of the distribution that each token was drawn from; static.
        wanted: [B, T] bool, the tokens whose scores are used; None for all. The fewer, the faster.

    Returns:
        [B, T - start] float32, nats: column j scores tokens[:, start + j]. Undefined on padding and where not wanted.
        With `entropy`, a pair of two such arrays: (log-probabilities, entropies).

    Raises:
        ValueError: start is not in [1, T].
    """
    if not 1 <= start <= tokens.shape[1]:
        raise ValueError(f"start must be in [1, T={tokens.shape[1]}], got {start}")
    hidden, back = _hidden(config, params, tokens, mask, segments)
    if isinstance(segments, Segments):  # in float32, for the sum of the gradients of all responses to a prompt
        hidden = jnp.take_along_axis(hidden.astype(jnp.float32), segments.previous()[:, start:, None], axis=1)
    else:
        hidden = back(hidden)[:, start - 1 : -1]
    options = Options(softcap=config.logit_softcap, vocab_first=config.tie_embeddings, entropy=entropy)
    logps, entropies = token_scores(
        hidden.astype(config.dtype), _head(config, params), tokens[:, start:], options, temperature=temperature,
        chunk=chunk, wanted=None if wanted is None else wanted[:, start:],
    )  # fmt: skip
    return (logps, entropies) if entropy else logps


def _init_boxed(config: PolicyConfig, key: jax.Array) -> dict[str, Any]:
    tokens = jnp.zeros((1, 2), jnp.int32)
    config = dataclasses.replace(config, attention="xla")  # no kernel is too choosy for two tokens
    return Decoder(config).init(key, tokens, tokens)["params"]


def _hidden(
    config: PolicyConfig, params: dict[str, Any], tokens: jax.Array, mask: jax.Array | None, segments: Layout
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Hidden states [B, T, E] in some order of columns, and the function that restores the order."""
    positions = columns = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if isinstance(segments, Segments):
        positions = jnp.where(segments.number > 0, segments.position, -1)
    elif segments is not None:
        first = jnp.diff(segments, axis=1, prepend=-1) != 0
        positions = jnp.where(segments > 0, columns - jax.lax.cummax(jnp.where(first, columns, 0), axis=1), -1)
    elif mask is not None:
        # A row that starts in column 0 needs no mask but the causal one, which every kernel has.
        roll = jax.vmap(functools.partial(jnp.roll, axis=0))
        starts = jnp.argmax(mask, axis=1)
        positions = jnp.where(roll(mask, -starts), columns, -1)
        return _decoder(config, params, roll(tokens, -starts), positions), lambda hidden: roll(hidden, starts)
    return _decoder(config, params, tokens, positions, segments), lambda hidden: hidden


def _decoder(config: PolicyConfig, params: dict[str, Any], *inputs: Any) -> Any:
    return Decoder(config).apply({"params": params}, *inputs)


def _embed(config: PolicyConfig, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    return _scaled(embedding[tokens].astype(config.dtype), config.embedding_scale)


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a number of x's type; nothing is computed for one."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def _head(config: PolicyConfig, params: dict[str, Any]) -> jax.Array:
    """[V, E] where embeddings are tied, else [E, V], in the compute dtype."""
    return params["embedding" if config.tie_embeddings else "head"].astype(config.dtype)


def _logits(config: PolicyConfig, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    equation = "...e,ve->...v" if config.tie_embeddings else "...e,ev->...v"
    logits = jnp.einsum(equation, hidden, _head(config, params), preferred_element_type=jnp.float32)
    cap = config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits


class Layer(NamedTuple):
    """What tells a layer from the others but its weights; of one layer or, stacked, of all L."""

    slides: Any  # [...] bool
    rotations: Rotations


@functools.cache
def layers(config: PolicyConfig) -> Layer:
    """The kinds of all layers, as NumPy arrays."""
    size, none = config.rotary_size or config.head_size, (False,) * config.num_layers

    def rotation(slides: bool, still: bool) -> tuple[np.ndarray, float]:
        theta = config.sliding_rope_theta if slides and config.sliding_rope_theta else config.rope_theta
        scaling = config.rope_scaling if config.scale_sliding or not slides else None
        turning, magnitude = frequencies(size, theta, scaling)
        return (0 * turning, 1.0) if still else (turning, magnitude)

    sliding = config.sliding or none
    turning, magnitudes = zip(*map(rotation, sliding, config.unrotated or none), strict=True)
    scale = np.array(magnitudes, np.float32) if set(magnitudes) != {1.0} else None
    return Layer(np.array(sliding), Rotations(np.array(turning, np.float32), scale))


class Norm(nn.Module):
    """RMS norm over the last axis, in float32."""

    config: PolicyConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        plus_one = self.config.norm_plus_one
        initial = nn.with_logical_partitioning(nn.initializers.constant(0.0 if plus_one else 1.0), (self.axis,))
        weight: Any = self.param("weight", initial, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.config.norm_epsilon)
        return (wide * scale * (1 + weight if plus_one else weight)).astype(x.dtype)


class Block(nn.Module):
    """One decoder layer, over whole rows or over what a cache holds."""

    config: PolicyConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: Layer, positions: jax.Array, segments: Layout, stored: Any = None
    ) -> tuple[jax.Array, Any]:
        """(x, None), or (x, (keys, values)) with stored = (keys, values, column to write, visible [B, T, C])."""
        c = self.config
        normed = Norm(c, name="attention_norm")(x) if c.pre_norms else x
        query, key, value = self._heads(normed, layer.rotations, positions)
        if stored is None:
            mixed = self._attend(query, key, value, layer.slides, segments)
        else:
            keys, values, column, visible = stored
            keys = jax.lax.dynamic_update_slice(keys, key.swapaxes(1, 2), (0, 0, column, 0))
            values = jax.lax.dynamic_update_slice(values, value.swapaxes(1, 2), (0, 0, column, 0))
            mixed = attend_cached(query, keys, values, visible, scale=self._scale(), softcap=c.attention_softcap)
            stored = (keys, values)
        shape = (c.num_heads, c.head_size, c.embed_size)
        attended = self._times(mixed, "output", shape, ("heads", "head", "embed"), inputs=2)
        attended = Norm(c, name="attention_post_norm")(attended) if c.post_norms else attended
        x = constrain(x + _scaled(attended, c.residual_scale), "batch", "length", None)
        fed = self._mlp(Norm(c, name="mlp_norm")(x) if c.pre_norms else x, positions)
        fed = Norm(c, name="mlp_post_norm")(fed) if c.post_norms else fed
        return constrain(x + _scaled(fed, c.residual_scale), "batch", "length", None), stored

    def _weight(
        self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], deviation: float, kept: Any
    ) -> Any:
        initial = nn.initializers.truncated_normal(deviation) if deviation else nn.initializers.zeros
        weight: Any = self.param(name, nn.with_logical_partitioning(initial, axes), shape, kept)
        return weight.astype(self.config.dtype)

    def _times(
        self, x: jax.Array, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], inputs: int = 1
    ) -> jax.Array:
        """x times a weight whose first `inputs` axes are x's last ones, and what its adapter adds if there is one."""
        size, adapter = math.prod(shape[:inputs]), self.config.lora
        product = jnp.tensordot(x, self._weight(name, shape, axes, size**-0.5, kept_dtype(self.config)), inputs)
        if not adapter or name not in adapter.modules:
            return product
        if not self.is_initializing() and not self.has_variable("params", name + lora.A):
            return product
        first, last = (*shape[:inputs], adapter.rank), (adapter.rank, *shape[inputs:])
        # The variance of A is that of PEFT, and with a B of zeros the policy begins as it is.
        into = self._weight(name + lora.A, first, (*axes[:inputs], "rank"), (3 * size) ** -0.5, jnp.float32)
        out = self._weight(name + lora.B, last, ("rank", *axes[inputs:]), 0.0, jnp.float32)
        return product + adapter.scale * jnp.tensordot(jnp.tensordot(x, into, inputs), out, 1)

    def _heads(
        self, x: jax.Array, rotations: Rotations, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, H, Q] and keys, and values, [B, T, K, Q]."""
        c = self.config

        def project(name: str, heads: int, axis: str) -> jax.Array:
            shape, axes = (c.embed_size, heads, c.head_size), ("embed", axis, "head")
            projected = self._times(x, name, shape, axes)
            if c.qkv_bias:
                projected = projected + self._weight(f"{name}_bias", shape[1:], axes[1:], 0.0, kept_dtype(c))
            return projected

        query, key = project("query", c.num_heads, "heads"), project("key", c.num_kv_heads, "kv_heads")
        value = project("value", c.num_kv_heads, "kv_heads")
        if c.qk_norm:
            query, key = self._norm_heads(query, "query", "heads"), self._norm_heads(key, "key", "kv_heads")
        return rotate(query, positions, rotations), rotate(key, positions, rotations), value

    def _norm_heads(self, x: jax.Array, name: str, axis: str) -> jax.Array:
        if not self.config.joint_qk_norm:
            return Norm(self.config, "head", name=f"{name}_norm")(x)
        return Norm(self.config, axis, name=f"{name}_norm")(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def _scale(self) -> float:
        return self.config.attention_scale or self.config.head_size**-0.5

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, slides: jax.Array | bool, segments: Layout
    ) -> jax.Array:
        c = self.config

        def with_window(window: int) -> Callable[..., jax.Array]:
            return functools.partial(
                attend_rows, kernel=c.attention, scale=self._scale(), softcap=c.attention_softcap, window=window
            )

        if any(c.sliding) and not all(c.sliding):
            return jax.lax.cond(slides, with_window(c.window), with_window(0), query, key, value, segments)
        return with_window(c.window if any(c.sliding) else 0)(query, key, value, segments)

    def _mlp(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        c = self.config
        if c.experts:
            return self._experts(x, positions, c.experts)
        gate, up = (self._times(x, name, (c.embed_size, c.mlp_size), ("embed", "mlp")) for name in ("gate", "up"))
        return self._times(ACTIVATIONS[c.activation](gate) * up, "down", (c.mlp_size, c.embed_size), ("mlp", "embed"))

    def _experts(self, x: jax.Array, positions: jax.Array, experts: Experts) -> jax.Array:
        c, count = self.config, experts.count
        scores = self._times(x, "router", (c.embed_size, count), ("embed", None)).astype(jnp.float32)
        scores = jax.nn.softmax(scores)
        if c.balance:
            scores = balanced(experts, c.balance / c.num_layers, scores, positions >= 0)
        into, out = (count, c.embed_size, c.mlp_size), (count, c.mlp_size, c.embed_size)
        gate, up = (
            self._weight(name, into, ("expert", "embed", None), into[1] ** -0.5, kept_dtype(c))
            for name in ("gate", "up")
        )
        down = self._weight("down", out, ("expert", None, "embed"), out[1] ** -0.5, kept_dtype(c))
        return apply_experts(experts, x, scores, gate, up, down, ACTIVATIONS[c.activation])


class Decoder(nn.Module):
    """Embedding, scanned blocks, final norm; the output head is applied outside, where it is needed."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, segments: Layout = None) -> jax.Array:
        c = self.config
        initial = nn.with_logical_partitioning(nn.initializers.normal(c.embed_size**-0.5), ("vocab", "embed"))
        kept = kept_dtype(c)
        embedding: Any = self.param("embedding", initial, (c.vocab_size, c.embed_size), kept)
        if not c.tie_embeddings:
            initial = nn.with_logical_partitioning(nn.initializers.normal(c.embed_size**-0.5), ("embed", "vocab"))
            self.param("head", initial, (c.embed_size, c.vocab_size), kept)
        policy = REMAT[c.remat]
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=policy) if policy else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=c.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x = constrain(_embed(c, embedding, tokens), "batch", "length", None)
        kinds: Any = jax.tree.map(jnp.array, layers(c))
        x, _ = blocks(c, name="blocks")(x, kinds, positions, segments)
        return _scaled(Norm(c, name="final_norm")(x), 1 / c.logit_divisor)
