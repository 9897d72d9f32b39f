"""Scores by chunks against a whole log-softmax: values, entropies, gradients and memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from krl import policy
from krl.base.sharding import make_mesh, named_sharding
from krl.policy import scores
from krl.policy.scores import Options, token_scores
from tests import tiny


@pytest.mark.parametrize("vocab_first", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 6, 7, 100])
def test_scores_and_their_gradients_equal_a_whole_log_softmax(vocab_first, softcap, chunk):
    rng = np.random.default_rng(0)
    hidden, targets = jnp.array(rng.normal(size=(3, 5, 8)), jnp.float32), jnp.array(rng.integers(0, 11, (3, 5)))
    head = jnp.array(rng.normal(size=(11, 8) if vocab_first else (8, 11)), jnp.float32)
    by_logp, by_entropy = jnp.array(rng.normal(size=(2, 3, 5)), jnp.float32)

    def whole(hidden, head):
        logits = hidden @ (head.T if vocab_first else head)
        logits = (softcap * jnp.tanh(logits / softcap) if softcap else logits) / 0.7
        logps = jax.nn.log_softmax(logits)
        entropy = -(jnp.exp(logps) * logps).sum(axis=-1)
        return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0], entropy

    def chunked(hidden, head, entropy=True):
        return token_scores(hidden, head, targets, Options(softcap, vocab_first, entropy), temperature=0.7, chunk=chunk)

    def total(scores):
        return (by_logp * scores[0] + by_entropy * scores[1]).sum()

    for expected, got in zip(whole(hidden, head), chunked(hidden, head), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    expected, got = (jax.grad(lambda *x, f=f: total(f(*x)), argnums=(0, 1))(hidden, head) for f in (whole, chunked))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-4), expected, got)
    alone = jax.grad(lambda x: (by_logp * chunked(x, head, False)[0]).sum())(hidden)
    plain = jax.grad(lambda x: (by_logp * whole(x, head)[0]).sum())(hidden)
    np.testing.assert_allclose(alone, plain, atol=1e-4)


@pytest.mark.parametrize(("rows", "length"), [(1, 4097), (8, 513), (64, 65)])
def test_memory_of_4096_tokens_stays_below_600_megabytes(rows, length):
    """With the vocabulary of Qwen 2.5, where the logits alone would take 2.5 GB."""
    config = policy.PolicyConfig(vocab_size=151936, embed_size=256, num_layers=1, num_heads=2, num_kv_heads=1)
    params = jax.eval_shape(lambda: policy.init(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def loss(params, tokens):
        logps, entropy = policy.token_logps(config, params, tokens, entropy=True)
        return (logps + entropy).mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile(tiny.AS_FOR_USERS)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6e9


@pytest.mark.parametrize(("shape", "names"), [((8,), ("fsdp",)), ((2, 2, 2), ("data", "fsdp", "model"))])
def test_devices_score_their_own_rows_and_sum_the_heads_gradient_once(shape, names):
    rng = np.random.default_rng(0)
    hidden, head = (
        jnp.array(rng.normal(size=(8, 12, 16)), jnp.float32),
        jnp.array(rng.normal(size=(16, 24)), jnp.float32),
    )
    targets, weights = jnp.array(rng.integers(0, 24, (8, 12))), jnp.array(rng.normal(size=(8, 12)), jnp.float32)
    wanted = jnp.arange(12) < jnp.array([0, 0, 1, 12, 5, 0, 7, 12])[:, None]  # devices have unequal work

    def total(hidden, head):
        scores = token_scores(hidden, head, targets, Options(0.0, False, True), temperature=0.7, chunk=3, wanted=wanted)
        return jnp.where(wanted, scores[0] * weights + scores[1], 0.0).sum()

    alone = jax.value_and_grad(total, (0, 1))(hidden, head)
    mesh = make_mesh(shape, names)
    placed = (
        jax.device_put(array, named_sharding(mesh, *axes))
        for array, axes in ((hidden, ("batch", None, None)), (head, ("embed", "vocab")))
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*placed).compile()
        together = compiled(
            *(jax.device_put(array, at) for array, at in zip((hidden, head), compiled.input_shardings[0], strict=True))
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), alone, together)
    a_head = 16 * 24 * 4 / (2 if "model" in names else 1)
    loops, entry = compiled.as_text().split("\nENTRY ")
    assert not _moved(loops, a_head)  # once a direction, and not once a chunk
    moved = _moved(entry, a_head)
    assert moved.count("all-gather") <= 2
    assert 1 <= len(moved) - moved.count("all-gather") <= 2


def _moved(text, size):
    """The collectives of a compiled program that have float32 arrays of so many bytes."""
    found = re.findall(r" = (.*) (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", text)
    arrays = [(kind, re.findall(r"f32\[([\d,]+)\]", shape)) for shape, kind in found]
    return [kind for kind, all_ in arrays if any(4 * math.prod(map(int, one.split(","))) >= size for one in all_)]


@pytest.mark.parametrize("chunk", [1, 6, 100])
def test_scores_that_are_not_wanted_cost_nothing_and_change_no_other(chunk, monkeypatch):
    rng = np.random.default_rng(0)
    hidden, head = jnp.array(rng.normal(size=(3, 8, 4)), jnp.float32), jnp.array(rng.normal(size=(11, 4)), jnp.float32)
    targets, by_logp = jnp.array(rng.integers(0, 11, (3, 8))), jnp.array(rng.normal(size=(3, 8)), jnp.float32)
    made = []
    logits = scores._logits

    def counted(hidden, *more):
        jax.debug.callback(lambda _: made.append(hidden.shape), hidden[0, 0, 0])
        return logits(hidden, *more)

    monkeypatch.setattr(scores, "_logits", counted)

    def total(hidden, head, wanted=None):
        found = token_scores(
            hidden, head, targets, Options(0.0, True, True), temperature=0.7, chunk=chunk, wanted=wanted
        )
        kept = [jnp.where(some, part, 0.0) for part in found]
        return (by_logp * kept[0] + kept[1]).sum(), kept

    for some in (rng.random((3, 8)) < 0.3, np.arange(8) == np.array([[7], [2], [7]]), np.zeros((3, 8), bool)):
        (expected, grads), (got, fewer) = (
            jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head, wanted) for wanted in (None, jnp.array(some))
        )
        jax.effects_barrier()
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6), expected[1], got[1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), grads, fewer)
        width = min(max(chunk // 3, 1), 8)
        chunks, needed = -(-8 // width), -(-some.sum(axis=1).max() // width)
        assert len(made) == 2 * (chunks + needed)  # there and back, of all and of those that are wanted
        made.clear()
