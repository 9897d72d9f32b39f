"""Tasks of reasoning-gym: mixtures, splits, scores, and what is refused."""

import collections

import numpy as np
import pytest

from krl.configs import default, smollm2
from krl.rewards.pool import VerifierPool
from krl.rewards.verify import score_reasoning_gym
from krl.run.data import load_task_sets
from krl.tasks.reasoning_gym import draw_tasks, parse_tasks

MIXTURE = "chain_sum(min_terms=2, max_terms=3, max_digits=2)*3, letter_counting, spell_backward(max_word_len=5)"
TWENTY = (
    "basic_arithmetic, bitwise_arithmetic, calendar_arithmetic, chain_sum, count_bits, course_schedule, decimal_chain_sum, "
    "gcd, family_relationships, fraction_simplification, isomorphic_strings, lcm, leg_counting, letter_counting, maze, "
    "number_sorting, prime_factorization, products, spell_backward, syllogism"
)  # fmt: skip
SIZES = {"warm": 60, "train": 80, "test": 40}


@pytest.fixture(autouse=True)
def drawn_here(monkeypatch):
    """Without a process for every drawing."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")


def test_the_config_of_a_published_model_asks_what_its_prompts_have_room_for():
    drawn = draw_tasks({"warm": 300, "train": 300, "test": 100}, seed=0, tasks=smollm2.get_config().reasoning_gym.tasks)
    assert len(set(drawn["train"].fields["generator"])) == 15
    words = np.array([len(prompt.split()) for prompt in drawn["train"].prompts])
    assert np.mean(words < 36) > 0.95  # of at most 48 tokens with the template


def test_splits_are_disjoint_and_the_same_for_the_same_seed():
    drawn, again, other = (draw_tasks(SIZES, seed=seed, tasks=MIXTURE) for seed in (0, 0, 1))
    assert drawn == again
    assert drawn["train"].prompts != other["train"].prompts
    prompts = [set(tasks.prompts) for tasks in (*drawn.values(), *other.values())]
    assert [len(tasks) for tasks in drawn.values()] == list(SIZES.values()) == [len(one) for one in prompts[:3]]
    for first in (0, 3):  # no question of one split is in another, whichever seed drew it
        assert not prompts[first] & (prompts[1] | prompts[2] | prompts[4] | prompts[5])


def test_what_goes_through_sets_is_drawn_alike_in_every_process(monkeypatch):
    drawn = []
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        drawn.append(draw_tasks(SIZES, seed=0, tasks="ransom_note, knights_knaves"))
    assert drawn[0] == drawn[1]
    with pytest.raises(ValueError, match=r"^reasoning-gym has no no_such_task\(\)"):
        draw_tasks(SIZES, seed=0, tasks="no_such_task")


def test_weights_decide_how_often_a_generator_is_drawn_and_options_what_it_draws():
    tasks = draw_tasks({"warm": 0, "train": 600, "test": 0}, seed=0, tasks=MIXTURE)["train"]
    counts = collections.Counter(tasks.fields["generator"])
    assert set(counts) == {"chain_sum", "letter_counting", "spell_backward"}
    assert abs(counts["chain_sum"] - 360) < 4 * np.sqrt(600 * 0.6 * 0.4)
    for generator, answer in zip(tasks.fields["generator"], tasks.answers, strict=True):
        assert generator != "spell_backward" or len(answer) <= 5
    hard = {d for g, d in zip(tasks.fields["generator"], tasks.fields["difficulty"], strict=True) if g == "chain_sum"}
    assert {d.split(",")[0] for d in hard} == {"num_terms=2", "num_terms=3"}
    assert tasks.completions == tasks.answers


def test_twenty_generators_are_scored_by_their_own_scorers_through_workers():
    tasks = draw_tasks({"warm": 0, "train": 120, "test": 0}, seed=3, tasks=TWENTY)["train"]
    assert len(set(tasks.fields["generator"])) == 20
    items = list(zip(tasks.prompts, tasks.answers, tasks.answers, tasks.rows, strict=True))
    boxed = [
        (prompt, f"<think>7</think> So it is \\boxed{{{given}}}.", gold, row) for prompt, given, gold, row in items
    ]
    wrong = [(prompt, "no such answer", gold, row) for prompt, _, gold, row in items]
    limits = {"item_seconds": 60.0, "batch_seconds": 300.0, "items_per_worker": 1000, "memory_gb": 4.0}
    with VerifierPool("reasoning_gym", workers=1, **limits) as pool:
        rewards, faults = pool.score([*items, *boxed, *wrong])
    assert not any(faults.values())
    right, marked, others = rewards.reshape(3, -1)
    assert (right == 1).all()
    plain = np.array(["\\" not in gold and "{" not in gold for gold in tasks.answers])
    assert (marked[plain] == 1).all()
    assert (others < 1).all()
    assert [score_reasoning_gym(*item) for item in items[:5]] == [1.0] * 5


def test_a_config_names_the_mixture():
    config = default.get_config()
    config.data.source = "reasoning_gym"
    config.reasoning_gym.update({"tasks": "gcd", "num_warm": 3, "num_train": 5, "num_test": 2})
    sets = load_task_sets(config)
    assert [len(sets[name]) for name in ("sft", "train", "test")] == [3, 5, 2]
    assert set(sets["train"].fields["generator"]) == {"gcd"}
    assert sets["train"].rows[0]["metadata"]["source_dataset"] == "gcd"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("", "must name generators, such as chain_sum"),
        ("gcd +", "must name generators"),
        ("gcd(1)", "must name generators"),
        ("gcd(num_terms=open('x'))", "must name generators"),
        ("gcd*0", "gives gcd the weight 0.0, which must be a positive number"),
        ("gcd*(-1)", "gives gcd the weight -1.0"),
        ("gcd, lcm, gcd*2", "names a generator twice with the same options"),
        ("no_such_task", "reasoning-gym has no no_such_task()"),
        ("gcd(no_such_option=1)", "reasoning-gym has no gcd(no_such_option=1): .*unexpected keyword"),
        ("gcd(min_value=9, max_value=3)", "reasoning-gym has no gcd(min_value=9, max_value=3)"),
        ("chain_sum(min_terms=2, max_terms=2, min_digits=1, max_digits=1)", "there are only .* different prompts"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(tasks, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")) as error:
        draw_tasks({"warm": 0, "train": 900, "test": 0}, seed=0, tasks=tasks)
    assert "\n" not in str(error.value)


def test_options_tell_equal_generators_apart():
    first, second = parse_tasks("gcd(max_value=9), gcd(max_value=99)*2")
    assert (first.weight, second.weight) == (1.0, 2.0)
    assert dict(second.options) == {"max_value": 99}


def test_a_generators_options_are_its_scorers_too():
    ladders = draw_tasks(
        {"warm": 0, "train": 5, "test": 0}, seed=0, tasks="word_ladder(min_word_length=3, max_word_length=3)"
    )["train"]
    for answer, row in zip(ladders.answers, ladders.rows, strict=True):
        assert score_reasoning_gym("", answer, answer, row) == 1
    places = "decimal_arithmetic(min_num_decimal_places=9, max_num_decimal_places=9, precision=14)"
    sums = draw_tasks({"warm": 0, "train": 5, "test": 0}, seed=0, tasks=places)["train"]
    for answer, row in zip(sums.answers, sums.rows, strict=True):
        assert score_reasoning_gym("", answer, answer, row) == 1
        assert score_reasoning_gym("", str(float(answer) + 9e-4), answer, row) < 1


def test_tasks_without_an_answer_are_nothing_to_imitate():
    drawn = draw_tasks({"warm": 8, "train": 2, "test": 0}, seed=0, tasks="rubiks_cube, gcd")
    assert "" in drawn["warm"].answers
    assert drawn["warm"].completions == ()
