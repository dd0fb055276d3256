"""Sensitivity of noisy attention, rounding included (docs/privacy.md, sections 1 and 2).

Norms are of one output row of one head. ``C`` is the value clip, ``d`` the head
dimension, ``n`` the (public, padded) number of keys, ``m`` the rows of one record.

Rounding. A clipped value held in a short format may exceed C by that format's unit
roundoff; it is counted twice. How the sum over keys rounds depends on who sums, and a
release is the same whoever does: the largest bound counts.

* ``xla`` and ``reference`` add blocks of 128 keys by a binary tree. Between neighbours one
  block and its ancestors round differently, the rest is the same data and so the same
  float. With b = min(128, n), γ = b u / (1 − b u) and u = 2⁻²³ (twice float32's unit
  roundoff, because matrix units truncate), the block contributes 2·γ·b·C (N. J. Higham,
  Accuracy and Stability of Numerical Algorithms, 2002, eq. 3.3) and the ancestors
  4·u·n·C: together they hold less than 3n keys, and an addition outside a matrix product
  errs by half a u.
* Fused kernels add a chunk of the keys one after the other, round its sum to a public unit
  g, and add the chunks as integers, which is exact. One chunk differs. See
  :func:`_chunk_error`.
"""

import dataclasses
import math
from typing import Literal

from dpfa_jax.mechanisms.gradient import adjacency_factor

# Who sums: any implementation, or only those that add chunks of the keys as integers.
Summation = Literal["any", "chunks"]

