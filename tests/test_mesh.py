"""A policy on meshes of eight devices against the same policy on one: what a step computes, and where its arrays lie."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from krl import budget, policy, rollout
from krl.base.sharding import make_mesh, tree_sharding
from krl.rollout import sampler, serve
from krl.run.checkpoint import Checkpoints
from krl.run.optimizer import abstract_state, init_state, make_optimizer
from krl.run.processes import place_whole
from krl.run.update import policy_update
from tests import tiny

# Everything that "model" splits comes in fours.
CONFIG = policy.PolicyConfig(
    vocab_size=32, embed_size=8, num_layers=1, num_heads=4, num_kv_heads=4, head_size=6, mlp_size=20, unroll=1
)
MESHES = [((8, 1), ("data", "model")), ((2, 4), ("fsdp", "model")), ((2, 2, 2), ("data", "fsdp", "model"))]
ALONE = ((1,), ("data",))
BETA1 = 0.9
OPTIMIZER = make_optimizer(
    learning_rate=0.01, warmup_steps=0, decay_steps=0, beta1=BETA1, beta2=0.98, weight_decay=0.0, grad_clip=1e9
)
COUNTS = [9, 2, 7, 6]
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time; the partition over devices is the same
GREEDY = {"max_new_tokens": 6, "eos_ids": tiny.EOS, "num_slots": 10, "temperature": 0.0}


def on(mesh_of):
    """(mesh, parameters of the policy as its rules lay them out there)."""
    mesh = make_mesh(*mesh_of)
    shardings = tree_sharding(mesh, policy.param_axes(CONFIG), jax.eval_shape(lambda: tiny.params(config=CONFIG)))
    return mesh, jax.device_put(tiny.params(config=CONFIG), shardings)


@functools.cache
def stepped(mesh_of):
    """(state, metrics) after an update; every number of its first moments is 1 - BETA1 of the gradient's."""
    mesh, params = on(mesh_of)
    index = np.repeat(np.arange(5), [5, 3, 4, 2, 2])  # the last two rows are padding
    advantages = np.random.default_rng(3).normal(size=16) * (np.arange(16) % 3 > 0) * (index < 4)
    update = functools.partial(
        policy_update, CONFIG, OPTIMIZER, num_updates=1, micro_tokens=72, temperature=1.0, clip_low=0.2, clip_high=0.28,
        dual_clip=10.0,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        return jax.jit(update, compiler_options=QUICK)(
            init_state(CONFIG, OPTIMIZER, params), tiny.prompts(), tiny.rollouts(index),
            jnp.asarray(advantages, jnp.float32), jax.random.key(0),
        )  # fmt: skip


def moments(state):
    return state.opt_state.inner_state[1][0]


@pytest.mark.parametrize("mesh_of", [MESHES[2], *map(tiny.slow, MESHES[:2])])
def test_loss_and_gradient_of_eight_devices_are_those_of_one(mesh_of):
    """To 1e-5, and a gradient to 3e-4 of its array's largest number: float32 sums in another order."""
    (alone, expected), (spread, metrics) = stepped(ALONE), stepped(mesh_of)
    for name, value in expected.items():
        if name != "shared_tokens":  # how wide rows are goes by the tokens of a device
            np.testing.assert_allclose(metrics[name], value, atol=1e-5, err_msg=name)
    for got, gradient in zip(jax.tree.leaves(moments(spread).mu), jax.tree.leaves(moments(alone).mu), strict=True):
        largest = float(abs(gradient).max())
        assert largest > 1e-5
        np.testing.assert_allclose(got, gradient, rtol=0, atol=3e-4 * largest)


@pytest.mark.parametrize("mesh_of", MESHES)
def test_every_device_holds_its_share_of_parameters_and_moments_after_an_update(mesh_of):
    """By hand: norms are cut along "fsdp" alone, everything else along "fsdp" and along "model"."""
    shape = dict(zip(mesh_of[1], mesh_of[0], strict=True))
    fsdp, model = shape.get("fsdp", 1), shape["model"]
    state, _ = stepped(mesh_of)
    for tree in (state.params, moments(state).mu, moments(state).nu):
        for path, leaf in jax.tree.leaves_with_path(tree):
            name = jax.tree_util.keystr(path)
            cuts = fsdp if "norm" in name else fsdp * model
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * cuts == leaf.size, name
            assert len(leaf.addressable_shards) == 8, name


@functools.partial(jax.jit, static_argnames="rule")
def spend(rule, belief, *seen):
    """The counts of a rule that has seen rewards."""
    task_ids, rewards, index, mask, lengths = seen
    return budget.allocate(rule, budget.observe(belief, task_ids, rewards, index, mask, lengths=lengths), 512, 2, 64)[0]


@pytest.mark.parametrize("mesh_of", MESHES)
def test_counts_of_eight_devices_are_those_of_one(mesh_of):
    rng = np.random.default_rng(0)
    index = np.repeat(np.arange(64), 6)
    rewards = (rng.random(len(index)) < rng.beta(1, 2, 64)[index]).astype(np.float32)
    lengths = rng.integers(1, 9, len(index))
    seen = budget.init_belief(64), np.arange(64), rewards, index, np.ones(len(index), bool), lengths
    counts = []
    for devices in (ALONE, mesh_of):
        mesh = make_mesh(*devices)
        with jax.set_mesh(mesh):
            counts.append(np.asarray(spend("knapsack_tokens", *place_whole(mesh, seen))))
    assert len(set(counts[0].tolist())) > 5
    np.testing.assert_array_equal(*counts)


@functools.cache
def greedy(mesh_of):
    """The likeliest responses, as the parameters lie for the update."""
    mesh, params = on(mesh_of)
    with jax.set_mesh(mesh):
        prompts = place_whole(mesh, tiny.prompts())
        generate = functools.partial(rollout.generate, CONFIG, num_rollouts=24, **GREEDY)
        return jax.jit(generate, compiler_options=QUICK)(params, prompts, jnp.array(COUNTS), jax.random.key(0))


@pytest.mark.parametrize("mesh_of", MESHES)
def test_greedy_rollouts_of_eight_devices_are_those_of_one(mesh_of):
    """To the token; log-probabilities to 1e-5."""
    alone, spread = greedy(ALONE), greedy(mesh_of)
    assert len({tuple(row) for row in alone.tokens.tolist()}) == 4
    for name in ("prompt_index", "sample_index", "mask", "tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(spread, name), getattr(alone, name), err_msg=name)
    np.testing.assert_allclose(spread.logps, alone.logps, atol=1e-5)


@pytest.mark.parametrize("mesh_of", MESHES)
def test_decoding_gathers_logits_and_never_a_parameter(mesh_of):
    mesh, params = on(mesh_of)
    options = serve.Options(24, GREEDY["num_slots"], 6, tiny.EOS, 0, (0, 1.0, 0.0))
    with jax.set_mesh(mesh):
        asked = sampler.Asked(place_whole(mesh, tiny.prompts()), jnp.array(COUNTS), jax.random.key(0), 0, jnp.ones(4))
        work, state = sampler.PROGRAMS["begin"](CONFIG, options, params, asked)
        model, slots = mesh.shape["model"], sampler._slots_each(options)
        for path, leaf in jax.tree.leaves_with_path(work.weights):
            cuts = 1 if leaf.ndim == 1 else model
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * cuts == leaf.size, path
        serving = sampler.PROGRAMS["serve"].lower(CONFIG, options, serve.Settings(1.0), work, state, 2)
        text = serving.compile(compiler_options=QUICK).as_text()
    gathered = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]\S* all-gather\(", text)}
    assert gathered == ({(slots, CONFIG.vocab_size)} if model > 1 else set())


@pytest.mark.parametrize("mesh_of", [ALONE, ((2,), ("data",)), ((2, 2), ("fsdp", "model")), ((8,), ("fsdp",))])
def test_a_checkpoint_of_one_mesh_is_restored_on_another_to_the_last_bit(mesh_of, tmp_path):
    state, _ = stepped(MESHES[2])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"state": state})
    mesh, params = on(mesh_of)
    with jax.set_mesh(mesh), Checkpoints(tmp_path, keep=1) as checkpoints:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
        step, found = checkpoints.restore({"state": abstract_state(CONFIG, OPTIMIZER, shapes)})
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, found["state"], state)
    for tree in (found["state"].params, moments(found["state"]).mu, moments(found["state"]).nu):
        for leaf, like in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
