"""Slots against loops; the sampler against the policy it samples from."""

import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from krl import policy, rollout
from krl.base.sharding import make_mesh, named_sharding, reshape_mesh, tree_sharding
from krl.base.types import Prompts
from krl.rollout import sampler, serve
from krl.rollout.sampler import slot_bytes, slots_in_memory, slots_of_a_cpu
from krl.rollout.tokens import LEVELS, draw_tokens, least_logit, random_numbers
from tests import tiny


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 6]).flatmap(lambda n: st.lists(st.integers(0, 5), min_size=n, max_size=n)), st.sampled_from([0, 4, 15, 34]))  # fmt: skip
def test_slots_equal_loops(counts, size):
    """Few numbers of prompts and rows, each a program; what has no row is left out."""
    rows = [(i, j, True) for i, n in enumerate(counts) for j in range(n)]
    expected = (rows + [(len(counts), 0, False)] * size)[:size]
    got = jax.jit(rollout.make_slots, static_argnums=1)(jnp.array(counts), size)
    assert list(zip(*(a.tolist() for a in got), strict=True)) == expected


def sample(counts, prompts=None, seed=0, **changes):
    options = {"max_new_tokens": 6, "eos_ids": tiny.EOS, "temperature": 1.0} | changes
    return rollout.generate(
        tiny.CONFIG, tiny.params(), prompts or tiny.prompts(), jnp.array(counts), jax.random.key(seed), **options
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logps_are_the_policys(temperature):
    prompts = tiny.prompts()
    got = sample([3, 0, 5, 2], temperature=temperature)
    index, lengths = np.asarray(got.prompt_index), np.asarray(got.lengths)
    real = np.arange(6)[None, :] < lengths[:, None]
    tokens = jnp.concatenate([prompts.tokens[index], got.tokens], axis=1)
    mask = jnp.concatenate([prompts.mask[index], jnp.array(real)], axis=1)
    logps = policy.token_logps(tiny.CONFIG, tiny.params(), tokens, mask, start=5, temperature=temperature)
    np.testing.assert_allclose(np.asarray(got.logps)[real], np.asarray(logps)[real], atol=1e-4)
    assert (np.asarray(got.logps)[~real] == 0).all()


def test_responses_end_at_the_end_token_and_padding_follows():
    got = sample([20, 20, 20, 20], max_new_tokens=8)
    tokens, lengths, finished = (np.asarray(x) for x in (got.tokens, got.lengths, got.finished))
    assert finished.any()
    assert not finished.all()
    for row, length, ended in zip(tokens, lengths, finished, strict=True):
        assert (1 in row) == ended
        assert length == (row.tolist().index(1) + 1 if ended else 8)
        assert (row[length:] == 0).all()


def test_samples_do_not_depend_on_the_other_prompts_or_the_rows():
    prompts = tiny.prompts()
    everything = sample([2, 3, 4, 1], num_rollouts=16)
    alone = Prompts(prompts.tokens[2:3], prompts.mask[2:3], prompts.task_ids[2:3])
    single = sample([3], prompts=alone)
    np.testing.assert_array_equal(single.tokens, everything.tokens[5:8])
    np.testing.assert_allclose(single.logps, everything.logps[5:8], atol=1e-4)
    assert len({tuple(row) for row in everything.tokens[:10].tolist()}) > 5
    assert not np.array_equal(sample([2, 3, 4, 1], seed=1).tokens, everything.tokens[:10])


def test_without_prompts_every_row_is_padding():
    prompts = jax.tree.map(lambda part: part[:0], tiny.prompts())
    got = sample(jnp.zeros(0, jnp.int32), prompts, num_rollouts=3, pad_id=7)
    assert got.prompt_index.tolist() == got.lengths.tolist() == [0, 0, 0]
    assert not got.mask.any()
    assert not got.finished.any()
    assert (got.tokens.shape, set(got.tokens.reshape(-1).tolist())) == ((3, 6), {7})
    assert sample([0, 0, 0, 0]).tokens.shape == (0, 6)


@pytest.mark.parametrize("slots", [1, 2, 5, 8, 13, 70])
def test_few_slots_give_what_a_slot_for_every_rollout_gives(slots):
    """Lengths differ, so slots end and are filled at all times, and columns are used again many times over."""
    counts, expected = [30, 0, 25, 14], jnp.array([2.0, 1.0, 6.0, 3.0])
    whole = sample(counts, num_rollouts=70, num_slots=70)
    few = sample(counts, num_rollouts=70, num_slots=slots, expected_tokens=expected)
    assert len(set(np.asarray(whole.lengths).tolist())) > 4
    for name in ("prompt_index", "sample_index", "mask", "tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(few, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(few.logps, whole.logps, atol=1e-4)


def test_the_longest_begin_first_and_devices_get_equal_shares():
    expected, mask = jnp.array([3.0, 9.0, 1.0, 7.0, 5.0, 0.0, 0.0]), jnp.arange(7) < 5
    assert sampler._deal(expected, mask, 1).tolist() == [1, 3, 4, 0, 2, 5, 6]
    assert sampler._deal(expected, mask, 2).tolist() == [1, 4, 2, 6, 3, 0, 5, 7]  # 7 is no row
    odd = jnp.array([jnp.nan, 2.0, jnp.inf, -jnp.inf, 5.0, 0.0, 0.0])
    assert sampler._deal(odd, mask, 1).tolist()[5:] == [5, 6]  # rollouts come before the rest whatever is expected


def test_slots_that_nothing_waits_for_are_given_up(monkeypatch):
    whole = sample([30, 20, 25, 14], num_slots=89, max_new_tokens=12)
    monkeypatch.setattr(serve, "FEWEST", 2)
    shrunk = sample([30, 20, 25, 14], num_slots=89, max_new_tokens=12)
    np.testing.assert_array_equal(shrunk.tokens, whole.tokens)
    np.testing.assert_array_equal(shrunk.lengths, whole.lengths)


def test_prompts_in_parts_are_the_prompts_at_once(monkeypatch):
    whole = sample([3, 1, 2, 4])
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 12)  # three of the four prompts
    begin: Any = sampler.PROGRAMS["begin"]
    begin.clear_cache()
    parts = sample([3, 1, 2, 4])
    begin.clear_cache()
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    np.testing.assert_allclose(parts.logps, whole.logps, atol=1e-4)


def test_devices_read_equally_many_prompts(monkeypatch):
    """At least one each at a time, or most would compute padding: eight prompts are one turn for eight devices."""
    rows, read = [], policy.read
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 1)
    monkeypatch.setattr(
        policy,
        "read",
        lambda config, layers, tokens, *rest: rows.append(len(tokens)) or read(config, layers, tokens, *rest),
    )
    prompts, options = tiny.prompts((5,) * 8), serve.Options(8, 8, 6, tiny.EOS, 0, (0, 1.0, 0.0))
    asked = sampler.Asked(prompts, jnp.ones(8, jnp.int32), jax.random.key(0), 0, jnp.ones(8))

    def flops():  # of one turn, as XLA counts loops
        begin = jax.jit(sampler._begin, static_argnums=(0, 1)).lower(tiny.CONFIG, options, tiny.params(), asked)
        return begin.compile().cost_analysis()["flops"]

    alone = flops()
    with jax.set_mesh(make_mesh((8,), ("data",))):
        assert flops() == pytest.approx(alone, rel=0.1)
    assert rows[0] == 1
    assert rows[-1] == 8


