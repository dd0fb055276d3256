"""Attention with several implementations behind one function."""

from pallas_kernels.attention.api import (
    attention,
    check_arguments,
    explain,
    implementations,
    partial_backend,
)
from pallas_kernels.attention.by_head import attention_by_head
from pallas_kernels.attention.spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "attention",
    "attention_by_head",
    "check_arguments",
    "explain",
    "implementations",
    "partial_backend",
]
