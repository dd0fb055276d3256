"""The budget on disk."""

from dpfa_jax.ledger.sqlite import AlreadyReleasedError, BudgetExceededError, Ledger, LedgerError

__all__ = ["AlreadyReleasedError", "BudgetExceededError", "Ledger", "LedgerError"]
