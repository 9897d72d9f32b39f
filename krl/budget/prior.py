"""What a prompt's success rate is likely to be before it is sampled.

A prompt is seen a few times in a run, each time by another policy, so its own record says little. What other
prompts like it showed says more. Each prompt gets a prior of its own, Beta(strength m, strength (1 - m)): m is
predicted from the prompt's features, by sources that differ in what they take a feature to be:

    groups     one label a prompt, such as its subject: each label has a rate, believed to be a Beta
    features   many, such as hashed pieces of its text: a logistic regression, believed to be a Gaussian
    gaussian_process   the same features: prompts that share many have logits that go together, as VIP predicts them

How much to forget from step to step, how strongly features may differ, and how far a prompt may be from what its
features say are not set by hand: a source keeps a setting for each of a few values of each. Settings are judged by
the likelihood they gave to outcomes that were new to them (Dawid, "Statistical theory: the prequential approach", J.
Royal Statistical Society A 147, 1984), and the best one of late is used. The prior common to all prompts is a setting
too, so that a source that predicts no better is not used.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ops import segment_sum
from jax.scipy.special import betaln, logit

from krl.base.masked import divide
from krl.budget.belief import PROVEN, Belief, fit_hopeless, possible, prior_rate

MEMORIES = (0.8, 0.95)  # what is left of a source's evidence of a feature after a step whose groups with it are mixed
SLOW_MEMORY = 0.995  # the same where they are even: without a gradient the policy moves little on such prompts
SPREADS = (0.03, 1.0, 10.0)  # variance of a feature's weight before anything is known of it, squared logits
FURTHER_SHARE = 0.03  # of that variance for a run of several tokens: what it says beyond its tokens
STRENGTHS = (0.7, 2.0, 8.0, 32.0, 128.0)  # alpha + beta of a prompt's rate around what its features say
SCORE_MEMORY = 0.98  # what is left of a setting's score after a step
LEAST_ALPHA = 0.25  # of the rates of what is not hopeless
NEWTON_STEPS, SOLVER_STEPS = 2, 2  # of the regression, and of the linear solver inside each
LONGEST_MOVE = 2.0  # of a prompt's logit in one of the regression's steps


class Prior(struct.PyTreeNode):
    """What a source has learnt, for each of its C settings, and how well they predicted."""

    evidence: tuple[jax.Array, jax.Array]  # [C, W] float32 each: successes and failures, or weights and precisions
    scores: jax.Array  # [C, S] float32, discounted log-likelihood of new outcomes for each strength, nats
    shared_score: jax.Array  # [] float32, the same for the prior common to all prompts
    failed: jax.Array  # [W] float32, failures of all prompts with a feature; -1 once one of them was solved
    hopeless: jax.Array  # [] float32, log-odds that a feature is one with which no prompt is ever solved
    source: "Source" = struct.field(pytree_node=False)


Evidence = tuple[jax.Array, jax.Array]  # of one setting, [W] each: what a source keeps of every feature


class Source(NamedTuple):
    """How rates follow from features: pure functions of one setting's evidence, its memory and its spread [W].

    Evidence, spread and memory are given by their places, and features=, centre=, wins= and outcomes= by their names.
    All numbers are float32 but for features, int32; W or more among a prompt's features stands for none. Spread is one
    number for the lower half of the features and a smaller one for the upper half, see `hash_features`: where features
    are labels, all of one kind, take spread[0].
    docs/recipes/prior.md has one.
    """

    start: Callable[[jax.Array], Evidence]  # (spread) -> evidence
    # (evidence, spread, features [M, F], common mean) -> (rates [M], how unsure they are [M], as 1 / outcomes)
    estimate: Callable[..., tuple[jax.Array, jax.Array]]
    # (evidence, spread, memory, features, common mean, wins [M], outcomes [M]) -> evidence
    learn: Callable[..., Evidence]


def init_prior(source: "str | Source", num_features: int) -> Prior:
    """Nothing learnt yet.

    Args:
        source: a key of PRIORS, or functions of one's own.
        num_features: W, labels of "groups", or the width to which "features" are hashed.

    Raises:
        ValueError: an unknown source, or no feature.
    """
    if isinstance(source, str) and source not in PRIORS:
        raise ValueError(f"unknown prior {source!r}; the sources are {sorted(PRIORS)}, or no prior at all")
    if num_features < 1:
        raise ValueError(f"a prior needs at least one feature, got num_features={num_features}")
    source = PRIORS[source] if isinstance(source, str) else source
    evidence = jax.vmap(source.start)(_spreads(num_features))
    scores = jnp.zeros((len(SETTINGS), len(STRENGTHS)))
    return Prior(evidence, scores, jnp.float32(0.0), jnp.zeros(num_features), jnp.float32(-PROVEN), source)


def inform(prior: Prior, belief: Belief, features: jax.Array) -> Belief:
    """The belief of M prompts with a prior for each from its features, by the best setting of late.

    Args:
        prior: of the source.
        belief: of the M prompts, with the common prior; see `krl.budget.take`.
        features: [M, F] int32 in [0, W); W or more for none.

    Returns:
        The belief with prior_alpha, prior_beta and hopeless [M] float32. The first two are the common ones while the
        source has predicted no better. A prompt is as hopeless as the most hopeless of its features. Its record has
        moved with what the source expects: a record is about the policy of its time, and says how far the prompt was
        from its kind. Of the setting that expected m then and expects m' now, n outcomes count n (m' - m) successes
        more, within 0 and n.
    """
    alphas, betas = _of_settings(prior, belief, features)
    best, strength = jnp.unravel_index(prior.scores.argmax(), prior.scores.shape)
    better = prior.scores.max() > prior.shared_score
    rates = divide(alphas, alphas + betas)[:, 0]  # whatever the strength
    then = jnp.take_along_axis(rates, jnp.maximum(belief.prior_of, 0)[None], axis=0)[0]
    outcomes = belief.successes + belief.failures
    move = jnp.where(belief.prior_of < 0, 0.0, outcomes * (then - belief.prior_then))
    move = jnp.clip(move, -belief.successes, belief.failures)
    of_feature = prior.hopeless - _barren(prior.failed, belief)
    worst = of_feature.at[features].get(mode="fill", fill_value=-PROVEN).max(axis=1)
    solvable = jax.nn.log_sigmoid(-belief.hopeless) + jax.nn.log_sigmoid(-worst)
    hopeless = jnp.log(-jnp.expm1(solvable)) - solvable
    return belief.replace(
        hopeless=jnp.maximum(hopeless, -PROVEN),
        prior_alpha=jnp.where(better, alphas[best, strength], belief.prior_alpha),
        prior_beta=jnp.where(better, betas[best, strength], belief.prior_beta),
        successes=belief.successes + move,
        failures=belief.failures - move,
        squares=jnp.clip(belief.squares + move, 0.0, outcomes),
        prior_then=rates[best],
        prior_of=jnp.where(better, best, -1).astype(jnp.int32) + jnp.zeros_like(belief.prior_of),
    )


def learn_prior(
    prior: Prior, belief: Belief, features: jax.Array, rewards: jax.Array, prompt_index: jax.Array, mask: jax.Array
) -> Prior:
    """The prior after a step's outcomes: settings are judged by them first, and then learn from them.

    Args:
        prior: before the step.
        belief: of the M prompts before the step, with the common prior.
        features: [M, F] int32 in [0, W); W or more for none.
        rewards: [R] float32 in [0, 1].
        prompt_index: [R] int32, the prompt that each rollout belongs to.
        mask: [R] bool, False on padding rows.

    Returns:
        The new prior. Prompts without a rollout teach nothing.
    """
    num_prompts = belief.visits.shape[0]
    index = jnp.where(mask, prompt_index, num_prompts)
    wins = segment_sum(jnp.where(mask, rewards, 0.0), index, num_prompts)
    outcomes = segment_sum(mask.astype(jnp.float32), index, num_prompts)
    # What a hopeless prompt shows says nothing of the others.
    wins, outcomes = possible(belief) * wins, possible(belief) * outcomes
    width = len(prior.failed)
    solved = (prior.failed < 0) | (_add_up(wins, features, width) > 0)
    failed = jnp.where(solved, -1.0, prior.failed + _add_up(outcomes - wins, features, width))
    alphas, betas = _of_settings(prior, belief, features)
    scores = SCORE_MEMORY * prior.scores + _log_likelihood(belief, alphas, betas, wins, outcomes)
    shared = _log_likelihood(belief, belief.prior_alpha, belief.prior_beta, wins, outcomes)
    strength = jnp.array(STRENGTHS)[prior.scores.max(axis=0).argmax()]
    # Outcomes of one prompt are alike: beyond `strength` of them, more say little about its features.
    share = divide(strength + 1, strength + outcomes)
    learn = functools.partial(
        prior.source.learn,
        features=features, centre=prior_rate(belief), wins=share * wins, outcomes=share * outcomes,
    )  # fmt: skip
    memories = jnp.array(SETTINGS)[:, 0]
    return prior.replace(
        failed=failed,
        hopeless=fit_hopeless(prior.hopeless, _barren(failed, belief), failed != 0),
        evidence=jax.vmap(learn)(prior.evidence, _spreads(width), memories),
        scores=scores,
        shared_score=SCORE_MEMORY * prior.shared_score + shared,
    )


def prior_metrics(prior: Prior, num_prompts: int) -> dict[str, jax.Array]:
    """Float32 scalars: what the prior's best setting predicts better, its strength, and the share of hopeless features.

    `prior_gain` is over the common prior, in nats per visit, averaged over the late steps that scores are; below 0 the
    common prior is used.
    """
    visits = num_prompts / (1 - SCORE_MEMORY)
    strength = jnp.array(STRENGTHS)[prior.scores.max(axis=0).argmax()]
    return {
        "prior_gain": (prior.scores.max() - prior.shared_score) / visits,
        "prior_strength": strength,
        "hopeless_features": jax.nn.sigmoid(prior.hopeless),
    }


def _of_settings(prior: Prior, belief: Belief, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(alpha, beta) of every setting, [C, S, M] float32."""
    estimate = functools.partial(prior.source.estimate, features=features, centre=prior_rate(belief))
    rates, unsure = jax.vmap(estimate)(prior.evidence, _spreads(len(prior.failed)))
    # Two sources of doubt add up: about what the features say, and about how far the prompt is from that.
    strengths = 1 / (unsure[:, None] + 1 / jnp.array(STRENGTHS)[None, :, None])
    rates = jnp.clip(rates, 1e-6, 1 - 1e-4)[:, None]
    return strengths * rates, strengths * (1 - rates)


