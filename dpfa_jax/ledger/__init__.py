"""The budget on disk, or on a server: charge first, then release."""

from dpfa_jax.ledger.budget import Budget
from dpfa_jax.ledger.chain import Entry, Head
from dpfa_jax.ledger.errors import (
    AlreadyReleasedError,
    BudgetExceededError,
    LedgerDamagedError,
    LedgerError,
    LedgerUnavailableError,
    PolicyError,
)
from dpfa_jax.ledger.export import to_csv, to_json
from dpfa_jax.ledger.ledger import Charge, Ledger
from dpfa_jax.ledger.store import ledger_name

__all__ = [
    "AlreadyReleasedError",
    "Budget",
    "BudgetExceededError",
    "Charge",
    "Entry",
    "Head",
    "Ledger",
    "LedgerDamagedError",
    "LedgerError",
    "LedgerUnavailableError",
    "PolicyError",
    "ledger_name",
    "to_csv",
    "to_json",
]
