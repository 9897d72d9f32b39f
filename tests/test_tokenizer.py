"""Tokenizers: nothing lost, the right tokens in front and at the end, templates, and broken files in one line."""

import json
import pathlib
import subprocess
import sys

import pytest
import sentencepiece
from tokenizers import processors

from krl.hf import tokenizer as tokenizer_module
from krl.hf.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    check_vocabulary,
    load_tokenizer,
    save_end_ids,
    train_sentencepiece,
)
from krl.tasks.templates import find_template
from tests.bpe import CHATML, TEXTS, byte_level, write

HARD_TEXTS = ["naïve — 数学\n\n#### 1,234", "🙂👩‍🔬 a .b ,c 's", "\t\r\n  x  \n", "\\boxed{\\frac{1}{2}}", "12345"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?\n"}]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(directory, the library's tokenizer) like a Qwen chat model's."""
    plain = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    end, _, turn_end = (plain.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    directory = write(
        tmp_path_factory.mktemp("qwen"), tokenizer=plain,
        tokenizer_config={
            "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False,
            "pad_token": "<|endoftext|>", "chat_template": CHATML, "clean_up_tokenization_spaces": True,
        },
        generation_config={"eos_token_id": [end, turn_end], "temperature": 0.7},
        config={"vocab_size": 512},
    )  # fmt: skip
    return directory, plain


def test_qwen_loses_nothing_and_puts_nothing_in_front(qwen):
    directory, plain = qwen
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    for text in [*TEXTS[:4], *HARD_TEXTS]:
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode_prompt(text) == plain.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("12345")) == 5  # a token a digit


def test_qwen_ids(qwen):
    directory, plain = qwen
    tokenizer = load_tokenizer(directory)
    end, turn_end = plain.token_to_id("<|endoftext|>"), plain.token_to_id("<|im_end|>")
    assert tokenizer.eos_ids == (turn_end, end)  # the tokenizer's own first, each once
    assert tokenizer.pad_id == end
    assert tokenizer.vocab_size == turn_end + 1 == plain.get_vocab_size()
    names = [file.name for file in tokenizer.files]
    assert sorted(names) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_special_tokens_that_no_text_or_chat_needs_ask_for_no_row_of_the_model(tmp_path):
    """As the image token of Gemma 3, for which its text models have none."""
    plain = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"])
    write(tmp_path, tokenizer=plain, tokenizer_config={"eos_token": "<|endoftext|>", "chat_template": CHATML})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == plain.token_to_id("<|im_end|>") + 1 == plain.token_to_id("<image>")
    assert tokenizer.decode([*tokenizer.encode("1"), plain.token_to_id("<image>")]) == "1"


def test_chat_ids_are_those_of_the_rendered_text(qwen):
    directory, plain = qwen
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n6*7?\n<|im_end|>\n<|im_start|>assistant\n"
    ids = load_tokenizer(directory).encode_chat(MESSAGES)
    assert ids == plain.encode(rendered).ids
    assert ids.count(plain.token_to_id("<|im_start|>")) == 3


def test_decoding_skips_special_tokens_and_ids_that_no_token_has(qwen, tmp_path):
    directory, _ = qwen
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode("6*7=42")
    padded = [tokenizer.pad_id, *ids[:2], tokenizer.vocab_size, 151_935, -1, *ids[2:], *tokenizer.eos_ids]
    assert tokenizer.decode(padded) == "6*7=42"
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.vocab_size]) == ""
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 400  # leaves ids that no token has
    write(tmp_path, tokenizer=content, tokenizer_config={"eos_token": "<|im_end|>"})
    gapped = load_tokenizer(tmp_path)
    assert gapped.vocab_size == 401
    assert gapped.decode([*ids, 399]) == "6*7=42"


def test_files_copied_elsewhere_give_the_same_tokenizer(qwen, tmp_path):
    tokenizer = load_tokenizer(qwen[0])
    write(tmp_path, config={"steps": 3, "policy": {"num_layers": 2}})  # a work directory's own config.json
    for file in tokenizer.files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copy = load_tokenizer(tmp_path)
    assert (copy.eos_ids, copy.pad_id, copy.vocab_size) == (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size)
    assert copy.encode_chat(MESSAGES) == tokenizer.encode_chat(MESSAGES)


