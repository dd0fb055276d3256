"""A lower bound on μ, and so on ε, from two samples of an attacker's scores.

The attacker guesses "neighbour 1" where a score lies above a threshold. With α the chance of
that under neighbour 0 and β the chance of the contrary under neighbour 1, a mechanism that
is μ-GDP allows no attack with β < Φ(Φ⁻¹(1 − α) − μ). Error rates that were counted so bound
μ from below. docs/auditing.md has the proof of coverage.

Sources: J. Dong, A. Roth and W. Su, Gaussian Differential Privacy, 2022, equation 6;
C. Clopper and E. Pearson, The use of confidence or fiducial limits, 1934; M. Nasr et al.,
Tight Auditing of Differentially Private Machine Learning, 2023, section 4 (the two together).
"""

import dataclasses
import math

import dp_accounting
import numpy as np
import scipy.stats
from jaxtyping import Float

from dpfa_jax.accounting.accountant import check_budget

# The first tenth of each sample chooses the threshold; the rest is counted.
_PILOT = 10


@dataclasses.dataclass(frozen=True)
class GdpBound:
    """What :func:`gdp_lower_bound` found.

    Attributes:
        mu: the lower bound on μ, at least 0.
        confidence: the chance, or more, that such a bound is not above the true μ.
        threshold: scores above it count as neighbour 1.
        false_positives: counted scores of neighbour 0 above the threshold.
        false_negatives: counted scores of neighbour 1 at or below it.
        negatives: counted scores of neighbour 0.
        positives: counted scores of neighbour 1.
    """

    mu: float
    confidence: float
    threshold: float
    false_positives: int
    false_negatives: int
    negatives: int
    positives: int

    def epsilon(self, delta: float) -> float:
        """The lower bound on ε at ``delta``: that of a μ-GDP mechanism."""
        return gdp_epsilon(self.mu, delta)

    def again(self, negatives: np.ndarray, positives: np.ndarray, confidence: float) -> "GdpBound":
        """The same for other scores, or another confidence."""
        return gdp_lower_bound(negatives, positives, confidence=confidence)


def check_audit(samples: int, mu: float) -> None:
    """Raises ValueError unless an audit can take these: samples >= 20, a finite μ > 0."""
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 2 * _PILOT:
        raise ValueError(f"samples={samples!r}: allowed is a whole number >= {2 * _PILOT}.")
    if not (isinstance(mu, int | float) and math.isfinite(mu) and mu > 0):
        raise ValueError(f"mu={mu!r}: allowed is a finite number > 0.")


def gdp_epsilon(mu: float, delta: float) -> float:
    """The least ε such that μ-GDP implies (ε, δ); 0 for small μ.

    Source: J. Dong, A. Roth and W. Su, 2022, corollary 2.13; computed by ``dp_accounting``.

    Raises:
        ValueError: for a negative μ, or a δ outside (0, 1).

    Example:
        >>> round(gdp_epsilon(1.0, 1e-5), 3), gdp_epsilon(0.0, 1e-5)
        (4.377, 0.0)
    """
    check_budget(1.0, delta)
    if not (math.isfinite(mu) and mu >= 0):
        raise ValueError(f"mu={mu!r}: allowed is a finite number >= 0.")
    return float(dp_accounting.get_epsilon_gaussian(1.0 / mu, delta)) if mu else 0.0


def gdp_mu(epsilon: float, delta: float) -> float:
    """The μ at which μ-GDP costs (ε, δ): the inverse of :func:`gdp_epsilon`.

    Raises:
        ValueError: for an ε that is not above 0, or a δ outside (0, 1).

    Example:
        >>> round(gdp_mu(4.377, 1e-5), 3)
        1.0
    """
    check_budget(epsilon, delta)
    return 1.0 / float(dp_accounting.get_sigma_gaussian(epsilon, delta))


def _upper_rate(errors: int, trials: int, miss: float) -> float:
    """Clopper and Pearson: above the true rate except with probability ``miss``."""
    if errors == trials:
        return 1.0
    return float(scipy.stats.beta.isf(miss, errors + 1, trials - errors))


def _checked(name: str, scores: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or scores.size < 2 * _PILOT:
        raise ValueError(
            f"{name} has shape {scores.shape}: one axis of at least {2 * _PILOT} scores is needed."
        )
    if np.isnan(scores).any():
        raise ValueError(f"{name}: {np.isnan(scores).sum()} scores are NaN; allowed are numbers.")
    return scores


def gdp_lower_bound(
    negatives: Float[np.ndarray, "n"],
    positives: Float[np.ndarray, "m"],
    *,
    confidence: float = 0.99,
) -> GdpBound:
    """A lower bound on μ that holds with probability ``confidence``.

    Guarantee. If the scores are independent draws and the mechanism behind them is μ-GDP,
    the bound is at most μ with probability at least ``confidence``, for every n and m.

    Args:
        negatives: scores under neighbour 0, in an order that does not depend on them; the
            first tenth chooses the threshold (midway between the medians) and is not counted.
        positives: likewise under neighbour 1. Attacks give them the larger scores.
        confidence: above 0, below 1. Half of the rest goes to each error rate.

    Raises:
        ValueError: for fewer than 20 scores, a NaN, or a confidence that is not allowed.

    Example:
        >>> random = np.random.default_rng(0)
        >>> bound = gdp_lower_bound(random.normal(size=20_000), 1.0 + random.normal(size=20_000))
        >>> 0.9 < bound.mu < 1.0
        True
    """
    pilots, (negatives, positives) = split_scores(negatives, positives, confidence)
    threshold = float(sum(np.median(x) for x in pilots) / 2)
    false_positives = int((negatives > threshold).sum())
    false_negatives = int((positives <= threshold).sum())
    alpha, beta = upper_rates(
        false_positives, false_negatives, negatives.size, positives.size, confidence
    )
    mu = max(0.0, float(scipy.stats.norm.isf(alpha) - scipy.stats.norm.ppf(beta)))
    return GdpBound(
        mu,
        confidence,
        threshold,
        false_positives,
        false_negatives,
        int(negatives.size),
        int(positives.size),
    )


def split_scores(
    negatives: Float[np.ndarray, "n"], positives: Float[np.ndarray, "m"], confidence: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first tenths, which choose a threshold, and the rest, which is counted.

    Raises:
        ValueError: for fewer than 20 scores, a NaN, or a confidence that is not allowed.
    """
    if not (isinstance(confidence, float) and 0 < confidence < 1):
        raise ValueError(f"confidence={confidence!r}: allowed is a number above 0 and below 1.")
    both = [_checked("negatives", negatives), _checked("positives", positives)]
    cuts = [x.size // _PILOT for x in both]
    pilots = [x[:n] for x, n in zip(both, cuts, strict=True)]
    return pilots, [x[n:] for x, n in zip(both, cuts, strict=True)]


def upper_rates(
    false_positives: int, false_negatives: int, negatives: int, positives: int, confidence: float
) -> tuple[float, float]:
    """Limits that both error rates keep below, together with probability ``confidence``."""
    miss = (1.0 - confidence) / 2
    return (
        _upper_rate(false_positives, negatives, miss),
        _upper_rate(false_negatives, positives, miss),
    )
