"""Attention by backend: cuDNN on GPUs for rows that are not packed, the splash kernel on TPUs, XLA everywhere else.

All compute softmax(cap(scale q k)) v over the keys a query may see: those of its own segment, at or
before its own position, and fewer than `window` positions back where a layer slides.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from krl.base.sharding import open_axes, partition_spec
from krl.base.types import Layout, Segments

KERNELS = ("auto", "xla", "cudnn", "splash")
_STEP = 128  # queries at a time, of rows up to _BLOCK, each part with the keys up to its last query alone
_BLOCK = 512  # queries whose attention XLA computes at a time
_NOTHING = -1e30  # a logit that leaves a key no weight
_LANES = 128  # the width of a TPU register: splash blocks and heads come in multiples of it


def attend_rows(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: Layout,
    *,
    kernel: str,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> jax.Array:
    """Causal attention within whole rows.

    Args:
        query: [B, T, H, Q].
        key, value: [B, T, K, Q] of the same dtype; K divides H.
        segments: [B, T] int32, tokens see only those of their own number; None if every row is one
            sequence that starts in column 0 (what follows its end is never seen from inside it). Or `Segments`.
        kernel: one of KERNELS, static; "auto" takes the fastest that this backend and these shapes allow.
        scale: the logits are multiplied by it.
        softcap: logits become softcap * tanh(logits / softcap); 0 for none.
        window: how many positions a token sees, its own counted; 0 for all before it.

    Returns:
        [B, T, H, Q] of the query's dtype; softmax is float32.

    Raises:
        ValueError: a named kernel that cannot compute this; the message says why.
    """
    if kernel == "auto":
        wanted = {"gpu": _on_nvidia(), "tpu": "splash"}.get(jax.default_backend(), "xla")
        kernel = "xla" if why_not(wanted, query, segments, softcap) else wanted
    reason = why_not(kernel, query, segments, softcap)
    if reason:
        raise ValueError(f"policy.attention={kernel!r} cannot be used: {reason}; take 'auto'")
    if kernel == "splash":
        assert not isinstance(segments, Segments)
        return splash(query, key, value, segments, scale=scale, softcap=softcap, window=window)
    if kernel == "cudnn":
        local = (window - 1, 0) if window else None
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
        )
    return _attend_by_xla(query, key, value, segments, scale=scale, softcap=softcap, window=window)


def _on_nvidia() -> str:
    """ "cudnn" where it has attention: on NVIDIA's GPUs from compute capability 8.0 on; else "xla"."""
    device = jax.devices()[0]
    cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return "cudnn" if cuda and float(device.compute_capability) >= 8 else "xla"


def _attend_by_xla(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: Layout, *, scale: float, softcap: float, window: int
) -> jax.Array:
    """`attend_rows` by products and a softmax; logits are made for so many queries at a time."""
    columns = jnp.arange(query.shape[1])
    keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)

    def attend(query: jax.Array, query_columns: jax.Array, mine: Any, seen: int = query.shape[1]) -> jax.Array:
        """Of some queries to the first `seen` keys."""
        theirs = jax.tree.map(lambda part: part[:, None, :seen], segments)
        behind = query_columns[:, :, None] - columns[:seen]
        visible = behind >= 0
        if isinstance(segments, Segments):
            visible &= mine.number[:, :, None] == theirs.number
            visible &= (theirs.branch == 0) | (mine.branch[:, :, None] == theirs.branch)
            behind = mine.position[:, :, None] - theirs.position
        elif segments is not None:
            visible &= mine[:, :, None] == theirs
        visible = visible & (behind < window) if window else visible
        bias = jax.lax.optimization_barrier(jnp.where(visible, 0.0, _NOTHING))  # else it is made again for every head
        hide = lambda logits: logits + bias[:, None, None]  # noqa: E731
        return _attend(query, keys[:, :, :seen], values[:, :, :seen], hide, scale, softcap)

    length = query.shape[1]
    if length > _BLOCK:
        return _in_blocks(attend, query, columns[None], segments)
    parts = []
    for begin in range(0, max(length, 1), _STEP):
        end = min(begin + _STEP, length)
        mine = jax.tree.map(lambda part, at=slice(begin, end): part[:, at], segments)
        parts.append(attend(query[:, begin:end], columns[None, begin:end], mine, seen=end))
    return jnp.concatenate(parts, axis=1)


def attend_cached(
    query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, *, scale: float, softcap: float = 0.0
) -> jax.Array:
    """Attention to a key/value cache, by XLA, which reads it as it lies there: transposed copies would cost more.

    Args:
        query: [B, T, H, Q].
        keys, values: [B, K, C, Q].
        visible: [B, T, C] bool, True where a query may see a key.
        scale, softcap: as for `attend_rows`.

    Returns:
        [B, T, H, Q]; an average of all values where a query sees nothing.
    """

    def attend(query: jax.Array, visible: jax.Array) -> jax.Array:
        hide = lambda logits: jnp.where(visible[:, None, None], logits, _NOTHING)  # noqa: E731
        return _attend(query, keys, values, hide, scale, softcap)

    return _in_blocks(attend, query, visible)


