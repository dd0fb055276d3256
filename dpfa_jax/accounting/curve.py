"""ε after each step of a plan, for progress bars and plots."""

import dp_accounting

from dpfa_jax.accounting.accountant import Accountant


def epsilon_curve(
    event: dp_accounting.DpEvent, steps: list[int], *, delta: float, adjacency: str
) -> list[float]:
    """ε at ``delta`` after each number of ``steps`` repetitions of ``event``.

    Example:
        >>> curve = epsilon_curve(dp_accounting.GaussianDpEvent(1.0), [0, 1], delta=1e-5,
        ...                       adjacency="add_remove")
        >>> [round(x, 2) for x in curve]
        [0.0, 4.38]
    """
    return [Accountant(adjacency).compose(event, n).epsilon(delta) if n else 0.0 for n in steps]
