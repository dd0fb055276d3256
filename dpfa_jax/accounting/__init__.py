"""Composition and calibration, on top of ``dp_accounting``."""

from dpfa_jax.accounting.accountant import Accountant, calibrate_noise_multiplier
from dpfa_jax.accounting.correlated import correlated_noise_event
from dpfa_jax.accounting.curve import epsilon_curve
from dpfa_jax.accounting.schedules import AdaptiveSchedule, planned_multipliers

__all__ = [
    "Accountant",
    "AdaptiveSchedule",
    "calibrate_noise_multiplier",
    "correlated_noise_event",
    "epsilon_curve",
    "planned_multipliers",
]
