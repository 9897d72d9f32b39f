"""Supervised fine-tuning: packed rows equal separate ones, and nothing that interrupts a training changes it."""

import functools
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krl import policy
from krl.base.sharding import make_mesh, named_sharding, tree_sharding
from krl.configs import arithmetic
from krl.hf.tokenizer import load_tokenizer, train_sentencepiece
from krl.run import learner, lock, setup
from krl.run import start as run_start
from krl.run.compiled import for_this_backend
from krl.run.optimizer import init_state, make_optimizer
from krl.run.sft import encode_pairs, finetune, pack_pairs
from krl.run.update import supervised_update
from krl.tasks import EncodedTasks, TaskSet
from tests import tiny
from tests.command_line import TINY

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 24


class Letters:
    """A tokenizer of one token a letter: "d" is 3, "e" is 4 and so on."""

    pad_id, eos_ids = 0, (1, 2)

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]


LETTERS: Any = Letters()  # what a prompt's template needs is left out


def tasks_of(*pairs: tuple[str, str]) -> EncodedTasks:
    """Encoded (prompt, completion) texts."""
    prompts, completions = zip(*pairs, strict=True)
    width = max(map(len, prompts))
    mask = np.array([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts], bool)
    tokens = np.array([[0] * (width - len(prompt)) + LETTERS.encode(prompt) for prompt in prompts], np.int32)
    return EncodedTasks(tokens, mask, TaskSet(prompts, ("",) * len(prompts), completions), dropped=0)


def random_tasks(count: int, seed: int = 0) -> EncodedTasks:
    rng = np.random.default_rng(seed)

    def text(least):
        return "".join(rng.choice(list("defghijklmnop"), rng.integers(least, 6)))

    return tasks_of(*((text(1), text(0)) for _ in range(count)))


TASKS = random_tasks(12)


def test_unpacked_pairs_mark_the_completion_and_leave_long_ones_out():
    encoded = tasks_of(("d", "fg"), ("e", "fgh"))
    tokens, mask, target = encode_pairs(encoded, LETTERS, 3)
    assert tokens.tolist() == [[3, 5, 6, 1]]
    assert mask.tolist() == [[True, True, True, True]]
    assert target.tolist() == [[False, True, True, True]]
    with pytest.raises(ValueError, match="max_new_tokens"):
        encode_pairs(encoded, LETTERS, 2)


def test_packed_pairs_by_hand():
    """Lengths 4, 7, 3, 9 and 4 into rows of 8: 7 alone, 4 with 4, then 3, and 9 is too long."""
    encoded = tasks_of(("de", "f"), ("ggg", "hhh"), ("i", "j"), ("kkkk", "kkkk"), ("d", "ee"))
    (tokens, segments, target), left_out = pack_pairs(encoded, LETTERS, 8)
    assert tokens.tolist() == [[6, 6, 6, 7, 7, 7, 1, 0], [3, 4, 5, 1, 3, 4, 4, 1], [8, 9, 1, 0, 0, 0, 0, 0]]
    assert segments.tolist() == [[1] * 7 + [0], [1] * 4 + [2] * 4, [1] * 3 + [0] * 5]
    assert target.astype(int).tolist() == [[0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert (tokens.dtype, segments.dtype, target.dtype) == (np.int32, np.int32, bool)
    assert left_out == 1


def test_nothing_predicts_the_first_token_of_a_pair_without_a_prompt():
    encoded = tasks_of(("d", "e"), ("", "fg"), ("", ""))
    (tokens, segments, target), left_out = pack_pairs(encoded, LETTERS, 6)
    assert tokens.tolist() == [[3, 4, 1, 5, 6, 1]]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert target.astype(int).tolist() == [[0, 1, 1, 0, 1, 1]]
    assert left_out == 1


def test_pairs_that_cannot_be_learnt_from_are_refused():
    with pytest.raises(ValueError, match=r"2 to 4 tokens \(the shortest has 5\)"):
        pack_pairs(tasks_of(("dd", "ee")), LETTERS, 4)
    without = EncodedTasks(TASKS.tokens, TASKS.mask, TaskSet(("d",) * 12, ("",) * 12), dropped=0)
    for prepare in (encode_pairs, pack_pairs):
        with pytest.raises(ValueError, match="a worked solution of every task"):
            prepare(without, LETTERS, 8)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text("def", max_size=9), st.text("def", max_size=9)), min_size=1), st.integers(2, 25))
