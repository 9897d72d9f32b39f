"""Files of samples, made by a fake sampler, that go on after a kill."""

import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from krl.eval.resume import evaluate_set
from krl.tasks import EncodedTasks, TaskSet
from tests.fake import TOKENIZER, answer_key, make_sampler, response, reward, score, tasks


def run(path, size=5, samples=3, num_rollouts=6, calls=None, sampler=None, given=None, encoded=None, **options):
    calls = [] if calls is None else calls
    return evaluate_set(
        "fake", sampler or make_sampler(calls, num_rollouts), options.pop("scorer", score), {}, encoded or tasks(size), jax.random.key(0),
        tokenizer=TOKENIZER, answer_key=answer_key, samples=samples, num_rollouts=num_rollouts, place=lambda x: x,
        path=path, settings={"temperature": 0.6, "checkpoint": "step 3"} if given is None else given, **options,
    )  # fmt: skip


def rows_of(path):
    """The rows of a file without its header."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[1:-1]]


@pytest.mark.parametrize(
    ("size", "samples", "num_rollouts"),
    [(5, 3, 6), (5, 3, 7), (2, 3, 12), (1, 1, 1), (1, 1, 8), (4, 1, 3), (3, 5, 2), (3, 4, 4), (2, 5, 1)],
)
def test_every_sample_of_every_task_is_a_row(tmp_path, size, samples, num_rollouts):
    """Sets smaller than a call, one sample, one task, a last batch that is not full, and k above R."""
    calls: list = []
    got = run(tmp_path / "deep" / "fake.jsonl", size, samples, num_rollouts, calls)
    expected, encoded = [], tasks(size)
    for task in range(size):
        for number in range(samples):
            text, finished = response(task, number)
            gold = encoded.tasks.answers[task]
            expected.append(
                {
                    "set": "fake", "task": task, "sample": number, "response": text, "key": answer_key(text),
                    "answer": gold if isinstance(gold, str) else list(gold),
                    "reward": reward(f"question {task}", text, gold), "length": len(text), "finished": finished,
                }
            )  # fmt: skip
    rows = rows_of(tmp_path / "deep" / "fake.jsonl")
    faults = [row.pop("faults") for row in rows]
    assert rows == expected
    assert sum(x["errors"] for x in faults if x) == size * samples
    assert got["faults"] == {
        "timeouts": sum("é" in row["response"] for row in rows), "crashes": 0, "errors": size * samples
    }  # fmt: skip
    assert (got["tasks"], got["samples"]) == (size, samples)
    assert got[f"avg@{samples}"]["value"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert got["response_length"] == pytest.approx(np.mean([row["length"] for row in rows]))
    assert got["truncation_rate"] == pytest.approx(np.mean([not row["finished"] for row in rows]))
    groups = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    solved = [any(row["reward"] == 1.0 for row in group) for group in groups]
    assert got[f"pass@{samples}"]["value"] == pytest.approx(np.mean(solved))
    assert sum(n for call in calls for _, n in call) == size * samples
    assert max(sum(n for _, n in call) for call in calls) <= num_rollouts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes and the result of a run that nothing stopped."""
    path = tmp_path_factory.mktemp("whole") / "fake.jsonl"
    result = run(path)
    return path.read_bytes(), result


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_run_killed_at_any_byte_goes_on_as_if_nothing_had_happened(tmp_path, whole, data):
    content, result = whole
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    near = st.sampled_from([e + shift for e in ends for shift in (-1, 0, 1) if e + shift <= len(content)])
    point = data.draw(st.integers(0, len(content)) | near)
    calls: list = []
    path = tmp_path / "fake.jsonl"
    path.write_bytes(content[:point])
    assert run(path, calls=calls) == result
    assert path.read_bytes() == content
    # batches of 2 tasks with 3 samples each, after the header: lines 0, 6, 12 and 15 end them
    done = sum(point >= ends[line] for line in (6, 12, 15))
    assert [task for call in calls for task, _ in call] == list(range(min(2 * done, 5), 5))


