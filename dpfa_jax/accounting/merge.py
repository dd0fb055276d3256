"""Fewer kinds of events, so that a composition of many different ones answers at once.

Gaussians add up exactly: 1/z². Sampled Gaussians do not, and building the privacy loss
distribution of each kind takes up to a second. Of those, neighbours are counted as one kind that
costs at least as much as each: with the least noise and the largest sampling probability among
them.

That is an upper bound, whatever is composed. Less noise: the noisier release is the other
one plus more noise. A larger sampling probability q: a dominating pair of the sampled Gaussian is
((1−q)A + qB, (1−q)A + qC), under ``add_remove`` with C = A; for q′ < q keep what is drawn with
probability q′/q and draw from A otherwise, and it is the pair of q′. So what is counted dominates
what is released, and domination survives composition (J. Dong, A. Roth, W. J. Su, Gaussian
differential privacy, 2022, sections 2 and 3).
"""

import math
from typing import Any, NamedTuple

import dp_accounting
import numpy as np

Counts = dict[dp_accounting.DpEvent, int]

# More kinds of sampled events than this are merged, to at most as many.
MOST_KINDS = 16
# Merging stops to refine when it costs less than this, relative.
_ENOUGH = 2e-3


def merge_gaussians(counts: Counts) -> Counts:
    """``counts`` with all Gaussian events made one: 1/z² adds up (docs/privacy.md, section 0).

    A single kind is left as it is.
    """
    gaussians = {
        e: n for e, n in counts.items() if isinstance(e, dp_accounting.GaussianDpEvent) and n
    }
    if len(gaussians) < 2 or any(not e.noise_multiplier > 0 for e in gaussians):
        return {e: n for e, n in counts.items() if n}
    precision = math.fsum(n / e.noise_multiplier**2 for e, n in gaussians.items())
    merged = dp_accounting.GaussianDpEvent(1 / math.sqrt(precision))
    return {merged: 1} | {e: n for e, n in counts.items() if n and e not in gaussians}


class _Sampled(NamedTuple):
    """A sampled Gaussian taken apart; kinds of equal ``group`` can be merged."""

    group: Any
    probability: float
    noise: float

    @classmethod
    def of(cls, event: dp_accounting.DpEvent) -> "_Sampled | None":
        match event:
            case dp_accounting.PoissonSampledDpEvent(
                sampling_probability=q, event=dp_accounting.GaussianDpEvent(noise_multiplier=z)
            ) if 0 < q <= 1 and z > 0:
                return cls(None, q, z)
            case dp_accounting.TruncatedSubsampledGaussianDpEvent(
                sampling_probability=q, noise_multiplier=z
            ) if z > 0:
                return cls((event.dataset_size, q, event.truncated_batch_size), q, z)
        return None

    def event(self, probability: float, noise: float) -> dp_accounting.DpEvent:
        """The event of this group with other numbers."""
        if self.group is None:
            inner = dp_accounting.GaussianDpEvent(noise)
            return dp_accounting.PoissonSampledDpEvent(probability, inner)
        size, q, batch = self.group
        return dp_accounting.TruncatedSubsampledGaussianDpEvent(size, q, batch, noise)


def _cost(probability: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """A measure of cost to merge by: about the variance of the privacy loss."""
    return np.asarray(probability**2 * np.expm1(np.minimum(noise**-2, 700.0)))


class _Box:
    """Kinds counted as one, and the best way to make two of them."""

    def __init__(self, kinds: np.ndarray):
        """``kinds``: rows of probability, noise, count and number."""
        self.kinds = kinds
        self.probability = float(kinds[:, 0].max())
        self.noise = float(kinds[:, 1].min())
        self.count = float(kinds[:, 2].sum())
        whole = float(_cost(kinds[:, 0].max(), kinds[:, 1].min())) * self.count
        self.excess = whole - float(np.sum(_cost(kinds[:, 0], kinds[:, 1]) * kinds[:, 2]))
        self.gain, self.parts = 0.0, (kinds, kinds[:0])
        for order in (np.argsort(kinds[:, 1]), np.argsort(-kinds[:, 0])):
            ordered = kinds[order]
            first = _running_cost(ordered)[:-1]
            second = _running_cost(ordered[::-1])[-2::-1]
            if first.size and whole - (least := float(np.min(first + second))) > self.gain:
                cut = int(np.argmin(first + second)) + 1
                self.gain, self.parts = whole - least, (ordered[:cut], ordered[cut:])


def _running_cost(kinds: np.ndarray) -> np.ndarray:
    """The cost of the first 1, 2, … kinds counted as one."""
    probability = np.maximum.accumulate(kinds[:, 0])
    return _cost(probability, np.minimum.accumulate(kinds[:, 1])) * np.cumsum(kinds[:, 2])


def merge_sampled(counts: Counts, most: int = MOST_KINDS) -> Counts:
    """``counts`` with at most ``most`` kinds of sampled Gaussians, which cost at least as much.

    Truncated ones are merged with those of equal sizes and sampling probability only: there may be
    more kinds left, one for each of these.

    Example:
        >>> def step(z):
        ...     return dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(z))
        >>> merged = merge_sampled({step(1 + i / 1000): 1 for i in range(1000)})
        >>> len(merged), sum(merged.values()), step(1) in merged
        (16, 1000, True)
    """
    events = list(counts)
    taken = [_Sampled.of(e) for e in events]
    groups: dict[Any, list[int]] = {}
    for i, sampled in enumerate(taken):
        if sampled is not None:
            groups.setdefault(sampled.group, []).append(i)
    boxes = [
        _Box(np.array([(*taken[i][1:], counts[events[i]], i) for i in members]))  # type: ignore[index]
        for members in groups.values()
    ]
    enough = _ENOUGH * sum(
        float(np.sum(_cost(b.kinds[:, 0], b.kinds[:, 1]) * b.kinds[:, 2])) for b in boxes
    )
    while len(boxes) < most and sum(b.excess for b in boxes) > enough:
        worst = max(range(len(boxes)), key=lambda i: boxes[i].gain)
        if not boxes[worst].gain > 0:
            break
        boxes[worst : worst + 1] = [_Box(part) for part in boxes[worst].parts]
    merged = {e: n for e, n in counts.items() if _Sampled.of(e) is None}
    for box in boxes:
        members = [int(i) for i in box.kinds[:, 3]]
        like = taken[members[0]]
        assert like is not None
        event = like.event(box.probability, box.noise)
        merged[event] = merged.get(event, 0) + sum(counts[events[i]] for i in members)
    return merged


def sampled_kinds(counts: Counts) -> int:
    """How many kinds of events there are besides Gaussians."""
    return sum(not isinstance(e, dp_accounting.GaussianDpEvent) for e in counts)


def wide_interval(counts: Counts, interval: float) -> float:
    """A width of bins, at least ``interval``, that suits the losses of these events.

    Bins blur a loss of standard deviation s by a variance of about h²/4, or h·s where they are
    wider than it. The widest h counts that blurs everything together by less than 2 %; it is
    never above 1e-3. A wider bin answers a larger ε, never a smaller one.
    """
    parts = [(s, n) for e, n in counts.items() if (s := _Sampled.of(e)) is not None]
    if not parts:
        return interval
    variance = _cost(*np.array([s[1:] for s, _ in parts]).T)
    number = np.array([float(n) for _, n in parts])
    for h in (1e-3, 5e-4, 2.5e-4):
        blur = np.minimum(h * h / 4, h * np.sqrt(variance))
        if h > interval and np.sum(blur * number) < 0.02 * np.sum(variance * number):
            return h
    return interval
