"""Tokenizers: sentencepiece models, and Hugging Face tokenizer.json directories, each a `krl.base.types.Tokenizer`.

Nothing here uses the network or runs code that comes with a checkpoint.
"""

import contextlib
import functools
import inspect
import itertools
import json
import os
import pathlib
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sentencepiece

from krl.base.types import Decoder, Tokenizer  # noqa: F401 (Decoder was here until 0.4)

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
# What a tokenizer is made of in a checkpoint's directory, as far as it is there.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
_REPLY = "the reply is 7391"  # such as no template has in itself
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    *_SETTINGS,
)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer from a sentencepiece model file or from a checkpoint's directory.

    Args:
        path: a .model file, or a directory with tokenizer.json (preferred) or tokenizer.model.

    Raises:
        ValueError: nothing is there, a file is broken, or no end token is named.
    """
    path = pathlib.Path(path)
    if path.is_file():
        if path.suffix != ".model":
            raise ValueError(f"the tokenizer {path} is neither a .model file nor a directory; name one of these")
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise ValueError(f"the tokenizer {path} does not exist; name a .model file or a checkpoint's directory")
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    raise ValueError(
        f"{path} holds neither tokenizer.json nor tokenizer.model; copy the checkpoint's tokenizer into it"
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a model has a row for every id of a tokenizer.

    Args:
        tokenizer: of the run.
        vocab_size: V of the model; may be larger, as in checkpoints with padded embeddings.

    Raises:
        ValueError: the tokenizer's ids reach beyond V.
    """
    largest = max(tokenizer.vocab_size - 1, tokenizer.pad_id, *tokenizer.eos_ids)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer's ids reach {largest} and the model's vocab_size is {vocab_size}; "
            "use the tokenizer that belongs to the checkpoint"
        )


