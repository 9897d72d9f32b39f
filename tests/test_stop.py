"""What ends a response: against decoding every beginning of it, on tokenizers of all kinds."""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models

from krl import policy, rollout
from krl.base.sharding import make_mesh, named_sharding, tree_sharding
from krl.hf.tokenizer import load_tokenizer, train_sentencepiece
from krl.rollout import serve
from krl.rollout.stop import Ends, describe_ends, find_ends, make_table, missing_end
from tests import tiny
from tests.bpe import CHATML, TEXTS, byte_level, write

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    "▁",
    "▁▁",
    "a",
    "b",
    "▁a",
    "▁the",
    "<",
    "/",
    "an",
    "s",
    "w",
    "er",
    "</",
    ">",
    "</ans",
    "é",
    "数",
    "\n",
    "▁x y",
    "##",
]


def of_bytes(directory):
    """Qwen's kind: every token is bytes, and characters are cut between tokens."""
    plain = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    plain.add_tokens([AddedToken("</think>", special=False)])
    return write(directory, tokenizer=plain, tokenizer_config={"eos_token": "<|endoftext|>", "chat_template": CHATML})


def of_pieces(decoder, directory):
    """Llama's and Gemma's kind: pieces with spaces in front, unknown characters in bytes."""
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, *PIECES])}
    plain = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    plain.decoder = decoder
    plain.add_special_tokens(["<unk>", "<s>", "</s>"])
    return write(directory, tokenizer=plain, tokenizer_config={"eos_token": "</s>"})


def trained(directory, **options):
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*TEXTS, "the </answer> é x  y"] * 3), model_writer=file, vocab_size=320, byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2, **options
        )  # fmt: skip
    return directory


def of_krl(directory):
    train_sentencepiece([*TEXTS, "</answer>é"], directory / "tokenizer.model", vocab_size=320, byte_fallback=True)
    return directory


REPLACED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
KINDS = {
    "bytes": of_bytes,
    "llama": functools.partial(of_pieces, decoders.Sequence([*REPLACED, decoders.Strip(" ", 1, 0)])),
    "gemma": functools.partial(of_pieces, decoders.Sequence(REPLACED)),
    "metaspace": functools.partial(of_pieces, decoders.Metaspace("▁", "always")),
    "krl": of_krl,
    "sentencepiece": functools.partial(trained, normalization_rule_name="identity"),
    "spaces kept": functools.partial(trained, normalization_rule_name="identity", remove_extra_whitespaces=False),
}
STRINGS = [
    ("</answer>",), ("</answer>", "answer"), ("é",), ("数", "x y"), ("\n\n", "\n"), (" ", "é>"), (" a",), ("a", "aa"), ("aab", "ab a"),
    ("abab", "bab"), ("  ",), ("the", " the"), ("é数é",), ("</",),
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(KINDS[request.param](tmp_path_factory.mktemp("kind")))


def first_end(tokenizer, strings, ids):
    """The number of tokens after which the decoded text first holds a string, 0 for never: by decoding every beginning."""
    holds = (size for size in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:size]) for s in strings))
    return next(holds, 0)


def by_table(table, ids):
    state = 0
    for size, number in enumerate(ids, 1):
        state = table[state, number]
        if state == len(table) - 1:
            return size
    return 0


@pytest.mark.parametrize("strings", STRINGS, ids=repr)
def test_a_response_ends_with_the_token_whose_text_first_holds_a_string(tokenizer, strings):
    """Spelled by the tokenizer, piece by piece and byte by byte, and at random from tokens that have to do with the strings."""
    size = tokenizer.vocab_size + 3  # rows of the model that no token has
    table, rng = make_table(tokenizer, strings, size), np.random.default_rng(0)
    letters = sorted({letter for string in strings for letter in string} | {" ", "a"})
    useful = [number for number in range(size) if set(tokenizer.decode([number]).strip()) <= set(letters)]
    useful += [
        i
        for i in range(tokenizer.vocab_size)
        for byte in "".join(strings).encode()
        if tokenizer.token(i) == f"<0x{byte:02X}>"
    ]
    useful += tokenizer.encode("".join(strings)) * 3
    responses = [rng.choice(useful, 12).tolist() for _ in range(60)] + [
        rng.integers(0, size, 12).tolist() for _ in range(10)
    ]
    texts = ["".join(rng.choice([*strings, *letters], 5)) for _ in range(10)]
    responses += [tokenizer.encode(text) for text in [*texts, *strings, *(" " + string for string in strings)]]
    found = [by_table(table, ids) for ids in responses]
    assert found == [first_end(tokenizer, strings, ids) for ids in responses]
    assert any(found) == any(string in tokenizer.decode(ids) for string in strings for ids in responses)
    assert any(found) or "</answer>" in strings  # which one of these tokenizers cannot spell


