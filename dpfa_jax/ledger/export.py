"""The record as JSON or CSV: everything that was written, entry by entry."""

import csv
import datetime
import io
import json
from collections.abc import Iterator
from typing import Any

from dpfa_jax.ledger.budget import Budget
from dpfa_jax.ledger.chain import FORMAT
from dpfa_jax.ledger.ledger import Ledger
from dpfa_jax.ledger.state import parse_body

_COLUMNS = ("number", "time", "kind", "scope", "label", "body", "keep_until", "previous", "hash")


def rows(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """One dictionary an entry.

    ``keep_until`` is the earliest day on which the policies in force when the entry was written
    let go of it. Nothing here deletes: what was spent counts for ever.
    """
    budgets: dict[str, Budget] = {}
    for entry in ledger.entries():
        if entry.kind == "budget":
            budgets[entry.scope] = Budget.from_json(parse_body(entry.body))
        written = datetime.datetime.fromtimestamp(entry.time / 1e6, datetime.UTC)
        days = _retention(budgets, entry.scope)
        until = None if days is None else written + datetime.timedelta(days=days)
        yield {
            **entry._asdict(),
            "time": written.isoformat(),
            "keep_until": until.date().isoformat() if until else None,
        }


def _retention(budgets: dict[str, Budget], scope: str) -> int | None:
    """The longest retention of the policies of a scope and those around it, in days."""
    days = []
    name: str | None = scope
    while name is not None and name in budgets:
        policy = budgets[name].policy
        if policy is not None:
            days.append(policy.audit_log_retention_days)
        name = budgets[name].parent
    return max(days, default=None)


def to_json(ledger: Ledger) -> str:
    """The whole record as one JSON object: format, head, entries with their bodies parsed.

    Raises:
        LedgerDamagedError: if the chain is broken.
    """
    entries = [{**row, "body": json.loads(row["body"])} for row in rows(ledger)]
    head = {"number": entries[-1]["number"], "hash": entries[-1]["hash"]}
    return json.dumps({"format": FORMAT, "head": head, "entries": entries}, indent=1) + "\n"


def to_csv(ledger: Ledger) -> str:
    """The whole record as CSV (RFC 4180), one line an entry, the body as JSON text.

    Texts that a spreadsheet would run as a formula are written with a ' before them.

    Raises:
        LedgerDamagedError: if the chain is broken.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS)
    writer.writeheader()
    for row in rows(ledger):
        for name in ("scope", "label"):
            if row[name] and row[name][0] in "=+-@\t\r":
                row[name] = "'" + row[name]
        writer.writerow(row)
    return out.getvalue()
