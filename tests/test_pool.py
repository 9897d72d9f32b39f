"""Reward workers: every way a reward function can misbehave costs its own item and nothing else."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from krl.configs import arithmetic
from krl.eval import command as measuring
from krl.rewards.pool import VerifierPool
from krl.run import setup
from tests.command_line import TINY

REWARDS = '''
import ctypes, os, pathlib, signal, subprocess, sys, threading, time
import numpy as np


def odd(prompt, response, answer):
    """Behaves as the response says; a number is its own reward."""
    if response == "sleep":
        time.sleep(1000)
    if response == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    if response == "eat":
        hoard = []
        while True:
            hoard.append(bytearray(1 << 26))
    if response == "segfault":
        ctypes.string_at(0)
    if response == "exit":
        os._exit(3)
    if response == "sys.exit":
        sys.exit(3)
    if response == "raise":
        raise RuntimeError("no\\nreward")
    if response == "close":
        os.closerange(0, 256)
    if response == "threads":
        threading.Thread(target=time.sleep, args=(1000,)).start()
        return 0.5
    if response == "print":
        print("0 1.0\\nready\\n" * 1000, flush=True)
        os.write(1, b"1 1.0\\n")
        return 0.25
    if response == "read":
        return 0.125 if sys.stdin.read() + input_or_nothing() == "" else 0.0
    if response == "family":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        pathlib.Path(prompt).write_text(str(child.pid))
        time.sleep(1000)
    if response == "slow":
        time.sleep(0.2)
        return 1.0
    if response == "pid":
        return float(os.getpid() % 2**20)
    if response == "environment":
        return float("jax" not in sys.modules and os.environ["CUDA_VISIBLE_DEVICES"] == "")
    if response == "secrets":
        return float(os.environ.get("OPEN_WORD", 0)) + ("SECRET_TOKEN" in os.environ) + 2 * ("HOME" in os.environ)
    values = {
        "nan": float("nan"), "inf": float("inf"), "big": 1e300, "none": None, "text": "1.0", "list": [1.0],
        "true": True, "numpy": np.float32(0.75),
    }
    return values[response] if response in values else float(response)


def input_or_nothing():
    try:
        return input()
    except EOFError:
        return ""


def told(prompt, response, answer):
    return float(response in answer) if isinstance(answer, tuple) else -1.0
'''
NOTHING = {"timeouts": 0, "crashes": 0, "errors": 0}


@pytest.fixture(autouse=True)
def rewards(tmp_path, monkeypatch):
    """A user's module where this process finds it, and a worker therefore too."""
    (tmp_path / "odd_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("odd_rewards", None)


def make_pool(reward="odd_rewards:odd", **changes):
    options = {
        "workers": 2,
        "item_seconds": 60,  # longer than a busy machine takes for any item that ends
        "batch_seconds": 120,
        "items_per_worker": 1000,
        "memory_gb": 2,
    } | changes
    return VerifierPool(reward, **options)


def items(*responses, prompt="", answer=""):
    return [(prompt, response, answer) for response in responses]


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int) -> bool:
    end = time.monotonic() + 60
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_items_come_while_others_are_scored():
    with make_pool() as pool:
        pool.begin()
        pool.add(items("0.5", "sleep", "0.25"))
        ticks = iter(range(10_000))
        pool.work(lambda: next(ticks) >= 40, look_seconds=0.01)  # "sleep" keeps one worker, and this one until then
        assert next(ticks) == 41
        pool.add(items("0.125", "raise"))
        pool.work(lambda: not pool._batch.waiting and len(pool._busy()) == 1)
        pool._batch_seconds = 0.1
        rewards, faults = pool.finish()
        assert rewards.tolist() == [0.5, 0.0, 0.25, 0.125, 0.0]
        assert faults == {"timeouts": 1, "crashes": 0, "errors": 1}
        pool.begin()
        pool.add(items("1.0"))
        pool.begin()  # what was begun is forgotten
        pool.add(items("0.5", "2.0"))
        pool.work(lambda: False)  # until all are done
        assert pool.finish()[0].tolist() == [0.5, 2.0]
    with make_pool(workers=0) as alone:
        alone.begin()
        alone.add(items("0.5"))
        alone.work(lambda: False)
        alone.add(items("raise", "0.25"))
        assert alone.finish()[0].tolist() == [0.5, 0.0, 0.25]


