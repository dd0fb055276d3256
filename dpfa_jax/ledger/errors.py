"""Why the ledger refuses. Each error is one message, in any of the catalogues' languages."""

from typing import Any

from dpfa_jax.messages import N_, Message


class LedgerError(ValueError):
    """The ledger refuses. Nothing was charged, nothing may be released.

    ``str(error)`` is English; ``error.message.show("de")`` another language.
    """

    def __init__(self, text: str, **values: Any):
        self.message = Message(text, values)
        super().__init__(self.message.show())


class BudgetExceededError(LedgerError):
    """A charge would pass its budget."""


class AlreadyReleasedError(LedgerError):
    """What a charge paid for was released before; a second release needs its own charge."""


class PolicyError(LedgerError):
    """A budget or a charge breaks a rule of a policy."""


class LedgerUnavailableError(LedgerError):
    """The record cannot be read or written now: disk, permissions, lock, network, clock."""


class LedgerDamagedError(LedgerError):
    """The record is not what was written: changed, cut, reordered, damaged, or an old copy."""


# One place for all texts of this room: the catalogues are made from it.
EXCEEDED = N_(
    "{scope}: '{label}' would bring ε to {total} at δ = {delta}; the budget is ε = {epsilon} and "
    "{left} of it is left. Nothing was charged or released. Use more noise or fewer releases, or "
    "open a new budget with a reason (dpfa budget new)."
)
RELEASED = N_(
    "{scope}: '{label}' was charged and released before. Releasing it again, with other noise, "
    "needs a charge of its own, under another label."
)
OTHER_EVENT = N_(
    "{scope}: label='{label}': was charged with another event. Use another label for another "
    "release."
)
EVENT = N_(
    "{scope}: this event cannot be accounted for ({problem}). Nothing was charged, so nothing may "
    "be released."
)
UNCHARGED = N_("{scope}: '{label}' was released without a charge. Charge it before the release.")
NO_BUDGET = N_("scope='{scope}': no budget was opened for it. Open one first (dpfa budget new).")
OTHER_BUDGET = N_(
    "scope='{scope}': has the budget {found}; {asked} was asked. A budget does not change: open a "
    "new one with a reason (dpfa budget new)."
)
NOT_ALLOWED = N_("{name}={value}: allowed is {allowed}. Nothing was written.")
POLICY = N_(
    "{scope}: policy {policy}, rule {rule}: {asked} was asked, allowed is {allowed}. Nothing was "
    "charged or released. Ask for what the rule allows, or have the policy changed by whoever "
    "answers for it."
)
UNAVAILABLE = N_(
    "{ledger}: cannot be used ({problem}). Nothing was charged, so nothing may be released. Mend "
    "the cause and try again."
)
LOCKED = N_(
    "{ledger}: another process has held the lock for more than {seconds} s. Nothing was charged, "
    "so nothing may be released. Wait for that process or end it, and try again."
)
CLOCK = N_(
    "{ledger}: the clock says {now}, but the last entry was written at {last}. Nothing was "
    "charged, so nothing may be released. Set the clock right and try again."
)
DAMAGED = N_(
    "{ledger}: entry {number} is not what was written: {problem}. Nothing was charged, so nothing "
    "may be released. Keep the file as evidence and restore a backup (dpfa budget verify)."
)
OLDER = N_(
    "{ledger}: entry {number}, which was seen before, is missing or another one. An old copy was "
    "restored, or the record was cut. Nothing was charged, so nothing may be released. Find the "
    "right file."
)
FORMAT = N_(
    "{ledger}: holds a record of another format ({found}); this version reads format {format}. "
    "Nothing was changed. Finish its runs with the version that wrote it, and open a new ledger "
    "with what is left of the budget."
)

# Details that stand within the texts above.
SECONDS = N_("a number of seconds >= 0")
ABOVE_0 = N_("a finite number > 0")
BETWEEN = N_("a number between 0 and 1, both excluded")
WHY = N_("a text that says why")
TEXT = N_("a text of 1 to {most} characters without control codes")
NO_PARENT = N_("False without a parent")
PARENTS = N_("that of {parent}, {value}")
BELOW = N_("a level below {level} ({levels})")
AROUND = N_("composition='adaptive' in all scopes around")
KEPT = N_("{value} with composition='adaptive'")
PRESET = N_("{names}, or a .toml file")
READABLE = N_("a policy that can be read ({problem})")
NONE = N_("none")
NO_HEAD = N_("the note of the last entry is missing")
OTHER_HEAD = N_("the note of the last entry names another one")
UNREADABLE = N_("this version cannot read it ({problem})")
MISSING = N_("it is missing; entry {found} stands in its place")
UNLINKED = N_("it does not follow the entry before it")
CHANGED = N_("its contents do not have its hash")
OVERSPENT = N_("up to it, '{scope}' spends more than its budgets allowed")
NO_DRIVER = N_("psycopg is not installed: pip install 'dpfa_jax[postgres]'")
EXCHANGED = N_("the file was exchanged while it was opened")
FULL = N_("the disk is full")
READ_ONLY = N_("the file is read-only")
NO_ACCESS = N_("the file cannot be opened: its path or its permissions")
NOT_SQLITE = N_("the file is damaged, or no ledger")
DISK = N_("the disk does not read or write")
NO_SERVER = N_("the server cannot be reached, or refuses")
