"""A GGUF file, as llama.cpp runs it, to a Hugging Face checkpoint that krl trains.

    python -m krl.hf.gguf FILE [FILE ...] OUT [--dtype bfloat16]

Several FILEs are the parts of one, in their order, whether llama.cpp split them or something cut them by bytes. Weights
of 2 to 8 bits are dequantised, so they are the published ones up to their rounding. The `gguf` package reads the files.
"""

import argparse
import contextlib
import json
import math
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes  # noqa: F401 (its bfloat16 gets a name in NumPy)
import numpy as np
import safetensors.numpy

from krl.configs.flags import one_line_errors
from krl.hf.config import STORED_TYPES
from krl.hf.weights import appearing_whole, check_hf, check_new, plan_files, write_index

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
_OF_A_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OF_A_GEMMA_LAYER = _OF_A_LAYER | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_ROTARY = "rope_freqs.weight"  # by what llama 3.1 and later divide the frequencies of their rotary positions

# What splits a text before its pieces are merged, by the file's name for it: a pattern of `tokenizers`, or whether
# digits stand alone. Patterns are those of the families' published tokenizer.json.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "llama-bpe": _WORDS % r"\p{N}{1,3}", "qwen2": _WORDS % r"\p{N}", "deepseek-r1-qwen": _WORDS % r"\p{N}",
    "smollm": "",
}  # fmt: skip
_CONTROL, _OWN, _UNUSED = 3, 4, 5  # kinds of pieces: special tokens, added ones, and rows without a token
_SHARD_BYTES = 5_000_000_000


def convert(files: Sequence[str | pathlib.Path], out: str | pathlib.Path, *, dtype: str = "float32") -> str:
    """Write a GGUF file as a Hugging Face directory: config.json, safetensors, tokenizer.json, the chat template.

    The directory appears whole or not at all. The host holds one shard of 5 GB at a time.

    Args:
        files: one, or the parts of one in their order.
        out: a new or empty directory.
        dtype: of the tensors: "float32", which keeps what dequantising gives, "bfloat16" or "float16".

    Returns:
        A sentence about what was written.

    Raises:
        ValueError: no GGUF file, one that is cut off, or an architecture, a quantisation, a tokenizer or an option
            that is not supported; the message names it.
    """
    gguf, out = _package(), check_new(out)
    with _readers([pathlib.Path(file) for file in files]) as readers, appearing_whole(out) as partial:
        if partial is None:  # the first of several processes writes
            return ""
        fields = {key: field.contents() for key, field in readers[0].fields.items()}
        stored = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        config = _config(fields, stored) | {"torch_dtype": dtype}
        _check_kinds(stored)
        _write_weights(stored, config, partial, dtype)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_tokenizer(fields, partial)
        check_hf(partial)  # refuses options that krl has not, tensors that are missing or left over
    kinds = sorted({gguf.GGMLQuantizationType(tensor.tensor_type).name for tensor in stored.values()})
    size = sum(int(tensor.n_elements) for name, tensor in stored.items() if name != _ROTARY)
    return f"{config['model_type']} of {size / 1e6:.1f} M parameters ({', '.join(kinds)}), written as {dtype}"


def _package() -> Any:
    """The library that reads the files."""
    try:
        import gguf
    except ImportError:
        raise ValueError("reading GGUF files needs a library: pip install 'krl[gguf]'") from None
    return gguf


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def _readers(files: Sequence[pathlib.Path]) -> Iterator[list[Any]]:
    """A reader of each file; of parts by bytes, which all but the first do not begin like a file, one of all."""
    begins, numbers = [], [[int(number) for number in re.findall(r"\d+", file.name)] for file in files]
    if numbers != sorted(numbers) or len(set(files)) < len(files):
        raise ValueError(
            f"name the parts in the order of their numbers, each once, not {', '.join(file.name for file in files)}"
        )
    for file in files:
        try:
            with file.open("rb") as opened:
                begins.append(opened.read(4) == b"GGUF")
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror}; check the path") from None
    if not begins[0]:
        raise ValueError(f"{files[0]} is not a GGUF file: it does not begin with GGUF")
    with tempfile.TemporaryDirectory(prefix="krl-gguf-") as scratch:
        if not all(begins):
            whole = pathlib.Path(scratch) / "whole.gguf"
            with whole.open("wb") as written:
                for file in files:
                    with file.open("rb") as part:
                        shutil.copyfileobj(part, written)
            files = [whole]
        readers = []
        for file in files:
            try:
                readers.append(_package().GGUFReader(file))
            except Exception as error:  # it takes the bytes as they are, and any error may follow
                raise ValueError(f"{file} cannot be read as GGUF, it may be cut off: {error}") from None
        field = readers[0].get_field("split.count")
        parts = 1 if field is None else field.contents()
        if parts == 1 < len(files):
            raise ValueError(f"{files[0]} is whole; name no other file beside it")
        if parts != len(files):
            raise ValueError(f"{files[0]} is one of {parts} files; name all of them, in their order")
        yield readers


