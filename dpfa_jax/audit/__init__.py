"""Attacks on the library's own claims: lower bounds on ε from what the code releases."""

from dpfa_jax.audit.attention import AttentionCase, attention_cases, audit_attention
from dpfa_jax.audit.bounds import GdpBound, gdp_epsilon, gdp_lower_bound, gdp_mu
from dpfa_jax.audit.result import AuditResult, judge
from dpfa_jax.audit.training import TrainingCase, audit_training, engines, training_cases

__all__ = [
    "AttentionCase",
    "AuditResult",
    "GdpBound",
    "TrainingCase",
    "attention_cases",
    "audit_attention",
    "audit_training",
    "engines",
    "gdp_epsilon",
    "gdp_lower_bound",
    "gdp_mu",
    "judge",
    "training_cases",
]
