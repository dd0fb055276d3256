"""What an audit found, and whether the claim stands."""

import dataclasses
import functools
import math
from typing import Any

import dp_accounting
import numpy as np
from jaxtyping import Float

from dpfa_jax.accounting import Accountant
from dpfa_jax.audit.bounds import GdpBound, gdp_lower_bound, gdp_mu
from dpfa_jax.audit.curves import EventBound, MakeEvent, event_lower_bound

# A score that is not a number tells the neighbours apart like a very large one.
_NOT_A_NUMBER = 1e30


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """One attack on one claim.

    Attributes:
        name: what was attacked.
        adjacency: of the claim.
        delta: δ at which ε is compared.
        claim: ε at ``delta``, as the library's own event and accountant state it.
        event: the claim itself.
        bound: the lower bound, with its counts.
        is_tight: whether the attack can reach the claim, so that a bound far below it means
            wasted noise.
        negatives: every score under neighbour 0.
        positives: every score under neighbour 1.
    """

    name: str
    adjacency: str
    delta: float
    claim: float
    event: dp_accounting.DpEvent = dataclasses.field(repr=False, compare=False)
    bound: GdpBound | EventBound
    is_tight: bool
    negatives: Float[np.ndarray, "n"] = dataclasses.field(repr=False, compare=False)
    positives: Float[np.ndarray, "m"] = dataclasses.field(repr=False, compare=False)

    @property
    def samples(self) -> int:
        """Scores of each neighbour, the smaller number if they differ."""
        return min(self.negatives.size, self.positives.size)

    @functools.cached_property
    def epsilon(self) -> float:
        """The lower bound on ε at ``delta``."""
        return self.bound.epsilon(self.delta)

    @property
    def ratio(self) -> float:
        """The lower bound on ε over the claim; a finding above 1 refutes it."""
        return self.epsilon / self.claim

    @property
    def least_ratio(self) -> float:
        """The ratio under which a tight attack fails: 0.95 from 10⁶ samples, 0.85 from 10⁴."""
        if not self.is_tight or self.samples < 10_000:
            return 0.0
        return 0.95 if self.samples >= 1_000_000 else 0.85

    @property
    def is_broken(self) -> bool:
        """Whether the bound passes the claim: less privacy than stated."""
        return self.epsilon > self.claim

    @property
    def is_wasteful(self) -> bool:
        """Whether a tight attack stays too far below the claim: more noise than stated."""
        return self.ratio < self.least_ratio

    @property
    def passed(self) -> bool:
        """Whether the claim stands."""
        return not (self.is_broken or self.is_wasteful)

    @property
    def verdict(self) -> str:
        """One word: ``'holds'``, ``'broken'`` or ``'wasteful'``."""
        return "broken" if self.is_broken else "wasteful" if self.is_wasteful else "holds"

    def at(self, confidence: float) -> "AuditResult":
        """The same scores judged at another confidence.

        Raises:
            ValueError: as :func:`gdp_lower_bound`.
        """
        bound = self.bound.again(self.negatives, self.positives, confidence)
        return dataclasses.replace(self, bound=bound)

    def to_json(self) -> dict[str, Any]:
        """Everything but the scores, for a program."""
        return {
            "name": self.name,
            "adjacency": self.adjacency,
            "verdict": self.verdict,
            "delta": self.delta,
            "epsilon_claimed": self.claim,
            "epsilon_lower_bound": self.epsilon,
            "ratio": self.ratio,
            "least_ratio": self.least_ratio,
            **self._parameter(),
            "confidence": self.bound.confidence,
            "samples": self.samples,
            "counted": [self.bound.negatives, self.bound.positives],
            "false_positives": self.bound.false_positives,
            "false_negatives": self.bound.false_negatives,
            "threshold": self.bound.threshold,
            "is_tight": self.is_tight,
        }

    def _parameter(self) -> dict[str, Any]:
        """The bound in the terms of its family, and the claim in the same."""
        if isinstance(self.bound, GdpBound):
            mu = gdp_mu(self.claim, self.delta)
            return {"mu_claimed": mu, "mu_lower_bound": self.bound.mu}
        return {"noise_multiplier_upper_bound": self.bound.noise_multiplier}


def judge(
    name: str,
    event: dp_accounting.DpEvent,
    adjacency: str,
    negatives: Float[np.ndarray, "n"],
    positives: Float[np.ndarray, "m"],
    *,
    delta: float = 1e-5,
    confidence: float = 0.99,
    is_tight: bool = True,
    make_event: MakeEvent | None = None,
) -> AuditResult:
    """Compares what the scores prove with what ``event`` claims.

    Args:
        name: what was attacked.
        event: the claim; a composition of Gaussian releases, unless ``make_event`` is given.
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        negatives: scores under neighbour 0; NaN counts as telling the neighbours apart.
        positives: scores under neighbour 1.
        delta: where ε is compared.
        confidence: of the lower bound.
        is_tight: whether the attack can reach the claim.
        make_event: the family of ``event``, by its noise multiplier; see
            :func:`event_lower_bound`.

    Raises:
        ValueError: as :func:`gdp_lower_bound`; for a claim that is no finite ε > 0.

    Example:
        >>> random = np.random.default_rng(0)
        >>> scores = random.normal(size=(2, 20_000))
        >>> result = judge("half the noise", dp_accounting.GaussianDpEvent(1.0), "add_remove",
        ...                scores[0], scores[1] + 2.0)
        >>> result.verdict
        'broken'
    """
    claim = Accountant(adjacency).compose(event).epsilon(delta)
    if not (math.isfinite(claim) and claim > 0):
        raise ValueError(f"event={event}: claims epsilon={claim}; a finite number > 0 is needed.")
    negatives, positives = np.asarray(negatives, np.float64), np.asarray(positives, np.float64)
    if np.isnan(negatives).any() or np.isnan(positives).any():
        # An attacker sees that something is not a number.
        sides = (np.isnan(negatives).mean(), np.isnan(positives).mean())
        sign = 1.0 if sides[1] >= sides[0] else -1.0
        negatives, positives = (
            np.nan_to_num(x, nan=sign * _NOT_A_NUMBER) for x in (negatives, positives)
        )
    return AuditResult(
        name=name,
        adjacency=adjacency,
        delta=delta,
        claim=claim,
        event=event,
        bound=gdp_lower_bound(negatives, positives, confidence=confidence)
        if make_event is None
        else event_lower_bound(negatives, positives, make_event, adjacency, confidence=confidence),
        is_tight=is_tight,
        negatives=negatives,
        positives=positives,
    )
