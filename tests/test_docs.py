"""The recipes and the quickstart do what they say, every key is described, and every key that a page names is there."""

import importlib.util
import json
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags

import krl.train
from krl import budget
from krl.configs import default
from krl.configs.check import check, flatten
from krl.configs.flags import define_flags, parse_flags
from krl.run.setup import NAMES
from tests.command_line import ROOT, TINY, environment, rows, undrawn

TRAIN = krl.train.train
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page):
    """The Python of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)


def mine():
    """The one file of the recipe for a reward."""
    (block,) = (block for block in blocks("recipes/reward.md") if block.startswith("# mine.py"))
    return block


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory to run a page in, with small policies and few steps."""

    def train(config, workdir, **own):
        shorter = {key: value for key, value in TINY.items() if key.startswith(("eval", "policy"))}
        shorter |= {"steps": 3, "alloc.budget": 4 * config.prompts_per_step, "eval.prompts": 20}
        shorter |= {"sft.steps": 60, "sft.batch_size": 16}
        config.update_from_flattened_dict(shorter)
        config.data.max_prompt_tokens = min(config.data.max_prompt_tokens, 16)
        config.sample.max_new_tokens = min(config.sample.max_new_tokens, 16)
        with undrawn():
            return TRAIN(config, workdir, **own)

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(krl.train, "train", train)
    yield tmp_path
    sys.modules.pop("mine", None)


def follow(page):
    """Run a page from top to bottom; the names that it leaves."""
    names = {"__name__": "page"}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


@pytest.mark.slow
def test_quickstart(here):
    names = follow("quickstart.md")
    assert names["result"].metrics["step"] == 3
    assert len(rows(here / "runs" / "notebook")) == 4


@pytest.mark.slow
def test_own_reward_on_own_data_in_python(here):
    make_data, text = blocks("recipes/reward.md")[1], mine()
    assert len(text.splitlines()) < 30
    exec(make_data, {})
    (here / "mine.py").write_text(text)
    ran = runpy.run_path("mine.py", run_name="__main__")
    assert [ran["reward"]("2+3=", response, "5") for response in ("5", "6", "2", "", "five")] == [1, 0.5, 0.25, 0, 0]
    won = [wins for row in rows(here / "runs" / "mine", "groups") for wins in row["successes"]]
    assert any(wins % 1 for wins in won), "an exact comparison would give whole rewards"


