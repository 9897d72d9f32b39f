"""Low-rank adapters: what they compute, what a run trains and keeps, and PEFT's files of them."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from krl import hf, policy
from krl.base.sharding import make_mesh, named_sharding
from krl.configs import default
from krl.eval.command import measure
from krl.policy.config import MODULES, Lora
from krl.run.optimizer import init_state, make_optimizer
from krl.run.update import policy_update
from tests import tiny
from tests.bpe import write_qwen
from tests.command_line import config_with, learnt, rows, run_here

GOLDEN = pathlib.Path(__file__).parent / "golden"
GEMMA = dataclasses.replace(
    tiny.CONFIG, qk_norm=True, qkv_bias=True, post_norms=True, norm_plus_one=True, embedding_scale=2.0, window=3,
    sliding=(True, False), logit_softcap=5.0, activation="gelu_tanh",
)  # fmt: skip
OPTIMIZER = make_optimizer(
    learning_rate=0.1, warmup_steps=0, decay_steps=0, beta1=0.9, beta2=0.98, weight_decay=0.1, grad_clip=1.0
)


def adapted(config=tiny.CONFIG, rank=2, alpha=3.0, modules=MODULES, seed=1):
    """(config with adapters, parameters in which they differ from nothing)."""
    config = dataclasses.replace(config, lora=Lora(rank, alpha, modules))
    params = tiny.params(seed, config)
    fresh = policy.trained(config, params)
    moved = [
        leaf + 0.2 * jax.random.normal(jax.random.key(n), leaf.shape) for n, leaf in enumerate(jax.tree.leaves(fresh))
    ]
    return config, policy.join(params, jax.tree.unflatten(jax.tree.structure(fresh), moved))


def same(left, right):
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        a.dtype == b.dtype and bool((a == b).all())
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.mark.parametrize("config", [tiny.CONFIG, GEMMA], ids=["llama", "gemma"])
def test_a_policy_with_fresh_adapters_is_the_one_without(config):
    with_adapters = dataclasses.replace(config, lora=Lora(2, 3.0))
    base, params = policy.init(config, jax.random.key(3)), policy.init(with_adapters, jax.random.key(3))
    tokens = tiny.prompts().tokens
    assert same(policy.frozen(with_adapters, params), base)
    assert (policy.apply(with_adapters, params, tokens) == policy.apply(config, base, tokens)).all()
    assert len(jax.tree.leaves(policy.trained(with_adapters, params))) == 2 * len(MODULES)
    into = policy.trained(with_adapters, params)["blocks"]["query_lora_a"]
    assert float(into.std()) > 0.05  # only B is nothing, or no gradient would come through


def test_adapters_are_of_the_modules_that_were_asked_for_and_nothing_else_is_trained():
    config, params = adapted(modules=("value", "down"))
    assert sorted(policy.trained(config, params)["blocks"]) == [
        "down_lora_a",
        "down_lora_b",
        "value_lora_a",
        "value_lora_b",
    ]
    assert same(policy.join(policy.frozen(config, params), policy.trained(config, params)), params)
    bare = dataclasses.replace(config, lora=None)
    assert policy.frozen(bare, params) == {}
    assert policy.trained(bare, params) is params


@pytest.mark.parametrize("config", [tiny.CONFIG, GEMMA], ids=["llama", "gemma"])
def test_merged_is_unmerged_in_whole_rows_and_in_decoding(config):
    config, params = adapted(config)
    merged, bare = policy.merge(config, params), dataclasses.replace(config, lora=None)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 16, (2, 7)), jnp.int32)
    logits = policy.apply(config, params, tokens)
    np.testing.assert_allclose(logits, policy.apply(bare, merged, tokens), atol=2e-5)
    assert np.abs(logits - policy.apply(bare, policy.frozen(config, params), tokens)).max() > 0.1
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (2, 7))
    cache = policy.init_cache(config, 2, 7)
    last, _ = policy.decode(config, policy.for_decoding(config, params), tokens, positions, cache, 0)
    np.testing.assert_allclose(last, logits[:, -1], atol=2e-5)
    assert jax.tree.structure(policy.for_decoding(config, params)) == jax.tree.structure(
        policy.for_decoding(bare, merged)
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.slow(GEMMA)], ids=["llama", "gemma"])
def test_gradients_are_those_through_merged_weights(config):
    config = dataclasses.replace(config, dtype="float64")
    config, params = adapted(config)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    frozen, adapters, bare = (
        policy.frozen(config, params),
        policy.trained(config, params),
        dataclasses.replace(config, lora=None),
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 16, (2, 7)), jnp.int32)
    direct = jax.grad(lambda some: policy.token_logps(config, policy.join(frozen, some), tokens).sum())(adapters)
    through = jax.grad(
        lambda some: policy.token_logps(bare, policy.merge(config, policy.join(frozen, some)), tokens).sum()
    )(adapters)
    for mine, other in zip(jax.tree.leaves(direct), jax.tree.leaves(through), strict=True):
        assert mine.dtype == jnp.float64
        np.testing.assert_allclose(mine, other, atol=1e-11)
        assert np.abs(other).max() > 1e-3


def updated(config, params, mesh=None, reference=None, **options):
    """(parameters that are trained after an update, metrics)."""
    options = {"num_updates": 2, "micro_tokens": 32, "temperature": 1.0} | options
    frozen = policy.frozen(config, params)
    given = tiny.prompts(), tiny.rollouts([0, 0, 1, 1, 1, 2, 3, 3]), jnp.asarray([1.0, -1, 2, 0, -0.5, 1, 0.5, -1])
    trained = policy.trained(config, params)
    if mesh is not None:
        whole = named_sharding(mesh)
        given, frozen, trained = jax.device_put((given, frozen, trained), whole)
    with jax.set_mesh(mesh or make_mesh((1,), ("data",))):
        state = init_state(config, OPTIMIZER, trained)
        state, metrics = policy_update(
            config, OPTIMIZER, state, *given, jax.random.key(0), reference=frozen or reference, **options
        )
    return state, metrics


def test_an_update_is_of_adapters_alone_and_its_loss_that_of_the_merged_policy():
    config, params = adapted()
    state, _ = updated(config, params, importance_cap=2.0, entropy_coefficient=0.01)
    merged, bare = policy.merge(config, params), dataclasses.replace(config, lora=None)
    _, expected = updated(bare, merged, importance_cap=2.0, entropy_coefficient=0.01, num_updates=1)
    _, one = updated(config, params, importance_cap=2.0, entropy_coefficient=0.01, num_updates=1)
    assert jax.tree.structure(state.params) == jax.tree.structure(policy.trained(config, params))
    assert all(
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(policy.trained(config, params)), strict=True)
    )
    for name in ("loss", "mismatch", "mismatch_max"):
        np.testing.assert_allclose(one[name], expected[name], atol=1e-4, err_msg=name)
    moments = jax.tree.leaves(state.opt_state)
    assert sum(leaf.size for leaf in moments) < 3 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_the_penalty_holds_adapters_to_the_frozen_policy():
    config, params = adapted()
    fresh = policy.init(config, jax.random.key(1))
    _, none = updated(config, fresh, kl_coefficient=0.1, num_updates=1)
    _, some = updated(config, params, kl_coefficient=0.1, num_updates=1)
    merged, bare = policy.merge(config, params), dataclasses.replace(config, lora=None)
    _, expected = updated(bare, merged, kl_coefficient=0.1, num_updates=1, reference=policy.frozen(config, params))
    assert float(none["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(some["kl"]) == pytest.approx(float(expected["kl"]), rel=1e-3)
    assert float(some["kl"]) > 0.01


@pytest.mark.parametrize(
    ("shape", "names"), [((8,), ("data",)), tiny.slow((2, 2, 2), ("data", "fsdp", "model"))], ids=str
)
def test_eight_devices_train_adapters_as_one(shape, names):
    config, params = adapted()
    one, said = updated(config, params, kl_coefficient=0.1)
    eight, told = updated(config, params, mesh=make_mesh(shape, names), kl_coefficient=0.1)
    for mine, other in zip(jax.tree.leaves(eight.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-4)
    for name in ("loss", "kl", "grad_norm"):
        np.testing.assert_allclose(told[name], said[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_frozen_takes_the_type_of_the_computation_and_adapters_stay_whole():
    config = dataclasses.replace(tiny.CONFIG, dtype="bfloat16", lora=Lora(2, 3.0))
    params = policy.init(config, jax.random.key(0))
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        narrow = "lora" not in name and "norm" not in name
        assert leaf.dtype == (jnp.bfloat16 if narrow else jnp.float32), name
    bare = dataclasses.replace(config, lora=None)
    wide = policy.init(bare, jax.random.key(0))
    tokens = tiny.prompts().tokens
    assert (policy.apply(config, params, tokens) == policy.apply(bare, wide, tokens)).all()


@pytest.mark.parametrize(
    ("rank", "alpha", "modules"),
    [(0, 1.0, MODULES), (1, 0.0, MODULES), (1, 1.0, ()), (1, 1.0, ("query", "query")), (1, 1.0, ("q_proj",))],
    ids=str,
)
def test_adapters_that_cannot_be_are_refused(rank, alpha, modules):
    with pytest.raises(ValueError, match="lora"):
        Lora(rank, alpha, modules)


# ---------------------------------------------------------------- files of PEFT


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_logits_with_adapters_of_peft_are_those_of_peft(family):
    config, params = hf.load_hf(GOLDEN / family)
    lora, adapters = hf.load_adapters(GOLDEN / family / "adapter", config)
    known, golden = np.load(GOLDEN / family / "golden.npz"), np.load(GOLDEN / family / "adapter" / "golden.npz")
    config, params = dataclasses.replace(config, lora=lora), policy.join(params, adapters)
    for number in range(3):
        logits = policy.apply(config, params, jnp.asarray(known[f"tokens{number}"], jnp.int32)[None])[0]
        np.testing.assert_allclose(logits, golden[f"logits{number}"], atol=1e-4)
        assert np.abs(known[f"logits{number}"] - golden[f"logits{number}"]).max() > 0.5


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_adapters_are_written_as_they_were_read(family, tmp_path):
    config, params = hf.load_hf(GOLDEN / family)
    lora, adapters = hf.load_adapters(GOLDEN / family / "adapter", config)
    config = dataclasses.replace(config, lora=lora)
    hf.save_adapters(tmp_path / "out", config, policy.join(params, adapters), base="some/model")
    mine, theirs = (
        safetensors.numpy.load_file(place / "adapter_model.safetensors")
        for place in (tmp_path / "out", GOLDEN / family / "adapter")
    )
    assert mine.keys() == theirs.keys()
    assert all((mine[name] == theirs[name]).all() for name in mine)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    was = json.loads((GOLDEN / family / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "some/model"
    assert (said["r"], sorted(said["target_modules"])) == (was["r"], sorted(was["target_modules"]))
    assert same(hf.load_adapters(tmp_path / "out", config)[1], adapters)
    with pytest.raises(ValueError, match="not empty"):
        hf.save_adapters(tmp_path / "out", config, adapters)
    with pytest.raises(ValueError, match="no adapters"):
        hf.save_adapters(tmp_path / "none", dataclasses.replace(config, lora=None), params)


def test_a_policy_is_exported_with_its_adapters_merged(tmp_path):
    config, params = hf.load_hf(GOLDEN / "qwen2")
    lora, adapters = hf.load_adapters(GOLDEN / "qwen2" / "adapter", config)
    config = dataclasses.replace(config, lora=lora)
    hf.save_hf(tmp_path / "merged", config, policy.join(params, adapters), dtype="float32")
    bare, merged = hf.load_hf(tmp_path / "merged")
    assert bare.lora is None
    assert same(merged, policy.merge(config, policy.join(params, adapters)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"some_new_kind": {"of": "adapter"}}, "some_new_kind="),
        ({"r": 0}, "r=0 must be"),
        ({"r": 4}, "r=4 and the policy ask for"),
        ({"lora_alpha": "x"}, "lora_alpha='x'"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000"),
        ({"use_rslora": "no"}, "use_rslora='no'"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, change, said):
    place = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "qwen2" / "adapter", place)
    file = place / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match="adapter") as error:
        hf.load_adapters(place, hf.read_config(GOLDEN / "qwen2"))
    assert said in str(error.value)


def test_tensors_that_are_not_those_of_adapters_are_refused_by_name(tmp_path):
    config = hf.read_config(GOLDEN / "qwen2")
    shutil.copytree(GOLDEN / "qwen2" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"

    def told(changed):
        safetensors.numpy.save_file(changed, file)
        with pytest.raises(ValueError, match="adapter_model") as error:
            hf.load_adapters(tmp_path / "adapter", config)
        return str(error.value)

    assert f"{name} is missing" in told({key: value for key, value in tensors.items() if key != name})
    assert "1 tensors that are no adapters of this policy (lm_head)" in told(tensors | {"lm_head": tensors[name]})
    assert "is F64 of shape" in told(tensors | {name: tensors[name].astype(np.float64)})
    assert "(3, 15)" in told(tensors | {name: tensors[name][:, :15].copy()})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot read"):
        hf.load_adapters(tmp_path / "adapter", config)
    (tmp_path / "adapter" / "adapter_config.json").write_text("[" * 100_000)
    for place in (tmp_path, tmp_path / "adapter"):
        with pytest.raises(ValueError, match="holds no adapters"):
            hf.load_adapters(place, config)


# ---------------------------------------------------------------- runs

ADAPTED = {
    "policy.lora_rank": 2,
    "policy.lora_modules": ("query", "value", "up"),
    "policy.dtype": "bfloat16",
    "loss.kl_coefficient": 0.01,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that trains adapters, and what it returned."""
    workdir = tmp_path_factory.mktemp("lora") / "work"
    return workdir, run_here(workdir, **ADAPTED)


