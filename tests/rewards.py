"""Reward functions that tests name in a config; nothing here is slow to import."""

import itertools
import os
import time
import zlib


def odd_letters(prompt, response, answer):
    """A reward that random text earns about half of the time; runs name it as tests.rewards:odd_letters."""
    assert prompt.startswith("What is")
    assert isinstance(answer, str)
    return float(sum(letter.isalpha() for letter in response) % 2)


def same(prompt, response, answer):
    """Whether a response is its answer, to the letter."""
    return float(response == answer)


def signed(prompt, response, answer):
    """3 for the answer and -1 for anything else: no share of a success."""
    return 3.0 if response == answer else -1.0


def refuses_a(prompt, response, answer):
    """-1, and an error where the response has an "a" in it."""
    if "a" in response:
        raise ValueError("an a")
    return -1.0


def huge_b(prompt, response, answer):
    """0, and a number that has no nine times as much where the response has a "b" in it."""
    return 1e308 if "b" in response else 0.0


def leave(prompt, response, answer):
    """0, but the response "leave" ends the process."""
    if response == "leave":
        os._exit(3)
    return 0.0


def error_where_wrong(prompt, response, answer):
    """`signed`, with an error instead of a reward for every second wrong answer, by its length."""
    if response != answer and len(response) % 2:
        raise ValueError(f"no number in {response!r}")
    return signed(prompt, response, answer)


def never(prompt, response, answer):
    """A reward that looks for what is not there."""
    raise KeyError("solution")


def odd_length(prompt, response, answer):
    """Whether a response has an odd number of characters."""
    return float(len(response) % 2)


def low(prompt, response, answer):
    """Rewards that are below -1, all of them."""
    return -3.0 - len(response)


def coin(prompt, response, answer):
    """1 for half of all responses, whatever they say."""
    return float(zlib.crc32(response.encode()) % 2)


def nothing(prompt, response, answer):
    """0 for every response."""
    return 0.0


def nth(prompt, response, answer):
    """How many responses this process has been asked about."""
    return float(next(_CALLS))


def in_a_moment(prompt, response, answer):
    """1, after a third of a second."""
    time.sleep(0.3)
    return 1.0


def tells_its_limits(prompt, response, answer):
    """1 where KRL_TRIED is seen; 1/4 for a process's second response if it may not take 2 GB; the sixth takes an hour."""
    call = next(_CALLS)
    if call == 6:
        time.sleep(3600)
    try:
        bytearray(2 * 10**9 if call == 2 else 1)
    except MemoryError:
        return 0.25
    return float("KRL_TRIED" in os.environ)


_CALLS = itertools.count(1)
