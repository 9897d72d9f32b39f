"""Rollouts in rows: every token once, prompts shared, and scores and gradients as if each rollout were alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from krl import policy
from krl.base.sharding import make_mesh
from krl.base.types import Rollouts, Segments
from krl.learn.pack import fill_columns, pack, place_rollouts, rollout_tokens, row_shape, rows_at_once
from krl.policy.attention import attend_rows, has_branches
from tests import tiny

GEMMA = dataclasses.replace(
    tiny.CONFIG, sliding=(True, False), window=3, attention_softcap=5.0, logit_softcap=4.0, qk_norm=True,
    norm_plus_one=True, post_norms=True, embedding_scale=2.0, sliding_rope_theta=100.0,
)  # fmt: skip


def fewest_rows(lengths, left=()):
    """The fewest rows of 9 columns that hold all lengths, by trying everything; `left` is the room in those begun."""
    if not lengths:
        return len(left)
    first, *rest = lengths
    rows = [fewest_rows(rest, (*left, 9 - first))]
    for row in {room: row for row, room in enumerate(left) if room >= first}.values():  # equal rooms are the same
        rows.append(fewest_rows(rest, (*left[:row], left[row] - first, *left[row + 1 :])))
    return min(rows)


@pytest.mark.parametrize(
    "lengths", [[9] * 7, [1] * 7, [0] * 7, [5, 4, 0, 9, 3, 3, 3], [6, 6, 6, 6, 6, 6, 3], [4, 4, 3, 3, 2, 2, 0]]
)
def test_rollouts_of_prompts_of_their_own_are_packed_tightly(lengths):
    asked = jnp.array([length // 2 for length in lengths])
    place, rows = pack(jnp.arange(7), asked, jnp.array(lengths) - asked, num_groups=7, num_rows=8, row_tokens=9)
    held = place.rollout[place.rollout >= 0].tolist()
    assert {*zip(held, place.position[place.rollout >= 0].tolist(), strict=True)} == {
        (rollout, at) for rollout, length in enumerate(lengths) for at in range(length)
    }
    assert len(held) == sum(lengths)
    assert (place.rollout[:rows] >= 0).any(axis=1).all()
    assert (place.rollout[rows:] < 0).all()
    assert rows <= 11 / 9 * fewest_rows([n for n in lengths if n]) + 6 / 9  # Dosa 2007
    for row in np.asarray(place.rollout):  # a rollout lies together
        changes = [r for r, before in zip(row, [-2, *row[:-1]], strict=True) if r != before]
        assert len(changes) == len(set(changes))


@pytest.mark.parametrize("seed", range(6))
def test_shared_rows_hold_every_response_once_behind_its_prompt(seed):
    rng = np.random.default_rng(seed)
    counts = rng.permutation([93, 1, 2, 2, 5, 17])
    group = rng.permutation(np.repeat(np.arange(6), counts))
    prompts, answered = rng.integers(0 if seed % 2 else 1, 9, 6), rng.integers(0, 7, len(group))
    columns, rows = 40, len(group)
    place, used = pack(
        jnp.asarray(group), jnp.asarray(prompts)[group], jnp.asarray(answered), num_groups=6, num_rows=rows,
        row_tokens=columns,
    )  # fmt: skip
    taken, seen = np.zeros(rows, int), []
    for row in range(int(used)):
        at = 0
        while at < columns and place.rollout[row, at] >= 0:
            leader = int(place.leader[row, at])
            asked = prompts[group[leader]]
            assert place.position[row, at : at + asked].tolist() == list(range(asked))
            assert (place.rollout[row, at : at + asked] == leader).all()
            at += asked
            while at < columns and place.leader[row, at] == leader and place.rollout[row, at] >= 0:
                rollout = int(place.rollout[row, at])
                end = at + answered[rollout]
                assert group[rollout] == group[leader]
                assert place.position[row, at:end].tolist() == list(range(asked, asked + answered[rollout]))
                assert (place.rollout[row, at:end] == rollout).all()
                seen.append(rollout)
                at = end
        assert (place.rollout[row, at:] < 0).all()
        taken[row] = at
    assert sorted(seen) == np.flatnonzero(answered).tolist()
    assert (place.rollout[used:] < 0).all()
    pairs = taken[:used, None] + taken[None, :used]
    assert (pairs[~np.eye(int(used), dtype=bool)] > columns).all()
    whole = (prompts[group] + answered)[answered > 0].sum()
    assert used <= 2 * whole // columns + 1
    if seed % 2 == 0:
        assert taken.sum() < 0.7 * whole


def test_gradients_of_responses_are_summed_in_float32():
    """A prompt's last token predicts the first of many responses; sums in bfloat16 stop growing at 256."""
    config, count = dataclasses.replace(tiny.CONFIG, dtype="bfloat16"), 600
    prompt = jnp.array([[5, 6, 7]])
    numbers = jnp.ones((1, 3 + count), jnp.int32)
    branch = jnp.concatenate([jnp.zeros((1, 3), jnp.int32), 1 + jnp.arange(count)[None]], axis=1)
    segments = Segments(numbers, branch, jnp.where(branch > 0, 3, jnp.arange(3 + count)))
    tokens = jnp.concatenate([prompt, jnp.full((1, count), 9)], axis=1)

    def together(params):
        return policy.token_logps(config, params, tokens, segments=segments)[:, 2:].mean()

    def alone(params):
        return policy.token_logps(config, params, tokens[:, :4])[:, 2].mean()

    params = tiny.params()
    for mine, other in zip(*(jax.tree.leaves(jax.grad(loss)(params)) for loss in (together, alone)), strict=True):
        np.testing.assert_allclose(mine, other, atol=0.03 * max(0.1, float(jnp.abs(other).max())))