def test_every_pair_that_fits_is_in_one_row_and_no_two_rows_would_fit_in_one(pairs, row_tokens):
    whole = [(*LETTERS.encode(prompt + completion), 1) for prompt, completion in pairs]
    fitting = sorted(ids for ids in whole if 2 <= len(ids) <= row_tokens)
    if not fitting:
        return
    (tokens, segments, target), left_out = pack_pairs(tasks_of(*pairs), LETTERS, row_tokens)
    found = []
    for row, numbers in zip(tokens, segments, strict=True):
        assert (np.diff(numbers[numbers > 0]) >= 0).all()
        assert (row[numbers == 0] == 0).all()
        found += [tuple(row[numbers == number].tolist()) for number in range(1, numbers.max() + 1)]
    assert sorted(found) == fitting
    assert left_out == len(pairs) - len(fitting)
    assert target.sum() == sum(
        len(completion) + bool(prompt) for (prompt, completion), ids in zip(pairs, whole, strict=True) if ids in fitting
    )
    used = (segments > 0).sum(axis=1)
    assert all(a + b > row_tokens for a, b in itertools.combinations(used.tolist(), 2))


def test_rows_of_a_few_pairs_are_nearly_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.0, 0.4, 2000), 2, 60).astype(int)
    (_, segments, _), left_out = pack_pairs(tasks_of(*(("d", "e" * (n - 2)) for n in lengths)), LETTERS, 64)
    assert left_out == 0
    assert (segments > 0).mean() > 0.97


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def plain(params):
    """((loss of the completions, loss of whole pairs), gradient of the first), each pair of TASKS in its own row."""
    pairs = list(zip(TASKS.tasks.prompts, TASKS.tasks.completions, strict=True))
    rows = [[*LETTERS.encode(prompt + completion), 1] for prompt, completion in pairs]
    tokens = jnp.array([row + [0] * (11 - len(row)) for row in rows])
    logits = policy.apply(tiny.CONFIG, params, tokens)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    def mean(begins):
        return jnp.concatenate([losses[i, begins[i] : len(row) - 1] for i, row in enumerate(rows)]).mean()

    return mean([len(prompt) - 1 for prompt, _ in pairs]), mean([0] * len(pairs))


GRADIENT = optax.sgd(1.0)  # what it takes from the parameters is the gradient


def update(batch, micro_tokens=1000):
    state = init_state(tiny.CONFIG, GRADIENT, tiny.params())
    return supervised_update(tiny.CONFIG, GRADIENT, state, *map(jnp.asarray, batch), micro_tokens=micro_tokens)


@pytest.mark.parametrize("batch", [encode_pairs(TASKS, LETTERS, 6), pack_pairs(TASKS, LETTERS, 24)[0]])
def test_either_layout_gives_the_token_mean_over_the_pairs_and_its_gradient(batch):
    (loss, whole), expected = plain(tiny.params())
    state, metrics = update(batch)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(expected)), rel=1e-5)
    grads = jax.tree.map(jnp.subtract, tiny.params(), state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, expected)

    # Padding and first tokens are never learnt, whatever the target mask says.
    tokens, layout, target = batch
    _, metrics = update((tokens, layout, np.ones_like(target)))
    assert float(metrics["loss"]) == pytest.approx(float(whole), rel=1e-5)


def test_packing_takes_fewer_rows():
    assert len(encode_pairs(TASKS, LETTERS, 6)[0]) == 12
    assert len(pack_pairs(TASKS, LETTERS, 24)[0][0]) < 6


def test_eight_devices_equal_one():
    (loss, _), grads = plain(tiny.params())
    tokens, segments, target = pack_pairs(TASKS, LETTERS, 24)[0]
    fill = ((0, -len(tokens) % 4), (0, 0))
    mesh = make_mesh((4, 2), ("fsdp", "model"))
    shardings = tree_sharding(mesh, policy.param_axes(tiny.CONFIG), jax.eval_shape(tiny.params))
    with jax.set_mesh(mesh):
        params = jax.device_put(tiny.params(), shardings)
        batch = [jax.device_put(np.pad(part, fill), named_sharding(mesh)) for part in (tokens, segments, target)]
        state = init_state(tiny.CONFIG, GRADIENT, params)
        _, metrics = supervised_update(tiny.CONFIG, GRADIENT, state, *batch, micro_tokens=1)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)


OPTIMIZER = make_optimizer(
    learning_rate=0.01, warmup_steps=4, decay_steps=STEPS - 4, beta1=0.9, beta2=0.98, weight_decay=0.01, grad_clip=1.0
)