_BLOCK = 128
_U = 2.0**-23
# Twice the unit roundoff of the format in which a clipped value row is held.
_HELD = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
# Half the spacing of float16's smallest numbers, which have no relative precision. The
# other formats have theirs far below any clip.
_HALF_STEP = {"float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-25}


@dataclasses.dataclass(frozen=True)
class RecordSensitivity:
    """Sensitivity of the joint release (N, C'·L) of one row of one head.

    Attributes:
        joint: Δ, the largest L2 change of (N, C'·L) between neighbours.
        denominator_weight: C', the public weight of L in the joint release.
    """

    joint: float
    denominator_weight: float

    def numerator_std(self, noise_multiplier: float) -> float:
        """σ_N = z Δ."""
        return noise_multiplier * self.joint

    def denominator_std(self, noise_multiplier: float) -> float:
        """σ_L = z Δ / C'."""
        return noise_multiplier * self.joint / self.denominator_weight


def _held_excess(value_clip: float, dtype: str, head_dim: int) -> float:
    """How far a clipped row may exceed C, relative: its format, and the norm's own error."""
    if dtype not in _HELD:
        raise ValueError(f"dtype={dtype!r}: allowed are {tuple(_HELD)}.")
    small = math.sqrt(head_dim) * _HALF_STEP[dtype] / value_clip
    return _HELD[dtype] + small + (head_dim / 2 + 4) * _U


def _summation_error(num_keys: int, head_dim: int, dtype: str, summation: Summation) -> float:
    """Largest difference that rounding makes to Σ w v̄ between neighbours, in units of C."""
    if summation == "chunks":
        # The coarser unit whatever the format: one for all devices. Noise is added to integers.
        return _chunk_error(num_keys, head_dim, "bfloat16")
    block = min(_BLOCK, num_keys)
    gamma = block * _U / (1 - block * _U)
    tree = 2 * gamma * block + 4 * _U * num_keys
    # Triton and TPU kernels turn their sum into a float before they add the noise: a rounding of at
    # most half a u of nC in both neighbours.
    return max(tree, _chunk_error(num_keys, head_dim, dtype, converted=_U * num_keys))


def _chunk_error(num_keys: int, head_dim: int, dtype: str, converted: float = 0.0) -> float:
    """The same for the fused kernels: one chunk, and its rounding to the unit.

    512 keys added one at a time: the t-th addition errs by at most half a u of a sum of
    norm t·C, in both neighbours, u·Σt together. Or 1024 keys by Hopper's matrix units, 16
    at a time: each product and the running sum are cut to a grid at least 2 bits below
    the last of the largest of them and the result to 24 bits, so that the two neighbours'
    errors differ by at most (16/4 + 2)·u of a sum of norm 16t·C. Rounding to the unit
    moves a coordinate by at most g more than before, and the four parts of a sum of
    weights likewise. g <= max(1.02·2⁻¹¹, n·2⁻²⁸)·C on Hopper, n·2⁻²⁸·C elsewhere.

    ``converted`` is what kernels other than Hopper's lose where their sum becomes a float.

    Source: docs/privacy.md, section 1, "Rounding".
    """
    one_by_one = min(num_keys, 512)
    error = _U * one_by_one * (one_by_one + 1) / 2 + converted
    unit = num_keys * 2.0**-28
    if dtype != "float32":  # Hopper's kernels take short formats only.
        keys = 16 * math.ceil(min(num_keys, 1024) / 16)
        error = max(error, (16 / 4 + 2) * _U * keys * (keys + 16) / 32)
        unit = max(unit, 1.02 * 2.0**-11)
    return error + max(math.sqrt(head_dim), 4.0) * unit


def record_sensitivity(
    value_clip: float,
    *,
    head_dim: int,
    num_keys: int,
    dtype: str,
    adjacency: str,
    rows_per_record: int = 1,
    summation: Summation = "any",
) -> RecordSensitivity:
    """Δ and C' for N = Σ w v̄ and L = Σ w with w in [0, 1] and ‖v̄‖ <= C.

    * ``add_remove``: ‖ΔN‖ <= C and |ΔL| <= 1, so Δ = √(C² + C'²). The variance of the
      ratio is least at C' = C·d^(−1/4).
    * ``replace_one``: the worst pair is w = w' = 1 and v̄ = −v̄', Δ = 2C, as long as
      C' <= √3·C; the largest such C' gives L the least noise.
    * A record of m rows moves the sum by at most m times that (triangle inequality).
    * ``summation="chunks"`` leaves out the binary tree, whose rounding grows with n.

    Source: docs/privacy.md, section 1, "Sensitivity".

    Example:
        >>> s = record_sensitivity(1.0, head_dim=16, num_keys=1, dtype="float32",
        ...                        adjacency="add_remove")
        >>> round(s.denominator_weight, 3), round(s.joint, 3)
        (0.5, 1.118)
    """
    error = _summation_error(num_keys, head_dim, dtype, summation)
    c = value_clip * (1 + _held_excess(value_clip, dtype, head_dim) + error)
    weight = 1 + error
    if adjacency_factor(adjacency) == 1:
        c_l = value_clip * head_dim**-0.25
        joint = math.hypot(c, c_l * weight)
    else:
        c_l = math.sqrt(3.0) * value_clip
        # Both records at w = 1: L moves by its rounding alone.
        joint = max(math.hypot(2 * c, c_l * 2 * error), math.hypot(c, c_l * weight))
    return RecordSensitivity(rows_per_record * joint, c_l)


def sequence_sensitivity(value_clip: float, *, head_dim: int, num_keys: int, dtype: str) -> float:
    """Δ = 2C for one softmax row over clipped values when the whole sequence is replaced.

    A row is a convex combination of rows of norm at most C, so it has norm at most C
    itself, before and after. Rounding: values and weights are each held in ``dtype``,
    and normalising and summing n float32 terms errs by at most 2·n·u.

    Source: docs/privacy.md, section 2.

    Example:
        >>> round(sequence_sensitivity(1.0, head_dim=64, num_keys=64, dtype="float32"), 3)
        2.0
    """
    held = 1 + _held_excess(value_clip, dtype, head_dim)
    return 2 * value_clip * held * (1 + _HELD[dtype] + 2 * num_keys * _U)
