"""Attention kernels against loops in NumPy; segments, windows and soft caps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from krl.policy import attention


def arrays(length, size=128, heads=2, kv_heads=1, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, count, size) for count in (heads, kv_heads, kv_heads)]
    return [jnp.array(rng.normal(size=shape), jnp.float32) for shape in shapes]


def reference(query, key, value, segments, scale, softcap, window):
    """In float64, one query at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for row, t, head in np.ndindex(query.shape[:3]):
        kv = head // (query.shape[2] // key.shape[2])
        seen = [c for c in range(t + 1) if not window or t - c < window]
        if segments is not None:
            seen = [c for c in seen if segments[row, c] == segments[row, t]]
        logits = key[row, seen, kv] @ query[row, t, head] * scale
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        out[row, t, head] = weights / weights.sum() @ value[row, seen, kv]
    return out


SEGMENTS = np.array([[1] * 20 + [2] * 30 + [0] * 78, [3] * 100 + [1] * 28])


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (0.0, 17), (3.0, 0), (3.0, 17)])
def test_kernels_equal_the_reference(segments, softcap, window):
    query, key, value = arrays(128)
    expected = reference(query, key, value, segments, 0.1, softcap, window)
    ids = None if segments is None else jnp.array(segments, jnp.int32)
    options = {"scale": 0.1, "softcap": softcap, "window": window}
    plain = attention.attend_rows(query, key, value, ids, kernel="xla", **options)
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    splash = attention.splash(query, key, value, ids, **options, interpret=True)
    np.testing.assert_allclose(splash, expected, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_go_block_by_block(packed, monkeypatch):
    """Also rows that no block divides, and their gradients."""
    query, key, value = arrays(50, size=8, heads=4, kv_heads=2)
    segments = jnp.array(np.repeat([[1, 2, 0], [4, 3, 1]], [20, 25, 5], axis=1), jnp.int32) if packed else None

    def attend(*inputs):
        return attention.attend_rows(*inputs, segments, kernel="xla", scale=0.3, softcap=2.0, window=11)

    def total(*inputs):
        return jnp.sin(attend(*inputs)).sum()

    whole, gradients = attend(query, key, value), jax.grad(total, argnums=(0, 1, 2))(query, key, value)
    np.testing.assert_allclose(
        whole, reference(query, key, value, None if segments is None else np.asarray(segments), 0.3, 2.0, 11), atol=1e-5
    )
    monkeypatch.setattr(attention, "_BLOCK", 16)
    np.testing.assert_allclose(attend(query, key, value), whole, atol=1e-6)
    seen = np.tril(np.ones((50, 50), bool)) & (np.arange(50)[:, None] - np.arange(50) < 11)
    seen = seen if segments is None else seen & (segments[:, :, None] == segments[:, None, :])
    stored = key.swapaxes(1, 2), value.swapaxes(1, 2)
    seen = jnp.broadcast_to(jnp.array(seen), (2, 50, 50))
    cached = attention.attend_cached(query, *stored, seen, scale=0.3, softcap=2.0)
    np.testing.assert_allclose(cached, whole, atol=1e-6)
    blocked = jax.grad(total, argnums=(0, 1, 2))(query, key, value)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), blocked, gradients)


def test_gradients_of_splash_equal_those_of_xla():
    def total(kernel, query, key, value):
        return jnp.sin(kernel(query, key, value, jnp.array(SEGMENTS, jnp.int32), scale=0.1, window=9)).sum()

    def plain(*inputs, **options):
        return attention.attend_rows(*inputs, kernel="xla", **options)

    def splash(*inputs, **options):
        return attention.splash(*inputs, interpret=True, **options)

    inputs = arrays(128, heads=2, kv_heads=1)
    expected, got = (jax.grad(total, argnums=(1, 2, 3))(kernel, *inputs) for kernel in (plain, splash))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), expected, got)


def test_a_kernel_that_cannot_is_refused_and_auto_takes_another():
    query, key, value = arrays(24, size=16)
    for kernel, reason in (("splash", "steps of 128"), ("cudnn", "16 bits")):
        with pytest.raises(ValueError, match=reason):
            attention.attend_rows(query, key, value, None, kernel=kernel, scale=1.0)
    narrow = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    segments = jnp.zeros((2, 24), jnp.int32)
    assert "segments" in attention.why_not("cudnn", narrow[0], segments, 0.0)
    assert "soft cap" in attention.why_not("cudnn", narrow[0], None, 1.0)
    assert not attention.why_not("cudnn", narrow[0], None, 0.0)
    assert attention.attend_rows(query, key, value, None, kernel="auto", scale=1.0).shape == query.shape
