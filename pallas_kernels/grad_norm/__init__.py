"""Squared norms of per-example weight gradients that are never formed."""

from pallas_kernels.grad_norm.api import (
    explain,
    grad_norm_squared,
    grad_norm_with_rows,
    grad_norms_with_rows,
    implementations,
)
from pallas_kernels.grad_norm.common import (
    Form,
    Norms,
    best_form,
    multiply_adds,
    norms_with_rows,
    upper_bound,
)

__all__ = [
    "Form",
    "Norms",
    "best_form",
    "explain",
    "grad_norm_squared",
    "grad_norm_with_rows",
    "grad_norms_with_rows",
    "implementations",
    "multiply_adds",
    "norms_with_rows",
    "upper_bound",
]
