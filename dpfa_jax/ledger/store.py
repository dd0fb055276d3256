"""Where entries are kept: a SQLite file, or a PostgreSQL server that many machines share.

One transaction is one charge. It begins by locking: SQLite's write lock (``BEGIN IMMEDIATE``),
or PostgreSQL's lock on the one row of ``ledger_head``. So decisions are made one after the
other, across threads, processes and hosts, each on what the last one committed. A lock goes with
its process or connection.
"""

import contextlib
import errno
import os
import sqlite3
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dpfa_jax.ledger import errors
from dpfa_jax.ledger.chain import FORMAT, ChainError, Entry, Head
from dpfa_jax.ledger.errors import LedgerDamagedError, LedgerError, LedgerUnavailableError
from dpfa_jax.messages import Message

_METADATA = sa.MetaData()
ENTRIES = sa.Table(
    "ledger_entries",
    _METADATA,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("label", sa.Text),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("previous", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    # A label is charged once and released once, whatever the program thinks.
    sa.Index("ledger_labels", "scope", "label", "kind", unique=True),
)
HEAD = sa.Table(
    "ledger_head",
    _METADATA,
    sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Column("format", sa.Integer, nullable=False),
)

# Against accidents; whoever removes these is found by the chain.
_APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER ledger_no_{what.lower()} BEFORE {what} ON ledger_entries "
        "BEGIN SELECT RAISE(ABORT, 'ledger entries are never changed'); END"
        for what in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE FUNCTION ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE EXCEPTION 'ledger entries are never changed'; END$$",
        "CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_entries "
        "FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse()",
    ],
}
# Connections of the parent that a fork must not use, nor close.
_INHERITED: list[sa.Pool] = []
_SMALLEST_PAGE = 512
# Any number, the same for everybody who creates a ledger.
_CREATION_LOCK = 0x6470_6661


def ledger_name(where: str | Path) -> str:
    """A path made absolute, or a URL without its password: for messages and notes.

    Example:
        >>> ledger_name("postgresql://me:secret@host/budgets")
        'postgresql://me:***@host/budgets'
    """
    if "://" not in str(where):
        return str(Path(where).absolute())
    return _url(str(where)).render_as_string(hide_password=True)


def _url(text: str) -> sa.URL:
    try:
        url = sa.engine.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise ValueError("where: not a path and not a URL that can be read.") from None
    if url.get_backend_name() != "postgresql":
        raise ValueError(
            f"where={url.render_as_string()!r}: allowed are a path and postgresql:// URLs."
        )
    return url


class _ExchangedError(OSError):
    """Another file has the name of the one that was opened."""


# What a person can mend, by SQLite's primary code, PostgreSQL's SQLSTATE, or the system's name.
_PROBLEMS: dict[Any, str] = {
    sqlite3.SQLITE_FULL: errors.FULL,
    sqlite3.SQLITE_READONLY: errors.READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: errors.NO_ACCESS,
    sqlite3.SQLITE_PERM: errors.NO_ACCESS,
    sqlite3.SQLITE_CORRUPT: errors.NOT_SQLITE,
    sqlite3.SQLITE_NOTADB: errors.NOT_SQLITE,
    sqlite3.SQLITE_IOERR: errors.DISK,
    "53100": errors.FULL,
    "25006": errors.READ_ONLY,
    "ENOSPC": errors.FULL,
    "EROFS": errors.READ_ONLY,
    "EACCES": errors.NO_ACCESS,
    "ENOENT": errors.NO_ACCESS,
}


def _problem(cause: BaseException) -> Message | str:
    """Why the database refuses, in a person's language, and in its own words."""
    if isinstance(cause, _ExchangedError):
        return Message(errors.EXCHANGED)
    words = str(cause).strip().split("\n")[0] or type(cause).__name__
    if isinstance(cause, sqlite3.Error):
        code: Any = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    elif isinstance(cause, OSError):
        code = errno.errorcode.get(cause.errno or 0)
    else:
        code = getattr(cause, "sqlstate", None)
    text = _PROBLEMS.get(code)
    if text is None and not isinstance(cause, sqlite3.Error | OSError):
        text = errors.NO_SERVER
    return (
        words
        if text is None
        else Message("{detail}: {words}", {"detail": Message(text), "words": words})
    )


