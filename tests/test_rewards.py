"""From the config's text to rewards: lists with weights, what is a number, the row, and functions of another form."""

import decimal
import fractions
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from krl.rewards.functions import as_number, component_names, load_rewards, parse_rewards, reward_or_error
from krl.rewards.pool import VerifierPool

MODULE = """
import functools


def right(prompt, response, answer):
    if response == "1odd":
        raise TypeError("odd")
    return float(response == answer)


def form(prompt, response, answer):
    if response == "raise":
        raise KeyError("no form")
    return float(response.startswith("1")) / 4


def fourth(prompt, response, answer, row):
    seen = dict(row)
    row.clear()
    row["spoilt"] = True
    return float(seen.get("weight", -1)) if seen.get("tests", ["x"]) == ["x"] else -2.0


def last(prompt, response, answer, strict=True, row=None):
    return float(row["weight"])


def keyword(prompt, response, answer, *, row):
    return float(row["weight"])


def others(prompt, response, answer, **rest):
    return float(len(rest))


class Judge:
    def __call__(self, prompt, response, answer):
        return 0.5


judge = Judge()
partial = functools.partial(fourth, row={"weight": 7})
huge = lambda prompt, response, answer: 1e308


def trl(completions, answer=None, **others):
    return [1.0 for _ in completions]


def openrlhf(queries, prompts):
    return 1.0


def more(prompt, response, answer, extra_info):
    return 1.0


def needs(prompt, response, answer, *, level):
    return 1.0


async def later(prompt, response, answer):
    return 1.0


class Later:
    async def __call__(self, prompt, response, answer):
        return 1.0


later_object, later_partial = Later(), functools.partial(Later())


async def stream(prompt, response, answer):
    yield 1.0


def by_position(prompt, response, answer, row, /):
    return float(row["weight"])


@functools.wraps(keyword)
def adapter(prompt, response, answer):
    return keyword(prompt, response, answer, row={"weight": 8})


@functools.wraps(keyword)
def passes_on(*args, **others):
    return keyword(*args, **others)


@functools.wraps(last)
def passes_on_words(prompt, response, answer, **others):
    return last(prompt, response, answer, **others)


@functools.wraps(by_position)
def passes_on_places(*args):
    return by_position(*args)


@functools.wraps(keyword)
def loses_row(*args):
    return keyword(*args)


class Unlike:
    def __init__(self, response):
        self.response = response


def addresses(prompt, response, answer):
    if response == "raise":
        raise ValueError(f"no use for {object.__repr__(Unlike(response))}")
    return Unlike(response)
"""
LIMITS = {"item_seconds": 10, "batch_seconds": 20, "items_per_worker": 1000, "memory_gb": 2}


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine", None)