def test_a_run_trains_adapters_and_keeps_what_they_stand_on_once(finished, capsys):
    workdir, result = finished
    frozen = policy.frozen(result.policy, result.params)
    assert frozen["blocks"]["query"].dtype == jnp.bfloat16
    assert float(np.abs(np.asarray(result.params["blocks"]["query_lora_b"])).max()) > 0  # it has learnt something
    assert [path.name for path in (workdir / "frozen").iterdir()] == ["0"]
    assert not list((workdir / "checkpoints").glob("*/params/*embedding*"))
    first, *_, last = (row["kl"] for row in rows(workdir)[1:])
    assert 0 <= first < 5e-6 < last  # it begins at the policy that is frozen, and leaves it
    assert all(np.isfinite(row["loss"]) for row in rows(workdir)[1:])


def test_a_run_of_adapters_continues_as_if_it_had_not_stopped(finished, tmp_path, capsys):
    workdir, result = finished
    for steps in (2, 4):
        continued = run_here(tmp_path, **ADAPTED, steps=steps)
    assert "continuing from step 2" in capsys.readouterr().out
    assert learnt(tmp_path) == learnt(workdir)
    assert same(continued.params, result.params)


def test_a_run_of_adapters_is_measured_and_exported_merged_and_alone(finished, tmp_path):
    workdir, result = finished
    measured = measure(config_with(**ADAPTED), workdir)["held_out"]
    assert measured["avg@2"]["value"] == pytest.approx(rows(workdir)[-1]["eval/accuracy"])
    assert hf.export(workdir, tmp_path / "merged") == 4
    _, merged = hf.load_hf(tmp_path / "merged")
    assert same(merged, policy.merge(result.policy, result.params))
    assert hf.export(workdir, tmp_path / "alone", adapters=True) == 4
    base, frozen = hf.load_hf(tmp_path / "alone" / "base")  # nobody else has what was fine-tuned
    assert json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "alone" / "base"
    )
    lora, adapters = hf.load_adapters(tmp_path / "alone", base)
    together = dataclasses.replace(base, lora=lora), policy.join(frozen, adapters)
    assert same(policy.merge(*together), merged)
    assert (lora.rank, lora.alpha, lora.modules) == (2, 32.0, ("query", "value", "up"))
    assert same(adapters, policy.trained(result.policy, result.params))
    assert result.generate(["1+1="]) == result.generate(["1+1="])
    with pytest.raises(ValueError, match="written in float32"):
        hf.export(workdir, tmp_path / "again", adapters=True, dtype="bfloat16")