@pytest.mark.slow
def test_unused_columns_of_long_caches_change_nothing(monkeypatch):
    assert serve.cache_columns(4 + 140) == 144
    assert serve.cache_columns(4 + 141) == 160
    counts, options = [3, 0, 5, 2], {"max_new_tokens": 141, "num_slots": 4}
    padded = sample(counts, **options)
    monkeypatch.setattr(serve, "TILE", 1)
    jax.clear_caches()
    exact = sample(counts, **options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), padded, exact)


def test_prompts_of_one_token():
    prompts = tiny.prompts(lengths=(1, 1))
    got = sample([2, 3], prompts=prompts, temperature=0.0)
    first = policy.apply(tiny.CONFIG, tiny.params(), prompts.tokens)[:, 0].argmax(-1)
    np.testing.assert_array_equal(got.tokens[:, 0], np.asarray(first)[[0, 0, 1, 1, 1]])


@pytest.mark.parametrize(("shape", "names"), [((8,), ("data",)), tiny.slow((2, 2, 2), ("data", "fsdp", "model"))])
def test_devices_with_queues_of_their_own_give_what_one_gives(shape, names):
    """19 rollouts and 6 slots, which no number of devices divides."""
    counts = [9, 0, 7, 3]
    alone = sample(counts, num_slots=19)
    mesh = make_mesh(shape, names)
    with jax.set_mesh(mesh):
        axes = tree_sharding(mesh, policy.param_axes(tiny.CONFIG), jax.eval_shape(tiny.params))
        spread = rollout.generate(
            tiny.CONFIG, jax.device_put(tiny.params(), axes), jax.device_put(tiny.prompts(), named_sharding(mesh)),
            jnp.array(counts), jax.random.key(0), max_new_tokens=6, eos_ids=tiny.EOS, num_slots=6,
        )  # fmt: skip
    np.testing.assert_array_equal(spread.tokens, alone.tokens)
    np.testing.assert_array_equal(spread.lengths, alone.lengths)
    np.testing.assert_allclose(spread.logps, alone.logps, atol=1e-4)