def _barren(failed: jax.Array, belief: Belief) -> jax.Array:
    """Log-probability that so many in a row fail at a rate of the common prior; PROVEN where failed is -1."""
    # With alpha near 0 a Beta has what is hopeless in itself, and failures would say nothing.
    alpha, beta = jnp.maximum(belief.prior_alpha, LEAST_ALPHA), belief.prior_beta
    log_probability = betaln(alpha, beta + jnp.maximum(failed, 0.0)) - betaln(alpha, beta)
    return jnp.where(failed < 0, PROVEN, log_probability)


def _log_likelihood(
    belief: Belief, alpha: jax.Array, beta: jax.Array, wins: jax.Array, outcomes: jax.Array
) -> jax.Array:
    """Log-probability of a step's outcomes, in one given order, under priors [..., M]; [...] float32, nats."""
    alpha, beta = alpha + belief.successes, beta + belief.failures
    return (betaln(alpha + wins, beta + outcomes - wins) - betaln(alpha, beta)).sum(axis=-1)


def _spreads(width: int) -> jax.Array:
    """The spread of every feature under every setting, [C, W] float32; see `hash_features` for the upper half."""
    further = jnp.arange(width) >= max(width // 2, 1)
    return jnp.array(SETTINGS)[:, 1:] * jnp.where(further, FURTHER_SHARE, 1.0)


# ---------------------------------------------------------------- groups


def _estimate_groups(
    evidence: Evidence, spread: jax.Array, features: jax.Array, centre: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The mean of each prompt's group under Beta(centre / spread + successes, (1 - centre) / spread + failures)."""
    successes, failures = (_look_up(counts, features) for counts in evidence)
    believed = 1 / spread[0]  # in outcomes; all labels are of one kind
    outcomes = believed + successes + failures
    return (centre * believed + successes) / outcomes, 1 / outcomes


def _learn_groups(
    evidence: Evidence,
    spread: jax.Array,
    memory: jax.Array,
    features: jax.Array,
    centre: jax.Array,
    wins: jax.Array,
    outcomes: jax.Array,
) -> Evidence:
    more = (_add_up(x, features, len(evidence[0])) for x in (wins, outcomes - wins))
    kept = _kept(memory, features, wins, outcomes, len(evidence[0]))
    successes, failures = (kept * (old + new) for old, new in zip(evidence, more, strict=True))
    return successes, failures


def _kept(memory: jax.Array, features: jax.Array, wins: jax.Array, outcomes: jax.Array, width: int) -> jax.Array:
    """What a step leaves of the evidence of each feature, [W]: the less, the more of its outcomes make a gradient."""
    mixed = _add_up(jnp.where((wins > 0) & (wins < outcomes), outcomes, 0.0), features, width)
    return SLOW_MEMORY * memory ** divide(mixed, _add_up(outcomes, features, width))


# ---------------------------------------------------------------- features


def _start_weights(spread: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights of 0, and how sure of that the spread is."""
    return jnp.zeros_like(spread), 1 / spread


def _estimate_features(
    evidence: Evidence, spread: jax.Array, features: jax.Array, centre: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """sigmoid(logit(centre) + sum of weights); the variance of that sum, taken over to the rate."""
    weights, precision = evidence
    rate = _rates(weights, features, centre)
    return rate, rate * (1 - rate) * _look_up(1 / precision, features)


def _rates(weights: jax.Array, features: jax.Array, centre: jax.Array) -> jax.Array:
    """The success rates of prompts, [M], whose logits are that of the centre and the weights of their features."""
    return jax.nn.sigmoid(logit(centre) + _look_up(weights, features))


def _learn_features(
    evidence: Evidence,
    spread: jax.Array,
    memory: jax.Array,
    features: jax.Array,
    centre: jax.Array,
    wins: jax.Array,
    outcomes: jax.Array,
) -> Evidence:
    """Newton steps to the mode, given the Gaussian from before; then forget towards the start.

    The precision is a diagonal between steps. Within a step the Hessian is whole: features that come
    together share what they explain.
    """
    before, precision = evidence

    def newton(_: jax.Array, weights: jax.Array) -> jax.Array:
        rate = _rates(weights, features, centre)
        curvature = outcomes * rate * (1 - rate)
        slope = _add_up(wins - outcomes * rate, features, len(weights)) - precision * (weights - before)
        hessian = lambda v: precision * v + _add_up(curvature * _look_up(v, features), features, len(v))  # noqa: E731
        diagonal = precision + _add_up(curvature, features, len(weights))
        change, _ = jax.scipy.sparse.linalg.cg(
            hessian, slope, tol=1e-5, atol=1e-6, maxiter=SOLVER_STEPS, M=lambda v: v / diagonal
        )
        # Where rates are near 0 or 1 the curvature says nothing of the way to other rates.
        furthest = jnp.abs(_look_up(change, features)).max(initial=0.0)
        return weights + change * jnp.minimum(1.0, LONGEST_MOVE / jnp.maximum(furthest, 1e-6))

    weights = jax.lax.fori_loop(0, NEWTON_STEPS, newton, before)
    rate = _rates(weights, features, centre)
    precision = precision + _add_up(outcomes * rate * (1 - rate), features, len(weights))
    share = _kept(memory, features, wins, outcomes, len(weights))
    kept, fresh = share * precision, (1 - share) / spread
    return divide(kept * weights, kept + fresh), kept + fresh


# ---------------------------------------------------------------- Gaussian process


def _estimate_process(
    evidence: Evidence, spread: jax.Array, features: jax.Array, centre: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """sigmoid(logit(centre) + sum of weights); how sure that is, is left to the strength."""
    rate = _rates(evidence[0], features, centre)
    return rate, jnp.zeros_like(rate)


def _learn_process(
    evidence: Evidence,
    spread: jax.Array,
    memory: jax.Array,
    features: jax.Array,
    centre: jax.Array,
    wins: jax.Array,
    outcomes: jax.Array,
) -> Evidence:
    """The posterior mean of the logits after a step, which is the next step's prior mean.

    The kernel, the sum of the shared features' spreads, does not shrink as evidence comes: the policy moves, so
    each step may move every logit again (Nguyen et al., arXiv 2602.01601). In the space of weights the mean of all
    prompts moves by features' kernel (kernel + noise)^-1 (observed - expected), with M equations.
    """
    weights, width = evidence[0], len(evidence[0])
    kernel = jax.vmap(lambda row: _look_up(spread * _add_up(row, features, width), features))(jnp.eye(len(wins)))
    rate = divide(wins + 0.5, outcomes + 1)
    noise = divide(1.0, outcomes * rate * (1 - rate))  # of an observed logit
    surprise = logit(rate) - logit(centre) - _look_up(weights, features)
    # Prompts without outcomes have no noise to divide by: their row says nothing.
    seen = outcomes > 0
    system = jnp.where(seen[:, None] & seen[None, :], kernel, 0.0) + jnp.diag(jnp.where(seen, noise, 1.0))
    moves = jax.scipy.linalg.solve(system, jnp.where(seen, surprise, 0.0), assume_a="pos")
    return memory * (weights + spread * _add_up(moves, features, width)), evidence[1]


def _look_up(values: jax.Array, features: jax.Array) -> jax.Array:
    """Sum of the values [W] of each prompt's features [M, F]; [M]."""
    return values.at[features].get(mode="fill", fill_value=0.0).sum(axis=1)


def _add_up(values: jax.Array, features: jax.Array, width: int) -> jax.Array:
    """The transpose of `_look_up`: values [M] added to each prompt's features; [W]."""
    return jnp.zeros(width).at[features].add(values[:, None], mode="drop")


PRIORS: dict[str, Source] = {
    "groups": Source(lambda spread: (jnp.zeros_like(spread), jnp.zeros_like(spread)), _estimate_groups, _learn_groups),
    "features": Source(_start_weights, _estimate_features, _learn_features),
    "gaussian_process": Source(_start_weights, _estimate_process, _learn_process),
}
SETTINGS = tuple(itertools.product(MEMORIES, SPREADS))


def hash_features(
    tokens: np.ndarray,
    mask: np.ndarray,
    fields: Mapping[str, Sequence[str]],
    *,
    width: int,
    longest: int = 2,
    most: int = 128,
) -> np.ndarray:
    """What is known of each prompt before it is sampled, as hashed features; on the host, once a run.

    A feature is a run of up to `longest` tokens, the number of tokens to a power of two, or the value of a field.
    Those of a single prompt and those of every prompt tell nothing about others and are left out.

    Args:
        tokens, mask: [D, P] int32 and bool, the prompts.
        fields: D texts each, by name, such as the subject.
        width: W, how many different features there are room for; those that share a hash are taken for one. Runs of
            several tokens have the upper half to themselves, all others the lower one.
        longest: tokens of a run at most.
        most: F at most, the features of the most prompts.

    Returns:
        [D, F] int32 in [0, W], ascending; W for none. F >= 1.

    References:
        Weinberger et al., "Feature hashing for large scale multitask learning", arXiv 0902.2206.

    >>> hash_features(np.array([[1, 2], [1, 3], [4, 3]]), np.ones((3, 2), bool), {}, width=1000, longest=1).shape
    (3, 2)
    """
    rows = []
    for number, (ids, real) in enumerate(zip(tokens, mask, strict=True)):
        prompt = ids[real].tolist()
        found = {("length", len(prompt).bit_length())} | {(name, texts[number]) for name, texts in fields.items()}
        for size in range(1, longest + 1):
            found |= {("tokens", *prompt[i : i + size]) for i in range(len(prompt) - size + 1)}
        rows.append({_hash(feature, width) for feature in found})
    prompts_with = np.bincount([feature for row in rows for feature in row], minlength=width)
    tells = (prompts_with > 1) & (prompts_with < len(rows))
    kept = [sorted(sorted(f for f in row if tells[f]), key=lambda f: -prompts_with[f])[:most] for row in rows]
    features = np.full((len(rows), max(map(len, kept), default=0) or 1), width, np.int32)
    for row, chosen in zip(features, kept, strict=True):
        row[: len(chosen)] = sorted(chosen)
    return features


@functools.lru_cache(maxsize=1 << 20)
def _hash(feature: tuple[Any, ...], width: int) -> int:
    digest = int.from_bytes(hashlib.blake2b(repr(feature).encode(), digest_size=8).digest(), "little")
    lower = width // 2
    if feature[0] == "tokens" and len(feature) > 2:
        return lower + digest % (width - lower)
    return digest % max(lower, 1)


def number_groups(labels: Sequence[str]) -> tuple[np.ndarray, int]:
    """Labels as features: ([D, 1] int32, the number of different labels).

    >>> number_groups(["algebra", "sets", "algebra"])[0].tolist()
    [[0], [1], [0]]
    """
    names, numbers = np.unique(np.array(labels), return_inverse=True)
    return numbers.reshape(-1, 1).astype(np.int32), len(names)