def test_a_frozen_policy_that_is_not_the_one_of_the_run_is_refused(finished, tmp_path):
    workdir, _ = finished
    run_here(tmp_path / "other", **ADAPTED | {"seed": 1, "sft.steps": 0, "steps": 0})
    for name, fault in (("lost", "frozen"), ("swapped", "frozen does not hold"), ("damaged", "checkpoint .*frozen/0")):
        shutil.copytree(workdir, tmp_path / name)
        frozen = tmp_path / name / "frozen"
        if name != "damaged":
            shutil.rmtree(frozen)
        if name == "swapped":
            shutil.copytree(tmp_path / "other" / "frozen", frozen)
        if name == "damaged":
            for file in (file for file in frozen.rglob("d/*") if file.is_file()):
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ValueError, match=fault):
            measure(config_with(**ADAPTED), tmp_path / name)
        with pytest.raises(ValueError, match=fault):
            hf.export(tmp_path / name, tmp_path / "out")
        assert frozen.exists() == (name != "lost")


def test_a_frozen_policy_that_another_run_left_is_refused_before_the_first_checkpoint(tmp_path):
    keys = ADAPTED | {"sft.steps": 0, "eval.every": 0, "checkpoint.dir": str(tmp_path / "kept"), "steps": 1}
    run_here(tmp_path / "first", **keys)
    shutil.rmtree(tmp_path / "kept" / "checkpoints")
    assert run_here(tmp_path / "first", **keys).metrics["step"] == 1
    shutil.rmtree(tmp_path / "kept" / "checkpoints")
    with pytest.raises(ValueError, match="frozen has checkpoints of a run with another config"):
        run_here(tmp_path / "second", **keys | {"seed": 5})


