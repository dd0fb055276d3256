"""Sensitivities: plain Python, one formula a function, each with its source."""

from dpfa_jax.mechanisms.attention import (
    RecordSensitivity,
    Summation,
    record_sensitivity,
    sequence_sensitivity,
)
from dpfa_jax.mechanisms.correlated import check_correlation, correlated_sensitivity
from dpfa_jax.mechanisms.gradient import adjacency_factor, gradient_sensitivity

__all__ = [
    "RecordSensitivity",
    "Summation",
    "adjacency_factor",
    "check_correlation",
    "correlated_sensitivity",
    "gradient_sensitivity",
    "record_sensitivity",
    "sequence_sensitivity",
]