class SentencePieceTokenizer:
    """A sentencepiece model file: one that krl trained, or the tokenizer.model of a published checkpoint.

    A model with a `bos` piece puts it in front of a prompt, unless tokenizer_config.json beside it says
    add_bos_token false. Models that krl trains have none. Has no chat template.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Load a model file.

        Raises:
            ValueError: the file is missing, is not a sentencepiece model, or no end token is named.
        """
        path = pathlib.Path(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot read the sentencepiece model {path}: {error}") from None
        self._path = path
        self.vocab_size: int = self._model.vocab_size()
        self.eos_ids: tuple[int, ...] = _end_ids(self._model.eos_id(), path)
        self.pad_id: int = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_ids[0]
        self.files: tuple[pathlib.Path, ...] = (path, *_present(path.parent, _SETTINGS))
        add_bos = _read_json(path.with_name("tokenizer_config.json")).get("add_bos_token") is not False
        bos = self._model.bos_id()
        self._bos: tuple[int, str] | None = (bos, self._model.id_to_piece(bos)) if bos >= 0 else None
        self._add_bos: bool = add_bos

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._model.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that begins a sequence: the `bos` piece if there is one, then the text.

        The piece's name at the beginning of the text ("<s>", as in templates on model cards) is that piece, once.
        """
        if self._bos is None:
            return self.encode(text)
        ident, name = self._bos
        begun = text.startswith(name)
        while text.startswith(name):
            text = text.removeprefix(name)
        return [ident] * (begun or self._add_bos) + self.encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], /, **arguments: object) -> list[int]:
        """Refused: a sentencepiece model has no chat template.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"the sentencepiece model {self._path} has no chat template; use a directory with tokenizer.json and "
            "chat_template.jinja or tokenizer_config.json, or a template without chat"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens and ids that no token has add nothing."""
        kept = (int(i) for i in ids if 0 <= i < self.vocab_size and i != self.pad_id and i not in self.eos_ids)
        return self._model.decode([i for i in kept if not self._model.is_control(i)])

    def token(self, number: int) -> str:
        """What a piece is called in the model; "" for an id that no piece has."""
        return self._model.id_to_piece(number) if 0 <= number < self.vocab_size else ""

    def added_id(self, text: str) -> int | None:
        """The control symbol that a text is, None if it is none."""
        number = self._model.piece_to_id(text)
        return number if self.token(number) == text and self._model.is_control(number) else None

    def turn_end(self) -> int | None:
        """None: a sentencepiece model has no chat template."""


class HuggingFaceTokenizer:
    """A checkpoint's directory with tokenizer.json.

    tokenizer.json is taken as it is, by the class that fits any: model classes named in
    tokenizer_config.json may rebuild parts of it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Load a directory.

        Raises:
            ValueError: a file is missing or broken, or no end token is named.
        """
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would ask for PyTorch
        import transformers  # slow to import, and sentencepiece models do without

        path = pathlib.Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"the tokenizer {file} does not exist; name a checkpoint's directory that holds it")
        try:
            self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
            self._known = frozenset(self._tokenizer.get_vocab().values())
        except Exception as error:  # the libraries raise many unrelated types
            raise ValueError(f"cannot read the tokenizer {file}: {_first_line(error)}") from None
        if not self._tokenizer.chat_template:  # where checkpoints that see images, too, may have it
            self._tokenizer.chat_template = _read_json(path / "chat_template.json").get("chat_template")
        self._path = path
        parameters = inspect.signature(self._tokenizer.apply_chat_template).parameters
        self._not_variables = {"self", "messages", *parameters} - {"tools", "documents", "kwargs"}
        self._whole: set[tuple[str, ...]] = set()  # roles of chats that the chat template takes whole
        self.eos_ids: tuple[int, ...] = _end_ids(self._tokenizer.eos_token_id, file)
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = self.eos_ids[0] if pad is None else pad
        self.files: tuple[pathlib.Path, ...] = _present(path, _FILES)
        # What stands in front of a text is asked of a text, because each kind of post-processor hides it elsewhere.
        plain, whole = self.encode("1"), self._tokenizer.encode("1")
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self._front = whole[:start]
        begin = self._tokenizer.bos_token_id
        self._begin = self._front or ([] if begin is None else [begin])  # never there twice
        # Gemma 3's text models have no row for the tokenizer's image token, which nothing here writes.
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        written = {*(self._known - special), *self._front, *self.eos_ids, self.pad_id}
        for roles in ("user",), ("system", "user"), ("user", "assistant", "user"):
            with contextlib.suppress(ValueError):  # it is told when such a chat is wanted
                written.update(self.encode_chat([{"role": role, "content": "1"} for role in roles]))
        self.vocab_size: int = max(written) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that begins a sequence: Llama and Gemma put a token in front, Qwen nothing.

        A template that writes that token itself, as on many model cards, does not get a second one.
        """
        ids = self.encode(text)
        if not self._front:
            return self._once(ids)
        # A template may write all of what stands in front or a part, as <bos> of [gMASK] <bos>.
        return self._front + list(itertools.dropwhile(self._front.__contains__, ids))

    def encode_chat(self, messages: Sequence[Mapping[str, str]], /, **arguments: object) -> list[int]:
        """Token ids of {"role", "content"} messages in the chat template, up to where the reply begins.

        Raises:
            ValueError: there is no chat template, it refuses these messages or leaves one out, or has no such variable.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer in {self._path} has no chat template; add chat_template.jinja, or chat_template in "
                "tokenizer_config.json, or use a template without chat"
            )
        own = arguments.keys() & self._not_variables
        if own:
            raise ValueError(
                f"config.data.template_arguments has {min(own)!r}, which krl gives the chat template itself; "
                "take it out"
            )
        text = self._render(messages, arguments)
        if arguments:
            self._check_variables(arguments)
        roles = tuple(message["role"] for message in messages)
        if roles not in self._whole:  # a message is left out if the text is the same whatever it says
            for i, message in enumerate(messages):
                other = {**message, "content": message["content"] + "x"}
                if self._render([*messages[:i], other, *messages[i + 1 :]], arguments) == text:
                    raise ValueError(
                        f"the chat template in {self._path} leaves out the {message['role']} message; use a chat "
                        "without it, or another template"
                    )
            self._whole.add(roles)
        return self._once(self.encode(text))

    def _check_variables(self, names: Iterable[str]) -> None:
        """Refuse names that the chat template never looks up: they would have no effect."""
        source = self._tokenizer.get_chat_template()
        for name in names:
            if not _looks_up(source, name):
                instead = "; system_prompt is the system message" if name == "system" else ""
                raise ValueError(
                    f"the chat template in {self._path} has no variable {name!r}; take it out of "
                    f"config.data.template_arguments{instead}"
                )

    def _render(self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, object]) -> str:
        """The text of a chat in the chat template."""
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False, **arguments
            )
        except Exception as error:  # the template decides what it raises
            raise ValueError(f"the chat template in {self._path} fails: {_first_line(error)}") from None

    def _once(self, ids: list[int]) -> list[int]:
        """Token ids whose beginning is there once, however often the text has it."""
        size = len(self._begin)
        while size and ids[: 2 * size] == 2 * self._begin:
            ids = ids[size:]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens and ids that no token has add nothing."""
        kept = [int(i) for i in ids if int(i) in self._known]
        return self._tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=True)

    def token(self, number: int) -> str:
        """What a token is called in tokenizer.json; "" for an id that no token has."""
        return self._tokenizer.convert_ids_to_tokens(number) if number in self._known else ""

    def added_id(self, text: str) -> int | None:
        """The special or added token that a text is, None if it is none."""
        return self._tokenizer.get_added_vocab().get(text)

    def turn_end(self) -> int | None:
        """The special or added token that the chat template puts behind a reply, None if there is none."""
        turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _REPLY}]
        try:
            rendered = self._tokenizer.apply_chat_template(turn, tokenize=False)
        except Exception:  # no template, or one that refuses; that is told when a chat is wanted
            return None
        added, end = set(self._tokenizer.get_added_vocab().values()), None
        for number in self.encode(rendered.rpartition(_REPLY)[2]):  # </think> may stand before it, white space behind
            if number in added:
                end = number
            elif end is not None and self.decode([number]).strip():
                break
        return end


