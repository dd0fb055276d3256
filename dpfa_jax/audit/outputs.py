"""Which outputs can be reached from only one neighbour: the last digits of floating point.

Real noise reaches every number from every input. Floating-point noise may not: fl(x + n) has
other last digits for other x, and one digit then tells the neighbours apart (I. Mironov, On
significance of the least significant bits for differential privacy, 2012). A release on a
public grid, or in bfloat16, whose cells are far wider than the noise's own digits, has no
such digits (docs/privacy.md, section 5).
"""

import numpy as np
from jaxtyping import Float


def off_grid(values: Float[np.ndarray, "*s"], spacing: float) -> float:
    """The share of values that are no multiples of ``spacing``, a power of two: exact.

    Example:
        >>> off_grid(np.array([0.5, 0.25, 0.3]), 0.25)
        0.3333333333333333
    """
    cells = np.asarray(values, np.float64) / spacing
    return float(np.mean(cells != np.round(cells)))


def one_sided(
    first: Float[np.ndarray, "n"], second: Float[np.ndarray, "m"], *, least: int
) -> float:
    """The share of draws, of both samples, at values that one has often and the other never.

    A value that both neighbours reach, with probabilities that differ by a factor of at most r,
    and that one sample has ``least`` times, is missing from the other with probability about
    exp(−least / r): with least = 30 r that is nothing, and the answer is 0. Give only outputs
    for which r is small.

    Args:
        first: outputs under neighbour 0.
        second: as many under neighbour 1.
        least: how often is often.

    Raises:
        ValueError: for samples of different size, or least < 1.

    Example:
        >>> one_sided(np.array([1.0, 1.0, 2.0]), np.array([2.0, 2.0, 2.0]), least=2)
        0.3333333333333333
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"first {first.shape}, second {second.shape}: one axis, equally many.")
    if not isinstance(least, int) or least < 1:
        raise ValueError(f"least={least!r}: allowed is a whole number >= 1.")
    alone = 0
    for one, other in ((first, second), (second, first)):
        values, counts = np.unique(one, return_counts=True)
        alone += int(counts[(counts >= least) & ~np.isin(values, other)].sum())
    return alone / (first.size + second.size)
