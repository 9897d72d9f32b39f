"""Reward functions that tests name in a config; nothing here is slow to import."""


def odd_letters(prompt, response, answer):
    """A reward that random text earns about half of the time; runs name it as tests.rewards:odd_letters."""
    assert prompt.startswith("What is")
    assert isinstance(answer, str)
    return float(sum(letter.isalpha() for letter in response) % 2)


def same(prompt, response, answer):
    """Whether a response is its answer, to the letter."""
    return float(response == answer)


def nan_where_wrong(prompt, response, answer):
    """A reward that is no number wherever `same` is 0."""
    return 1.0 if same(prompt, response.strip(), answer) else float("nan")


def signed(prompt, response, answer):
    """3 for the answer and -1 for anything else: no share of a success."""
    return 3.0 if response == answer else -1.0