def test_llama_puts_its_first_token_in_front_once(tmp_path):
    plain = byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin, end, turn_end = (plain.token_to_id(f"<|{name}|>") for name in ("begin_of_text", "end_of_text", "eot_id"))
    plain.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A <|end_of_text|>",  # what is put behind is no part of a prompt
                special_tokens=[("<|begin_of_text|>", begin), ("<|end_of_text|>", end)],
            ),
        ]
    )
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}"
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    write(tmp_path, tokenizer=plain, tokenizer_config=names, generation_config={"eos_token_id": end})
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path)
    text = plain.encode("7*8=56\n", add_special_tokens=False).ids
    assert tokenizer.encode("7*8=56\n") == text
    assert tokenizer.encode_prompt("7*8=56\n") == [begin, *text]
    assert tokenizer.encode_prompt("") == [begin]
    said = plain.encode("system: Be brief.<|eot_id|>user: 6*7?\n<|eot_id|>", add_special_tokens=False).ids
    assert tokenizer.encode_chat(MESSAGES) == [begin, *said]
    assert tokenizer.eos_ids == (turn_end, end)
    assert tokenizer.pad_id == turn_end  # no pad token is named
    assert tmp_path / "chat_template.jinja" in tokenizer.files


@pytest.fixture
def begun(tmp_path):
    """(a tokenizer that puts <bos> in front, the id of <bos>); its chat template writes <bos> and knows `think`."""
    plain = byte_level(["<bos>", "<end>"])
    begin = plain.token_to_id("<bos>")
    plain.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", begin)])
    names = {"bos_token": "<bos>", "eos_token": "<end>"}
    write(tmp_path, tokenizer=plain, tokenizer_config=names)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content.replace('/quiet', '') | trim }}{% endif %}"
        "{% for m in messages if m.role != 'system' %}[{{ m.content.split('</think>')[-1] }}]{% endfor %}"
        "{% if think is defined and not think %}()/{% endif %}"
    )
    return load_tokenizer(tmp_path), begin


def test_no_template_doubles_the_first_token(begun):
    tokenizer, begin = begun
    text = tokenizer.encode("1+<bos>1")  # which is only looked at in front
    assert text.count(begin) == 1
    for front in ("", "<bos>", "<bos><bos>"):
        assert tokenizer.encode_prompt(front + "1+<bos>1") == [begin, *text]
        assert find_template(front + "{prompt}")(tokenizer, "1+<bos>1") == [begin, *text]
    said = tokenizer.encode("be[1]")
    for front in ("", "<bos>"):
        system = {"role": "system", "content": front + "be"}
        assert tokenizer.encode_chat([system, {"role": "user", "content": "1"}]) == [begin, *said]
    assert tokenizer.encode_prompt("<bos>") == tokenizer.encode_prompt("") == [begin]


def test_no_template_doubles_a_part_of_what_stands_in_front(tmp_path):
    plain = byte_level(["<mask>", "<bos>", "<end>"])
    front = [plain.token_to_id("<mask>"), plain.token_to_id("<bos>")]
    special = list(zip(("<mask>", "<bos>"), front, strict=True))
    plain.post_processor = processors.TemplateProcessing(single="<mask> <bos> $A", special_tokens=special)
    write(tmp_path, tokenizer=plain, tokenizer_config={"bos_token": "<bos>", "eos_token": "<end>"})
    tokenizer = load_tokenizer(tmp_path)
    for begun in ("", "<bos>", "<bos><bos>", "<mask><bos>", "<mask>"):
        assert tokenizer.encode_prompt(begun + "1+<bos>1") == [*front, *tokenizer.encode("1+<bos>1")]


def test_template_arguments_are_the_templates_own(begun):
    tokenizer, begin = begun
    ask = [{"role": "user", "content": "1"}]
    assert tokenizer.encode_chat(ask, think=True) == [begin, *tokenizer.encode("[1]")]
    assert tokenizer.encode_chat(ask, think=False) == [begin, *tokenizer.encode("[1]()/")]
    assert find_template("chat", {"think": False, "system_prompt": "be"})(tokenizer, "1") == [
        begin, *tokenizer.encode("be[1]()/")
    ]  # fmt: skip
    for name in ("thinking", "thin", "quiet", "m", "role", "system"):  # a text, a loop's, an attribute
        with pytest.raises(ValueError, match=f"no variable '{name}'; take it out of config.data.template_arg") as error:
            tokenizer.encode_chat(ask, **{name: False})
        assert ("system_prompt is the system message" in str(error.value)) == (name == "system")
    for name in ("messages", "self", "tokenize", "add_generation_prompt", "conversation", "max_length"):
        with pytest.raises(
            ValueError, match=f"template_arguments has '{name}', which krl gives the chat template itself"
        ):
            find_template("chat", {name: False})(tokenizer, "1")


