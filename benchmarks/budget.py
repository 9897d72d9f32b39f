"""Speed and exactness of the solvers, beside the published dynamic program.

    python -m benchmarks.budget [--source exploration_utils.py] [--sizes 256 512]

--source is verl/trainer/ppo/exploration_utils.py of the published code (github.com/liziniu/KnapsackRL); it needs
numba. Without it only krl is measured. Prints the tables of docs/budget.md; medians, after compilation.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from krl import budget

N_MIN, N_MAX, PER_PROMPT = 2, 128, 8


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--source", help="exploration_utils.py of the published code")
    arguments.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 1024])
    options = arguments.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}\n")
    published = load_published(options.source) if options.source else None
    compare(options.sizes, published)
    large()
    step()
    suboptimal()


def seconds(call: Callable, repeats: int = 9) -> tuple[float, float]:
    """(first call, median of the others)."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return times[0], statistics.median(times[1:])


def rates(prompts: int) -> np.ndarray:
    """Rates as a window of 16 outcomes shows them, none of them 0 or 1: what both solvers accept."""
    p = np.random.default_rng(0).beta(0.5, 0.5, prompts)
    return np.clip(np.round(p * 16), 1, 15) / 16


def value(n, p):
    """V(n, p) in float64."""
    return p * (1 - p) ** 2 * (1 - p**n - (1 - p) ** n)


def optimum(p: np.ndarray, total: int, n_min: int, n_max: int) -> float:
    """The best objective by dynamic programming in float64."""
    best = np.full(total + 1, -np.inf)
    best[0] = 0.0
    for rate in p:
        after = np.full(total + 1, -np.inf)
        for n in range(n_min, min(n_max, total) + 1):
            np.maximum(after[n:], best[: total + 1 - n] + value(n, rate), out=after[n:])
        best = after
    return best[total]


def load_published(path: str) -> Callable[[np.ndarray, int], np.ndarray]:
    """(rates, rollouts per prompt) -> counts, by the published code."""
    spec = importlib.util.spec_from_file_location("published", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def solve(p, per_prompt):
        states = np.stack([np.ones(len(p)), p, np.full(len(p), 16.0)], axis=1)
        with contextlib.redirect_stdout(io.StringIO()):
            counts, _ = module.sampling_budget_by_knapsack(
                states, n=per_prompt, min_n=N_MIN, max_n=N_MAX, allow_fallback=False
            )
        return counts

    return solve


def compare(sizes: list[int], published: Callable | None) -> None:
    """The step's knapsack: time, and the objective as a share of the float64 dynamic program's."""
    print(
        "| prompts | krl, ms | compile, s | objective less optimum | published, s | its objective less optimum | ratio "
        "|"
    )
    print("|---|---|---|---|---|---|---|")
    for prompts in sizes:
        p, total = rates(prompts), prompts * PER_PROMPT
        solve = jax.jit(lambda p, total: budget.knapsack(budget.log_gains(p, N_MIN, N_MAX), total, N_MIN))
        given = jnp.asarray(p, jnp.float32)
        first, ours = seconds(lambda solve=solve, given=given, total=total: solve(given, total))
        best = optimum(p, total, N_MIN, N_MAX)
        gap = value(np.asarray(solve(given, total)), p).sum() / best - 1
        row = f"| {prompts} | {1e3 * ours:.2f} | {first - ours:.2f} | {gap:.1e} |"
        if published:
            published(rates(16), PER_PROMPT)
            published(p[:64], PER_PROMPT)  # numba compiles
            repeats = 3 if prompts <= 512 else 1
            theirs = seconds(lambda p=p: published(p, PER_PROMPT), repeats)[1]
            their_gap = value(published(p, PER_PROMPT), p).sum() / best - 1
            print(f"{row} {theirs:.2f} | {their_gap:.1e} | {theirs / ours:.0f} |", flush=True)
        else:
            print(f"{row} | | |", flush=True)


def large() -> None:
    """A whole data set at once."""
    prompts = 10**6
    p = jnp.asarray(np.random.default_rng(0).beta(0.5, 0.5, prompts), jnp.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, median = seconds(lambda: budget.knapsack_large(p, PER_PROMPT * prompts, N_MIN, N_MAX), 5)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"\nknapsack_large, {prompts:,} prompts: {median:.2f} s, compile {first - median:.2f} s, "
        f"peak memory of the process {peak / 1e6:.2f} GB (before it {before / 1e6:.2f})"
    )


def step() -> None:
    """What a step of a large run spends on budgets: take, allocate, update, fit the prior."""
    tasks, prompts = 10**6, 4096
    total = prompts * PER_PROMPT
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.permutation(tasks)[:prompts], jnp.int32)
    rewards, everything = jnp.asarray(rng.integers(0, 2, total), jnp.float32), jnp.ones(total, bool)
    update = jax.jit(budget.update, donate_argnums=0)

    @jax.jit
    def allocate(belief, total):
        counts, _ = budget.allocate("knapsack", budget.take(belief, ids), total, N_MIN, N_MAX)
        return counts, jnp.searchsorted(jnp.cumsum(counts), jnp.arange(prompts * PER_PROMPT), side="right")

    state = [budget.init_belief(tasks)]

    def one_step():
        _, index = allocate(state[0], total)
        state[0] = update(state[0], ids, rewards, index, everything)
        return state[0]

    first, median = seconds(one_step, 15)
    print(f"belief update and allocation, {prompts} of {tasks:,} prompts: {1e3 * median:.1f} ms, compile {first:.2f} s")


def suboptimal() -> None:
    """How often scoring "nothing beyond n_min" as 0, as the published program does, misses the optimum.

    Both objectives are solved exactly by the same dynamic program; only that one value differs.
    """
    print("\n| rollouts per prompt | instances below the optimum | mean shortfall of those | largest |")
    print("|---|---|---|---|")
    prompts, instances = 16, 200
    for per_prompt in (2.5, 3, 4, 6, 8):
        total, misses = int(prompts * per_prompt), []
        for seed in range(instances):
            p = np.clip(np.round(np.random.default_rng(seed).beta(0.5, 0.5, prompts) * 16), 1, 15) / 16
            n = np.arange(33)[None, :]
            true = np.where(n < N_MIN, -np.inf, value(np.maximum(n, 1), p[:, None]))
            scored = np.where(n == N_MIN, 0.0, true)
            counts = np.asarray(budget.max_plus_dp(scored, total))
            misses.append(1 - value(counts, p).sum() / optimum(p, total, N_MIN, 32))
        below = [miss for miss in misses if miss > 1e-9]
        mean = statistics.mean(below) if below else 0.0
        print(f"| {per_prompt} | {len(below) / instances:.1%} | {mean:.2%} | {max(misses):.2%} |", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
