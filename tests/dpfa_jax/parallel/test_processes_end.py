"""What one of several processes tells the others, and what it says when it ends."""

import jax
import numpy as np
import pytest
from ended import Ended, end_is_raised  # noqa: F401

from dpfa_jax.parallel import processes

pytestmark = pytest.mark.usefixtures("end_is_raised")


def raise_and_stop(error, own):
    try:
        raise error
    except BaseException as raised:
        processes.stop(raised, own)


def stopped(error, capsys, own=()):
    """The status, the traceback and the last line."""
    with pytest.raises(Ended) as ended:
        raise_and_stop(error, own)
    *trace, last = capsys.readouterr().err.splitlines()
    return ended.value.args[0], "\n".join(trace), last


AFTER = "Nothing was released after the last checkpoint"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space", "run/x"), "OSError: [Errno 28] No space: 'run/x'"),
        (TypeError("a\nb"), "TypeError: a"),
        (MemoryError(), "MemoryError"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
            "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory",
        ),
    ],
)
def test_an_error_of_this_process_is_no_other_ones(error, said, capsys):
    status, trace, last = stopped(error, capsys)
    assert status == 3
    assert "Traceback" in trace
    assert "raise error" in trace
    assert last.startswith(f"dpfa: process 0: stopped with {said}. {AFTER}")
    assert "another process" not in last


@pytest.mark.parametrize(
    ("kind", "text", "traced"),
    [
        (jax.errors.JaxRuntimeError, "UNKNOWN: Gloo all-reduce failed: Connection reset", False),
        (jax.errors.JaxRuntimeError, "UNAVAILABLE: Failed to send RPC", False),
        (jax.errors.JaxRuntimeError, "INTERNAL: it may be the program's own fault", True),
        # What a collective of CPUs raises where it is waited for.
        (ValueError, "UNKNOWN: Gloo all-reduce failed: Connection reset", False),
    ],
)
def test_what_a_collective_raises_is_another_process(kind, text, traced, capsys):
    status, trace, last = stopped(kind(f"{text}\nmore"), capsys)
    assert status == 3
    assert ("Traceback" in trace) == traced
    where = f"another process stopped or cannot be reached ({kind.__name__}: {text}). {AFTER}"
    assert last.startswith(f"dpfa: process 0: {where}")


def test_what_is_known_is_one_line(capsys):
    status, trace, last = stopped(processes.ProcessError("the first process stopped: x"), capsys)
    assert (status, trace) == (3, "")
    assert last.startswith(f"dpfa: process 0: the first process stopped: x. {AFTER}")
    status, trace, last = stopped(ValueError("mesh: no."), capsys, own=(ValueError,))
    assert (status, trace, last) == (2, "", "dpfa: process 0: mesh: no.")


@pytest.fixture
def play(monkeypatch):
    """Plays one of two processes; the first one's broadcasts are the second's."""
    sent = []

    def broadcast(value):
        if jax.process_index() == 0:
            sent.append(np.array(value))
            return value
        return sent.pop(0)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", broadcast)
    yield lambda number: monkeypatch.setattr(jax, "process_index", lambda: number)
    assert sent == []


@pytest.mark.parametrize("call", ["on_first", "agreed"])
def test_what_json_cannot_hold_is_an_error_of_all(call, play):
    def run():
        if call == "on_first":
            return processes.on_first(lambda: {1, 2})
        return processes.agreed({1, 2})

    play(0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        run()
    play(1)
    with pytest.raises(processes.ProcessError, match=r"stopped: TypeError: .*not JSON"):
        run()


def test_what_the_first_sends_is_everybodys(play):
    for number, own in enumerate((["ü", None, 1.5], "another")):
        play(number)
        assert processes.agreed(own) == ["ü", None, 1.5]
