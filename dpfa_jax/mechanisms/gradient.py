"""Sensitivity of a sum of clipped gradients."""

from typing import Literal

Adjacency = Literal["add_remove", "replace_one"]
ADJACENCIES = ("add_remove", "replace_one")


def adjacency_factor(adjacency: str) -> int:
    """How many clipped vectors differ between neighbours: 1 or 2.

    Raises:
        ValueError: for another word.

    Example:
        >>> adjacency_factor("replace_one")
        2
    """
    if adjacency not in ADJACENCIES:
        raise ValueError(f"adjacency={adjacency!r}: allowed are {ADJACENCIES}.")
    return 2 if adjacency == "replace_one" else 1


def gradient_sensitivity(l2_clip_norm: float, adjacency: str) -> float:
    """Largest L2 change of Σ clip(g_i, C): C, or 2C when one example replaces another.

    Source: M. Abadi et al., Deep Learning with Differential Privacy (2016), section 3.1;
    docs/privacy.md, section 4.
    """
    return adjacency_factor(adjacency) * l2_clip_norm
