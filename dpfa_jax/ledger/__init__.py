"""The budget on disk."""

from dpfa_jax.ledger.sqlite import BudgetExceededError, Ledger

__all__ = ["BudgetExceededError", "Ledger"]