def train(directory, *, params=None, stop=None, place=jnp.asarray, report=lambda step, loss: None, **changes):
    options: dict[str, Any] = {
        "steps": STEPS, "batch_size": 2, "micro_tokens": 1000, "seed": 0,
        "save_every": 5, "max_bad_updates": 2, "pairs": pack_pairs(TASKS, LETTERS, 16)[0],
    }  # fmt: skip
    return finetune(
        tiny.CONFIG,
        OPTIMIZER,
        tiny.params() if params is None else params,
        directory=directory,
        **(options | changes),
        should_stop=(stop or threading.Event()).is_set,
        place=place,
        report=report,
    )


class Updates:
    """Places batches and calls a function before the batch of one update; remembers what was placed."""

    def __init__(self, update=-1, act=None):
        self.placed, self._update, self._act = [], update, act

    def __call__(self, part):
        if len(self.placed) == 3 * self._update:
            self._act()
        self.placed.append(part)
        return jnp.asarray(part)

    @property
    def begun(self):
        return len(self.placed) // 3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Params after all updates."""
    params, finished = train(tmp_path_factory.mktemp("whole"))
    assert finished
    return params


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_pairs_are_learnt_in_either_layout(tmp_path, uninterrupted):
    unpacked, _ = train(tmp_path, pairs=encode_pairs(TASKS, LETTERS, 6))
    (before, _), _ = plain(tiny.params())
    for params in (uninterrupted, unpacked):
        (after, _), _ = plain(params)
        assert after < 0.8 * before


def test_a_stopped_training_continues_as_if_it_had_not_stopped(tmp_path, uninterrupted):
    stop = threading.Event()
    _, finished = train(tmp_path, stop=stop, place=Updates(6, stop.set))
    assert not finished
    rest = Updates()
    params, finished = train(tmp_path, place=rest)
    assert finished
    assert rest.begun == STEPS - 7  # the update that was under way is kept, though no period ended there
    assert_equal(params, uninterrupted)
    again = Updates()
    params, finished = train(tmp_path, place=again)
    assert (finished, again.begun) == (True, 0)
    assert_equal(params, uninterrupted)


def test_a_training_that_fails_continues_from_its_last_period(tmp_path, uninterrupted):
    def fail():
        raise OSError("the host is gone")

    with pytest.raises(OSError, match="gone"):
        train(tmp_path, place=Updates(13, fail))
    rest = Updates()
    params, finished = train(tmp_path, place=rest)
    assert finished
    assert rest.begun == STEPS - 10
    assert_equal(params, uninterrupted)


KILLED = """
import os, pathlib, signal, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from tests.test_sft import Updates, train

def kill():
    while not (pathlib.Path(sys.argv[1]) / "10").exists():  # written in the background
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

train(pathlib.Path(sys.argv[1]), place=Updates(13, kill))
"""


def test_a_killed_training_loses_the_updates_of_one_period(tmp_path, uninterrupted):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    rest = Updates()
    params, finished = train(tmp_path, place=rest)
    assert finished
    assert rest.begun == STEPS - 10
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, uninterrupted)


def test_each_pass_takes_every_row_once_in_another_order_without_a_new_compilation(tmp_path):
    compiles: Any = for_this_backend(supervised_update, tiny.CONFIG, OPTIMIZER, micro_tokens=1000)
    updates, reported = Updates(), []
    tokens, _, _ = pack_pairs(TASKS, LETTERS, 16)[0]
    each = len(tokens) // 2  # updates in a pass
    train(tmp_path / "first", steps=1)
    compiled = compiles._cache_size()
    assert compiled
    train(tmp_path / "second", steps=2 * each, place=updates, report=lambda step, loss: reported.append((step, loss)))
    assert compiles._cache_size() == compiled
    seen = [row.tolist() for part in updates.placed[::3] for row in part]
    passes = seen[: 2 * each], seen[2 * each :]
    for one in passes:
        assert len({tuple(row) for row in one}) == 2 * each
    assert passes[0] != passes[1]
    assert [step for step, _ in reported] == list(range(1, 2 * each + 1))
    assert all(0 < loss < 10 for _, loss in reported)


def test_a_batch_takes_no_more_rows_than_there_are(tmp_path):
    def refuse(part):
        raise LookupError(f"{len(part)} rows")

    rows = len(pack_pairs(TASKS, LETTERS, 16)[0][0])
    with pytest.raises(LookupError, match=f"^{rows} rows"):
        train(tmp_path, batch_size=100, place=refuse)


def test_updates_that_are_not_finite_end_the_training(tmp_path):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, tiny.params())
    with pytest.raises(FloatingPointError, match="2 updates in a row were not finite; lower"):
        train(tmp_path, params=broken)


# ---------------------------------------------------------------- the cache of several runs


