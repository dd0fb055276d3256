"""The event of a whole run whose noise is correlated between steps."""

import dp_accounting

from dpfa_jax.mechanisms import correlated_sensitivity


def correlated_noise_event(
    noise_multiplier: float,
    correlation: float,
    steps: int,
    *,
    participations: int | None = None,
    min_separation: int = 1,
) -> dp_accounting.GaussianDpEvent:
    """What ``add_noise(..., correlation=λ)`` releases in ``steps`` updates, all together.

    One Gaussian release with the noise multiplier z/s, s from
    :func:`dpfa_jax.mechanisms.correlated_sensitivity`. Sampling does not amplify it: with noise
    that is tied to the previous step's, the steps are no independent releases, and no
    accountant for a Poisson sample of each step applies.

    Args:
        noise_multiplier: z of ``add_noise``.
        correlation: λ.
        steps: updates made with one key; runs with different keys compose.
        participations: in how many steps an example takes part at most. The data order must
            ensure it; None assumes nothing.
        min_separation: how far apart these steps are at least; likewise.

    Raises:
        ValueError: for a number that is not allowed.

    Example:
        >>> correlated_noise_event(4.0, 0.0, 16)
        GaussianDpEvent(noise_multiplier=1.0)
    """
    if not 0.0 <= noise_multiplier < float("inf"):
        raise ValueError(f"noise_multiplier={noise_multiplier!r}: allowed is a finite number >= 0.")
    larger = correlated_sensitivity(
        correlation, steps, participations=participations, min_separation=min_separation
    )
    return dp_accounting.GaussianDpEvent(noise_multiplier / larger)