@pytest.mark.slow
def test_own_reward_on_own_data_by_a_config_file(here):
    exec(blocks("recipes/reward.md")[1], {})
    (here / "mine.py").write_text(mine())
    keys = [f"--config.{key}={value}" for key, value in (TINY | {"sft.steps": 0, "eval.every": 0, "steps": 1}).items()]
    made = subprocess.run(
        [sys.executable, ROOT / "train.py", "--config", "mine.py", "--workdir", "runs/mine", *keys],
        env=environment(here) | {"PYTHONPATH": f".:{ROOT / 'tests' / 'undrawn'}:{ROOT}"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert rows(here / "runs" / "mine")[-1]["step"] == 1
    assert json.loads((here / "runs" / "mine" / "config.json").read_text())["data.reward"] == "mine:reward"


@pytest.mark.slow
def test_own_data(here):
    for name, size in (("train", 16), ("test", 4)):
        lines = [{"question": f"{i} + 1?", "answer": str(i + 1), "solution": f"#### {i + 1}"} for i in range(size)]
        pathlib.Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = follow("recipes/data.md")["get_config"]()
    config.tokenizer.vocab_size = 300
    assert krl.train.train(config, "runs/mine").metrics["step"] == 3
    assert json.loads((here / "runs" / "mine" / "held_out.json").read_text())["prompts"][-1] == "3 + 1?"


@pytest.mark.slow
@pytest.mark.slow
def test_own_value_function(here):
    names = follow("recipes/value.md")
    counts, rates = [2] * 4, np.array([0.02, 0.2, 0.5, 0.98])
    for _ in range(80 - 8):
        gains = [names["any_mixed"](p, n + 1) - names["any_mixed"](p, n) for p, n in zip(rates, counts, strict=True)]
        counts[int(np.argmax(gains))] += 1
    assert names["counts"].tolist() == counts
    assert rows(here / "runs" / "any_mixed")[-1]["price"] < 0


@pytest.mark.slow
def test_own_allocation_rule(here):
    names = follow("recipes/rule.md")
    assert names["shares"]["uniform"] < min(names["shares"]["optimist"], names["shares"]["knapsack"])
    unknown = budget.init_belief(4)
    deviation = (0.25 / 2) ** 0.5  # of Beta(1/2, 1/2)
    counts, info = budget.allocate(names["optimist"], unknown, 40, 2, 16)
    assert counts.tolist() == [10] * 4
    assert float(info["mean_hope"]) == pytest.approx(0.5 + deviation)
    assert all(0 < row["mean_hope"] <= 1 for row in rows(here / "runs" / "optimist")[1:])


@pytest.mark.slow
def test_own_prior(here):
    source = follow("recipes/prior.md")["hardest"]
    evidence = source.learn(source.start(np.full(3, 0.5)), None, 0.5, np.array([[0, 1], [1, 3]]), None, np.array([2, 0]), np.array([4, 2]))  # fmt: skip
    assert [part.tolist() for part in evidence] == [[1, 1, 0], [2, 3, 0]]
    rates, _ = source.estimate(evidence, np.full(3, 0.5), np.array([[0, 1], [0, 2], [3, 3]]), 0.75)
    assert rates.tolist() == pytest.approx([(1.5 + 1) / (2 + 3), (1.5 + 1) / (2 + 2), 0.75])
    assert all(np.isfinite(row["prior_gain"]) for row in rows(here / "runs" / "hardest")[1:])


@pytest.mark.slow
def test_own_reward_in_a_notebook(here):
    (block,) = (block for block in blocks("recipes/reward.md") if "reward=close" in block)
    names = {"__name__": "page"}
    exec(block, names)
    assert names["close"]("2+3=", "6", "5") == 0.5
    assert json.loads((here / "runs" / "close" / "config.json").read_text())["data.reward"] == "close given in Python"


@pytest.mark.slow
def test_own_policy(here):
    names = follow("recipes/policy.md")
    assert names["second"].metrics["step"] == 3
    before, after = (rows(here / "runs" / name) for name in ("first", "second"))
    assert len(before) == len(after) == 4


def test_budgets_in_another_trainer(here):
    (block,) = blocks("recipes/elsewhere.md")
    assert len(block.splitlines()) <= 24
    names = follow("recipes/elsewhere.md")
    known = budget.take(names["belief"], np.arange(1000), 60)
    believed, visits = np.asarray(budget.mean(known)), np.asarray(known.visits)
    means = {rate: believed[names["rates"] == rate].mean() for rate in (0.0, 0.03, 0.5, 1.0)}
    assert means[0.0] < means[0.03] < 0.1 < means[0.5] < 0.6 < 0.9 < means[1.0]
    assert visits[names["rates"] == 1.0].mean() < 0.7 * visits[names["rates"] == 0.03].mean()


@pytest.fixture(scope="module")
def hooks():
    """docs/hooks.py, which mkdocs imports by its path too."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_is_described(hooks):
    assert [name for name, key in default.KEYS.items() if len(key.help) < 4 or key.help.endswith(".")] == []
    assert default.SECTIONS.keys() == {name.rpartition(".")[0] for name in default.KEYS} - {""}
    page = SimpleNamespace(file=SimpleNamespace(src_uri="configuration.md"))
    made = hooks.on_page_markdown("<!-- the keys of krl/configs/default.py -->", page, None, None)
    assert all(
        f"| [`{name}`](#{name}){{#{name}}} | `{value!r}` |" in made
        for name, value in flatten(default.get_config()).items()
    )
    assert "| [`steps`](#steps){#steps} | `200` | at least 0 | Training steps; a step samples" in made


def test_defaults_are_among_the_values_that_their_keys_take():
    assert [name for name, key in default.KEYS.items() if not key.range.holds(key.default)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_and_files_that_pages_name_are_there(page):
    text = page.read_text()
    known = flatten(default.get_config())
    named = set(re.findall(r"\bconfig\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", text)) - {"json", "py", "key"}
    places = {*known, *(key.split(".")[0] for key in known)}
    assert sorted(named - places) == []
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_pages_show_are_parsed(page):
    for line in re.sub(r"\\\n\s*", " ", page.read_text()).splitlines():
        found = re.match(r" {4,}(?:PYTHONPATH=\. )?(?:python (?:train|eval)\.py|krl-(?:train|eval)) (.*)", line)
        if found and not re.search(r"FILE|mine\.py|\[|\.\.\.", found[1]):
            values = flags.FlagValues()
            define_flags(values)
            parse_flags(["krl-train", *shlex.split(found[1], comments=True)], values)
            check(values.config, NAMES)


def test_the_api_page_of_the_budget_has_all_of_it():
    page = (ROOT / "docs" / "api" / "budget.md").read_text()
    listed = {name for names in re.findall(r"members: \[([^]]*)\]", page) for name in re.split(r",\s*", names.strip())}
    assert sorted(set(budget.__all__) - listed) == []
