"""A PostgreSQL server for the tests: its own, on loopback, gone afterwards."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from ledger_fire import fire


@pytest.fixture
def under_fire():
    """What ``fire.py ACTION …`` answers."""

    def run(*args):
        process = fire(*args)
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err
        return json.loads(out)

    return run


def programs():
    """Where Debian, or anybody, keeps the server's programs."""
    beside = shutil.which("initdb")
    found = [Path(beside).parent] if beside else []
    return [*found, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)][0]


@pytest.fixture(scope="session")
def server():
    """The URL of a running server's database ``postgres``."""
    # The server refuses to run as root.
    user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="ledger-pg-"))
    if user:
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "cwd": folder, **user}
    subprocess.run(
        [programs() / "initdb", "-D", data, "-A", "trust", "-U", "tester", "-E", "UTF8"],
        check=True,
        **quiet,
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [programs() / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder],
            stderr=log,
            **quiet,
        )
    url = f"postgresql://tester@127.0.0.1:{port}/postgres"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                sa.create_engine(url.replace("postgresql", "postgresql+psycopg")).connect().close()
                break
            except sa.exc.OperationalError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # Ends its sessions and stops.
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


_NUMBERS = itertools.count()


@pytest.fixture
def database(server):
    """The URL of an empty database."""
    name = f"test_{os.getpid()}_{next(_NUMBERS)}"
    engine = sa.create_engine(
        server.replace("postgresql", "postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    return server.replace("/postgres", f"/{name}")
