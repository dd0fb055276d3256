"""Squared norms of per-example weight gradients that are never formed."""

from pallas_kernels.grad_norm.api import explain, grad_norm_squared, implementations
from pallas_kernels.grad_norm.common import Form, best_form, multiply_adds, upper_bound

__all__ = [
    "Form",
    "best_form",
    "explain",
    "grad_norm_squared",
    "implementations",
    "multiply_adds",
    "upper_bound",
]
