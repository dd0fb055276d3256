"""Sensitivity of gradient noise that cancels a part of the previous step's."""

import math
import numbers

import numpy as np


def check_correlation(correlation: float) -> None:
    """Raises ValueError unless λ is a number from 0 to below 1."""
    is_number = isinstance(correlation, numbers.Real) and not isinstance(correlation, bool)
    if not (is_number and 0.0 <= correlation < 1.0):
        raise ValueError(f"correlation={correlation!r}: allowed is a number from 0 to below 1.")


def correlated_sensitivity(
    correlation: float,
    steps: int,
    *,
    participations: int | None = None,
    min_separation: int = 1,
) -> float:
    """How much larger noise must be, for all steps together, than for one step of one example.

    Step t releases x_t + σ (g_t − λ g_{t−1}), all g standard normal, g_{−1} = 0. With D the matrix
    of ones and, below them, −λ, that is D (C x + σ g), C = D⁻¹, C_ij = λ^(i−j) for i ≥ j: the
    steps together are post-processing of one Gaussian release of C x. That holds also where x_t
    depends on what was released before, as C is lower triangular (S. Denisov et al., Improved
    Differential Privacy for SGD via Optimal Private Linear Operators on Adaptive Streams, 2022).
    An example that takes part in the steps S, with gradients of norm at most 1 there, changes
    C x by at most ‖Σ_{j ∈ S} C_{·j}‖, because C has no negative entry (C. Choquette-Choo et al.,
    Multi-Epoch Matrix Factorization Mechanisms for Private Machine Learning, 2023). Over S of k
    steps that lie b or more apart, that is largest for 0, b, 2b, …, as the entries fall with
    i − j (N. Kalinin and C. Lampert, Banded Square Root Matrix Factorization for Differentially
    Private Model Training, 2024).

    Args:
        correlation: λ, from 0 to below 1.
        steps: how many are released, n.
        participations: k, in how many steps an example takes part at most; None: in as many
            as ``min_separation`` leaves room for. Any random sampling is covered by that.
        min_separation: b, how many steps lie between two of them at least; 1 is any two.

    Raises:
        ValueError: for a number that is not allowed.

    Example:
        >>> correlated_sensitivity(0.0, 100)  # independent noise, in every step
        10.0
        >>> round(correlated_sensitivity(0.5, 100, participations=1), 4)  # 1/√(1 − λ²)
        1.1547
    """
    check_correlation(correlation)
    counts = {"steps": steps, "min_separation": min_separation}
    if participations is not None:
        counts["participations"] = participations
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: allowed is a whole number >= 1.")
    most = -(-steps // min_separation)
    first = np.zeros(steps)
    first[: min(participations or most, most) * min_separation : min_separation] = 1.0
    total = state = 0.0
    for x in first:
        state = correlation * state + x
        total += state * state
    return math.sqrt(total)
