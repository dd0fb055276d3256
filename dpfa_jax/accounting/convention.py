"""One convention for noise multipliers, and the one place where it is translated.

An event's ``noise_multiplier`` is z = σ/Δ with Δ the sensitivity under the stated adjacency,
so that one Gaussian release with z = 1 has μ = 1 (ε = 4.38 at δ = 1e-5) under either
adjacency. ``dp_accounting``'s PLD accountant reads z as σ/C under ``REPLACE_ONE``, where C
bounds one record and Δ = 2C (its RDP accountant reads it as σ/Δ: the two differ by a factor
of 2 there).
"""

import dp_accounting


def to_replace_one(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """``event`` with its multipliers in units of C = Δ/2, for the PLD accountant.

    Raises:
        dp_accounting.UnsupportedEventError: for an event that has no translation.
    """
    match event:
        case dp_accounting.GaussianDpEvent(noise_multiplier=z):
            return dp_accounting.GaussianDpEvent(2 * z)
        case dp_accounting.PoissonSampledDpEvent(sampling_probability=q, event=inner):
            return dp_accounting.PoissonSampledDpEvent(q, to_replace_one(inner))
        case dp_accounting.TruncatedSubsampledGaussianDpEvent():
            return dp_accounting.TruncatedSubsampledGaussianDpEvent(
                event.dataset_size,
                event.sampling_probability,
                event.truncated_batch_size,
                2 * event.noise_multiplier,
            )
        case dp_accounting.NoOpDpEvent() | dp_accounting.NonPrivateDpEvent():
            return event
    raise dp_accounting.UnsupportedEventError(
        f"{event}: not supported under adjacency='replace_one'."
    )