class Store:
    """Rows and transactions; knows nothing of budgets.

    Args:
        where: a path, or a URL such as ``postgresql://user@host/database``.
        timeout: how long to wait for another's lock, in seconds.
    """

    def __init__(self, where: str | Path, timeout: float):
        self._timeout = timeout
        self._may_create = True
        self._connected: tuple[int, tuple[Any, ...]] | None = None
        text = str(where)
        self.path = None if "://" in text else Path(where)
        if self.path is None:
            self.name, self._engine = self._server(text)
        else:
            self.name, self._engine = text, self._file(self.path)
        sa.event.listen(self._engine, "begin", self._begin)

    def _server(self, text: str) -> tuple[str, sa.Engine]:
        url, name = _url(text), ledger_name(text)
        try:
            engine = sa.create_engine(
                url.set(drivername="postgresql+psycopg"),
                pool_size=1,
                pool_pre_ping=True,
                connect_args={"connect_timeout": max(2, int(self._timeout))},
            )
        except ModuleNotFoundError:
            raise LedgerUnavailableError(
                errors.UNAVAILABLE,
                ledger=name,
                problem=Message(errors.NO_DRIVER),
            ) from None
        return name, engine

    def _file(self, path: Path) -> sa.Engine:
        def connect() -> sqlite3.Connection:
            with contextlib.suppress(FileNotFoundError):
                # SQLite takes the first bytes of a header for an empty database: a ledger cut
                # off there would begin anew.
                if 0 < path.stat().st_size < _SMALLEST_PAGE:
                    short = sqlite3.DatabaseError("the file is too short to be a database")
                    short.sqlite_errorcode = sqlite3.SQLITE_NOTADB
                    raise short
            mode = "rwc" if self._may_create else "rw"
            uri = f"file:{urllib.parse.quote(str(path.absolute()))}?mode={mode}"
            database = sqlite3.connect(
                uri, uri=True, timeout=self._timeout, isolation_level=None, check_same_thread=False
            )
            # FULL: a commit is on the disk, not in a cache, before it returns.
            database.execute("PRAGMA synchronous = FULL")
            return database

        # One connection is kept: the last one that closes empties the log, with four more
        # writes to the disk.
        return sa.create_engine(
            "sqlite://", creator=connect, poolclass=sa.pool.QueuePool, pool_size=1
        )

    def _files(self) -> tuple[Any, ...]:
        """Which files the path names now: another file of that name is another ledger."""
        if self.path is None:
            return ()
        found = []
        for path in (self.path, self.path.with_name(f"{self.path.name}-wal")):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_dev, status.st_ino))
        return tuple(found)

    def _reconnect(self) -> None:
        """Lets go of connections that are another process's, or to files that are gone."""
        known, now = self._connected, (os.getpid(), self._files())
        if known is not None and known != now:
            forked = known[0] != now[0]
            if forked:
                _INHERITED.append(self._engine.pool)
            self._engine.dispose(close=not forked)
            self._connected = None

    def close(self) -> None:
        """Closes the connection; the next transaction opens another."""
        self._engine.dispose(close=self._connected is None or self._connected[0] == os.getpid())
        self._connected = None

    def _begin(self, connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("ledger_writes", True)
        if self.path is not None:
            if writes:
                # Outside a transaction, and kept in the file.
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
        else:
            if not writes:  # One snapshot, as SQLite's readers have.
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            milliseconds = int(self._timeout * 1000)
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {milliseconds}")
            connection.exec_driver_sql("SET LOCAL synchronous_commit = on")

    def create(self, first: Entry) -> None:
        """Makes the tables, with ``first`` in them, unless they are there."""
        with self.transaction() as connection:
            if self.path is None:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CREATION_LOCK)))
            if not self._is_ledger(connection):
                _METADATA.create_all(connection)
                for statement in _APPEND_ONLY[connection.dialect.name]:
                    connection.exec_driver_sql(statement)
                connection.execute(sa.insert(ENTRIES), first._asdict())
                connection.execute(
                    sa.insert(HEAD),
                    {"id": 1, "number": first.number, "hash": first.hash, "format": FORMAT},
                )
        self._may_create = False

    def check(self) -> None:
        """Raises LedgerError unless a ledger is there."""
        self._may_create = False
        with self.transaction(writes=False) as connection:
            if not self._is_ledger(connection):
                raise LedgerError(
                    errors.FORMAT, ledger=self.name, found=Message(errors.NONE), format=FORMAT
                )

    def _is_ledger(self, connection: sa.Connection) -> bool:
        """Whether a ledger of this format is there, or nothing; else raises."""
        tables = set(sa.inspect(connection).get_table_names())
        found: Any = None
        if HEAD.name in tables:
            found = connection.execute(sa.select(HEAD.c.format)).scalar()
            if found is None:
                raise ChainError(0, errors.NO_HEAD)
        elif {"budgets", "charges"} <= tables:
            found = 1
        elif tables and self.path is not None:
            found = ", ".join(sorted(tables))
        if found not in (None, FORMAT):
            raise LedgerError(errors.FORMAT, ledger=self.name, found=found, format=FORMAT)
        return found == FORMAT

    @contextlib.contextmanager
    def transaction(self, *, writes: bool = True) -> Iterator[sa.Connection]:
        """A transaction: committed to disk when it ends, undone if it raises.

        Raises:
            LedgerUnavailableError: if the database refuses, for whatever reason.
            LedgerDamagedError: if the chain is broken.
        """
        try:
            self._reconnect()
            before = self._files()[:1]
            with self._engine.connect() as plain:
                connection = plain.execution_options(ledger_writes=writes)
                with connection.begin():
                    if self._connected is None:
                        self._connected = (os.getpid(), self._files())
                        if before not in ((), self._files()[:1]):
                            raise _ExchangedError
                    yield connection
        except ChainError as error:
            raise LedgerDamagedError(
                errors.DAMAGED, ledger=self.name, number=error.number, problem=error.problem
            ) from None
        except UnicodeDecodeError as error:  # SQLite's driver, of a name in a damaged file
            problem = Message(errors.NOT_SQLITE)
            raise LedgerUnavailableError(
                errors.UNAVAILABLE, ledger=self.name, problem=problem
            ) from error
        except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> LedgerUnavailableError:
        cause = getattr(error, "orig", None) or error
        locked = "database is locked" in str(cause) or getattr(cause, "sqlstate", "") == "55P03"
        if locked:
            return LedgerUnavailableError(
                errors.LOCKED, ledger=self.name, seconds=round(self._timeout, 1)
            )
        return LedgerUnavailableError(errors.UNAVAILABLE, ledger=self.name, problem=_problem(cause))

    def head(self, connection: sa.Connection, *, lock: bool) -> Head:
        """The head as it is noted; ``lock``: for this transaction alone."""
        query = sa.select(HEAD.c.number, HEAD.c.hash).where(HEAD.c.id == 1)
        row = connection.execute(query.with_for_update() if lock else query).first()
        if row is None:
            raise ChainError(0, errors.NO_HEAD)
        return Head(*row)

    def rows(self, connection: sa.Connection, after: int = -1) -> Iterable[Any]:
        """All rows of entries behind number ``after``, in order."""
        query = sa.select(*ENTRIES.c).where(ENTRIES.c.number > after).order_by(ENTRIES.c.number)
        # On the statement: on the connection it would hold for later ones, too.
        return connection.execute(query.execution_options(yield_per=10_000))

    def row(self, connection: sa.Connection, number: int) -> Any:
        """The row of one entry, or None."""
        return connection.execute(sa.select(*ENTRIES.c).where(ENTRIES.c.number == number)).first()

    def labelled(self, connection: sa.Connection, kind: str, scope: str, label: str) -> Any:
        """The row of a charge or a release, or None."""
        return connection.execute(
            sa.select(*ENTRIES.c).where(
                ENTRIES.c.scope == scope, ENTRIES.c.label == label, ENTRIES.c.kind == kind
            )
        ).first()

    def append(self, connection: sa.Connection, entry: Entry) -> None:
        """Adds an entry and notes it as the head."""
        connection.execute(sa.insert(ENTRIES), entry._asdict())
        connection.execute(sa.update(HEAD).values(number=entry.number, hash=entry.hash))