@pytest.mark.parametrize(
    ("template", "looked_up"),
    [
        ("{# think #}think{{ 'think' }}{% for think in messages %}{{ think.think }}{% endfor %}", False),
        ("{% if think is not defined %}{% set think = true %}{% endif %}{{ think }}", True),
        ("{% set think = think | default(true) %}", True),
        ("{% macro say(think) %}{{ think }}{% endmacro %}{{ say(1) }}", False),
        ("{%- generation -%}{{ 'think' }}{% break %}{%- endgeneration -%}", False),
        ("{% generation %}{{ think }}{% endgeneration %}", True),
        ("{% strange %}{{ think }}", True),  # cannot be parsed: the word counts
    ],
)
def test_a_variable_is_one_that_the_template_looks_up(template, looked_up):
    assert tokenizer_module._looks_up(template, "think") == looked_up


def test_a_chat_template_in_a_json_file_of_its_own(tmp_path):
    write(tmp_path, tokenizer=byte_level(["<end>"]), tokenizer_config={"eos_token": "<end>"})
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "[{{ messages[0].content }}]"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_chat([{"role": "user", "content": "1"}]) == tokenizer.encode("[1]")
    assert tmp_path / "chat_template.json" in tokenizer.files


def test_a_message_that_the_template_leaves_out_is_told(begun):
    tokenizer, begin = begun
    ask, late = {"role": "user", "content": "1"}, {"role": "system", "content": "late"}
    with pytest.raises(ValueError, match="leaves out the system message") as error:
        tokenizer.encode_chat([ask, late, ask])
    assert "\n" not in str(error.value)
    flag = {"role": "system", "content": "/quiet"}  # which a template may take out on purpose
    assert tokenizer.encode_chat([flag, ask]) == [begin, *tokenizer.encode("[1]")]
    thought = {"role": "assistant", "content": "<think>long</think>2"}  # thoughts are left out on purpose
    assert tokenizer.encode_chat([ask, thought, ask]) == [begin, *tokenizer.encode("[1][2][1]")]


def test_the_network_is_never_asked(qwen, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("looked up a host"))
    assert load_tokenizer(qwen[0]).encode("1")


def test_sentencepiece_alone_does_not_import_transformers(tmp_path):
    train_sentencepiece(TEXTS, tmp_path / "tokenizer.model", vocab_size=40, byte_fallback=False)
    code = (
        "import sys; from krl.hf.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]).encode('1')\n"
        "assert not {'transformers', 'tokenizers'} & set(sys.modules)"
    )
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