def _attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    hide: Callable[[jax.Array], jax.Array],
    scale: float,
    softcap: float,
) -> jax.Array:
    """Attention of [B, T, H, Q] queries to [B, K, C, Q] keys and values; hide masks logits [B, K, H / K, T, C]."""
    rows, length, heads, size = query.shape
    kv_heads, columns = keys.shape[1:3]
    grouped = query.reshape(rows, length, kv_heads, -1, size).transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, size)
    logits = jnp.einsum("bknq,bkcq->bknc", grouped, keys, preferred_element_type=jnp.float32) * scale
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    logits = hide(logits.reshape(rows, kv_heads, -1, length, columns))
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype).reshape(rows, kv_heads, -1, columns)
    mixed = jnp.einsum("bknc,bkcq->bknq", weights, values).reshape(rows, kv_heads, -1, length, size)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, size)


def _in_blocks(attend: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """Attention for _BLOCK queries at a time, made again in the backward pass; arrays are [., T, ...] or None.

    So there is never an [H, T, T] array (Rabe and Staats, arXiv 2112.05682).
    """
    length = arrays[0].shape[1]
    if length <= _BLOCK:
        return attend(*arrays)

    def cut(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, -length % _BLOCK), *((0, 0),) * (array.ndim - 2)))
        return array.reshape(array.shape[0], -1, _BLOCK, *array.shape[2:]).swapaxes(0, 1)

    mixed = jax.lax.map(lambda block: jax.checkpoint(attend)(*block), jax.tree.map(cut, arrays))
    return mixed.swapaxes(0, 1).reshape(arrays[0].shape[0], -1, *mixed.shape[3:])[:, :length]


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """`attend_rows` by jax's splash kernel for TPUs, each device on its own rows and heads.

    Args:
        query, key, value, segments, scale, softcap, window: as for `attend_rows`.
        interpret: run the kernel's steps as plain JAX, on any backend.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = query.shape[1]
    block = next(size for size in (512, 256, _LANES) if length % size == 0)
    mask = masks.LocalMask((length, length), (window - 1, 0), 0) if window else masks.CausalMask((length, length))
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip

    def local(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None) -> jax.Array:
        kernel = kernels.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * query.shape[2]),
            block_sizes=sizes,
            attn_logits_soft_cap=softcap or None,
            interpret=interpret,
        )
        groups = query.shape[2] // key.shape[2]
        heads_first = (x.swapaxes(1, 2) for x in (query * scale, key.repeat(groups, 2), value.repeat(groups, 2)))
        ids = None if segments is None else kernels.SegmentIds(segments, segments)
        return jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)

    axes = open_axes()
    if not axes:
        return local(query, key, value, segments)
    spec = functools.partial(partition_spec, mesh_axes=axes)
    wide, narrow = spec(("batch", "length", "heads", "head")), spec(("batch", "length", "kv_heads", "head"))
    specs = (wide, narrow, narrow, None if segments is None else spec(("batch", "length")))
    each = jax.shard_map(local, in_specs=specs, out_specs=wide, axis_names=set(axes), check_vma=False)
    return each(query, key, value, segments)


def has_branches(kernel: str, length: int, head_size: int) -> bool:
    """Whether `attend_rows` with a kernel computes packed rows by XLA, which takes `Segments` as fast as numbers.

    Args:
        kernel: one of KERNELS.
        length, head_size: of the rows without branches, T, and of a head.
    """
    splash = jax.default_backend() == "tpu" and not (length % _LANES or head_size % _LANES)
    return kernel == "xla" or (kernel == "auto" and not splash)


def why_not(kernel: str, query: jax.Array, segments: Layout, softcap: float) -> str:
    """Why a kernel cannot compute attention of these queries, [B, T, H, Q]; "" if it can."""
    length, size = query.shape[1], query.shape[3]
    if kernel == "cudnn":
        if query.dtype not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN computes in 16 bits and policy.dtype is {query.dtype}"
        if size % 8 or size > 128:
            return f"cuDNN takes heads of up to 128 in steps of 8, not of {size}"
        if softcap:
            return "cuDNN has no soft cap of attention logits"
        if segments is not None:
            return "cuDNN has no segments for packed rows (optim.packed=False and sft.row_tokens=0 pack none)"
    if kernel == "splash" and isinstance(segments, Segments):
        return "splash has no prompts that several responses share"
    if kernel == "splash" and (size % _LANES or length % _LANES):
        return f"splash takes heads and rows in steps of {_LANES}, not heads of {size} and rows of {length}"
    return ""
