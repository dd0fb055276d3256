"""The end of a process, raised instead."""

import pytest

from dpfa_jax.parallel import processes


class Ended(BaseException):
    """In place of the process's end."""


@pytest.fixture
def end_is_raised(monkeypatch):
    def end(status):
        raise Ended(status)

    monkeypatch.setattr(processes.os, "_exit", end)