def test_a_list_of_rewards_has_names_and_weights():
    assert parse_rewards("math") == {"math": 1.0}
    assert parse_rewards(" math * 1.5 , mine:form*-1e-1,exact") == {"math": 1.5, "mine:form": -0.1, "exact": 1.0}
    assert component_names("math") == component_names("math*1.0") == ()
    assert component_names("math*2") == ("math",)
    assert component_names("math,exact") == ("math", "exact")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has a part without a name"),
        ("math,", "has a part without a name"),
        ("math*2,*3", "has a part without a name"),
        ("math*1,exact,math*0.5", "names math twice"),
        ("math*much", "the weight of math is 'much'; it must be a finite number"),
        ("math*", "the weight of math is ''"),
        ("math*nan", "the weight of math is 'nan'"),
        ("math*1*2", "the weight of math is '1"),
        ("0.1*math", "the weight of 0.1 is 'math'"),
        ("math,mine:gone", "mine has no gone"),
        ("mine:trl", r"reward 'mine:trl': its parameters are \(completions, answer=None, \*\*others\), and too many positional"),
        ("mine:openrlhf", "too many positional arguments"),
        ("mine:more", "missing a required argument: 'extra_info'"),
        ("mine:needs", "missing a required .*argument: 'level'"),
        ("mine:later", "must return a number"),
        ("mine:later_object", "must return a number"),
        ("mine:later_partial", "must return a number"),
        ("mine:stream", "must return a number"),
        ("mine:loses_row", "unexpected keyword argument 'row'|missing a required .*argument: 'row'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_a_reward_is_refused_at_the_start(text, message, workers):
    if workers and text != "mine:trl":  # one is enough: what a worker refuses comes from the same function
        return
    with pytest.raises(ValueError, match=message) as refused:
        VerifierPool(text, workers=workers, **LIMITS)
    assert "\n" not in str(refused.value)


def test_what_float_takes_is_a_reward_and_text_is_not():
    class Index:
        def __index__(self):
            return 3

    for value, number in (
        (np.array(1.0), 1), (np.array([[0.5]]), 0.5), (jnp.float32(1), 1), (jnp.array([2.0]), 2), (jnp.bfloat16(0.5), 0.5), (np.int8(-3), -3),
        (np.bool_(True), 1), (True, 1), (np.ma.array([2.0]), 2), (decimal.Decimal("0.25"), 0.25), (fractions.Fraction(1, 8), 0.125), (Index(), 3), (10**300, 1e300),
        (np.float64(1e300), 1e300), (5e-324, 5e-324),
    ):  # fmt: skip
        assert as_number(value) == number
        assert isinstance(as_number(value), float)
    for value in (
        np.ma.masked, np.ma.array([1.0], mask=[True]), "1.0", b"1.0", bytearray(b"1"), memoryview(b"1"), np.str_("1.0"), np.array("1.0"), np.array(["1"]), np.bytes_(b"1"), None, 1j,
        np.complex64(1), np.array(1j), float("nan"), float("inf"), -np.inf, np.array(np.nan), decimal.Decimal("sNaN"),
        decimal.Decimal("1e400"), 10**400, [1.0], (1.0,), {}, np.ones(2), np.zeros(0), jnp.ones(2), object(), float, np.float64,
    ):  # fmt: skip
        assert as_number(value) is None, value


def test_tensors_of_pytorch_are_rewards():
    torch = pytest.importorskip("torch")
    for value in (torch.tensor(0.5), torch.tensor([0.5], requires_grad=True), torch.tensor(0.5, dtype=torch.bfloat16)):
        assert as_number(value) == 0.5
    assert as_number(torch.ones(2)) is None


def test_reasons_are_one_line_whatever_an_error_says():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def give(value):
        def reward(prompt, response, answer):
            if isinstance(value, BaseException):
                raise value
            return value

        return reward_or_error(reward, "q", "r", "a")

    assert give(Mute()) == "it raised Mute: a Mute"
    assert give(ValueError("a\n\tb \ud800\x1b[31m")) == "it raised ValueError: a b ??[31m"
    assert give("1.0") == "it returned '1.0', not a finite number"
    assert give(10**5000) == "it returned a int, not a finite number"
    assert len(give(ValueError("x" * 999))) == 200


@pytest.mark.parametrize("workers", [0, 1])
def test_several_rewards_are_added_up_and_one_that_fails_leaves_the_response_out(workers):
    with VerifierPool("mine:right*2, mine:form*-0.5", workers=workers, **LIMITS) as pool:
        assert pool.names == ("mine:right", "mine:form")
        rewards, faults = pool.score([("p", "12", "12"), ("p", "1", "2"), ("p", "raise", "raise"), ("p", "x", "x")])
        assert rewards.tolist() == [2 - 0.125, -0.125, 0, 2]
        np.testing.assert_array_equal(pool.last_parts, [[1, 0.25], [0, 0.25], [1, np.nan], [1, 0]])
        assert faults == {"timeouts": 0, "crashes": 0, "errors": 1}
        reason = "mine:form: it raised KeyError: 'no form'"
        assert pool.last_reasons == ["", "", reason, ""]
        assert pool.last_failure == f"{reason} (prompt 'p', response 'raise')"
        # What is told is rather why the first reward failed; what comes after that one is computed all the same.
        pool.score([("p", "raise", "raise"), ("p", "1odd", ""), ("p", "1", "1")])
        np.testing.assert_array_equal(pool.last_parts, [[1, np.nan], [np.nan, 0.25], [1, 0.25]])
        assert pool.last_rewards.tolist() == [0, 0, 2 - 0.125]
        assert pool.last_failure == "mine:right: it raised TypeError: odd (prompt 'p', response '1odd')"
    with VerifierPool("mine:huge*10", workers=workers, **LIMITS) as pool:
        assert pool.score([("", "", "")])[1]["errors"] == 1
        assert pool.last_error == "the sum of its rewards is no finite number"
        assert (pool.last_parts.tolist(), pool.last_rewards.tolist()) == ([[1e308]], [0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_function_with_a_row_gets_a_copy_of_it(workers):
    rows = [{"weight": 0.5, "tests": ["x"]}, {"weight": 4}]
    items = [("", "", "", rows[0]), ("", "", "", rows[1]), ("", "", "", rows[0]), ("", "", "")]
    with VerifierPool("mine:fourth", workers=workers, **LIMITS) as pool:
        assert pool.score(items)[0].tolist() == [0.5, 4, 0.5, -1]  # without a row it is {}
    assert rows == [{"weight": 0.5, "tests": ["x"]}, {"weight": 4}]
    with VerifierPool("mine:right,mine:keyword*2", workers=workers, **LIMITS) as pool:
        assert pool.score(items[:2])[0].tolist() == [2, 9]


def test_who_gets_a_row():
    takes = {name: load_rewards(f"mine:{name}")[0].takes_row for name in ("fourth", "last", "keyword", "others", "right", "judge", "partial")}  # fmt: skip
    assert takes == {"fourth": True, "last": True, "keyword": True, "others": False, "right": False, "judge": False, "partial": True}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "reward"),
    [("by_position", 3), ("adapter", 8), ("passes_on", 3), ("passes_on_words", 3), ("passes_on_places", 3)],
)
def test_a_row_is_given_as_the_function_can_be_called(name, reward):
    with VerifierPool(f"mine:{name}", workers=0, **LIMITS) as pool:
        assert pool.score([("", "", "", {"weight": 3})])[0].tolist() == [reward]
        assert pool.last_reasons == [""]


def test_reasons_have_no_addresses():
    with VerifierPool("mine:addresses", workers=0, **LIMITS) as pool:
        pool.score([("", "raise", ""), ("", "1", "")])
    assert pool.last_reasons == [
        "it raised ValueError: no use for <mine.Unlike object>", "it returned <mine.Unlike object>, not a finite number",
    ]  # fmt: skip


def test_rows_are_sent_only_to_functions_that_take_them():
    with VerifierPool("mine:right", workers=1, **LIMITS) as pool:
        assert pool.score([("", "1", "1", {"cannot be pickled": lambda: 0})])[0].tolist() == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit needs Linux")
def test_every_failure_has_a_reason(tmp_path):
    (tmp_path / "odd.py").write_text(
        "import ctypes, os, time\n\n\ndef odd(prompt, response, answer):\n"
        "    if response == 'exit':\n        os._exit(3)\n"
        "    if response == 'segfault':\n        ctypes.string_at(0)\n"
        "    if response == 'eat':\n        hoard = [bytearray(1 << 26) for _ in range(1000)]\n"
        "    if response == 'sleep':\n        time.sleep(100)\n"
        "    return 1.0\n"
    )
    with VerifierPool("odd:odd", workers=1, **LIMITS | {"memory_gb": 1}) as pool:
        pool.score([("p" * 200, word, "") for word in ("1", "exit", "segfault", "eat")])
        assert pool.last_reasons == [
            "", "its process ended with exit code 3", "its process was killed by signal 11",
            "it ran out of memory, beyond 1 GiB (verify.memory_gb)",
        ]  # fmt: skip
        assert pool.last_failure == f"{pool.last_reasons[1]} (prompt '{'p' * 77}...', response 'exit')"
        pool._item_seconds = 0.3
        pool.score([("", "sleep", "")])
        assert pool.last_reasons == ["it took longer than 0.3 s (verify.item_seconds)"]
        pool._item_seconds, pool._batch_seconds = 10, 0.3
        pool.score([("", "sleep", "")])
        assert pool.last_reasons == ["it was not done 0.3 s after the last response (verify.batch_seconds)"]