def test_workers_see_no_credentials(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("OPEN_WORD", "0.5")
    with make_pool() as pool, make_pool(environment=["OPEN_WORD", "MISSING"]) as told:
        assert pool.score(items("secrets"))[0].tolist() == [2.0]
        assert told.score(items("secrets"))[0].tolist() == [2.5]


@pytest.mark.slow
def test_order_is_kept_and_results_equal_those_in_process():
    batch = [("", f"#### {i % 3}", ("1", "3.0", "\\frac{4}{2}")[i % 3]) for i in range(101)]
    with make_pool("math", workers=0) as alone, make_pool("math", workers=3, items_per_worker=10) as pool:
        expected, counts = alone.score(batch)
        assert expected.dtype == np.float32
        assert counts == NOTHING
        assert 0 < expected.sum() < 101
        for _ in range(2):
            rewards, counts = pool.score(batch)
            np.testing.assert_array_equal(rewards, expected)
            assert rewards.dtype == np.float32
            assert counts == NOTHING
        rewards, counts = pool.score([])
        assert rewards.shape == (0,)
    numbers = [str(i / 8) for i in range(50)]
    with make_pool() as pool:
        assert pool.score(items(*numbers))[0].tolist() == [i / 8 for i in range(50)]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_function_may_return(workers):
    with make_pool(workers=workers) as pool:
        assert pool.last_error == ""
        responses = [
            "raise",
            "nan",
            "1",
            "inf",
            "big",
            "none",
            "text",
            "list",
            "sys.exit",
            "true",
            "numpy",
            "-2.5",
            "word",
        ]
        rewards, counts = pool.score(items(*responses))
        largest = float(np.finfo(np.float32).max)
        assert rewards.tolist() == [0, 0, 1, 0, largest, 0, 0, 0, 0, 1, 0.75, -2.5, 0]
        assert pool.last_rewards[4] == 1e300
        assert counts == {"timeouts": 0, "crashes": 0, "errors": 8}
        assert pool.last_error == "it raised ValueError: could not convert string to float: 'word'"
        pool.score(items("none"))
        assert pool.last_error == "it returned None, not a finite number"
        pool.score(items("raise"))
        assert pool.last_error == "it raised RuntimeError: no reward"
    with make_pool("odd_rewards:told", workers=workers) as pool:
        assert pool.score([("", "a", ("a", "b")), ("", "c", ("a", "b")), ("", "a", "a")])[0].tolist() == [1, 0, -1]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit needs Linux")
def test_crashes_cost_only_their_item():
    with make_pool(memory_gb=1) as pool:
        rewards, counts = pool.score(items("1", "segfault", "2", "exit", "3", "eat", "4", "close", "5", "environment"))
        assert rewards.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 1]
        assert counts == {"timeouts": 0, "crashes": 4, "errors": 0}
        assert pool.score(items("1"))[1] == NOTHING


def test_late_items_are_killed_and_the_rest_is_scored():
    with make_pool(item_seconds=1.5) as pool:
        begin = time.monotonic()
        rewards, counts = pool.score(items("1", "sleep", "2", "deaf", "3", "4"))
        assert rewards.tolist() == [1, 0, 2, 0, 3, 4]
        assert counts == {"timeouts": 2, "crashes": 0, "errors": 0}
        assert 1.5 <= time.monotonic() - begin < 60


def test_a_batch_ends_in_time_and_leaves_no_answer_behind():
    with make_pool(workers=1, batch_seconds=1.0) as pool:
        begin = time.monotonic()
        rewards, counts = pool.score(items(*["slow"] * 500))  # 0.2 s each
        assert 1.0 <= time.monotonic() - begin < 60
        assert rewards.sum() <= 5
        assert counts == {"timeouts": 500 - rewards.sum(), "crashes": 0, "errors": 0}
    with make_pool(workers=1, batch_seconds=3) as pool:
        pool._batch_seconds = 0.3
        assert pool.score(items("sleep", "7"))[1]["timeouts"] == 2
        pool._batch_seconds = 20
        assert pool.score(items("8", "9"))[0].tolist() == [8, 9]


