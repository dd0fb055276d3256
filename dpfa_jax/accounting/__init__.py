"""Composition and calibration, on top of ``dp_accounting``."""

from dpfa_jax.accounting.accountant import Accountant, calibrate_noise_multiplier
from dpfa_jax.accounting.curve import epsilon_curve

__all__ = ["Accountant", "calibrate_noise_multiplier", "epsilon_curve"]
