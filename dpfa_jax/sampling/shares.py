"""A batch dealt to several hosts: each loads its own rows, and all rows are loaded once.

Every host draws the whole batch from the same key, which costs no communication, and takes
its share. What is dealt is a permutation of the padded rows: no example can be lost or come
twice, however many hosts there are.
"""

import numbers
from typing import NamedTuple

import numpy as np


def _positions(rows: int, parts: int) -> np.ndarray:
    """Which row of the batch stands at each place of the dealt one."""
    return np.arange(rows).reshape(rows // parts, parts).T.reshape(-1)


def deal[Batch: NamedTuple](batch: Batch, parts: int) -> Batch:
    """The batch in the order of its parts, each a block of rows with its padding last.

    Row j of the batch goes to part j mod ``parts``, so that real examples are spread evenly.

    Args:
        batch: of ``PoissonSampler`` or ``UserSampler``: arrays with the padded rows first.
        parts: how many hosts, or devices.

    Raises:
        ValueError: if the rows do not divide into so many parts.

    Example:
        >>> from dpfa_jax.sampling import PoissonBatch
        >>> batch = PoissonBatch(np.array([3, 5, 8, 0]), np.array([False, False, False, True]))
        >>> deal(batch, 2).indices.tolist()
        [3, 8, 5, 0]
    """
    rows = len(batch[0])
    whole = isinstance(parts, numbers.Integral) and not isinstance(parts, bool)
    if not whole or parts < 1 or rows % int(parts):
        raise ValueError(
            f"parts={parts!r}: allowed is a whole number >= 1 that divides the batch's {rows} rows."
        )
    order = _positions(rows, int(parts))
    return type(batch)(*(np.asarray(x)[order] for x in batch))


def share[Batch: NamedTuple](batch: Batch, part: int, parts: int) -> Batch:
    """The rows of one part: what one host loads. The shares in turn are ``deal(batch, parts)``.

    Args:
        batch: as for :func:`deal`.
        part: which, from 0; ``jax.process_index()`` for hosts.
        parts: how many; ``jax.process_count()``.

    Raises:
        ValueError: as :func:`deal`, and for a part that there is not.

    Example:
        >>> from dpfa_jax.sampling import PoissonBatch
        >>> batch = PoissonBatch(np.array([3, 5, 8, 0]), np.array([False, False, False, True]))
        >>> share(batch, 1, 2)
        PoissonBatch(indices=array([5, 0]), is_padding_example=array([False,  True]))
    """
    dealt = deal(batch, parts)
    if not isinstance(part, numbers.Integral) or not 0 <= part < parts:
        raise ValueError(f"part={part!r}: allowed is a whole number from 0 to {parts - 1}.")
    size = len(batch[0]) // parts
    return type(batch)(*(x[part * size : (part + 1) * size] for x in dealt))