def test_prints_reads_and_threads_do_not_disturb():
    with make_pool(workers=1, items_per_worker=2) as pool:
        long = "7" + " " * 300_000  # more than a pipe holds
        rewards, counts = pool.score(items("print", "threads", "read", long, "\ud800", "3", prompt="\ud800\x00"))
        assert rewards.tolist() == [0.25, 0.5, 0.125, 7, 0, 3]
        assert counts == {"timeouts": 0, "crashes": 0, "errors": 1}


def test_workers_are_recycled():
    with make_pool(workers=1, items_per_worker=3) as pool:
        rewards, _ = pool.score(items(*["pid"] * 9))
        assert [len(set(rewards[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
        assert len(set(rewards)) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_workers_are_replaced_and_none_outlives_the_pool():
    with make_pool() as pool:
        pool.score(items(*["slow"] * 4))
        for worker in pool._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
            assert gone(worker.process.pid)
        rewards, counts = pool.score(items("1", "2", "3"))  # they died while idle: no item is lost
        assert rewards.tolist() == [1, 2, 3]
        assert counts == NOTHING
        pids = [worker.process.pid for worker in pool._workers]
        assert all(map(alive, pids))
        assert all(os.getsid(pid) == pid for pid in pids)  # an interrupt at the terminal does not reach them
    assert not any(map(alive, pids))
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.score(items("1"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_late_item_started_ends_with_it(tmp_path):
    note = tmp_path / "pid"
    with make_pool(workers=1, item_seconds=4.0) as pool:
        assert pool.score(items("family", prompt=str(note)))[1]["timeouts"] == 1
        assert gone(int(note.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal at a parent's death")
@pytest.mark.parametrize("response", ["1", "deaf"])
def test_workers_end_with_a_parent_that_is_killed(response):
    program = f"""
import sys, threading
from krl.rewards.pool import VerifierPool
pool = VerifierPool("odd_rewards:odd", workers=2, item_seconds=99, batch_seconds=99, items_per_worker=9, memory_gb=2)
print(*[worker.process.pid for worker in pool._workers], flush=True)
pool.score([("", {response!r}, "")] * 4)
sys.stdin.read()
"""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert parent.stdin
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.3)
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    assert all(map(gone, pids))
    parent.stdin.close()
    parent.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_idle_workers_use_no_processor():
    def ticks(pid: int) -> int:
        return sum(map(int, pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    with make_pool(workers=1) as pool:
        pool.score(items("1"))
        (pid,) = [worker.process.pid for worker in pool._workers]

        def rests() -> bool:
            before = ticks(pid)
            time.sleep(0.5)
            return ticks(pid) == before

        assert any(rests() for _ in range(10))  # at first it may still be on its way back to waiting


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_names_and_numbers_are_refused_in_one_line(workers, tmp_path):
    (tmp_path / "broken_rewards.py").write_text("import os\nos.getpid(\n")
    for name, message in {
        "maths": "must be one of",
        "gone_rewards:odd": "cannot import gone_rewards",
        "broken_rewards:odd": "cannot import broken_rewards: SyntaxError",
        "odd_rewards:even": "has no even",
        "odd_rewards:np": "not a function",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            make_pool(name, workers=workers)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="item_seconds=0"):
        make_pool(workers=workers, item_seconds=0)


def test_workers_end_where_a_run_or_a_measurement_is_refused_after_they_were_started(tmp_path, monkeypatch):
    started: list = []

    def note(config, *given):
        started.append(make_pool("exact", workers=1))
        return started[-1]

    monkeypatch.setattr(setup, "make_verifiers", note)
    monkeypatch.setattr(measuring, "make_verifiers", note)
    config = arithmetic.get_config()
    config.update_from_flattened_dict(TINY | {"data.max_prompt_tokens": 1})
    with pytest.raises(ValueError, match=r"raise config.data.max_prompt_tokens"):
        setup.set_up(config, tmp_path / "run")
    config.policy.path = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        measuring.measure(config, tmp_path / "other")
    assert len(started) == 2
    assert all(pool._closed and not pool._workers for pool in started)


def test_a_worker_that_cannot_start_is_refused(tmp_path):
    (tmp_path / "dying_rewards.py").write_text("import os\nos._exit(1)\n")
    with pytest.raises(ValueError, match="a worker ended or hung while it imported the function"):
        make_pool("dying_rewards:odd")