def test_a_cpu_has_as_many_slots_as_its_caches_or_a_large_policy_allow():
    def slots(length, **sizes):
        config = policy.PolicyConfig(**sizes)
        params = jax.eval_shape(lambda: policy.init(config, jax.random.key(0)))
        return slots_of_a_cpu(config, params, length)

    toy = {"vocab_size": 512, "embed_size": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_size": 32}
    assert slots(160, **toy) == int(4e6 / (2 * 4 * 2 * 32 * 160 * 4)) == 12
    assert slots(2000, **toy) == 8  # however long
    smollm2 = {"vocab_size": 49152, "embed_size": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
    smollm2 |= {"head_size": 64, "mlp_size": 1536}
    assert slots(156, **smollm2) == 134515008 * 4 // (2 * 30 * 3 * 64 * 156 * 4) == 74
    assert slots(156, **smollm2, dtype="bfloat16") == 74
    assert slots(60, **smollm2) == 194


@pytest.mark.slow
def test_memory_is_that_of_the_slots():
    """Eight times the rollouts add what they leave behind, and no caches."""

    def temporaries(rollouts):
        sizes = policy.PolicyConfig(vocab_size=16, num_layers=2, head_size=64)
        shapes = jax.eval_shape(lambda: policy.init(sizes, jax.random.key(0)))
        options = {"max_new_tokens": 64, "eos_ids": tiny.EOS, "num_rollouts": rollouts, "num_slots": 16}
        whole = jax.jit(functools.partial(rollout.generate, sizes, **options))
        lowered = whole.lower(shapes, tiny.prompts(), jnp.array([2, 2, 2, 2]), jax.random.key(0))
        return lowered.compile(tiny.AS_FOR_USERS).memory_analysis().temp_size_in_bytes

    a_slot = 2 * 2 * 2 * 64 * (4 + 64) * 4
    assert temporaries(512) - temporaries(64) < 448 * a_slot / 20


@functools.partial(jax.jit, static_argnames="limits")
def drawn_with(logits, numbers, temperature=1.0, limits=()):
    """(tokens, log-probabilities, log-probabilities of the whole distribution) of [V] logits and [n, LEVELS] numbers."""

    def one(numbers):
        found = draw_tokens(logits[None], numbers[None], temperature=temperature, **dict(limits))
        return jax.tree.map(lambda part: part[0], found)

    return jax.vmap(one)(numbers)


def draws(logits, number, **options):
    """The same of random numbers."""
    keys = jax.random.split(jax.random.key(5), number // 64)
    return drawn_with(logits, random_numbers(keys, 64).reshape(-1, LEVELS), **options)


def test_tokens_are_drawn_as_the_logits_say():
    logits = jnp.array(np.random.default_rng(0).normal(size=1000) * 3, jnp.float32)
    logits = logits.at[:40].set(-jnp.inf)  # a whole group that cannot be
    token, logp, whole = draws(logits, 1 << 15)
    expected = np.asarray(jax.nn.softmax(logits), np.float64)
    assert scipy.stats.chisquare(*grouped(token, expected)).pvalue > 1e-3
    np.testing.assert_allclose(logp, np.log(expected[np.asarray(token)]), atol=1e-4)
    assert not (np.asarray(token) < 40).any()
    np.testing.assert_array_equal(logp, whole)


def grouped(token, expected):
    """(counts seen, counts expected) of tokens, those least likely together so that each group is seen some 20 times."""
    order, total = np.argsort(expected), len(token)
    group = (np.cumsum(expected[order]) * total // 20).astype(int)
    seen, wanted = (
        np.bincount(group, each[order]) for each in (np.bincount(token, minlength=len(order)), expected * total)
    )
    kept = wanted > 10
    rest = [[part[~kept].sum()] for part in (seen, wanted)]
    seen, wanted = (np.concatenate([part[kept], more]) for part, more in zip((seen, wanted), rest, strict=True))
    there = wanted > 0
    return seen[there], wanted[there] * seen[there].sum() / wanted[there].sum()


def test_every_rare_token_is_drawn_as_often_as_it_should_be():
    """A policy that is sure of one of 32768 = 32 x 32 x 32 tokens and gives 3e-8 to each of the others.

    The numbers of a choice are cut where the choice changes, so of evenly spaced ones every rare token gets exactly one. A sum of
    float32 from the first token to the last, and one random number of 23 bits, know a quarter of them.
    """
    rare, sure = 3e-8, 20_000
    logits = jnp.full(32768, np.log(rare / (1 - 32767 * rare)), jnp.float32).at[sure].set(0.0)
    last, every = 1 - 2.0**-24, np.arange(32)
    tail = (
        1024 * rare,
        32 * rare / (1 - 31 * 1024 * rare),
        rare / (1 - 31 * 1024 * rare - 31 * 32 * rare),
    )  # of a choice
    parts = [
        [((a + 0.5) * tail[0], (b + 0.5) / 32, (c + 0.5) / 32) for a in every[:31] for b in every for c in every],
        [(last, (b + 0.5) * tail[1], (c + 0.5) / 32) for b in every[:31] for c in every],
        [(last, last, (c + 0.5) * tail[2]) for c in every[:31]],
    ]
    numbers = [number for part in parts for number in part]
    borders = [(31 * tail[0], last, last), (last, 31 * tail[1], last), (last, last, 31 * tail[2])]
    numbers += [tuple(min(1.001 * number, last) for number in border) for border in borders]
    token, logp, _ = (np.asarray(part) for part in drawn_with(logits, jnp.array(numbers, jnp.float32)))
    assert sorted(token[:32767]) == [i for i in range(32768) if i != sure]
    assert (token[-3:] == sure).all()  # right beyond the rare ones
    np.testing.assert_allclose(np.exp(logp[:32767]), rare, rtol=1e-4)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_border_of_a_tiny_probability_is_where_it_should_be(place):
    """By hand, of four tokens: exp(-20) of their sum, wherever it stands; sums in the tokens' order would lose it."""
    logits = jnp.array(np.insert([0.0, -0.5, -jnp.inf], place, -20.0), jnp.float32)
    groups = np.array([logits[:2], logits[2:]])
    tiny, other = np.exp(groups).sum(axis=1)[[place // 2, 1 - place // 2]]
    inside = np.exp(-20.0) / tiny  # in its group of two
    first = tiny / (tiny + other) if tiny < other else 1.0
    for factor in (0.999, 1.001):
        token = draw_tokens(logits[None], jnp.array([[0.0, first, inside]]) * factor, temperature=1.0)[0][0]
        assert (token == place) == (factor < 1)


def test_random_numbers_are_fine_however_small():
    numbers = np.asarray(random_numbers(jax.random.split(jax.random.key(0), 1 << 12), 64), np.float64).reshape(-1)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    below = [(numbers < 2.0**-k).sum() for k in range(1, 14)]
    wanted = [len(numbers) * 2.0**-k for k in range(1, 14)]
    np.testing.assert_allclose(below, wanted, atol=0, rtol=4 / np.sqrt(wanted[-1]))
    small = numbers[numbers < 2.0**-10]
    digits = np.frexp(small)[0] * 2**24  # the 24 bits of a float32
    assert (digits == digits.round()).all()
    assert abs((digits % 2).mean() - 0.5) < 0.1  # down to the last one
    np.testing.assert_array_equal(random_numbers(jax.random.split(jax.random.key(1), 3), 5)[:, :2], random_numbers(jax.random.split(jax.random.key(1), 3), 2))  # fmt: skip


@pytest.mark.parametrize("uniform", [0.0, 1e-30, 1 - 2**-24])
def test_the_ends_of_the_random_numbers_are_possible_tokens(uniform):
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 1.0, -jnp.inf], [-200.0, -jnp.inf, 3.0, -jnp.inf, -200.0], [-jnp.inf] * 4 + [-7.0]])  # fmt: skip
    token, *_ = draw_tokens(logits, jnp.full((3, LEVELS), uniform), temperature=1.0)
    assert token[0] in (1, 3)
    assert token[1:].tolist() == [2, 4]


def test_a_second_round_draws_the_samples_after_the_first():
    at_once, first, second = sample([3, 4, 2, 3]), sample([2, 2, 2, 2]), sample([1, 2, 0, 1], first_sample=2)
    rounds = [(r.prompt_index, r.sample_index, r.tokens) for r in (first, second)]
    index, number, tokens = (np.concatenate(parts) for parts in zip(*rounds, strict=True))
    order = np.lexsort((number, index))
    np.testing.assert_array_equal(number[order], at_once.sample_index)
    np.testing.assert_array_equal(tokens[order], at_once.tokens)


def test_equal_prompts_of_different_tasks_draw_different_samples():
    one = tiny.prompts(lengths=(3,))
    twins = Prompts(jnp.tile(one.tokens, (2, 1)), jnp.tile(one.mask, (2, 1)), jnp.array([5, 6]))
    got = sample([4, 4], prompts=twins)
    assert not np.array_equal(got.tokens[:4], got.tokens[4:])


def test_padding_rows_are_empty():
    got = sample([1, 0, 2, 0], num_rollouts=8)
    assert got.mask.tolist() == [True] * 3 + [False] * 5
    assert got.prompt_index.tolist() == [0, 2, 2] + [4] * 5
    assert got.lengths[3:].tolist() == [0] * 5
    assert (got.tokens[3:] == 0).all()
    assert not got.finished[3:].any()


def test_no_rollouts_are_no_rows():
    got = sample([0, 0, 0, 0])
    assert (got.tokens.shape, got.logps.shape, got.lengths.shape) == ((0, 6), (0, 6), (0,))


def test_temperature_zero_takes_the_most_likely_token():
    prompts = tiny.prompts()
    got = sample([1, 1, 1, 1], temperature=0.0)
    tokens, mask = prompts.tokens, prompts.mask
    alive = np.ones(4, bool)
    for step in range(6):
        best = np.asarray(policy.apply(tiny.CONFIG, tiny.params(), tokens, mask)[:, -1].argmax(-1))
        assert (np.asarray(got.tokens)[alive, step] == best[alive]).all()
        alive &= best != 1
        tokens = jnp.concatenate([tokens, jnp.array(best)[:, None]], axis=1)
        mask = jnp.concatenate([mask, jnp.ones((4, 1), bool)], axis=1)


def test_frequencies_follow_the_policy():
    prompts = tiny.prompts(lengths=(3,))
    got = sample([4000], prompts=prompts, max_new_tokens=1)
    shares = np.bincount(np.asarray(got.tokens)[:, 0], minlength=16) / 4000
    logits = policy.apply(tiny.CONFIG, tiny.params(), prompts.tokens, prompts.mask)[0, -1]
    np.testing.assert_allclose(shares, jax.nn.softmax(logits), atol=0.03)


def test_counts_and_temperature_do_not_recompile():
    sample([2, 2, 2, 2])
    before = tiny.sampler_programs()
    sample([8, 0, 0, 0], temperature=0.5)
    sample([1, 2, 3, 2], temperature=0.0)
    assert tiny.sampler_programs() == before


def test_another_layout_decodes_the_same_and_holds_no_parameter_whole():
    mesh = make_mesh((8, 1), ("fsdp", "model"))
    layout = reshape_mesh(mesh, (4, 2))
    axes = tree_sharding(mesh, policy.param_axes(tiny.CONFIG), jax.eval_shape(tiny.params))
    params, prompts = jax.device_put(tiny.params(), axes), jax.device_put(tiny.prompts(), named_sharding(mesh))
    alone = sample([9, 0, 7, 3], num_slots=19)
    with jax.set_mesh(mesh):
        with jax.set_mesh(layout):
            spread = rollout.generate(
                tiny.CONFIG, params, prompts, jnp.array([9, 0, 7, 3]), jax.random.key(0), max_new_tokens=6,
                eos_ids=tiny.EOS, num_slots=6,
            )  # fmt: skip
        np.testing.assert_array_equal(spread.tokens, alone.tokens)
        np.testing.assert_array_equal(
            jnp.sum(spread.lengths), alone.lengths.sum()
        )  # usable beside the first mesh's arrays
    with jax.set_mesh(layout):
        options = serve.Options(19, 6, 6, tiny.EOS, 0, (0, 1.0, 0.0))
        asked = sampler.Asked(prompts, jnp.array([9, 0, 7, 3]), jax.random.key(0), 0, jnp.ones(4))
        work, state = sampler.PROGRAMS["begin"](tiny.CONFIG, options, params, asked)
        for name in ("gate", "up", "down", "query", "output"):
            assert not work.weights["blocks"][0][name].sharding.is_fully_replicated
        whole = state.slots.cache.keys[0]
        assert whole.sharding.shard_shape(whole.shape) == (whole.shape[0] // 4, whole.shape[1] // 2, *whole.shape[2:])
        lowered = sampler.PROGRAMS["serve"].lower(tiny.CONFIG, options, serve.Settings(1.0), work, state, 6)
        decode = lowered.compile(tiny.AS_FOR_USERS).as_text()
    gathered = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]\S* all-gather\(", decode)}
    assert gathered == {(2, 16)}  # the logits of two slots: parameters and prompts are gathered before, once


@pytest.mark.parametrize("slots", [3, 8, 19])
@pytest.mark.parametrize("mesh", [None, ((2, 2, 2), ("data", "fsdp", "model")), tiny.slow(((8,), ("data",)))])
def test_a_watcher_sees_every_rollout_once_and_changes_none(mesh, slots, monkeypatch):
    monkeypatch.setattr(serve, "FEWEST", 1)
    counts, seen, calls = [9, 0, 7, 3], {}, []

    def watch(rows, tokens, lengths, is_ready):
        for row, response, length in zip(rows.tolist(), tokens, lengths, strict=True):
            assert row not in seen
            seen[row] = response[:length].tolist()
        calls.append((len(rows), is_ready()))

    def run():
        if mesh is None:
            return sample(counts, num_rollouts=21, num_slots=slots, watch=watch)
        on = make_mesh(*mesh)
        with jax.set_mesh(on):
            axes = tree_sharding(on, policy.param_axes(tiny.CONFIG), jax.eval_shape(tiny.params))
            return rollout.generate(
                tiny.CONFIG, jax.device_put(tiny.params(), axes), jax.device_put(tiny.prompts(), named_sharding(on)),
                jnp.array(counts), jax.random.key(0), max_new_tokens=6, eos_ids=tiny.EOS, num_slots=slots,
                num_rollouts=21, watch=watch,
            )  # fmt: skip

    got, alone = run(), sample(counts, num_rollouts=21, num_slots=19)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, alone)
    np.testing.assert_array_equal(got.tokens, alone.tokens)
    expected = zip(np.asarray(alone.tokens), np.asarray(alone.lengths), strict=True)
    assert seen == {row: tokens[:length].tolist() for row, (tokens, length) in enumerate(expected) if row < 19}
    assert slots > 3 or sum(number > 0 for number, _ in calls) > 1


def test_a_process_without_the_first_copy_of_any_row_sees_none():
    shard = SimpleNamespace(replica_id=1, index=(slice(None),), data=np.ones(3, np.int32))
    rows, tokens, lengths = sampler._newly_ended(
        np.arange(3), np.zeros(3, bool), SimpleNamespace(shape=(3, 6), addressable_shards=[shard]), SimpleNamespace(addressable_shards=[shard])
    )  # fmt: skip
    assert (rows.shape, tokens.shape, lengths.shape) == ((0,), (0, 6), (0,))


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match=r"\[M\] = \[4\]"):
        sample([1, 2])
    with pytest.raises(ValueError, match="sum to 4"):
        sample([1, 1, 1, 1], num_rollouts=3)
    with pytest.raises(ValueError, match="num_slots"):
        sample([1, 1, 1, 1], num_slots=0)


def test_nucleus_sampling_draws_from_the_likeliest_tokens_only():
    logits = 5 * jnp.array(np.random.default_rng(1).normal(size=16), jnp.float32)
    probabilities = np.asarray(jax.nn.softmax(logits / 5), np.float64)
    order = np.argsort(-probabilities)
    kept = order[: np.searchsorted(np.cumsum(probabilities[order]), 0.7) + 1]
    expected = np.where(np.isin(np.arange(16), kept), probabilities, 0) / probabilities[kept].sum()
    token, logp, whole = draws(logits, 1 << 14, temperature=5.0, limits=(("top_p", 0.7),))
    drawn = np.bincount(token, minlength=16)
    assert 1 < len(kept) < 16
    assert (drawn[expected == 0] == 0).all()
    assert scipy.stats.chisquare(drawn[kept], expected[kept] * len(token)).pvalue > 1e-3
    np.testing.assert_allclose(logp, np.log(expected[np.asarray(token)]), atol=1e-4)
    np.testing.assert_allclose(whole, np.log(probabilities[np.asarray(token)]), atol=1e-4)
    assert (draws(logits, 64, temperature=5.0, limits=(("top_p", 1e-6),))[0] == order[0]).all()


def kept_by_sorting(logits, top_k, top_p, min_p):
    """Which tokens are left, by the definitions, one limit after the other; no two logits are equal."""
    left = np.argsort(-logits)
    left = left[: top_k or None]
    share = np.exp(logits[left] - logits.max())
    if top_p < 1:
        left = left[: np.searchsorted(np.cumsum(share) / share.sum(), top_p) + 1]
    return {int(token) for token in left if np.exp(logits[token] - logits.max()) >= min_p}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 3, 20, 50]), st.sampled_from([1e-6, 0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.05, 1.0]))  # fmt: skip
