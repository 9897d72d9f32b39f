"""A byte-level BPE tokenizer like Qwen's, small enough to train in a test, and checkpoint directories with it."""

import json
import pathlib

import jax
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from krl import hf, policy

TEXTS = ["12+34=46", "7*8=56\n", "  two  spaces ", "9000-1=8999"] * 20
# Qwen's: a digit a piece, one space goes with the word after it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(special_tokens):
    """A small byte-level BPE of the `tokenizers` library; the special tokens have the last ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS + ["the user and the assistant"] * 9, trainer)
    tokenizer.add_special_tokens(special_tokens)
    return tokenizer


def write(directory, **files):
    """A checkpoint's directory; files are named without .json, and are JSON values or library tokenizers."""
    for name, content in files.items():
        text = content.to_str() if isinstance(content, tokenizers.Tokenizer) else json.dumps(content)
        (directory / f"{name}.json").write_text(text)
    return directory


def write_qwen(directory: pathlib.Path, **changes) -> pathlib.Path:
    """A random Qwen 2.5 of two small layers as a Hugging Face directory, tokenizer and all."""
    plain = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    sizes = {"vocab_size": 320, "embed_size": 16, "head_size": 8, "mlp_size": 32, "qkv_bias": True}
    config = policy.PolicyConfig(**sizes | {"tie_embeddings": False, "stored_dtype": "bfloat16"} | changes)
    hf.save_hf(directory, config, policy.init(config, jax.random.key(0)))
    ends = [plain.token_to_id("<|endoftext|>"), plain.token_to_id("<|im_end|>")]
    return write(
        directory, tokenizer=plain, generation_config={"eos_token_id": ends},
        tokenizer_config={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": CHATML},
    )  # fmt: skip
