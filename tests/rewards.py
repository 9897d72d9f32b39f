"""Reward functions that tests name in a config; nothing here is slow to import."""


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