@functools.lru_cache
def _looks_up(source: str, name: str) -> bool:
    """Whether a chat template takes a variable's value from outside; a text, a comment or a loop may have its name."""
    import jinja2.meta  # which only chat templates need

    # `transformers` has a block of its own, which marks replies and changes no text.
    plain = re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{%\1 if true \2%}{%\1 endif \2%}", source)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return name in jinja2.meta.find_undeclared_variables(environment.parse(plain))
    except jinja2.TemplateError:  # it has blocks that only `transformers` knows
        return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _end_ids(own: int | None, tokenizer: pathlib.Path) -> tuple[int, ...]:
    """The tokenizer's own end token, then those of generation_config.json beside it, or else of config.json."""
    named: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = tokenizer.with_name(name)
        fields = _read_json(file)
        inner = fields.get("text_config")  # of a model that sees images, too
        for part in (fields, inner if isinstance(inner, dict) else {}):
            found = part.get("eos_token_id")
            found = found if isinstance(found, list) else [] if found is None else [found]
            if not all(type(i) is int and i >= 0 for i in found):
                raise ValueError(f"{file} has eos_token_id {found}; it must be a token id or a list of them")
            named += found
        if named:
            break
    ids = tuple(dict.fromkeys([*([] if own is None or own < 0 else [own]), *named]))
    if not ids:
        raise ValueError(
            f"the tokenizer {tokenizer} has no end token; name it as eos_token in tokenizer_config.json "
            "or as eos_token_id in generation_config.json or config.json beside it"
        )
    return ids


def save_end_ids(directory: pathlib.Path, eos_ids: Sequence[int]) -> None:
    """Have a copy of a tokenizer end responses as the original does, whatever config.json is beside it.

    Args:
        directory: where the tokenizer's files are; generation_config.json is made or completed.
        eos_ids: of the original.
    """
    file = directory / "generation_config.json"
    fields = _read_json(file)
    if fields.get("eos_token_id") is None or fields["eos_token_id"] == []:
        file.write_text(json.dumps(fields | {"eos_token_id": list(eos_ids)}, indent=2) + "\n")


def _present(directory: pathlib.Path, names: Iterable[str]) -> tuple[pathlib.Path, ...]:
    return tuple(directory / name for name in names if (directory / name).is_file())


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {file}: it is not a JSON object")
    return content


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def train_sentencepiece(
    texts: Iterable[str], path: str | os.PathLike[str], *, vocab_size: int, byte_fallback: bool
) -> None:
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
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")  # another run may train the same
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
            partial.unlink()
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from None
    partial.replace(path)