def test_a_trained_tokenizer_loses_nothing(tmp_path):
    path = tmp_path / "t.model"
    train_sentencepiece(TEXTS, path, vocab_size=320, byte_fallback=True)
    tokenizer = load_tokenizer(path)
    for text in [*TEXTS[:4], *HARD_TEXTS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_prompt(text) == tokenizer.encode(text)
    assert len(tokenizer.encode("12345")) == 5  # a token a digit
    ids = [tokenizer.pad_id, *tokenizer.encode("12"), tokenizer.vocab_size, -1, *tokenizer.eos_ids]
    assert tokenizer.decode(ids) == "12"
    assert tokenizer.pad_id not in tokenizer.eos_ids
    assert tokenizer.files == (path,)
    with pytest.raises(ValueError, match=r"t\.model has no chat template"):
        tokenizer.encode_chat(MESSAGES)


def test_a_published_sentencepiece_model(tmp_path):
    """Laid out like Llama 2's: unk 0, bos 1, eos 2, no pad."""
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
    assert load_tokenizer(tmp_path).eos_ids == (2,)
    write(tmp_path, generation_config={"eos_token_id": [5, 2]}, special_tokens_map={}, config={"vocab_size": 64})
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((2, 5), 2)
    text = tokenizer.encode("12+34=46")
    assert not {0, 1, 2} & set(text)
    assert tokenizer.encode_prompt("12+34=46") == [1, *text]
    assert tokenizer.decode([1, *text, 5, 2]) == "12+34=46"
    assert {file.name for file in tokenizer.files} == {
        "tokenizer.model", "generation_config.json", "special_tokens_map.json"
    }  # fmt: skip
    for add, front in ((True, [1]), (False, [])):
        write(tmp_path, tokenizer_config={"add_bos_token": add})
        changed = load_tokenizer(tmp_path)
        assert changed.encode_prompt("12") == front + tokenizer.encode("12")
        for text in ("<s>12", "<s><s>12"):  # as the templates on model cards spell that piece
            assert changed.encode_prompt(text) == [1, *tokenizer.encode("12")]


@pytest.mark.parametrize(
    ("files", "further"),
    [
        ({}, []),
        ({"config": {"eos_token_id": 257}}, [257]),
        ({"config": {"eos_token_id": [258, 257]}}, [258, 257]),
        ({"config": {"text_config": {"eos_token_id": [257]}}}, [257]),  # of a model that sees images
        ({"config": {"eos_token_id": 258, "text_config": {"eos_token_id": 257}}}, [258, 257]),
        ({"config": {"eos_token_id": None}, "generation_config": {"top_p": 0.9}}, []),
        ({"config": {"eos_token_id": 258}, "generation_config": {"top_p": 0.9}}, [258]),
        ({"config": {"eos_token_id": 258}, "generation_config": {"eos_token_id": [257]}}, [257]),
        ({"config": {"eos_token_id": 258}, "generation_config": {"eos_token_id": []}}, [258]),
    ],
)
def test_config_json_names_end_tokens_where_generation_config_json_does_not_and_a_copy_has_the_same(
    tmp_path, files, further
):
    """A copy of the tokenizer, in a work directory, lies beside another config.json."""
    plain = byte_level(["<end>"])
    tokenizer = load_tokenizer(write(tmp_path, tokenizer=plain, tokenizer_config={"eos_token": "<end>"}, **files))
    assert tokenizer.eos_ids == (plain.token_to_id("<end>"), *further)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tokenizer.files:
        (copy / file.name).write_bytes(file.read_bytes())
    write(copy, config={"eos_token_id": 3})
    save_end_ids(copy, tokenizer.eos_ids)
    assert load_tokenizer(copy).eos_ids == tokenizer.eos_ids
    kept = json.loads((copy / "generation_config.json").read_text())
    assert kept.get("top_p") == files.get("generation_config", {}).get("top_p")


def test_training_is_reproducible(tmp_path):
    for name in "ab":
        train_sentencepiece(TEXTS, tmp_path / name, vocab_size=40, byte_fallback=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="tokenizer of 4 pieces"):
        train_sentencepiece(TEXTS, tmp_path / "small.model", vocab_size=4, byte_fallback=False)
    assert not (tmp_path / "small.model").exists()


def test_a_model_must_have_a_row_for_every_id(qwen):
    tokenizer = load_tokenizer(qwen[0])
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    check_vocabulary(tokenizer, 512)
    reach = tokenizer.vocab_size - 1
    with pytest.raises(ValueError, match=f"reach {reach} and the model's vocab_size is {reach}"):
        check_vocabulary(tokenizer, reach)


def _broken(directory, case):
    """The path of a tokenizer with one fault."""
    plain = byte_level(["<end>"])
    if case == "missing":
        return directory / "gone"
    if case == "text":
        (directory / "words.txt").write_text("x")
        return directory / "words.txt"
    if case == "junk model":
        (directory / "junk.model").write_bytes(b"not a model")
        return directory / "junk.model"
    files = {"tokenizer": plain, "tokenizer_config": {"eos_token": "<end>"}}
    faults = {
        "junk json": files | {"tokenizer": {"model": 3}},
        "neither": {"config": {}},
        "no end": files | {"tokenizer_config": {}},
        "wrong end": files | {"generation_config": {"eos_token_id": "<end>"}},
        "wrong config end": files | {"config": {"eos_token_id": "<end>"}},
        "junk generation": files | {"generation_config": [1]},
    }
    return write(directory, **faults[case])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "gone does not exist"),
        ("text", r"words\.txt is neither a \.model file nor a directory"),
        ("junk model", r"cannot read the sentencepiece model .*junk\.model"),
        ("neither", r"neither tokenizer\.json nor tokenizer\.model"),
        ("junk json", r"cannot read the tokenizer .*tokenizer\.json"),
        ("no end", "has no end token; name it"),
        ("wrong end", r"generation_config\.json has eos_token_id \['<end>'\]"),
        ("wrong config end", r"/config\.json has eos_token_id \['<end>'\]"),
        ("junk generation", r"generation_config\.json: it is not a JSON object"),
    ],
)
def test_broken_tokenizers_are_refused_in_one_line(tmp_path, case, message):
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(_broken(tmp_path, case))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"no chat template; add chat_template\.jinja, or chat_template in tokenizer_config\.json"),
        ("{{ raise_exception('System role not supported') }}", "fails: System role not supported"),
        ("{% for message in", "chat template in .* fails"),
    ],
)
def test_chat_templates_that_fail_are_one_line(tmp_path, template, message):
    settings = {"eos_token": "<end>"} | ({"chat_template": template} if template else {})
    tokenizer = load_tokenizer(write(tmp_path, tokenizer=byte_level(["<end>"]), tokenizer_config=settings))
    with pytest.raises(ValueError, match=message) as error:
        tokenizer.encode_chat(MESSAGES)
    assert "\n" not in str(error.value)
