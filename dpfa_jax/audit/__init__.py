"""Attacks on the library's own claims: lower bounds on ε from what the code releases."""

from dpfa_jax.audit.attention import AttentionCase, attention_cases, audit_attention
from dpfa_jax.audit.bounds import GdpBound, gdp_epsilon, gdp_lower_bound, gdp_mu
from dpfa_jax.audit.curves import Claim, EventBound, event_lower_bound
from dpfa_jax.audit.result import AuditResult, judge
from dpfa_jax.audit.sampled import SampledCase, audit_sampled, sampled_cases
from dpfa_jax.audit.training import TrainingCase, audit_training, engines, training_cases

__all__ = [
    "AttentionCase",
    "AuditResult",
    "Claim",
    "EventBound",
    "GdpBound",
    "SampledCase",
    "TrainingCase",
    "attention_cases",
    "audit_attention",
    "audit_sampled",
    "audit_training",
    "engines",
    "event_lower_bound",
    "gdp_epsilon",
    "gdp_lower_bound",
    "gdp_mu",
    "judge",
    "sampled_cases",
    "training_cases",
]