# ---------------------------------------------------------------- config.json


def _config(fields: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json; `krl.hf.config.read_config` refuses what of them is not supported."""
    kind = fields.get("general.architecture")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"the architecture {kind!r} is not supported; supported are {', '.join(_MODEL_TYPES)}")

    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{key}", default)
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise ValueError(f"the field {kind}.{key} differs from layer to layer, which is not supported")
            value = value[0]
        # Files hold float32: the shortest decimal that is the same float32 is what the maker wrote.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    try:
        heads, layers, embed = (get(key) for key in ("attention.head_count", "block_count", "embedding_length"))
        size = get("attention.key_length", embed // heads)
        config = {
            "model_type": _MODEL_TYPES[kind],
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "vocab_size": int(stored["token_embd.weight"].shape[1]),
            "hidden_size": embed,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": size,
            "hidden_act": "silu",
            "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon")),
            "rope_theta": get("rope.freq_base", 1e6 if kind == "gemma3" else 1e4),
            "max_position_embeddings": get("context_length"),
            "tie_word_embeddings": "output.weight" not in stored,
        }
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"a field or tensor that every {kind} has is missing: {error}") from None
    for key in ("bos_token_id", "eos_token_id"):
        config[key] = fields.get(f"tokenizer.ggml.{key}")
    if get("expert_count", 0):
        raise ValueError(f"the field {kind}.expert_count = {get('expert_count')}: experts are not supported")
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, size) != size:
            raise ValueError(f"the field {kind}.{key} = {get(key)} is not the size of a head, {size}")
    scaling = _scaling(get, stored.get(_ROTARY), config["rope_theta"], size)
    config |= {"rope_scaling": scaling} if scaling else {}
    if kind not in ("gemma2", "gemma3"):
        return config
    del config["hidden_act"]
    # The largest of either generation scales by the width of its layers, not by that of a head, and no field says so.
    largest = layers == {"gemma2": 46, "gemma3": 62}[kind]
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": embed // heads if largest else size,
        "sliding_window": get("attention.sliding_window"),
    }
    if kind == "gemma2":
        config["attn_logit_softcapping"] = get("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = get("final_logit_softcapping", 30.0)
        period = 2
    else:
        config["rope_local_base_freq"] = get("rope.freq_base_swa", 1e4)
        period = get("attention.sliding_window_pattern", 6)
    kinds = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]
    return config | {"layer_types": kinds}


def _scaling(get: Any, factors: Any, theta: float, size: int) -> dict[str, Any] | None:
    """How rotary positions are stretched, in the terms of config.json; None if they are not."""
    # What llama.cpp takes where the file says nothing, and how older files name the factor.
    kind, factor = get("rope.scaling.type", "linear"), get("rope.scaling.factor", 0) or get("rope.scale_linear", 0) or 1
    if factors is None:
        if kind == "none" or (kind == "linear" and factor == 1):
            return None
        if kind != "linear":
            raise ValueError(f"rotary positions are scaled by the type {kind!r}; supported are linear and llama 3's")
        return {"rope_type": kind, "factor": factor}
    # The file holds what llama 3's rule gave for each frequency, and not the rule.
    factors = np.array(factors.data, np.float32)
    if factors.shape != (size // 2,):
        raise ValueError(f"the tensor {_ROTARY} has the shape {factors.shape}, and heads have {size // 2} frequencies")
    low, high, length = 1.0, 4.0, 8192
    turns = length / (2 * math.pi * theta ** (np.arange(0, size, 2) / size))  # of each frequency over that length
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factor = float(factors.max())
    if not np.allclose(1 / factors, (1 - smooth) / factor + smooth, rtol=1e-4):
        raise ValueError(
            f"the tensor {_ROTARY} stretches positions in another way than llama 3, which is not supported"
        )
    return {
        "rope_type": "llama3", "factor": round(factor, 4), "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }  # fmt: skip


# ---------------------------------------------------------------- weights


def _check_kinds(stored: dict[str, Any]) -> None:
    """Refuse kinds of quantisation that the library cannot undo, before anything is written."""
    gguf = _package()
    for name, tensor in stored.items():
        kind = gguf.GGMLQuantizationType(tensor.tensor_type)
        try:
            gguf.dequantize(np.array(tensor.data.reshape(-1, tensor.data.shape[-1])[:1]), kind)
        except NotImplementedError:
            raise ValueError(
                f"the tensor {name} is quantised as {kind.name}, which the gguf package cannot undo"
            ) from None


def _name(name: str, gemma: bool) -> str:
    """The checkpoint's name of a tensor; "" for the factors of rotary positions."""
    if name in (*_WHOLE, _ROTARY):
        return _WHOLE.get(name, "")
    names = _OF_A_GEMMA_LAYER if gemma else _OF_A_LAYER
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.partition(".")
    if block != "blk" or not layer.isdigit() or part not in names or kind not in ("weight", "bias"):
        raise ValueError(f"the tensor {name} belongs to no architecture that is supported")
    return f"model.layers.{layer}.{names[part]}.{kind}"


def _write_weights(stored: dict[str, Any], config: dict[str, Any], out: pathlib.Path, dtype: str) -> None:
    """Dequantise into safetensors, a file for each 5 GB."""
    gemma, size = config["model_type"].startswith("gemma"), np.dtype(dtype).itemsize
    names = {name: theirs for name in stored if (theirs := _name(name, gemma))}
    sizes = {name: int(stored[name].n_elements) * size for name in names}
    files = plan_files(sizes, _SHARD_BYTES)
    for file, shard in files.items():
        arrays = {names[name]: _weight(stored[name], names[name], config).astype(dtype) for name in shard}
        safetensors.numpy.save_file(arrays, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)
    write_index(out, {file: [names[name] for name in shard] for file, shard in files.items()}, sum(sizes.values()))


def _weight(tensor: Any, name: str, config: dict[str, Any]) -> np.ndarray:
    """A tensor of a checkpoint, float32."""
    weight = _package().dequantize(tensor.data, tensor.tensor_type)
    weight = np.ascontiguousarray(weight, np.float32).reshape([int(n) for n in tensor.shape[::-1]])
    if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
        return weight - 1  # the file has what the layer multiplies with, the checkpoint what it adds to 1
    heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
    which = name.rpartition("_proj")[0][-1:]
    if config["model_type"] == "llama" and which in heads:
        # The file has the two numbers of a rotation side by side, the checkpoint in two halves.
        pairs = weight.reshape(config[heads[which]], -1, 2, *weight.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))
    return weight