def test_a_group_that_fits_into_a_row_has_its_prompt_once():
    place, used = pack(
        jnp.zeros(8, int), jnp.full(8, 5), jnp.arange(8), num_groups=1, num_rows=8, row_tokens=5 + sum(range(8))
    )
    assert int(used) == 1
    assert (place.rollout[0] >= 0).all()
    assert place.leader[0].tolist() == [7] * 33


def alone(config, params, prompts, rollouts):
    """The log-probabilities of responses, [R, T], each rollout in a row of its own."""
    source = jnp.minimum(rollouts.prompt_index, len(prompts.task_ids) - 1)
    real = jnp.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    tokens = jnp.concatenate([prompts.tokens[source], rollouts.tokens], axis=1)
    mask = jnp.concatenate([prompts.mask[source], real], axis=1)
    return policy.token_logps(config, params, tokens, mask)[:, prompts.tokens.shape[1] - 1 :]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.slow(GEMMA)], ids=["llama", "gemma"])
@pytest.mark.parametrize(
    "counts", [(93, 0, 1, 2), *map(tiny.slow, [(1, 1, 1, 1), (2, 0, 0, 0), (5, 3, 4, 2)])], ids=str
)
def test_scores_and_gradients_are_those_of_rollouts_alone(config, counts):
    config = dataclasses.replace(config, dtype="float64")
    prompts, params = tiny.prompts(), tiny.params(1, config)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    index = np.repeat([0, 1, 2, 3, 4], [*counts, 2])  # two rows of padding
    rollouts: Rollouts = tiny.rollouts(np.random.default_rng(0).permutation(index))
    num, length = rollouts.tokens.shape
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(num, length)))
    real = rollouts.mask[:, None] & (jnp.arange(length) < rollouts.lengths[:, None])
    everyone = jnp.arange(num)[None]
    place, rows, _ = place_rollouts(prompts, rollouts, rollouts.mask, everyone, 64, packed=True, shared=True)
    place = jax.tree.map(lambda leaf: leaf[0, : int(rows[0])], place)
    columns = fill_columns(place, prompts, rollouts, weights[:, 0])

    def separate(params):
        logps = alone(config, params, prompts, rollouts)
        return jnp.where(real, logps * weights, 0.0).sum(), logps

    def together(params):
        logps = policy.token_logps(config, params, columns.tokens, segments=columns.segments, wanted=columns.response)
        which, time = place.rollout[:, 1:], place.position[:, 1:] - prompts.mask.sum(axis=1)[
            jnp.minimum(rollouts.prompt_index, 3)][place.rollout[:, 1:]]  # fmt: skip
        answers = columns.response[:, 1:]
        where = jnp.where(answers, which, num), time
        found = jnp.zeros((num, length)).at[where].set(logps, mode="drop")
        return jnp.where(real, found * weights, 0.0).sum(), found

    (_, expected), gradient = jax.jit(jax.value_and_grad(separate, has_aux=True))(params)
    (_, got), same = jax.jit(jax.value_and_grad(together, has_aux=True))(params)
    np.testing.assert_allclose(jnp.where(real, got, 0), jnp.where(real, expected, 0), atol=1e-10)
    for mine, other in zip(jax.tree.leaves(same), jax.tree.leaves(gradient), strict=True):
        assert mine.dtype == jnp.float64
        np.testing.assert_allclose(mine, other, atol=1e-9)
    computed, apart = int((place.rollout >= 0).sum()), float(rollout_tokens(prompts, rollouts, rollouts.mask))
    assert computed == apart if max(counts) == 1 else computed < apart
    if max(counts) > 90:
        assert computed < 0.62 * apart


def test_rows_are_as_wide_as_micro_batches_and_attention_allow():
    assert row_shape(48, 12, 1024, 128, shared=True) == (96, 128, 8)  # 48 + 4 * 12 columns, of which 32 rows may do
    assert row_shape(48, 12, 1024, 16, shared=True) == (96, 16, 4)  # no micro-batch of rows that sharing leaves empty
    assert row_shape(48, 12, 90, 128, shared=True)[0] == 90
    assert row_shape(48, 12, 40, 128, shared=True)[0] == 60
    assert row_shape(128, 160, 4608, 128, shared=True)[0] == 512
    assert row_shape(512, 4096, 65536, 128, shared=True)[0] == 4608
    assert row_shape(48, 12, 1024, 128, shared=False) == (60, 128, 16)


def test_micro_batches_are_as_few_as_fit_and_equally_large():
    assert [rows_at_once(2048, 366, rows) for rows in (1, 4, 5, 6, 16, 17)] == [1, 4, 5, 3, 4, 5]
    assert rows_at_once(100, 366, 16) == 1
    with jax.set_mesh(make_mesh((8,), ("data",))):
        assert [rows_at_once(8 * 2048, 366, rows) for rows in (1, 8 * 16 - 3, 8 * 16)] == [8, 32, 32]


def test_branches_need_a_kernel_that_has_them(monkeypatch):
    assert has_branches("xla", 128, 128)
    assert has_branches("auto", 128, 128)
    assert not has_branches("splash", 128, 128)
    assert not has_branches("cudnn", 128, 128)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not has_branches("auto", 128, 128)
    assert has_branches("auto", 128, 64)  # which splash does not take
    assert has_branches("auto", 100, 128)
    heads, number = jnp.zeros((1, 128, 1, 128)), jnp.zeros((1, 128), jnp.int32)
    with pytest.raises(ValueError, match="share"):
        attend_rows(heads, heads, heads, Segments(number, number, number), kernel="splash", scale=1.0)
