"""Several processes of one program: how they start, what the first does alone, how they end.

JAX runs the same program in every process. What exists once (a ledger, a report, a key from
the operating system) is the first process's business; the others learn the outcome, and an
error of the first is an error of all. Nothing here polls: if a process dies, the collective
that waits for it fails, or JAX's coordination service ends those that wait.
"""

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils


class ProcessError(RuntimeError):
    """The first process could not go on, or another one cannot be reached."""


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = 30,
) -> None:
    """Joins the other processes, before anything else of JAX is used.

    Args:
        coordinator: ``'host:port'`` of the first process. None: JAX finds it, and the other two,
            in the environment of SLURM, Open MPI, Kubernetes or a TPU pod.
        processes: how many there are.
        process_id: this one's number, from 0.
        heartbeat_seconds: without a sign of life for so long, a process counts as dead.

    Raises:
        ValueError: if only some of the three are given, one is none, or they do not fit together.
        ProcessError: if the others cannot be reached.
    """
    given = (coordinator, processes, process_id)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ValueError(
            f"coordinator={coordinator!r}, processes={processes!r}, process_id={process_id!r}: "
            "allowed are all three, or none (they are then found in the environment)."
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator={coordinator!r}: allowed is 'host:port'.")
    if processes is not None and processes < 1:
        raise ValueError(f"processes={processes!r}: allowed is a whole number >= 1.")
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise ValueError(
            f"process_id={process_id!r}: allowed is a whole number from 0 to {processes - 1}."
        )
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id, heartbeat_timeout_seconds=heartbeat_seconds
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ProcessError(f"the processes cannot join: {first}") from error


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def agreed(value: Any) -> Any:
    """The first process's value, of anything that JSON holds, in all of them."""
    return on_first(lambda: value)


def _sent(text: str) -> str:
    """The first process's text, in all of them."""
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(own.size)))
    padded = own if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().decode()


def on_first[Value](function: Callable[[], Value]) -> Value:
    """Calls the function in the first process; its result, or its failure, is everybody's.

    Args:
        function: its result is something that JSON holds.

    Raises:
        ProcessError: in the other processes, where the first one's call raised, or its result
            is nothing that JSON holds; in the first it is the error itself.

    Example:
        >>> on_first(lambda: 3)
        3
    """
    if jax.process_count() == 1:
        return function()
    text, failure = "", None
    if is_first():
        try:
            text = json.dumps({"value": function()})
        except Exception as error:  # the others wait for a text, whatever it says
            failure, text = error, json.dumps({"error": f"{type(error).__name__}: {error}"})
    outcome = json.loads(_sent(text))
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise ProcessError(f"the first process stopped: {outcome['error']}")
    return outcome["value"]  # type: ignore[no-any-return]


@contextlib.contextmanager
def held_by_first(make: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """A context that the first process enters for all, such as a lock."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(make())

        on_first(enter)
        yield


def wait_for_all(where: str) -> None:
    """Returns when every process has come here; fails if one cannot any more."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


# First words of an error: of the libraries of collectives, and where a service does not answer.
_COLLECTIVES = re.compile(r"\A[A-Z_]+: (Gloo|NCCL)\b")
_NO_ANSWER = re.compile(r"\A(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED):")
_AFTER = (
    " Nothing was released after the last checkpoint; the same command in all processes continues "
    "from there."
)


def of_another(error: BaseException) -> bool:
    """Whether this is what a collective raises when another process stopped or is out of reach.

    It has no type of its own. JAX's runtime raises one type for all it meets, a device without
    memory too; what CPUs raise (from Gloo) is a ValueError.

    Example:
        >>> of_another(jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset by peer"))
        True
        >>> of_another(ValueError("batch_size=0: allowed is a whole number >= 1."))
        False
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not str(error).startswith("RESOURCE_EXHAUSTED")
    return isinstance(error, ValueError) and _COLLECTIVES.search(str(error)) is not None


def stop(error: BaseException, own: tuple[type[BaseException], ...] = ()) -> NoReturn:
    """Says why, and ends this process at once, with 2 for an error of its own and 3 for a lost one.

    JAX's shutdown waits for all processes, some of which are waiting in a collective or gone.
    Nothing is lost: what was released is on disk, and what was not is not.

    Args:
        error: why.
        own: types of errors that a person can mend. Of what may be this program's own fault the
            traceback is printed too.
    """
    mendable = isinstance(error, own)
    if mendable or isinstance(error, ProcessError):
        text = str(error)
    else:
        lost = of_another(error)
        if not (lost and (_COLLECTIVES.search(str(error)) or _NO_ANSWER.search(str(error)))):
            traceback.print_exception(error)
        first = (str(error).strip().splitlines() or [""])[0]
        what = f"{type(error).__name__}: {first}" if first else type(error).__name__
        if lost:
            text = f"another process stopped or cannot be reached ({what})"
        else:
            text = f"stopped with {what}"
    after = "" if mendable else _AFTER
    end = "" if text.endswith(".") else "."
    print(f"dpfa: process {jax.process_index()}: {text}{end}{after}", file=sys.stderr)
    end_now(2 if mendable else 3)


def end_now(status: int) -> NoReturn:
    """Ends this process without JAX's shutdown, which waits for the others for minutes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
