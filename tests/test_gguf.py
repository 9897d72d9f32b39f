"""GGUF files to checkpoints: weights, configurations, tokenizers, and what is refused."""

import dataclasses
import json
import pathlib

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece

from krl import hf
from krl.hf.gguf import convert, main
from krl.policy.config import RopeScaling
from tests.bpe import CHATML, TEXTS, byte_level

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
}  # fmt: skip
PLAIN = {"post_attention_layernorm": "ffn_norm"}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
PIECES = [f"piece{i}" for i in range(96)]


def stored_name(name, gemma):
    """llama.cpp's name of a checkpoint's tensor."""
    name, _, kind = name.rpartition(".")
    front, layer = "", name.split(".")[2] if name.startswith("model.layers.") else ""
    if layer:
        front, name = f"blk.{layer}.", name.removeprefix(f"model.layers.{layer}.")
    return f"{front}{(NAMES | (GEMMA if gemma else PLAIN))[name]}.{kind}"


def paired(weight, heads):
    """Rows of queries or keys as llama.cpp has them: of a head 0, n/2, 1, n/2 + 1, ..."""
    size = len(weight) // heads
    order = np.arange(size).reshape(2, size // 2).T.reshape(-1)
    return np.concatenate([weight[head * size + order] for head in range(heads)])


def write(file, family, tensors, fields, pieces=PIECES, kind=None, tokenizer=()):
    """A GGUF file of arrays by llama.cpp's names and of fields without the family in front of them."""
    writer = gguf.GGUFWriter(file, family)
    tokens = {"model": "llama", "tokens": pieces, "scores": [-float(i) for i in range(len(pieces))],
              "token_type": [1] * len(pieces), "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    named = {f"{family}.{k}": v for k, v in fields.items()} | {
        f"tokenizer.{k if k == 'chat_template' else f'ggml.{k}'}": v for k, v in (tokens | dict(tokenizer)).items()
    }
    adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
            list: writer.add_array}  # fmt: skip
    for key, value in named.items():
        if value is not None:
            adds[type(value)](key, value)
    for name, array in tensors.items():
        if kind is None or array.ndim == 1:
            writer.add_tensor(name, array.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(array.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def of_golden(family, file, **more):
    """A golden checkpoint as a GGUF file."""
    config = json.loads((GOLDEN / family / "config.json").read_text())
    kind = {"llama2": "llama", "llama3": "llama", "qwen2_sliding": "qwen2"}.get(family, family)
    gemma = kind.startswith("gemma")
    tensors = {}
    for name, array in safetensors.numpy.load_file(GOLDEN / family / "model.safetensors").items():
        if gemma and name.endswith("norm.weight"):
            array = array + 1
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = paired(array, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        tensors[stored_name(name, gemma)] = array
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    fields = {
        "block_count": config["num_hidden_layers"], "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"], "context_length": config["max_position_embeddings"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "attention.key_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.freq_base": float(full["rope_theta"]),
    }  # fmt: skip
    if full.get("rope_type") == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": full["factor"]}
    if gemma:
        fields["attention.sliding_window"] = config["sliding_window"]
    if kind == "gemma2":
        fields |= {f"{name}_softcapping": config[f"{name}_softcapping"] for name in ("attn_logit", "final_logit")}
    if kind == "gemma3":
        fields |= {"attention.sliding_window_pattern": 3, "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"]}
    return write(file, kind, tensors, fields | more)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama2", "qwen2", "qwen3"])
def test_a_checkpoint_comes_back_as_it_was(family, tmp_path):
    told = convert([of_golden(family, tmp_path / "model.gguf")], tmp_path / "out")
    config, params = hf.load_hf(tmp_path / "out")
    expected, golden = hf.load_hf(GOLDEN / family)
    off = 1e-7 if family.startswith("gemma") else 0.0  # its norms were rounded when 1 was added
    jax.tree.map(lambda leaf, other: np.testing.assert_allclose(leaf, other, rtol=0, atol=off), params, golden)
    # No GGUF file says by what attention is scaled where that is not the size of a head.
    unsaid = {"source": "", "attention_scale": 0.0}
    assert dataclasses.replace(config, **unsaid) == dataclasses.replace(expected, **unsaid)
    assert told.startswith(config_type := json.loads((tmp_path / "out/config.json").read_text())["model_type"])
    assert family.startswith(config_type.removesuffix("_text"))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"{size / 1e6:.1f} M parameters (F32)" in told


def test_what_llama_3_does_to_positions_is_found_in_what_the_file_has(tmp_path):
    def factors(low, high):
        lengths = 2 * np.pi * 500000.0 ** (np.arange(0, 16, 2) / 16)
        mixed = (8192 / lengths - low) / (high - low)
        between = 1 / ((1 - mixed) / 32 + mixed)
        return np.where(lengths < 8192 / high, 1.0, np.where(lengths > 8192 / low, 32.0, between))

    convert([small(tmp_path, more={"rope_freqs.weight": factors(1, 4)})], tmp_path / "out")
    assert hf.read_config(tmp_path / "out").rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    with pytest.raises(ValueError, match=r"rope_freqs.weight stretches positions in another way than llama 3"):
        convert([small(tmp_path, more={"rope_freqs.weight": factors(1, 2)})], tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_what_the_package_makes_of_them(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    plain = gguf.GGUFReader(small(tmp_path))
    tensors = {tensor.name: np.array(tensor.data) for tensor in plain.tensors}
    fields = {k.removeprefix("llama."): f.contents() for k, f in plain.fields.items() if k.startswith("llama.")}
    file = write(tmp_path / "model.gguf", "llama", tensors, fields, kind=kind)
    assert kind.name in convert([file], tmp_path / "out", dtype="bfloat16" if kind.name == "BF16" else "float32")
    found = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    up = tensors["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(
        found["model.layers.0.mlp.up_proj.weight"].astype(np.float32), gguf.dequantize(gguf.quantize(up, kind), kind)
    )
    np.testing.assert_allclose(found["model.layers.0.mlp.up_proj.weight"].astype(np.float32), up, atol=0.3)


def test_parts_are_put_together_and_damage_is_told(tmp_path):
    whole = of_golden("qwen3", tmp_path / "model.gguf").read_bytes()
    parts = [tmp_path / f"model.part{i}" for i in range(3)]
    for i, part in enumerate(parts):
        part.write_bytes(whole[i * len(whole) // 3 : (i + 1) * len(whole) // 3])
    convert(parts, tmp_path / "out")
    convert([tmp_path / "model.gguf"], tmp_path / "other")
    other = of_golden("qwen2", tmp_path / "model_of_another.gguf")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()
    for files, message in (
        (parts[:2], "it may be cut off"), (parts[1:], "does not begin with GGUF"),
        ([tmp_path / "none.gguf"], "No such file or directory"),
        ([parts[0], parts[2], parts[1]], "in the order of their numbers"),
        ([*parts[:2], *parts[1:]], "each once"), ([tmp_path / "model.gguf", other], "is whole; name no other file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            convert(files, tmp_path / "third")
        assert not (tmp_path / "third").exists()
    with pytest.raises(ValueError, match="is not empty"):
        convert(parts, tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count = 8: experts are not supported"),
        ({"rope.dimension_count": 2}, "rope.dimension_count = 2 is not the size of a head, 4"),
        ({"attention.head_count_kv": [2, 1]}, "head_count_kv differs from layer to layer"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "type 'yarn'; supported are"),
        ({"attention.layer_norm_rms_epsilon": None}, "every llama has is missing"),
        ({"block_count": 9}, "missing"),
        ({"block_count": 1}, "unexpected"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert([of_golden("llama2", tmp_path / "model.gguf", **more)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


@pytest.mark.parametrize(
    "fields",
    [
        {"rope.scaling.factor": 4.0},
        {"rope.scale_linear": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ],
)
def test_positions_are_scaled_as_llama_cpp_scales_them(fields, tmp_path):
    convert([of_golden("llama2", tmp_path / "model.gguf", **fields)], tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }


def test_architectures_tensors_and_tokenizers_that_nothing_here_knows(tmp_path):
    embedding = {"token_embd.weight": np.zeros((96, 16))}
    with pytest.raises(ValueError, match="the architecture 'mamba' is not supported; supported are llama, qwen2"):
        convert([write(tmp_path / "a.gguf", "mamba", embedding, {})], tmp_path / "out")
    with pytest.raises(ValueError, match=r"the tensor blk.0.ssm_in.weight belongs to no architecture"):
        convert([small(tmp_path, more={"blk.0.ssm_in.weight": np.zeros((4, 32))})], tmp_path / "out")
    with pytest.raises(ValueError, match="every llama has is missing"):
        convert([write(tmp_path / "b.gguf", "llama", embedding, {})], tmp_path / "out")
    for tokenizer, message in (
        ({"model": "bert"}, "the file's tokenizer is 'bert'; supported are 'gpt2'"),
        ({"model": "gpt2", "pre": "falcon"}, "splits texts as 'falcon'; supported are llama-bpe, qwen2"),
        ({"eos_token_id": None}, "names no end token"),
        ({"scores": None}, "has no scores"),
        ({"token_type": [1] * 5}, "has 96 pieces and the kinds of 5"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["no such"]}, "tokenizer does not fit together"),
    ):
        file = of_golden("llama2", tmp_path / "model.gguf")
        reader = gguf.GGUFReader(file)
        fields = {k.removeprefix("llama."): f.contents() for k, f in reader.fields.items() if k.startswith("llama.")}
        tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        with pytest.raises(ValueError, match=message):
            convert([write(tmp_path / "c.gguf", "llama", tensors, fields, tokenizer=tokenizer)], tmp_path / "out")


def test_a_byte_level_tokenizer_splits_texts_as_the_original(tmp_path):
    original = byte_level(["<|im_start|>", "<|im_end|>"])
    model = json.loads(original.to_str())["model"]
    pieces = sorted(original.get_vocab(), key=original.get_vocab().__getitem__)
    tokenizer = {
        "model": "gpt2", "pre": "qwen2", "scores": None, "chat_template": CHATML,
        "token_type": [3 if piece.startswith("<|im") else 1 for piece in pieces] + [5] * 3,
        "merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]],
        "bos_token_id": None, "eos_token_id": len(pieces) - 1,
    }  # fmt: skip
    convert([small(tmp_path, [*pieces, "[PAD0]", "[PAD1]", "[PAD2]"], tokenizer)], tmp_path / "out")
    found = hf.load_tokenizer(tmp_path / "out")
    for text in [*TEXTS[:4], "Größe: 1234.5 ±7% — the user's\n\n  and 龍", "<|im_start|>user\n1<|im_end|>"]:
        assert found.encode(text) == original.encode(text).ids
        assert found.encode_prompt(text) == original.encode(text).ids
        assert found.decode(found.encode(text)).strip() == original.decode(original.encode(text).ids).strip()
    assert found.eos_ids == (len(pieces) - 1,)
    chat = found.encode_chat([{"role": "user", "content": "12+34="}])
    assert original.decode(chat, skip_special_tokens=False).startswith("<|im_start|>user\n12+34=<|im_end|>")


@pytest.mark.parametrize(
    ("prefix", "runs", "written"), [(True, [], "▁"), (False, ["▁▁▁", "▁▁▁▁▁"], "▁"), (False, ["▁▁▁", "▁▁▁▁▁"], " ")]
)
def test_a_tokenizer_with_scores_splits_texts_as_sentencepiece(prefix, runs, written, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join([*TEXTS, "the user and the assistant add numbers", "numbers are added"] * 9))
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(tmp_path / "spm"), vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=prefix,
        hard_vocab_limit=False, minloglevel=2, user_defined_symbols=runs,
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    pieces = [original.id_to_piece(i) for i in range(original.vocab_size())]
    kinds = [
        2 if original.is_unknown(i) else 3 if original.is_control(i) else 4 if piece in runs else 1
        for i, piece in enumerate(pieces)
    ]
    tokenizer = {
        "scores": [original.get_score(i) for i in range(len(pieces))], "token_type": kinds, "unknown_token_id": 0,
        "add_space_prefix": prefix,
    }  # fmt: skip
    stored = [piece.replace("▁", written) if piece in runs else piece for piece in pieces]  # as llama.cpp does, or not
    convert([small(tmp_path, stored, tokenizer)], tmp_path / "out")
    found = hf.load_tokenizer(tmp_path / "out")
    for text in [*TEXTS[:4], "the added numbers", "  two  spaces", "Größe ± 龍", "a\nb\t c", "x", f"a{' ' * 11}b"]:
        assert found.encode(text) == original.encode(text), text
        assert found.encode_prompt(text) == [1, *original.encode(text)]
        assert found.decode(found.encode(text)) == original.decode(original.encode(text))


def small(tmp_path, pieces=PIECES, tokenizer=(), more=()):
    """A llama of one layer and two heads of 16 with these pieces and more tensors."""
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
              "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,),
              "ffn_norm": (32,)}  # fmt: skip
    tensors = {f"blk.0.{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": rng.normal(size=(len(pieces), 32)), "output_norm.weight": np.ones(32)} | dict(more)
    fields = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 64, "context_length": 64,
              "attention.head_count": 2, "attention.head_count_kv": 1, "rope.freq_base": 500000.0,
              "attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
    return write(tmp_path / "small.gguf", "llama", tensors, fields, pieces, tokenizer=tokenizer)


def test_the_command_says_what_it_wrote_or_why_not(tmp_path, monkeypatch, capsys):
    file = of_golden("qwen2", tmp_path / "model.gguf")
    given = ["krl.hf.gguf", str(file), str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", given)
    main()
    assert f"{tmp_path / 'out'}: qwen2 of 0.0 M parameters (F32), written as float32" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"krl.hf.gguf: .*out is not empty; choose another directory"):
        main()