def test_a_policy_with_adapters_is_given_merged(finished, tmp_path):
    workdir, result = finished
    given = run_here(
        tmp_path,
        own={"policy": (result.policy, result.params)},
        steps=0,
        **{"tokenizer.path": str(workdir / "policy"), "sft.steps": 0},
    )
    assert given.policy.lora is None
    assert same(given.params, policy.merge(result.policy, result.params))


@pytest.mark.slow
def test_a_run_goes_on_from_adapters_or_merges_them(tmp_path):
    start = write_qwen(tmp_path / "start")
    config = hf.read_config(start, lora=Lora(2, 32.0, ("query", "value", "up")))
    assert config.lora == Lora(2, 32.0, ("up", "value", "query"))  # in whatever order they are told
    fresh = policy.trained(config, policy.init(config, jax.random.key(0)))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, fresh)
    hf.save_adapters(tmp_path / "adapter", config, moved)
    keys = {
        "policy.path": str(start),
        "policy.adapter": str(tmp_path / "adapter"),
        "data.max_prompt_tokens": 16,
        "steps": 0,
    }
    keys |= {"sft.steps": 0, "eval.every": 0, "arithmetic.num_warm": 0}
    on = run_here(tmp_path / "on", **keys | ADAPTED)
    assert same(policy.trained(on.policy, on.params), moved)
    merged = run_here(tmp_path / "merged", **keys)
    _, base = hf.load_hf(start)
    assert same(merged.params, policy.merge(config, policy.join(base, moved)))
    with pytest.raises(
        ValueError, match=r"goes on with policy.lora_rank=2, lora_alpha=32.0 and lora_modules=\('query'"
    ):
        run_here(tmp_path / "other", **keys | ADAPTED | {"policy.lora_rank": 3})
    assert list((tmp_path / "other").iterdir()) == []  # which is free for the right values
    alone = hf.export(tmp_path / "on", tmp_path / "alone", adapters=True)
    assert (alone, [file.name for file in (tmp_path / "alone").iterdir() if file.is_dir()]) == (0, [])
    assert json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(start)
    measured = measure(config_with(**keys), tmp_path / "measured")
    assert "_with_adapters_" in next(iter((tmp_path / "measured" / "eval").iterdir())).name
    assert measured["held_out"]["tasks"] == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy.adapter": "somewhere"}, "config.policy.adapter='somewhere' must be left empty: they are adapters"),
        ({"policy.adapter": "x", "policy.path": "y", "policy.lora_rank": 2}, "must be left empty with sft.steps"),
        (
            {"policy.lora_modules": ("q_proj",)},
            "config.policy.lora_modules=('q_proj',) must be different ones of query",
        ),
        ({"policy.lora_modules": ()}, "must be different ones of"),
        ({"policy.lora_modules": ("up", "up")}, "must be different ones of"),
        ({"policy.lora_rank": -1}, "config.policy.lora_rank=-1 must be at least 0"),
        ({"policy.lora_alpha": 0.0}, "config.policy.lora_alpha=0.0 must be above 0"),
    ],
    ids=str,
)
def test_adapters_that_a_run_cannot_have_are_refused_by_their_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"config\.policy") as error:
        run_here(tmp_path, **changes)
    assert message in str(error.value)


def test_the_modules_of_the_configuration_are_those_of_a_layer():
    assert default.KEYS["policy.lora_modules"].default == MODULES