def test_a_run_may_go_on_with_calls_of_another_size(tmp_path, whole):
    content, result = whole
    path = tmp_path / "fake.jsonl"
    for num_rollouts in (2, 3, 15, 40):
        path.write_bytes(content[: content.index(b"\n", len(content) // 2)])
        assert run(path, num_rollouts=num_rollouts) == result
        strip = lambda rows: [{**row, "faults": None} for row in rows]  # noqa: E731
        lines = [json.loads(line) for line in content.split(b"\n")[1:-1]]
        assert strip(rows_of(path)) == strip(lines)


def test_a_run_that_fails_between_batches_keeps_what_it_has(tmp_path, whole):
    content, result = whole
    calls: list = []
    path = tmp_path / "fake.jsonl"

    def failing(items):
        if len(calls) == 3:
            raise RuntimeError("the verifiers are gone")
        return score(items)

    with pytest.raises(RuntimeError, match="gone"):
        run(path, calls=calls, scorer=failing)
    assert len(rows_of(path)) == 12
    done = []
    assert run(path, report=lambda tasks, text: done.append(tasks)) == result
    assert done == [4, 5]
    assert path.read_bytes() == content
    assert run(path, sampler=lambda *_, **__: pytest.fail("nothing is left to sample")) == result


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"{\n", b"\xff\n", b""])
def test_what_follows_a_damaged_or_missing_row_is_sampled_again(tmp_path, whole, damage):
    content, result = whole
    lines = content.splitlines(keepends=True)
    calls: list = []
    path = tmp_path / "fake.jsonl"
    path.write_bytes(b"".join([*lines[:8], damage, *lines[9:]]))
    assert run(path, calls=calls) == result
    assert path.read_bytes() == content
    assert [task for call in calls for task, _ in call] == [2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"given": {"temperature": 1.0, "checkpoint": "step 3"}}, r"with temperature=0.6, now temperature=1.0;"),
        ({"given": {"temperature": 0.6}}, "with checkpoint='step 3', now no checkpoint;"),
        ({"given": {"temperature": 0.6, "checkpoint": "step 3", "top_p": 0.9}}, "with no top_p, now top_p=0.9;"),
        ({"samples": 2}, "with samples=3, now samples=2;"),
        ({"size": 4}, "with tasks='5 with digest .*', now tasks='4 with digest"),
        ({"given": {"temperature": 0.7, "checkpoint": "step 4"}}, "checkpoint='step 3'.*; temperature=0.6, now"),
    ],
)
def test_a_file_of_other_settings_is_refused(tmp_path, whole, changes, message):
    path = tmp_path / "fake.jsonl"
    path.write_bytes(whole[0])
    with pytest.raises(ValueError, match=message) as error:
        run(path, **changes)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == whole[0]


def test_changed_tasks_are_other_settings_and_padding_is_not(tmp_path, whole):
    path = tmp_path / "fake.jsonl"
    path.write_bytes(whole[0])
    old = tasks(5)
    tokens, mask = (np.pad(x, ((0, 0), (2, 0))) for x in (old.tokens, old.mask))
    assert run(path, encoded=EncodedTasks(tokens, mask, old.tasks, dropped=0)) == whole[1]
    answers = TaskSet(old.tasks.prompts, (*old.tasks.answers[:4], "7"))
    for other in (
        EncodedTasks(old.tokens, old.mask, answers, dropped=0),
        EncodedTasks(old.tokens + old.mask, old.mask, old.tasks, dropped=0),
    ):
        with pytest.raises(ValueError, match="tasks='5 with digest"):
            run(path, encoded=other)


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"set": "fake"}\n', b"[1]\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "fake.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no file of samples"):
        run(path)
    assert path.read_bytes() == content


def test_sizes_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="samples=3 and num_rollouts=0"):
        run(tmp_path / "fake.jsonl", num_rollouts=0)