# ---------------------------------------------------------------- tokenizer


def _write_tokenizer(fields: dict[str, Any], out: pathlib.Path) -> None:
    """tokenizer.json and its settings, from the file's pieces."""
    import transformers  # slow to import

    kind, pieces = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(pieces or ())
    if pieces and len(kinds) != len(pieces):
        raise ValueError(f"the file's tokenizer has {len(pieces)} pieces and the kinds of {len(kinds)}")
    if not pieces or kind not in ("gpt2", "llama"):
        raise ValueError(
            f"the file's tokenizer is {kind!r}; supported are 'gpt2' (byte-level BPE) and 'llama' (sentencepiece)"
        )
    build = _byte_level if kind == "gpt2" else _sentencepiece
    vocabulary = {piece: i for i, piece in enumerate(pieces) if kinds[i] != _UNUSED}
    try:
        tokenizer, begins = build(fields, vocabulary)
    except ValueError:
        raise
    except Exception as error:  # what the library raises where a merge is of no pieces
        raise ValueError(f"the file's tokenizer does not fit together: {error}") from None
    from tokenizers import AddedToken, processors

    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece, i in vocabulary.items() if kinds[i] == _CONTROL]
    )
    # Those of sentencepiece are found in a text whose spaces are "▁" already: "▁▁▁" of Gemma is three spaces.
    spelled = kind == "llama" and not fields.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.add_tokens([AddedToken(piece, normalized=spelled) for piece, i in vocabulary.items() if kinds[i] == _OWN])
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    special = {name: pieces[i] for name, i in ids.items() if i is not None and i < len(pieces)}
    if "eos_token" not in special:
        raise ValueError("the file names no end token (tokenizer.ggml.eos_token_id)")
    if fields.get("tokenizer.ggml.add_bos_token", begins) and "bos_token" in special:
        begin = (special["bos_token"], ids["bos_token"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[begin[0], "$A"], pair=[begin[0], "$A", "$B"], special_tokens=[begin]
        )
    as_transformers: Any = transformers.PreTrainedTokenizerFast  # which has no types
    whole = as_transformers(tokenizer_object=tokenizer, **special)
    whole.chat_template = fields.get("tokenizer.chat_template")
    whole.save_pretrained(out)
    ends = [ids["eos_token"], *(fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))]
    ends = [int(i) for i in dict.fromkeys(ends) if i is not None and i < len(pieces)]
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": ids["bos_token"], "eos_token_id": ends}) + "\n"
    )


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _byte_level(fields: dict[str, Any], vocabulary: dict[str, int]) -> tuple[Any, bool]:
    """(the byte-level BPE of GPT-2's descendants, whether a text begins with `bos` where the file does not say)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = fields.get("tokenizer.ggml.pre", "default")
    if split not in _PATTERNS:
        raise ValueError(f"the file's tokenizer splits texts as {split!r}; supported are {', '.join(_PATTERNS)}")
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges") or ()]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
    if "qwen" in split:
        tokenizer.normalizer = normalizers.NFC()
    first = (
        pre_tokenizers.Split(Regex(_PATTERNS[split]), "isolated")
        if _PATTERNS[split]
        else pre_tokenizers.Digits(individual_digits=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not _PATTERNS[split])]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split == "llama-bpe"


def _sentencepiece(fields: dict[str, Any], vocabulary: dict[str, int]) -> tuple[Any, bool]:
    """(sentencepiece's BPE, that a text begins with `bos` where the file does not say)."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores, unknown = fields.get("tokenizer.ggml.scores"), fields.get("tokenizer.ggml.unknown_token_id", 0)
    if not scores:
        raise ValueError("the file's tokenizer has no scores (tokenizer.ggml.scores), by which its pieces are merged")
    # A model of sentencepiece has no list of merges: any two pieces merge that make a piece, the best piece first.
    merges = sorted(
        (-scores[number], cut, piece[:cut], piece[cut:])
        for piece, number in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    )
    names = {number: piece for piece, number in vocabulary.items()}
    bpe = models.BPE(
        vocab=vocabulary, merges=[(left, right) for *_, left, right in merges], unk_token=names.get(unknown),
        fuse_unk=True, byte_fallback="<0x0A>" in vocabulary,
    )  # fmt: skip
    tokenizer = Tokenizer(bpe)
    space: Any = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        space = normalizers.Sequence([normalizers.Prepend("▁"), space])
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer, True


def main() -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m krl.hf.gguf", description=(convert.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="a GGUF file, or its parts in their order")
    parser.add_argument("out", metavar="OUT", help="a new directory")
    parser.add_argument("--dtype", choices=list(STORED_TYPES.values()), default="float32", help="of the tensors")
    given = parser.parse_args()
    with one_line_errors("krl.hf.gguf"):
        print(f"{given.out}: {convert(given.files, given.out, dtype=given.dtype)}")


if __name__ == "__main__":
    main()