def set_up_here(place, **changes):
    config = arithmetic.get_config()
    config.update_from_flattened_dict(
        TINY | {
            "data.source": "dataset", "data.path": str(place / "sums.jsonl"), "data.prompt_field": "q", "data.answer_field": "a",
            "data.completion_field": "a", "sft.dir": str(place / "sft"), "eval.prompts": 4,
        } | changes
    )  # fmt: skip
    workdir = place / f"work{len(list(place.glob('work*')))}"
    return setup.set_up(config, workdir), config, workdir


def write_sums(place, rows):
    lines = [json.dumps({"q": question, "a": answer}) for question, answer in rows]
    (place / "sums.jsonl").write_text("\n".join(lines) + "\n")


SUMS = [(f"{i}+{i}", str(2 * i)) for i in range(20)]


def test_a_fine_tuned_policy_belongs_to_what_the_files_held(tmp_path):
    write_sums(tmp_path, SUMS)
    first, config, workdir = set_up_here(tmp_path)
    model = first.tokenizer.files[0]
    assert setup.set_up(config, workdir).cache == first.cache  # the run that continues
    os.utime(tmp_path / "sums.jsonl", (1, 1))
    second, _, _ = set_up_here(tmp_path)
    assert (second.cache, second.tokenizer.files[0]) == (first.cache, model)
    others = {
        "the same texts in another order": SUMS[::-1],
        "one other solution of the same length": [("0+0", "1"), *SUMS[1:]],
        "another letter": [("0-0", "0"), *SUMS[1:]],
    }
    caches = {first.cache}
    for rows in others.values():
        write_sums(tmp_path, rows)
        parts, _, _ = set_up_here(tmp_path)
        caches.add(parts.cache)
        assert parts.tokenizer.files[0] != model
    assert len(caches) == 1 + len(others)
    write_sums(tmp_path, SUMS)
    assert set_up_here(tmp_path)[0].cache == first.cache
    for changes in ({"seed": 1}, {"policy.mlp_size": 8}, {"sft.learning_rate": 1e-3}, {"data.template": "Q: {prompt}", "data.max_prompt_tokens": 20}):  # fmt: skip
        assert set_up_here(tmp_path, **changes)[0].cache not in caches
    for changes in ({"sft.save_every": 7}, {"policy.unroll": 2}, {"steps": 9}):
        assert set_up_here(tmp_path, **changes)[0].cache == first.cache


def test_a_checkpoint_is_told_from_another_by_all_its_bytes(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = np.zeros(3 << 20, np.uint8)
    found = []
    for value in (0, 1, 0):
        weights[len(weights) // 2] = value
        (tmp_path / "model.safetensors").write_bytes(weights.tobytes())
        found.append(run_start.fingerprint(tmp_path))
    assert found[0] == found[2] != found[1]


def test_of_runs_that_share_a_cache_one_fine_tunes_and_the_others_wait(tmp_path, monkeypatch, capsys):
    """The second sees what the first has written, whole, and takes no update of its own."""
    write_sums(tmp_path, SUMS)
    parts, config, _ = set_up_here(tmp_path)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    begun, release, updates = threading.Event(), threading.Event(), []

    def fake(policy_config, optimizer, params, pairs, directory, *, steps, **options):
        done = directory / "done"
        if not done.exists():
            updates.append(steps)
            begun.set()
            release.wait(60)
            done.touch()
        return params, True

    monkeypatch.setattr(learner, "finetune", fake)

    def start(should_stop=lambda: False):
        with jax.set_mesh(parts.mesh):
            return learner.start_params(config, parts, should_stop)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(start)
        assert begun.wait(60)
        assert pool.submit(start, lambda: True).result() is None  # a signal came while it waited
        second = pool.submit(start)
        release.set()
        assert first.result() is not None
        assert second.result() is not None
    assert updates == [config.sft.steps]
    said = capsys.readouterr().out
    assert f"krl: waiting for process {os.getpid()} on " in said
    assert f", which has the fine-tuning in {parts.cache}" in said
    assert [path.name for path in tmp_path.glob("sft/*.running*")] == []


def test_runs_that_train_one_tokenizer_at_the_same_time_get_it_whole(tmp_path):
    texts, file = ["abc def", "abc"] * 50, tmp_path / "tokenizer.model"
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(train_sentencepiece, texts, file, vocab_size=20, byte_fallback=False) for _ in range(8)]
    assert [one.exception() for one in made] == [None] * 8
    assert load_tokenizer(file).decode(load_tokenizer(file).encode("abc def")) == "abc def"
    assert list(tmp_path.iterdir()) == [file]
