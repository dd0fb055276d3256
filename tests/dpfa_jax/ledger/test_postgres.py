"""The same ledger on a real PostgreSQL server, which the tests start."""

import dp_accounting
import pytest
import sqlalchemy as sa
from ledger_fire import check_after_kills

from dpfa_jax import Accountant, Ledger
from dpfa_jax.ledger import (
    AlreadyReleasedError,
    BudgetExceededError,
    LedgerDamagedError,
    LedgerUnavailableError,
    to_csv,
    to_json,
)

Gaussian = dp_accounting.GaussianDpEvent
DELTA = 1e-5

pytestmark = pytest.mark.postgres


def sql(database, *statements):
    engine = sa.create_engine(
        database.replace("postgresql", "postgresql+psycopg"), poolclass=sa.pool.NullPool
    )
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@pytest.fixture
def ledger(database):
    ledger = Ledger(database, timeout=5.0)
    ledger.open_budget("s", epsilon=4.4, delta=DELTA, adjacency="add_remove", unit="user")
    return ledger


def test_it_behaves_as_the_file_does(ledger, database):
    assert ledger.path is None
    assert ledger.charge("s", "ä'; --", Gaussian(1.0), key_fingerprint="abc") is True
    assert ledger.charge("s", "ä'; --", Gaussian(1.0)) is False
    with pytest.raises(BudgetExceededError, match="'b' would bring"):
        ledger.charge("s", "b", Gaussian(1.0))
    ledger.mark_released("s", "ä'; --")
    again = Ledger(database)
    with pytest.raises(AlreadyReleasedError):
        again.charge("s", "ä'; --", Gaussian(1.0))
    (charge,) = again.charges("s")
    assert (charge.event, charge.released, charge.key_fingerprint) == (Gaussian(1.0), True, "abc")
    assert again.spent("s") == Accountant("add_remove").compose(Gaussian(1.0)).epsilon(DELTA)
    assert again.verify() == ledger.head()
    assert to_json(again) == to_json(ledger)
    assert to_csv(again).count("\n") == 5


def test_two_processes_memory_follows_what_is_committed(ledger, database):
    other = Ledger(database)
    other.charge("s", "a", Gaussian(2.0))
    ledger.charge("s", "b", Gaussian(3.0))
    exact = Accountant("add_remove").compose(Gaussian(2.0)).compose(Gaussian(3.0)).epsilon(DELTA)
    assert other.spent("s") == ledger.spent("s") == pytest.approx(exact)


def test_entries_cannot_be_changed_by_accident(ledger, database):
    for statement in (
        "UPDATE ledger_entries SET time = 0",
        "DELETE FROM ledger_entries",
        "TRUNCATE ledger_entries",
    ):
        with pytest.raises(sa.exc.DBAPIError, match="never changed"):
            sql(database, statement)
    ledger.verify()


def test_what_was_changed_is_found(ledger, database):
    ledger.charge("s", "a", Gaussian(5.0))
    ledger.charge("s", "b", Gaussian(5.0))
    sql(
        database,
        "DROP TRIGGER ledger_append_only ON ledger_entries",
        "UPDATE ledger_entries SET body = replace(body, '5.0', '50.0') WHERE number = 2",
    )
    for act in (ledger.verify, lambda: Ledger(database).charge("s", "c", Gaussian(50.0))):
        with pytest.raises(LedgerDamagedError, match="entry 2 is not what was written"):
            act()


def test_a_lock_that_somebody_holds(ledger, database):
    patient = Ledger(database, timeout=0.3)
    engine = sa.create_engine(database.replace("postgresql", "postgresql+psycopg"))
    with engine.connect() as holder:
        holder.exec_driver_sql("SELECT * FROM ledger_head FOR UPDATE")
        with pytest.raises(LedgerUnavailableError, match=r"held the lock for more than 0\.3 s"):
            patient.charge("s", "a", Gaussian(5.0))
        holder.rollback()
    assert patient.charge("s", "a", Gaussian(5.0)) is True


def test_a_server_that_is_not_there():
    with pytest.raises(LedgerUnavailableError, match="cannot be used") as refused:
        Ledger("postgresql://me:secret@127.0.0.1:1/none", timeout=1.0)
    assert "secret" not in str(refused.value)


def test_a_connection_that_dies_in_between(ledger, database):
    """The server ends every session: an error or a charge, never a charge in memory only."""
    ledger.charge("s", "a", Gaussian(5.0))
    sql(
        database,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    assert ledger.charge("s", "b", Gaussian(5.0)) is True
    assert ledger.verify() == ledger.head()


@pytest.mark.slow
def test_kill_minus_nine_on_the_server(database, under_fire):
    said = under_fire("kill", database, 60)
    assert said["killed"] == 60
    check_after_kills(database, said)


@pytest.mark.slow
def test_eight_racing_for_the_last_unit(database, under_fire):
    for won, lost, ended in under_fire("race", database, 4, 8):
        assert (won, lost, ended) == (1, 7, 8)
    Ledger(database).verify()
