"""Tokenizers behind one small protocol; ours are sentencepiece models."""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import sentencepiece

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2


class Tokenizer(Protocol):
    """What krl needs of a tokenizer."""

    vocab_size: int
    pad_id: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens add nothing."""


class SentencePieceTokenizer:
    """A sentencepiece model file with `pad` and `eos` pieces."""

    def __init__(self, path: str | os.PathLike):
        """Load a model file.

        Raises:
            ValueError: the file is missing, is not a sentencepiece model, or has no end token.
        """
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot read the sentencepiece model {path}: {error}") from None
        if self._model.eos_id() < 0:
            raise ValueError(f"the sentencepiece model {path} has no end token; train it with eos_id set")
        self.vocab_size: int = self._model.vocab_size()
        self.pad_id: int = max(self._model.pad_id(), 0)
        self.eos_ids: tuple[int, ...] = (self._model.eos_id(),)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens add nothing."""
        special = (self.pad_id, *self.eos_ids)
        return self._model.decode([int(i) for i in ids if i not in special])


def train_sentencepiece(texts: Iterable[str], path: str | os.PathLike, *, vocab_size: int, byte_fallback: bool) -> None:
    """Train a unigram sentencepiece model that keeps digits apart and loses no white space.

    Args:
        texts: what to learn pieces from, one text a sentence.
        path: where to write the model; it appears whole or not at all.
        vocab_size: the most pieces; fewer if the texts have not so many.
        byte_fallback: spell unknown characters as bytes (256 more pieces) instead of as unknown.

    Raises:
        ValueError: sentencepiece refuses, for example because vocab_size cannot hold the characters.
    """
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=file,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                byte_fallback=byte_fallback,
                split_digits=True,
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                normalization_rule_name="identity",
                user_defined_symbols=["\n"],
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNKNOWN_ID,
                bos_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from None
    partial.replace(path)
