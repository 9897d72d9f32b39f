"""The decoder against a NumPy reference, its own cache, and padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from krl import policy
from tests import tiny


def reference_logits(config, params, tokens):
    """The decoder for one unpadded sequence, written again in float64 NumPy with loops over heads."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * weight

    def rotate(x):  # [T, Q]
        half = config.head_size // 2
        out = np.empty_like(x)
        for t in range(len(x)):
            for i in range(half):
                angle = t * config.rope_theta ** (-i / half)
                a, b = x[t, i], x[t, i + half]
                out[t, i] = a * np.cos(angle) - b * np.sin(angle)
                out[t, i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x = params["embedding"][tokens]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        h = norm(x, block["attention_norm"]["weight"])
        attended = np.zeros_like(x)
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            q, k = rotate(h @ block["query"][:, head]), rotate(h @ block["key"][:, shared])
            scores = q @ k.T / np.sqrt(config.head_size)
            scores[np.triu_indices(len(tokens), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            attended += weights @ (h @ block["value"][:, shared]) @ block["output"][head]
        x = x + attended
        h = norm(x, block["mlp_norm"]["weight"])
        gate = h @ block["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ block["up"])) @ block["down"]
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    return norm(x, params["final_norm"]["weight"]) @ head


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "num_kv_heads": 1}, {"remat": "full", "unroll": 2}])
def test_logits_equal_the_numpy_reference(changes):
    config = dataclasses.replace(tiny.CONFIG, **changes)
    params, tokens = tiny.params(config=config), np.array([3, 7, 7, 12, 4, 9])
    logits = policy.apply(config, params, jnp.array(tokens)[None])[0]
    np.testing.assert_allclose(logits, reference_logits(config, params, tokens), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    params, tokens = tiny.params(), jnp.array([[3, 7, 5, 12]])
    plain = policy.apply(tiny.CONFIG, params, tokens)
    before, after = (3, 0) if side == "left" else (0, 3)
    padded = jnp.pad(tokens, ((0, 0), (before, after)), constant_values=9)
    mask = jnp.pad(jnp.ones((1, 4), bool), ((0, 0), (before, after)))
    got = policy.apply(tiny.CONFIG, params, padded, mask)[:, before : before + 4]
    np.testing.assert_allclose(got, plain, atol=1e-4)


def test_decoding_with_the_cache_equals_the_whole_sequence():
    params, prompts = tiny.params(), tiny.prompts()
    more = jnp.array(np.random.default_rng(1).integers(3, 16, (4, 3)))
    tokens = jnp.concatenate([prompts.tokens, more], axis=1)
    mask = jnp.concatenate([prompts.mask, jnp.ones_like(more, bool)], axis=1)
    whole = policy.apply(tiny.CONFIG, params, tokens, mask)
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
    cache, layers = policy.init_cache(tiny.CONFIG, 4, tokens.shape[1] + 2), policy.for_decoding(tiny.CONFIG, params)
    logits, cache = policy.decode(tiny.CONFIG, layers, prompts.tokens, positions[:, :5], cache, 0)
    np.testing.assert_allclose(logits, whole[:, 4], atol=1e-4)
    for step, column in enumerate((9, 5, 7)):  # in any order, with a gap
        at = slice(5 + step, 6 + step)
        logits, cache = policy.decode(tiny.CONFIG, layers, tokens[:, at], positions[:, at], cache, column)
        np.testing.assert_allclose(logits, whole[:, 5 + step], atol=1e-4)
    assert (cache.positions[:, [6, 8]] == -1).all()


@pytest.mark.parametrize("chunk", [2, 3, 128])
def test_token_logps_are_the_log_softmax_of_the_logits(chunk):
    params, prompts = tiny.params(), tiny.prompts()
    logits = np.asarray(policy.apply(tiny.CONFIG, params, prompts.tokens, prompts.mask), np.float64) / 0.7
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logps[:, 1:-1], np.asarray(prompts.tokens)[:, 2:, None], axis=-1)[..., 0]

    def scored(params):
        return policy.token_logps(
            tiny.CONFIG, params, prompts.tokens, prompts.mask, start=2, temperature=0.7, chunk=chunk
        )

    real = np.asarray(prompts.mask)[:, 2:]
    np.testing.assert_allclose(np.asarray(scored(params))[real], expected[real], atol=1e-4)

    def total(params, chunk):
        logps = policy.token_logps(tiny.CONFIG, params, prompts.tokens, prompts.mask, chunk=chunk)
        return jnp.where(prompts.mask[:, 1:], logps, 0.0).sum()

    whole, chunked = (jax.jit(jax.grad(total), static_argnums=1)(params, size) for size in (128, chunk))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, chunked)


def test_token_logps_refuse_the_first_position():
    with pytest.raises(ValueError, match="start"):
        policy.token_logps(tiny.CONFIG, tiny.params(), jnp.zeros((1, 4), jnp.int32), start=0)


def test_every_parameter_has_axes_of_its_rank():
    shapes = jax.eval_shape(lambda key: policy.init(tiny.CONFIG, key), jax.random.key(0))
    axes = policy.param_axes(tiny.CONFIG)
    jax.tree.map(lambda leaf, names: None if leaf.ndim == len(names) else pytest.fail(f"{leaf} {names}"), shapes, axes)


@pytest.mark.parametrize("plus_one", [False, True])
def test_a_fresh_policy_has_norms_of_one_no_biases_and_products_that_keep_the_size(plus_one):
    sizes = {"embed_size": 32, "num_heads": 8, "head_size": 8, "mlp_size": 128, "qkv_bias": True}
    config = dataclasses.replace(tiny.CONFIG, norm_plus_one=plus_one, **sizes)
    params = policy.init(config, jax.random.key(0))
    blocks, one = params["blocks"], 0 if plus_one else 1
    for norm in (params["final_norm"], blocks["attention_norm"], blocks["mlp_norm"]):
        assert (norm["weight"] == one).all()
    assert all((blocks[f"{name}_bias"] == 0).all() for name in ("query", "key", "value"))
    inputs = {"query": 32, "key": 32, "value": 32, "output": 64, "gate": 32, "up": 32, "down": 128}
    cut = 0.88  # the standard deviation of a normal variable that is drawn again beyond two
    for name, size in inputs.items():
        assert float(blocks[name].std()) * size**0.5 == pytest.approx(cut, rel=0.05), name


def test_a_kernel_for_long_rows_does_not_keep_parameters_from_being_made():
    config = dataclasses.replace(tiny.CONFIG, attention="splash")
    jax.tree.map(
        np.testing.assert_array_equal,
        policy.init(config, jax.random.key(0)),
        policy.init(tiny.CONFIG, jax.random.key(0)),
    )
    with pytest.raises(ValueError, match="splash"):
        policy.apply(config, tiny.params(), jnp.zeros((1, 4), jnp.int32))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="num_heads 3"):
        policy.PolicyConfig(vocab_size=8, num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError, match="head_size 5"):
        policy.PolicyConfig(vocab_size=8, head_size=5)