def test_the_ends_of_a_run(tmp_path):
    tokenizer = load_tokenizer(of_bytes(tmp_path))
    end, turn_end, thought = (tokenizer.added_id(text) for text in ("<|endoftext|>", "<|im_end|>", "</think>"))
    plain = find_ends(tokenizer, (), 300)
    assert (plain.eos_ids, plain.strings, plain.table) == ((end,), (), None)
    ends = find_ends(tokenizer, ("<|im_end|>", "</answer>", "</think>"), 300)
    assert ends.eos_ids == (end, turn_end, thought)
    assert ends.strings == ("</answer>", "</think>")  # which a response may spell, too
    said = f"responses end with <|endoftext|> ({end}) or <|im_end|> ({turn_end}) or </think> ({thought})"
    assert describe_ends(ends) == f"{said} or the text '</answer>' or the text '</think>'"
    with pytest.raises(ValueError, match=r"'<\|im_end\|>', which is token \d+, and the model's vocab_size is 200"):
        find_ends(tokenizer, ("<|im_end|>",), 200)
    with pytest.raises(ValueError, match="empty text"):
        find_ends(tokenizer, ("",), 300)


def test_long_stop_strings_are_found_in_no_time_and_longer_ones_refused(tmp_path):
    """Four texts that are each other's beginnings as far as may be; trying every ending of each took minutes."""
    tokenizer = load_tokenizer(of_bytes(tmp_path))
    strings = tuple("a" * 480 + end for end in "bcde")
    begun = time.perf_counter()
    table = find_ends(tokenizer, strings, tokenizer.vocab_size).table
    assert time.perf_counter() - begun < 10
    a, b, x = (tokenizer.encode(letter)[0] for letter in "abx")
    assert by_table(table, [x, *[a] * 500, b, x]) == 502
    assert by_table(table, [*[a] * 479, b]) == by_table(table, [*[a] * 300, x, *[a] * 300, b]) == 0
    with pytest.raises(ValueError, match=r"config.sample.stop has 2001 bytes of stop strings, and may have 2000"):
        find_ends(tokenizer, ("é" * 1000, "a"), tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7<|im_end|>\n", r"'7<\|im_end\|>\\n', which no response can hold.*name '<\|im_end\|>' alone"),
        ("a\ud800", r"'a\\ud800', with half a character"),
    ],
)
def test_stop_strings_that_no_text_holds_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        find_ends(load_tokenizer(of_bytes(tmp_path)), ("7", text), 300)


def test_a_tokenizer_whose_tokens_change_with_their_neighbours_takes_no_stop_strings(tmp_path):
    """The white space that "</w>" stands for is there only if more follows."""
    names = ["<unk>", "</s>", *"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
    plain = tokenizers.Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>")
    )
    plain.decoder = decoders.BPEDecoder("</w>")
    plain.add_special_tokens(["<unk>", "</s>"])
    tokenizer = load_tokenizer(write(tmp_path, tokenizer=plain, tokenizer_config={"eos_token": "</s>"}))
    assert tokenizer.decode([names.index("a</w>"), names.index("b</w>")]) == "a b"
    with pytest.raises(ValueError, match="a token's text depends on the tokens beside it"):
        find_ends(tokenizer, ("a b",), len(names))
    assert find_ends(tokenizer, (), len(names)).eos_ids == tokenizer.eos_ids


def test_the_text_of_a_response_ends_with_the_first_string_to_end(tmp_path):
    tokenizer = load_tokenizer(of_bytes(tmp_path))
    for strings, text, left in [
        (("</answer>", "swer>x"), "7</answer>x</answer>", "7</answer>"),
        (("bc", "abcd"), "xabcd", "xabc"),
        (("bc",), "abd", "abd"),
        ((), "abd", "abd"),
    ]:
        assert Ends(tokenizer, (), strings, None).decode(tokenizer.encode(text)) == left


CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ END }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "chat", "stop", "in_prompts", "warned"),
    [
        (CHATML, True, (), False, True),
        (CHATML, False, (), False, False),  # a base model's prompts
        (CHATML, False, (), True, True),  # a text of one's own with turns in it
        (CHATML, True, ("<|im_end|>",), True, False),
        (CHAT.replace("END", "'<|endoftext|>'"), True, (), False, False),
        (CHAT.replace("END", "'</think>'"), True, (), False, True),
        (CHAT.replace("END", "'</think>\\n<|im_end|>'"), True, (), False, True),
        (CHAT.replace("END", "''"), True, (), False, False),
        ("{{ raise_exception('no') }}", True, (), False, False),
        (None, True, (), False, False),
    ],
)
def test_a_chat_whose_end_of_a_turn_ends_no_response_is_warned_of(tmp_path, template, chat, stop, in_prompts, warned):
    settings = {"eos_token": "<|endoftext|>"} | ({"chat_template": template} if template else {})
    tokenizer = load_tokenizer(write(of_bytes(tmp_path), tokenizer_config=settings))
    prompts = np.array([*tokenizer.encode("12"), *([tokenizer.added_id("<|im_end|>")] * in_prompts)])
    said = missing_end(find_ends(tokenizer, stop, 300), prompts, chat=chat)
    assert bool(said) == warned
    if warned:
        name = "<|im_end|>" if "<|im_end|>" in template else "</think>"
        assert f"""ends a turn with {name} ({tokenizer.added_id(name)})""" in said
        assert f"""--config.sample.stop="('{name}',)\"""" in said


# ---------------------------------------------------------------- in the sampler


class Letters:
    """A token a letter, two of them two letters; the end token is 1."""

    pad_id, eos_ids, vocab_size = 0, (1,), 16
    names = ("", "", *"abcdefghij", "ab", "ca", "bc", "k")

    def decode(self, ids):
        return "".join(self.names[number] for number in ids)

    def token(self, number):
        return self.names[number]

    def added_id(self, text):
        return None


def sample(stop, mesh=None, slots=70, **options):
    """Rollouts of the tiny policy, of 14 tokens at most; without strings, of the same random numbers, they are those that go on."""
    ends = find_ends(Letters(), stop, 16)
    options = {"max_new_tokens": 14, "eos_ids": ends.eos_ids, "stop_table": ends.table, "num_slots": slots} | options
    params, prompts = tiny.params(), tiny.prompts()
    if mesh is None:
        return rollout.generate(tiny.CONFIG, params, prompts, jnp.array([30, 0, 25, 14]), jax.random.key(0), **options)
    with jax.set_mesh(mesh):
        axes = tree_sharding(mesh, policy.param_axes(tiny.CONFIG), jax.eval_shape(tiny.params))
        params, prompts = jax.device_put(params, axes), jax.device_put(prompts, named_sharding(mesh))
        return rollout.generate(tiny.CONFIG, params, prompts, jnp.array([30, 0, 25, 14]), jax.random.key(0), **options)


STOP = ("abc", "bca", "ka", "gg")


@pytest.fixture(scope="module")
def cut():
    """(tokens, lengths, finished) of the rollouts that should come, from those without strings by decoding them here."""
    free, ends = sample(()), Ends(Letters(), (1,), STOP, None)
    tokens, lengths, finished = (np.array(part) for part in (free.tokens, free.lengths, free.finished))
    stopped = [
        first_end(ends.tokenizer, STOP, row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)
    ]
    assert 10 < sum(map(bool, stopped)) < 60
    for row, size in enumerate(stopped):
        if size:
            tokens[row, size:], lengths[row], finished[row] = 0, size, True
    return tokens, lengths, finished


@pytest.mark.parametrize("few", [{"slots": 70}, {"slots": 5}, {"slots": 13}])
def test_the_sampler_ends_responses_where_their_text_holds_a_string(cut, few, monkeypatch):
    """However often slots are filled again or given up; nothing is sampled beyond."""
    monkeypatch.setattr(serve, "FEWEST", 2)
    got = sample(STOP, **few)
    for part, expected in zip((got.tokens, got.lengths, got.finished), cut, strict=True):
        np.testing.assert_array_equal(part, expected)
    beyond = np.arange(14) >= cut[1][:, None]
    assert (np.asarray(got.logps)[beyond] == 0).all()
    assert (np.asarray(got.logps)[~beyond] < 0).all()


@pytest.mark.parametrize("mesh", [((8,), ("data",)), tiny.slow(((2, 2, 2), ("data", "fsdp", "model")))])
def test_queues_on_several_devices_end_responses_alike(cut, mesh):
    got = sample(STOP, make_mesh(*mesh), slots=16)
    for part, expected in zip((got.tokens, got.lengths, got.finished), cut, strict=True):
        np.testing.assert_array_equal(part, expected)


def test_a_string_in_the_prompt_does_not_count():
    """The prompts' last tokens are the first of a string; the string itself is nowhere in a response."""
    prompts = tiny.prompts()
    free = sample((), max_new_tokens=1)
    last = {Letters.names[number] for number in np.asarray(prompts.tokens[:, -1]).tolist()}
    first = {Letters.names[number] for number in np.asarray(free.tokens[:, 0]).tolist()} - {""}
    straddling = tuple(before + after for before, after in itertools.product(last, first) if len(before + after) > 2)
    got = sample(straddling, max_new_tokens=1)
    np.testing.assert_array_equal(got.finished, free.finished)