def test_limits_leave_what_sorting_leaves(seed, top_k, top_p, min_p):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=40) * rng.choice([0.1, 3, 100]) + rng.choice([-50, 0, 50])).astype(np.float32)
    bound = least_logit(jnp.array(logits)[None], top_k=top_k, top_p=top_p, min_p=min_p)[0, 0]
    assert set(np.flatnonzero(logits >= bound).tolist()) == kept_by_sorting(
        logits.astype(np.float64), top_k, top_p, min_p
    )


def test_a_learner_computes_the_log_probabilities_of_the_whole_distribution():
    got = sample([4, 4, 4, 4], top_k=5, top_p=0.8, min_p=0.1, temperature=1.3)
    prompts = tiny.prompts()
    real = np.arange(6) < np.asarray(got.lengths)[:, None]
    tokens = jnp.concatenate([prompts.tokens[got.prompt_index], got.tokens], axis=1)
    mask = jnp.concatenate([prompts.mask[got.prompt_index], jnp.array(real)], axis=1)
    logps = policy.token_logps(tiny.CONFIG, tiny.params(), tokens, mask, start=5, temperature=1.3)
    np.testing.assert_allclose(np.asarray(got.policy_logps)[real], np.asarray(logps)[real], atol=1e-4)
    assert (np.asarray(got.logps) >= np.asarray(got.policy_logps) - 1e-6).all()
    assert float((got.logps - got.policy_logps).max()) > 0.1


@pytest.mark.parametrize("limit", [{"top_k": -1}, {"min_p": 1.5}])
def test_impossible_limits_are_refused(limit):
    with pytest.raises(ValueError, match="top_k must be"):
        sample([1, 1, 1, 1], **limit)


def test_slots_fit_in_memory():
    mesh = make_mesh((4, 2), ("data", "model"))
    each = slot_bytes(tiny.CONFIG, 100)
    assert each == 2 * 2 * 2 * 4 * 100 * 4  # keys and values, layers, heads, their size, tokens, bytes
    assert slots_in_memory(tiny.CONFIG, 100, 3.5 * each / 2 / 1e9, mesh) == 12  # a device holds half of a slot's heads
    assert slots_in_memory(tiny.CONFIG, 100, 1e-12, mesh) == 4


def test_top_p_reaches_the_sampler():
    likeliest = sample([2, 2, 2, 2], temperature=0.0)
    np.testing.assert_array_equal(sample([2, 2, 2, 2], top_p=1e-6).tokens, likeliest.tokens)
    with pytest.raises(ValueError, match="top_p"):
        sample([1, 1, 1, 1], top_p=0.0)
