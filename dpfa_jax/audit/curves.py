"""A lower bound on ε for claims whose trade-off is not a Gaussian's, such as sampled DP-SGD.

A claim is the accountant's δ(ε). It forbids every attack whose error rates lie under its
trade-off curve; counted errors, with Clopper and Pearson's limits, so refute whole curves. In
a family of mechanisms ordered by their noise multiplier, the refuted ones are those with more
noise than some z, and the ε of that z bounds the ε of what runs. docs/auditing.md has the proof.

Sources: P. Kairouz, S. Oh and P. Viswanath, The composition theorem for differential privacy,
2015, theorem 2.1 (what (ε, δ) forbids); M. Nasr et al., Tight Auditing of Differentially Private
Machine Learning, 2023, section 4.3 (curves of privacy loss distributions).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import dp_accounting
import numpy as np
from jaxtyping import Float

from dpfa_jax.accounting import Accountant
from dpfa_jax.audit import bounds

MakeEvent = Callable[[float], dp_accounting.DpEvent]
# ε at which δ is asked for. Fewer points make the claimed curve lower: the bound stays valid.
_EPSILONS = np.concatenate([[1e-6], np.geomspace(0.01, 30.0, 80)])
_INTERVAL = 1e-2
_CANDIDATES = np.linspace(0.04, 0.96, 17)


class Claim:
    """The (ε, δ) curve that an accountant states for an event.

    Args:
        event: what is claimed.
        adjacency: ``'add_remove'`` or ``'replace_one'``.

    Example:
        >>> claim = Claim(dp_accounting.GaussianDpEvent(1.0), "add_remove")
        >>> bool(abs(claim.least_false_negatives(np.array([0.5]))[0] - 0.1587) < 0.002)
        True
    """

    def __init__(self, event: dp_accounting.DpEvent, adjacency: str):
        accountant = Accountant(adjacency, interval=_INTERVAL).compose(event)
        self._deltas = np.array([accountant.delta(float(x)) for x in _EPSILONS])

    def least_false_negatives(self, false_positives: Float[np.ndarray, "n"]) -> np.ndarray:
        """The least β that the claim allows at each α, for either guess being the first."""
        alpha = np.asarray(false_positives, np.float64)[:, None]
        rest = 1.0 - self._deltas - np.exp(_EPSILONS) * alpha
        other = np.exp(-_EPSILONS) * (1.0 - self._deltas - alpha)
        return np.maximum(0.0, np.maximum(rest, other).max(axis=1))


@dataclasses.dataclass(frozen=True)
class EventBound:
    """What :func:`event_lower_bound` found; the fields of :class:`GdpBound`, and these.

    Attributes:
        noise_multiplier: no mechanism of the family with more noise fits the counts.
        make_event: the family.
        adjacency: of the claim.
    """

    noise_multiplier: float
    make_event: MakeEvent = dataclasses.field(repr=False, compare=False)
    adjacency: str
    confidence: float
    threshold: float
    false_positives: int
    false_negatives: int
    negatives: int
    positives: int

    def epsilon(self, delta: float) -> float:
        """The lower bound on ε at ``delta``; 0 where the counts refute nothing."""
        if math.isinf(self.noise_multiplier):
            return 0.0
        event = self.make_event(self.noise_multiplier)
        return Accountant(self.adjacency).compose(event).epsilon(delta)

    def again(
        self, negatives: np.ndarray, positives: np.ndarray, confidence: float
    ) -> "EventBound":
        """The same for other scores, or another confidence."""
        return event_lower_bound(
            negatives, positives, self.make_event, self.adjacency, confidence=confidence
        )


def event_lower_bound(
    negatives: Float[np.ndarray, "n"],
    positives: Float[np.ndarray, "m"],
    make_event: MakeEvent,
    adjacency: str,
    *,
    confidence: float = 0.99,
) -> EventBound:
    """A lower bound on the privacy loss within a family that its noise multiplier orders.

    Guarantee. If the scores are independent draws and the mechanism satisfies the (ε, δ)
    curve of ``make_event(z)``, the bound's noise multiplier is at least z with probability at
    least ``confidence``, for every n and m. The family must lose privacy as z falls.

    Args:
        negatives: scores under neighbour 0; the first tenth chooses the threshold.
        positives: scores under neighbour 1, the larger ones.
        make_event: the family: a noise multiplier to the event of the whole release.
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        confidence: above 0, below 1. Half of the rest goes to each error rate.

    Raises:
        ValueError: as :func:`gdp_lower_bound`.

    Example:
        >>> random = np.random.default_rng(0)
        >>> scores = random.normal(size=20_000), 1.0 + random.normal(size=20_000)
        >>> bound = event_lower_bound(*scores, dp_accounting.GaussianDpEvent, "add_remove")
        >>> 1.0 < bound.noise_multiplier < 1.2
        True
    """
    pilots, (negatives, positives) = bounds.split_scores(negatives, positives, confidence)

    @functools.cache
    def claim(z: float) -> Claim:
        return Claim(make_event(z), adjacency)

    def refuted(z: float, alpha: float, beta: float) -> bool:
        return beta < claim(z).least_false_negatives(np.array([alpha]))[0]

    def most_noise(alpha: float, beta: float, tolerance: float) -> float:
        """The z of the curve that the point lies on, to a relative tolerance, from above."""
        low, high = -3.0, 5.0  # exponents of 2: the same values for each point, so cached ones
        if not refuted(2.0**high, alpha, beta):
            return math.inf
        while high - low > tolerance:
            middle = (low + high) / 2
            low, high = (low, middle) if refuted(2.0**middle, alpha, beta) else (middle, high)
        return float(2.0**high)  # refuted itself: what runs has no more noise than this

    # The threshold that gives the best bound from the pilot itself: it is wary of rare errors.
    best = (math.inf, 0.0)
    for threshold in np.unique(np.quantile(np.concatenate(pilots), _CANDIDATES)):
        *_, alpha, beta = _errors(pilots[0], pilots[1], threshold, confidence)
        best = min(best, (most_noise(alpha, beta, 0.05), float(threshold)))
    threshold = best[1]
    false_positives, false_negatives, alpha, beta = _errors(
        negatives, positives, threshold, confidence
    )
    return EventBound(
        most_noise(alpha, beta, 5e-3),
        make_event,
        adjacency,
        confidence,
        threshold,
        false_positives,
        false_negatives,
        int(negatives.size),
        int(positives.size),
    )


def _errors(
    negatives: np.ndarray, positives: np.ndarray, threshold: float, confidence: float
) -> tuple[int, int, float, float]:
    """Both counts of errors at a threshold, and both limits of their rates."""
    counts = int((negatives > threshold).sum()), int((positives <= threshold).sum())
    alpha, beta = bounds.upper_rates(
        counts[0], counts[1], negatives.size, positives.size, confidence
    )
    return counts[0], counts[1], alpha, beta
