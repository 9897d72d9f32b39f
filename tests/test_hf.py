"""Hugging Face checkpoints against golden files of transformers: logits, greedy text, bytes and errors."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from krl import hf, policy, rollout
from krl.base.sharding import make_mesh
from krl.base.types import Prompts
from krl.configs import default
from krl.hf import __main__ as command
from krl.hf import families
from krl.hf.weights import INDEX
from krl.policy.experts import Experts
from krl.run import start
from tests import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden"
ROOT = pathlib.Path(__file__).parent.parent
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))


TOKENIZER = types.SimpleNamespace(vocab_size=96, pad_id=0, eos_ids=(2,))  # all that its sizes are asked of


@functools.cache
def checkpoint(family):
    """(config, params, tokens of three sequences, their logits, 64 greedy tokens after each)."""
    config, params = hf.load_hf(GOLDEN / family)
    golden = np.load(GOLDEN / family / "golden.npz")
    return config, params, *([golden[f"{name}{i}"] for i in range(3)] for name in ("tokens", "logits", "greedy"))


def padded(sequences, side):
    """Rows of 26 columns: (tokens [3, 26] int32, mask [3, 26] bool)."""
    tokens, mask = np.full((len(sequences), 26), 7, np.int32), np.zeros((len(sequences), 26), bool)
    for row, sequence in enumerate(sequences):
        columns = slice(26 - len(sequence), None) if side == "left" else slice(len(sequence))
        tokens[row, columns], mask[row, columns] = sequence, True
    return jnp.array(tokens), jnp.array(mask)


def test_every_family_has_a_golden_checkpoint():
    assert FAMILIES == [
        "gemma2", "gemma3", "gemma3_images", "granite", "llama2", "llama3", "mistral", "olmo2", "olmo3", "olmoe",
        "phi3", "phi4", "qwen2", "qwen2_sliding", "qwen2_yarn", "qwen3", "qwen3_moe", "smollm3",
    ]  # fmt: skip
    known = {json.loads((GOLDEN / family / "config.json").read_text())["model_type"] for family in FAMILIES}
    assert known - {"gemma3"} | {"gemma3_text", "ministral"} == set(families.FAMILIES)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, side):
    config, params, sequences, logits, _ = checkpoint(family)
    tokens, mask = padded(sequences, side)
    got = policy.apply(config, params, tokens, mask)
    for row, expected in enumerate(logits):
        np.testing.assert_allclose(got[row][mask[row]], expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_do_not_see_each_other(family):
    config, params, sequences, logits, _ = checkpoint(family)
    packed = np.concatenate([*sequences, np.zeros(3, int)])[None]
    segments = np.repeat([5, 6, 2, 0], [*map(len, sequences), 3])[None]
    got = policy.apply(config, params, jnp.array(packed, jnp.int32), segments=jnp.array(segments, jnp.int32))
    np.testing.assert_allclose(got[0, : sum(map(len, sequences))], np.concatenate(logits), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_through_the_cache_equal_those_of_transformers(family):
    config, params, sequences, logits, _ = checkpoint(family)
    tokens, mask = padded(sequences, "left")
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
    cache, layers = policy.init_cache(config, 3, 30), policy.for_decoding(config, params)
    for begin, end in ((0, 19), (19, 25), (25, 26)):
        got, cache = policy.decode(config, layers, tokens[:, begin:end], positions[:, begin:end], cache, begin)
        for row, expected in enumerate(logits):
            np.testing.assert_allclose(got[row], expected[end - 27], atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES[:2], *map(tiny.slow, FAMILIES[2:])])
def test_greedy_continuations_equal_those_of_transformers(family):
    config, params, sequences, _, greedy = checkpoint(family)
    tokens, mask = padded(sequences, "left")
    prompts = Prompts(tokens, mask, jnp.arange(3, dtype=jnp.int32))
    rollouts = rollout.generate(
        config, params, prompts, jnp.array([1, 2, 1]), jax.random.key(0), max_new_tokens=64, eos_ids=(), temperature=0.0
    )
    np.testing.assert_array_equal(rollouts.tokens, [greedy[0], greedy[1], greedy[1], greedy[2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_what_was_loaded_gives_the_same_bytes(family, tmp_path):
    config, params, *_ = checkpoint(family)
    hf.save_hf(tmp_path / "out", config, params, shard_bytes=7000)
    before, after = read(GOLDEN / family), read(tmp_path / "out")
    if family == "gemma3_images":  # its language model alone
        inner = "language_model."
        before = {name.removeprefix(inner): array for name, array in before.items() if name.startswith(inner)}
        assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    else:
        assert (tmp_path / "out/config.json").read_bytes() == (GOLDEN / family / "config.json").read_bytes()
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        assert array.tobytes() == after[name].tobytes(), name
    assert max(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) < 9500
    again, loaded = hf.load_hf(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params, loaded)


def read(directory):
    """Every tensor of a directory, checked against its index if it has one."""
    files = sorted(directory.glob("*.safetensors"))
    tensors = {file.name: safetensors.numpy.load_file(file) for file in files}
    if (directory / INDEX).exists():
        index = json.loads((directory / INDEX).read_text())
        assert index["weight_map"] == {name: file for file, arrays in tensors.items() for name in arrays}
        assert index["metadata"]["total_size"] == sum(a.nbytes for arrays in tensors.values() for a in arrays.values())
    return {name: array for arrays in tensors.values() for name, array in arrays.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_generations_of_config_json_describe_the_same_model(family, tmp_path):
    shutil.copy(GOLDEN / family / "config_v4.json", tmp_path / "config.json")
    assert hf.read_config(tmp_path) == hf.read_config(GOLDEN / family)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3", "olmo2"])
def test_a_mesh_shards_the_parameters_and_changes_nothing(family, tmp_path):
    config, whole, sequences, logits, _ = checkpoint(family)
    mesh = make_mesh((2, 2, 2), ("data", "fsdp", "model"))
    _, params = hf.load_hf(GOLDEN / family, mesh)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    assert params["blocks"]["gate"].sharding.shard_shape((3, 16, 32)) == (3, 8, 16)
    assert params["blocks"]["query"].sharding.spec[2] == "model"
    with jax.set_mesh(mesh):
        got = policy.apply(config, params, jnp.array(sequences[0], jnp.int32)[None].repeat(4, 0))
    np.testing.assert_allclose(got[3], logits[0], atol=1e-4)
    hf.save_hf(tmp_path / "out", config, params)
    before, after = read(GOLDEN / family), read(tmp_path / "out")
    assert all(array.tobytes() == after[name].tobytes() for name, array in before.items())


@pytest.mark.parametrize("family", ["qwen3_moe", tiny.slow("olmoe")])
def test_experts_and_their_gradients_are_the_same_on_eight_devices(family, tmp_path):
    config, whole, sequences, logits, _ = checkpoint(family)
    mesh = make_mesh((2, 2, 2), ("data", "fsdp", "model"))
    _, params = hf.load_hf(GOLDEN / family, mesh)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    assert params["blocks"]["down"].sharding.spec[1:] == ("model", None, "fsdp")
    tokens = jnp.array([np.resize(sequence, 24) for sequence in (*sequences, sequences[0])], jnp.int32)
    directions = jax.random.normal(jax.random.key(0), (4, 24, config.vocab_size))

    def along(params):
        return (policy.apply(config, params, tokens) * directions).sum()

    expected = jax.grad(along)(whole)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(policy.apply(config, params, tokens)[0], logits[0], atol=1e-4)
        np.testing.assert_allclose(policy.apply(config, params, tokens[:1])[0], logits[0], atol=1e-4)
        got = jax.jit(jax.grad(along))(params)
        alone = jax.jit(jax.grad(lambda params: (policy.apply(config, params, tokens[:1]) * directions[:1]).sum()))(
            params
        )
    assert all(leaf.any() for leaf in jax.tree.leaves(expected))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(alone))  # a row fewer than devices, and not a NaN
    jax.tree.map(lambda leaf, other: np.testing.assert_allclose(leaf, other, atol=2e-3, rtol=1e-4), got, expected)
    hf.save_hf(tmp_path / "out", config, params)
    before, after = read(GOLDEN / family), read(tmp_path / "out")
    assert all(array.tobytes() == after[name].tobytes() for name, array in before.items())


def test_experts_have_no_adapters_and_attention_beside_them_has(tmp_path):
    with pytest.raises(ValueError, match="leave gate, up, down out"):
        dataclasses.replace(checkpoint("olmoe")[0], lora=policy.Lora(2, 2.0))
    config = dataclasses.replace(checkpoint("olmoe")[0], lora=policy.Lora(2, 2.0, ("query", "output")))
    fresh = policy.adapt(config, checkpoint("olmoe")[1], jax.random.key(0))
    hf.save_adapters(tmp_path / "out", config, fresh)
    again, loaded = hf.load_adapters(tmp_path / "out", checkpoint("olmoe")[0])
    assert again == config.lora
    jax.tree.map(np.testing.assert_array_equal, loaded, policy.trained(config, fresh))
    assert sorted(policy.trained(config, fresh)["blocks"]) == [
        "output_lora_a",
        "output_lora_b",
        "query_lora_a",
        "query_lora_b",
    ]


def test_only_the_slices_of_a_device_are_read(monkeypatch):
    sizes, get = [], safetensors.safe_open

    class Counting:
        def __init__(self, view):
            self.view = view

        def __getitem__(self, cut):
            part = self.view[cut]
            sizes.append(part.shape)
            return part

        def __getattr__(self, name):
            return getattr(self.view, name)

    class Opened:
        def __init__(self, *args, **options):
            self.file = get(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return Counting(self.file.get_slice(name))

    monkeypatch.setattr(safetensors, "safe_open", Opened)
    hf.load_hf(GOLDEN / "qwen2", make_mesh((2, 2), ("fsdp", "model")))
    assert (16, 8) in sizes  # gate [32, 16] in halves along both axes
    assert (32, 16) not in sizes


def changed(tmp_path, family="qwen2", **fields):
    """A copy of a golden checkpoint whose config.json has other fields; None removes one."""
    target = tmp_path / "changed"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(GOLDEN / family, target)
    config = json.loads((target / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attention_bias", True, "attention_bias"),
        ("mlp_bias", True, "mlp_bias"),
        ("hidden_act", "relu", "'relu' is not supported"),
        ("rope_parameters", {"rope_type": "proportional", "factor": 4.0, "rope_theta": 1e4}, "'proportional'"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "finetuned": True}, "finetuned"),
        ("rope_parameters", {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0]}, "1 numbers, not 2"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "alpha"),
        ("layer_types", ["full_attention", "chunked_attention", "full_attention"], "layer_types"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        ("num_experts", 8, "num_experts"),
        ("num_nextn_predict_layers", 1, "num_nextn_predict_layers"),
        ("use_mrope", True, "use_mrope"),
        ("is_causal", False, "is_causal"),
        ("attn_logit_softcapping", 3.0, "attn_logit_softcapping"),
        ("query_pre_attn_scalar", 64, "query_pre_attn_scalar"),
        ("logits_scaling", 8.0, "logits_scaling"),
        ("num_attention_heads", 0, "zero|num_heads"),
        ("num_key_value_heads", 0, "num_kv_heads 0"),
        ("num_hidden_layers", -1, "layer_types"),
        ("hidden_size", 16.0, "embed_size 16.0"),
        ("rms_norm_eps", "tiny", "norm_epsilon 'tiny'"),
        ("tie_word_embeddings", "yes", "tie_embeddings 'yes'"),
        ("rope_parameters", {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}, "factor 0.0 of rope_scaling"),
        ("model_type", ["qwen2"], "is not supported"),
        ("model_type", "mamba", "'mamba' is not supported; supported are llama"),
        ("hidden_size", None, "hidden_size"),
        ("hidden_size", 10**400, "embed_size 1000"),
        ("rms_norm_eps", 10**39, "norm_epsilon 1000"),
        ("rope_parameters", {"rope_type": "linear", "factor": 1e39, "rope_theta": 1e4}, "factor 1e.39 of rope_scaling"),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": math.inf}, "partial"),
        ("rope_parameters", {"rope_theta": 1e4, "full_attention": {}, "sliding_attention": {}}, "must not have 'full"),
    ],
)
def test_fields_that_change_the_computation_are_refused_by_name(tmp_path, field, value, message):
    others = {"rope_parameters": None} if field == "rope_scaling" else {}
    with pytest.raises(ValueError, match=message) as error:
        hf.read_config(changed(tmp_path, **{field: value}, **others))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "field", "value", "message"),
    [
        ("mistral", "layer_types", ["chunked_attention"] * 3, "layer_types"),
        ("mistral", "attention_bias", True, "attention_bias"),
        ("smollm3", "no_rope_layers", [1], "a 0 or a 1 for each of 3 layers"),
        ("smollm3", "mlp_bias", True, "mlp_bias"),
        ("gemma3", "use_bidirectional_attention", True, "use_bidirectional_attention"),
        ("gemma3", "attn_logit_softcapping", 5.0, "attn_logit_softcapping"),
        ("olmo2", "clip_qkv", 8.0, "clip_qkv"),
        ("olmo3", "layer_types", ["linear_attention"] * 3, "layer_types"),
        ("qwen2", "use_qk_norm", True, "use_qk_norm"),
        ("phi3", "partial_rotary_factor", 0.9, r"\[0.9, 1.0\]"),
        ("phi3", "lm_head_bias", True, "lm_head_bias"),
        ("granite", "num_local_experts", 8, "num_local_experts"),
        ("qwen3_moe", "decoder_sparse_step", 2, "decoder_sparse_step"),
        ("qwen3_moe", "mlp_only_layers", [0], "mlp_only_layers"),
        ("qwen3_moe", "num_experts_per_tok", 7, r"of 6 experts \(at most 1,000,000\) 7"),
        ("olmoe", "num_experts", 10**39, r"experts \(at most 1,000,000\) 2 cannot"),
        ("qwen3_moe", "layer_types", ["full_attention"] * 3, "layer_types"),
        ("qwen3_moe", "norm_topk_prob", "no", "normalised 'no'"),
        ("olmoe", "clip_qkv", 1.0, "clip_qkv"),
        ("llama2", "rope_scaling", {"rope_type": "linear", "factor": 2.0}, "say two things"),
        ("llama2", "partial_rotary_factor", 0.0, "partial_rotary_factor"),
        ("phi4", "partial_rotary_factor", 0.25, "partial_rotary_factor"),
        ("granite", "attention_multiplier", 0.0, "attention_multiplier"),
        ("gemma2", "final_logit_softcapping", "x", "logit_softcap 'x'"),
        ("mistral", "sliding_window", 2.5, "window 2.5"),
        ("smollm3", "no_rope_layers", [], "a 0 or a 1 for each of 3 layers"),
        ("llama2", "vocab_size", 10**13, "from 1 to 10,000,000"),
        ("granite", "logits_scaling", 0.0, "logit_divisor"),
        ("qwen2_yarn", "partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("gemma2", "query_pre_attn_scalar", 10**400, "malformed field"),
        ("olmo3", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}, "must have 'full_attention'"),
    ],
)
def test_what_a_family_may_ask_for_and_is_not_there_is_refused_by_name(tmp_path, family, field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        hf.read_config(changed(tmp_path, family=family, **{field: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": -1.0}, "high_frequency_factor -1.0"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}, "high_frequency_factor '32'"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "the pre-training, 0,"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": "1"}, "magnitude '1'"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "must be below"),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 0.0]}, "divisors .1.0, 0.0."),
    ],
)
def test_scalings_that_cannot_be_are_one_line(tmp_path, scaling, message):
    with pytest.raises(ValueError, match=message) as error:
        hf.read_config(changed(tmp_path, family="llama2", rope_parameters=scaling | {"rope_theta": 1e4}))
    assert "\n" not in str(error.value)


def test_halves_are_rotated():
    with pytest.raises(ValueError, match="rotary_size 3 must be even"):
        policy.PolicyConfig(vocab_size=8, rotary_size=3)


def test_experts_slide_in_all_layers_or_in_none(tmp_path):
    more: dict = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = hf.read_config(changed(tmp_path, family="qwen3_moe", **more))
    assert (config.sliding, config.window) == ((True,) * 3, 4)
    more["use_sliding_window"] = False
    assert not any(hf.read_config(changed(tmp_path, family="qwen3_moe", **more)).sliding)


def test_fields_that_repeat_what_a_family_computes_are_not_refused(tmp_path):
    for family, field, value in (("qwen3_moe", "use_qk_norm", True), ("gemma2", "sliding_window_size", 4096)):
        assert hf.read_config(changed(tmp_path, family=family, **{field: value})) == hf.read_config(GOLDEN / family)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.read_config(changed(tmp_path, family="mistral", layer_types=kinds))
    assert config == dataclasses.replace(hf.read_config(GOLDEN / "mistral"), sliding=(True, False, True))


def test_positions_that_change_with_the_length_have_a_limit(tmp_path):
    plain = hf.read_config(GOLDEN / "qwen2")
    path = changed(tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0})
    assert hf.read_config(path) == dataclasses.replace(plain, longest=128)
    assert hf.read_config(GOLDEN / "phi4").longest == 100
    config = default.get_config()
    config.policy.path, config.data.max_prompt_tokens, config.sample.max_new_tokens = str(GOLDEN / "phi4"), 60, 41
    with pytest.raises(ValueError, match=r"rows of 101 tokens; beyond 100 the checkpoint"):
        start.find_policy(config, TOKENIZER, tmp_path)
    config.sample.max_new_tokens = 40
    assert start.find_policy(config, TOKENIZER, tmp_path).longest == 100


def test_the_language_model_of_one_that_sees_images_is_read_by_either_name(tmp_path, capsys):
    config, params, *_ = checkpoint("gemma3_images")
    path = changed(tmp_path, family="gemma3_images")
    arrays = safetensors.numpy.load_file(path / "model.safetensors")
    newer = {
        re.sub(r"^language_model\.model\.", "model.language_model.", name): array for name, array in arrays.items()
    }
    newer = {name if "language_model" in name else f"model.{name}": array for name, array in newer.items()}
    assert len(newer) == len(arrays)
    safetensors.numpy.save_file(newer, path / "model.safetensors")
    again, loaded = hf.load_hf(path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    run = default.get_config()
    run.policy.path = str(path)
    start.find_policy(run, TOKENIZER, tmp_path)
    assert "its language model alone is read and trained" in capsys.readouterr().out
    whole = json.loads((path / "config.json").read_text())
    capped = whole | {"text_config": whole["text_config"] | {"final_logit_softcapping": 5.0}}
    (path / "config.json").write_text(json.dumps(capped))
    assert hf.read_config(path) == config  # which as a whole has no cap, whatever its file says
    safetensors.numpy.save_file(newer | {"model.language_model.more": np.ones(1)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected \(model.more\)"):
        hf.load_hf(path)


def test_adapters_of_weights_that_are_stored_as_one_are_merged_alone(tmp_path):
    """PEFT has one A for queries, keys and values of Phi-3 together, and here each has its own."""
    config, params, sequences, *_ = checkpoint("phi3")
    config = dataclasses.replace(config, lora=policy.Lora(2, 4.0, ("query", "up")))
    params = policy.adapt(config, params, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    with pytest.raises(ValueError, match=r"qkv_proj.weight is several weights in one, .* export the merged policy"):
        hf.save_adapters(tmp_path / "adapters", config, params)
    hf.save_hf(tmp_path / "merged", config, params)
    tokens = jnp.array(sequences[0], jnp.int32)[None]
    expected = policy.apply(config, params, tokens)
    np.testing.assert_allclose(policy.apply(*hf.load_hf(tmp_path / "merged"), tokens), expected, atol=1e-4)


def test_what_a_checkpoint_is_takes_one_line(tmp_path):
    shutil.copy(GOLDEN / "olmo3" / "config.json", tmp_path)
    # In a process of its own: a module that its package has imported is run with a warning.
    command_line = [sys.executable, "-W", "error::RuntimeWarning", "-m", "krl.hf.check", str(tmp_path)]
    told = subprocess.run(command_line, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert told.count("\n") == 1
    assert told.startswith(
        "olmo3 is supported: 10.2 k parameters in bfloat16; 3 layers; unusual: qk_norm, joint_qk_norm"
    )
    assert (
        ", no pre_norms, post_norms, window 5, sliding in 2 of 3 layers, rope_scaling yarn, no scale_sliding; " in told
    )
    assert "training keeps 163 kB" in told  # 16 bytes of each parameter
    assert ", of which a token goes through 8.85 k; " in hf.describe(GOLDEN / "olmoe")
    assert "images, which are left out; " in hf.describe(GOLDEN / "gemma3_images")
    for odd in (5, [1], "LlamaForCausalLM", {}):
        fields = json.loads((GOLDEN / "olmo3" / "config.json").read_text()) | {"architectures": odd}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert hf.describe(tmp_path).startswith("olmo3 is supported")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(SystemExit, match=r"krl.hf: .*'mamba' is not supported"):
        command.main(["check", str(tmp_path)])


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen2_sliding"])
def test_which_layers_slide_is_known_without_layer_types(family, tmp_path):
    """As in the files that were published before transformers wrote the list; the golden file has its list."""
    config = hf.read_config(changed(tmp_path, family=family, layer_types=None))
    assert any(config.sliding)
    assert not all(config.sliding)
    assert config == hf.read_config(GOLDEN / family)


def test_fields_that_are_off_or_harmless_are_not_refused(tmp_path):
    path = changed(
        tmp_path,
        use_mrope=False,
        attention_bias=False,
        attention_dropout=0.1,
        resid_pdrop=0.1,
        unsloth_fixed=True,
        partial_rotary_factor=1.0,
        logits_scaling=1.0,
        is_causal=True,
        return_dict=True,
        temperature=0.7,
        is_llama_config=True,
    )
    assert hf.read_config(path) == hf.read_config(GOLDEN / "qwen2")


def test_a_null_is_off_and_not_the_default_of_the_family(tmp_path):
    path = changed(tmp_path, family="gemma2")
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(fields | {"attn_logit_softcapping": None, "num_key_value_heads": None})
    )
    config = hf.read_config(path)
    assert (config.attention_softcap, config.logit_softcap, config.num_kv_heads) == (0.0, 6.0, 4)
    del fields["attn_logit_softcapping"]
    (path / "config.json").write_text(json.dumps(fields))
    assert hf.read_config(path).attention_softcap == 50.0


def test_fields_of_another_family_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sliding_window"):
        hf.read_config(changed(tmp_path, family="llama3", use_sliding_window=True, sliding_window=2))
    with pytest.raises(ValueError, match="attn_logit_softcapping"):
        hf.read_config(changed(tmp_path, family="gemma3", attn_logit_softcapping=3.0))


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path):
    def fails(message, **fields):
        with pytest.raises(ValueError, match=message) as error:
            hf.load_hf(changed(tmp_path, **fields))
        assert "\n" not in str(error.value)

    fails(r"12 unexpected \(model.layers.2.input_layernorm.weight, ", num_hidden_layers=2, layer_types=None)
    fails(r"12 missing \(model.layers.3.input_layernorm.weight, ", num_hidden_layers=4, layer_types=None)
    fails(r"shape \(96, 16\) and its config.json asks for \(97, 16\)", vocab_size=97)
    with pytest.raises(ValueError, match=r"nowhere is no checkpoint directory"):
        hf.load_hf(tmp_path / "nowhere")

    def broken(message, change):
        path = changed(tmp_path, family="qwen2_sliding")
        change(path)
        with pytest.raises(ValueError, match=message) as error:
            hf.load_hf(path)
        assert "\n" not in str(error.value)

    first = "model-00001-of-00005.safetensors"
    broken(f"{first}: .*cut off", lambda path: (path / first).write_bytes((path / first).read_bytes()[:-10]))
    broken(f"{first}: .*cut off", lambda path: (path / first).write_bytes(b""))
    broken(f"{first} is missing", lambda path: (path / first).unlink())
    for text in ("{", "[" * 100_000, json.dumps({"weight_map": {"a": "x" * 5_000}})):
        broken("not an index", lambda path, text=text: (path / INDEX).write_text(text))
    broken("model.safetensors is missing", lambda path: (path / INDEX).unlink())
    broken(
        "at most 10,000",
        lambda path: (path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 10**300})),
    )
    for text in ("{", "[" * 100_000, "9" * 5_000):
        broken("not the configuration", lambda path, text=text: (path / "config.json").write_text(text))
    broken("hf_quant_config.json says", lambda path: (path / "hf_quant_config.json").write_text("{}"))

    def whole_numbers(path):
        arrays = safetensors.numpy.load_file(path / first)
        safetensors.numpy.save_file({k: v.astype(np.int8) for k, v in arrays.items()}, path / first)

    broken("quantised", whole_numbers)


LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
SEES = LLAMA | {"model_type": "gemma3_text"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "nothing in it is a checkpoint's"),
        ({"adapter_config.json": {}, "adapter_model.safetensors": {}, "tokenizer.json": {}}, "adapters .* name it in config.policy.adapter"),
        ({"config.json": LLAMA, "adapter_config.json": {}, "adapter_model.safetensors": {}}, "adapters .* name it in config.policy.adapter"),
        ({"config.json": {"model_type": "llava", "text_config": SEES, "vision_config": {}}, "model.safetensors": {}}, "'llava' is a model with more than a language model.* save that, whose model_type is 'gemma3_text', alone"),
        ({"config.json": LLAMA, "model-00001-of-00002.safetensors": {}}, r"model-00001-of-00002\.safetensors is told by model\.safetensors\.index\.json, which is not there"),
        ({"config.json": LLAMA, "model.safetensors.index.json": {"weight_map": {"a": "model-1.safetensors"}}, "flax_model.msgpack": {}}, "model-1.safetensors is missing; .*fetch it, too"),
        ({"config.json": LLAMA, "pytorch_model-00001-of-00002.bin": {}}, "pickled weights, which are not read; convert"),
        ({"config.json": LLAMA}, "config.json and no weights"),
        ({"config.json": LLAMA, "tf_model.h5": {}}, "another format than safetensors"),
        ({"config.json": LLAMA | {"quantization_config": {"quant_method": "gptq"}}}, r"'quantization_config' says .* quantised \(gptq\)"),
        ({"model-q4.gguf": {}}, "GGUF files, made for llama.cpp"),
        ({"config.json": {"alloc.budget": 16}, "metrics.jsonl": {}, "policy/config.json": LLAMA}, "'model_type'.*work directory of a run; write its policy with python -m krl.hf export"),
        ({"_CHECKPOINT_METADATA": {}, "params/_METADATA": {}}, "Orbax checkpoint of a run"),
        ({"consolidated.00.pth": {}, "params.json": {}}, "its maker's own format"),
        ({"snapshots/0a1b/config.json": LLAMA}, "the hub's cache; name the directory below its snapshots"),
        ({"checkpoint-500/config.json": LLAMA}, "directories in it hold config.json"),
        ({"tokenizer.json": {}, "tokenizer_config.json": {}}, "a tokenizer alone"),
        ({"model.safetensors": {}}, "weights without their config.json"),
        ({"model_index.json": {}}, "diffusers"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_told_what_it_is(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        hf.load_hf(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_and_a_name_of_the_hub_are_no_directories(tmp_path):
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path, message in [
        (tmp_path / "q4.gguf", "it is a GGUF file"),
        (tmp_path / "model.safetensors", "it is a file; name a directory"),
        ("Qwen/Qwen3-0.6B", r"must be downloaded first \(hf download Qwen/Qwen3-0.6B --local-dir DIR\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            hf.load_hf(path)


def test_a_second_copy_of_a_tied_embedding_is_read_over(tmp_path):
    path = changed(tmp_path, family="qwen3")
    arrays = safetensors.numpy.load_file(path / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hf.load_hf(path)[1], checkpoint("qwen3")[1])
    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    with pytest.raises(ValueError, match="set it to false to keep both"):
        hf.load_hf(path)
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:9]
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(9, 16\)"):
        hf.load_hf(path)


def test_saving_never_writes_over_anything(tmp_path):
    config, params, *_ = checkpoint("llama2")
    (tmp_path / "kept.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        hf.save_hf(tmp_path, config, params)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]
    for name in ("kept.txt/below", "kept.txt"):
        with pytest.raises(ValueError, match=r"kept\.txt"):
            hf.save_hf(tmp_path / name, config, params)
    with pytest.raises(ValueError, match=r"absent\.json"):
        hf.save_hf(tmp_path / "out", config, params, files=[tmp_path / "absent.json"])
    with pytest.raises(ValueError, match="not of this config"):
        hf.save_hf(tmp_path / "out", dataclasses.replace(config, qkv_bias=True), params)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    hf.save_hf(tmp_path / "link", config, params)
    jax.tree.map(np.testing.assert_array_equal, hf.load_hf(tmp_path / "empty")[1], params)


def test_config_json_names_the_type_that_is_written(tmp_path):
    config, params, *_ = checkpoint("llama2")
    hf.save_hf(tmp_path / "wide", config, params, dtype="float32")
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"
    path = changed(tmp_path)
    arrays = safetensors.numpy.load_file(path / "model.safetensors")
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float32)
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    config, params = hf.load_hf(path)  # of two types: float32 holds both
    hf.save_hf(tmp_path / "mixed", config, params)
    assert json.loads((tmp_path / "mixed/config.json").read_text())["dtype"] == "float32"
    assert {str(array.dtype) for array in read(tmp_path / "mixed").values()} == {"float32"}


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": True}, {"qk_norm": True, "tie_embeddings": False}, {"qk_norm": True, "experts": Experts(3, 2)}],
)
def test_a_policy_from_scratch_can_be_exported(options, tmp_path):
    config = policy.PolicyConfig(vocab_size=16, **options)
    params = policy.init(config, jax.random.key(0))
    hf.save_hf(tmp_path / "out", config, params)
    again, loaded = hf.load_hf(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params, loaded)


def test_options_that_no_family_has_are_not_exported(tmp_path):
    config = policy.PolicyConfig(vocab_size=16, embedding_scale=2.0)
    with pytest.raises(ValueError, match="embedding_scale"):
        hf.save_hf(tmp_path / "out", config, policy.init(config, jax.random.key(0)))
    assert not (tmp_path / "out").exists()
