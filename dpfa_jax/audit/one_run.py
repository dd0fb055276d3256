"""A lower bound on ε from one training run with many canaries.

Each of m canaries joins the data by a fair coin; after the run the attacker guesses, for the r
whose scores say most, whether they joined. A private run lets few of the guesses be right.

Sources: T. Steinke, M. Nasr and M. Jagielski, Privacy Auditing with One (1) Training Run, 2023,
theorem 5.2 (:func:`one_run_epsilon`); S. Mahloujifar, L. Melis and K. Chaudhuri, Auditing
f-Differential Privacy in One Run, 2024, theorem 3, algorithm 1 (:func:`refutes_curve`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import dp_accounting
import numpy as np
import scipy.stats
from jaxtyping import Bool, Float

from dpfa_jax.accounting import Accountant
from dpfa_jax.accounting.accountant import check_budget
from dpfa_jax.audit.curves import Claim, MakeEvent

_MOST_EPSILON = 50.0


class Guesses(NamedTuple):
    """What was guessed: ``right`` of ``made`` guesses about ``canaries`` canaries."""

    canaries: int
    made: int
    right: int


def guess(
    scores: Float[np.ndarray, "m"], joined: Bool[np.ndarray, "m"], share: float = 0.2
) -> Guesses:
    """Guesses "joined" for the highest scores and "not" for the lowest, and counts.

    Args:
        scores: of each canary, larger for those that seem to have joined.
        joined: what the coins said.
        share: of the canaries, fixed beforehand; half of them at each end.

    Raises:
        ValueError: for arrays that do not fit together, a NaN, or a share outside (0, 1].

    Example:
        >>> guess(np.array([3.0, 0.1, 0.2, -2.0]), np.array([True, True, False, True]), 0.5)
        Guesses(canaries=4, made=2, right=1)
    """
    scores, joined = np.asarray(scores, np.float64), np.asarray(joined, np.bool_)
    if scores.ndim != 1 or scores.shape != joined.shape or scores.size < 2:
        raise ValueError(
            f"scores {scores.shape} and joined {joined.shape}: one axis, two canaries or more."
        )
    if np.isnan(scores).any():
        raise ValueError(f"scores: {np.isnan(scores).sum()} are NaN; allowed are numbers.")
    if not (isinstance(share, float) and 0 < share <= 1):
        raise ValueError(f"share={share!r}: allowed is a number above 0, at most 1.")
    each = max(1, int(scores.size * share / 2))
    order = np.argsort(scores, kind="stable")
    right = int(joined[order[-each:]].sum() + (~joined[order[:each]]).sum())
    return Guesses(scores.size, 2 * each, right)


def _check(guesses: Guesses, confidence: float) -> None:
    m, made, right = guesses
    if not 0 <= right <= made <= m or m < 1:
        raise ValueError(f"{guesses}: allowed is 0 <= right <= made <= canaries.")
    if not (isinstance(confidence, float) and 0 < confidence < 1):
        raise ValueError(f"confidence={confidence!r}: allowed is a number above 0 and below 1.")


def chance_of(guesses: Guesses, epsilon: float, delta: float) -> float:
    """The most probable that so many right guesses are if the run is (ε, δ)-private.

    P(W >= v) <= P(B >= v) + 2 m δ max_i P(v > B >= v − i)/i, B ~ Bin(made, 1/(1 + e^−ε)).
    """
    m, made, v = guesses
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    tail = scipy.stats.binom.sf(np.arange(-1, v), made, rate)  # P(B >= k) for k = 0 .. v
    if v == 0:
        return 1.0
    i: Any = np.arange(1, v + 1)
    worst = float(np.max((tail[v - i] - tail[v]) / i))
    return min(1.0, float(tail[v]) + 2 * m * delta * max(0.0, worst))


def one_run_epsilon(guesses: Guesses, delta: float, *, confidence: float = 0.95) -> float:
    """The largest ε that the guesses refute at ``delta``; 0 if they refute none.

    Guarantee. If the run is (ε, δ)-private for replacing a canary by nothing, the answer is
    at most ε with probability at least ``confidence`` over the coins and the run.

    Raises:
        ValueError: for counts that do not fit, a δ or a confidence that is not allowed.

    Example:
        >>> round(one_run_epsilon(Guesses(1000, 200, 190), 1e-5), 2)
        2.39
    """
    _check(guesses, confidence)
    check_budget(1.0, delta)
    return _largest(lambda e: chance_of(guesses, e, delta) <= 1 - confidence, _MOST_EPSILON)


def _largest(refuted: Callable[[float], bool], most: float) -> float:
    """The end of the refuted numbers, which begin at 0; from below, to 10⁻⁴."""
    low, high = 0.0, most
    if not refuted(low):
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def refutes_curve(
    guesses: Guesses, inverse: Callable[[float], float], *, confidence: float = 0.95
) -> bool:
    """Whether so many right guesses are too improbable under a trade-off curve f.

    Let r_i be the chance of i right guesses or more, and h_i that of as many wrong ones, in
    units in which their sum is made/m at i = 0. Under f, h_i >= g(r_(i+1)) where g is the
    inverse of α ↦ 1 − f(α), and r_i grows from r_(i+1) by i/(made − i) of h's step. Starting
    from r and h at the observed count as small as the confidence allows, a sum above
    made/m at i = 0 is a contradiction.

    Args:
        guesses: what was guessed.
        inverse: g: the largest α with 1 − f(α) <= x.
        confidence: the chance, or more, that a true curve is not refuted.
    """
    _check(guesses, confidence)
    m, made, right = guesses
    miss = 1.0 - confidence
    r, h = miss * right / m, miss * (made - right) / m
    for i in range(right - 1, -1, -1):
        higher = max(h, inverse(r))
        r = min(1.0, r + i / (made - i) * (higher - h))
        h = higher
    return r + h > made / m


def one_run_gaussian_epsilon(guesses: Guesses, delta: float, *, confidence: float = 0.95) -> float:
    """The ε at ``delta`` of the largest μ-GDP curve that the guesses refute.

    Raises:
        ValueError: as :func:`one_run_epsilon`.

    Example:
        >>> round(one_run_gaussian_epsilon(Guesses(1000, 200, 190), 1e-5), 1)
        3.9
    """
    _check(guesses, confidence)
    check_budget(1.0, delta)
    norm = scipy.stats.norm

    def refuted(mu: float) -> bool:
        inverse = lambda x: float(norm.cdf(norm.ppf(x) - mu))  # noqa: E731
        return refutes_curve(guesses, inverse, confidence=confidence)

    mu = _largest(refuted, 20.0)
    return float(dp_accounting.get_epsilon_gaussian(1.0 / mu, delta)) if mu else 0.0


def one_run_event_epsilon(
    guesses: Guesses,
    delta: float,
    make_event: MakeEvent,
    adjacency: str,
    *,
    confidence: float = 0.95,
) -> float:
    """The ε at ``delta`` of the noisiest plan of a family that the guesses refute.

    Args:
        guesses: what was guessed.
        delta: where ε is stated.
        make_event: the family, by its noise multiplier; see :func:`event_lower_bound`.
        adjacency: of the claim.
        confidence: as :func:`refutes_curve`.

    Raises:
        ValueError: as :func:`one_run_epsilon`.
    """
    _check(guesses, confidence)
    check_budget(1.0, delta)
    # Rising from 0, and dense where rates are small.
    alpha = np.concatenate([[0.0], np.geomspace(1e-9, 1e-2, 400), np.linspace(0.01, 1.0, 2000)])

    @functools.cache
    def refuted(z: float) -> bool:
        detected: Any = 1.0 - Claim(make_event(z), adjacency).least_false_negatives(alpha)

        def inverse(x: float) -> float:
            # The grid's α below: smaller refutes less.
            return float(alpha[max(0, int(np.searchsorted(detected, x, side="right")) - 1)])

        return refutes_curve(guesses, inverse, confidence=confidence)

    low, high = -3.0, 8.0  # exponents of 2; more noise is refuted sooner
    if not refuted(2.0**high):
        return 0.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(2.0**middle) else (middle, high)
    return Accountant(adjacency).compose(make_event(2.0**high)).epsilon(delta)
