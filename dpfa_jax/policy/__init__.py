"""Rules of an organisation: ceilings, units, places, how long to keep the record."""

from dpfa_jax.policy.policy import Policy, load_policy, policies, regions

__all__ = ["Policy", "load_policy", "policies", "regions"]
