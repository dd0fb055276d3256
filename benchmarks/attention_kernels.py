"""Which kernels a call of attention consists of, and how long each takes.

    python -m benchmarks.attention_kernels --shape 1,65536,16,128 --direction forward+backward
    python -m benchmarks.attention_kernels --shape 16,1024,16,128,causal --json kernels.json

runs versions of ``dpfa bench attention`` on its inputs, calls in a row under JAX's profiler,
and prints for each the median of the time between the beginnings of two calls, and in the
order in which they run its kernels with their median times and the median gap before each.
For what the table of the bench cannot say: a call that is slow, in which of its parts?

The profiler's times of long calls are those of a card that runs a second or two, not one
that is warm for minutes; compare parts of one run.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dpfa_jax.bench import attention, cases, files, timing

OURS = "cuDNN (jax.nn);dpfa exact;dpfa ChaCha8;dpfa ChaCha8, norms"


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel's run on the device, in ns."""

    name: str
    start: float
    duration: float


@dataclasses.dataclass(frozen=True)
class Part:
    """One kernel of a call: medians over the calls, in µs."""

    name: str
    time: float
    gap_before: float


def parts_of(events: Sequence[Event], calls: int) -> tuple[float, list[Part]]:
    """The period of the calls in µs, and their kernels in order.

    Args:
        events: of the same number of kernels in each call, in any order.
        calls: how many calls there were.

    Raises:
        ValueError: the calls did not run the same kernels.
    """
    events = sorted(events, key=lambda e: e.start)
    number, rest = divmod(len(events), calls)
    rows = [events[i * number : (i + 1) * number] for i in range(calls)]
    if rest or not number or any([e.name for e in r] != [e.name for e in rows[0]] for r in rows):
        raise ValueError(f"events: {len(events)} kernels are not {calls} times the same ones.")
    parts = []
    for i, first in enumerate(rows[0]):
        # The first kernel of the first call has none before it.
        before = [events[c * number + i - 1] for c in range(calls) if c * number + i]
        these = [row[i] for row in rows]
        gaps = [
            e.start - b.start - b.duration
            for e, b in zip(these[-len(before) :], before, strict=True)
        ]
        time = statistics.median(e.duration for e in these)
        parts.append(Part(first.name, time / 1e3, statistics.median(gaps) / 1e3 if gaps else 0.0))
    starts = [row[0].start for row in rows]
    periods = [b - a for a, b in itertools.pairwise(starts)]
    return (statistics.median(periods) / 1e3 if periods else 0.0), parts


def profile(runnable: timing.Runnable, calls: int) -> list[Event]:
    """The kernels of some calls in a row, by JAX's profiler."""
    runnable.run(3)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            runnable.run(calls)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        return [
            Event(event.name, event.start_ns, event.duration_ns)
            for plane in data.planes
            if "GPU" in plane.name
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]


def shape_of(text: str) -> cases.Shape:
    """A shape from 'B,T,N,D' or 'B,T,N,D,causal'."""
    numbers, causal = text.split(",")[:4], text.split(",")[4:]
    if len(numbers) < 4 or not all(n.isdecimal() and int(n) for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: four positive numbers, B,T,N,D, are needed.")
    if causal not in ([], ["causal"]):
        raise argparse.ArgumentTypeError(f"{text!r}: only ',causal' may follow the four numbers.")
    return cases.Shape(*map(int, numbers), is_causal=bool(causal))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; exit status 1 if a version could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=shape_of, required=True, help="B,T,N,D or B,T,N,D,causal")
    parser.add_argument("--direction", choices=cases.DIRECTIONS, default=cases.DIRECTIONS[0])
    parser.add_argument("--versions", default=OURS, help="names of the bench, ';' between them")
    parser.add_argument("--calls", type=int, default=30, help="profiled calls of each")
    parser.add_argument("--json", type=Path, help="writes the figures there, too")
    options = parser.parse_args(arguments)
    known = {v.name: v for v in attention.VERSIONS}
    names = options.versions.split(";")
    if unknown := [n for n in names if n not in known]:
        parser.error(f"--versions: {unknown[0]!r} is none of {'; '.join(known)}.")
    if options.calls < 2:
        parser.error(f"--calls: {options.calls} is less than 2.")
    if jax.default_backend() != "gpu":
        parser.error(f"a GPU is needed; the default backend is {jax.default_backend()!r}.")
    cell = attention.prepare_cell(options.shape, options.direction, [known[n] for n in names])
    found: dict[str, Any] = {}
    failed = dict(cell.errors)
    for name, runnable in cell.runnables.items():
        try:
            period, parts = parts_of(profile(runnable, options.calls), options.calls)
        # One version's failure is a result to show beside the others'.
        except Exception as error:
            failed[name] = timing.describe_error(error)
            continue
        found[name] = {"period_us": period, "kernels": [dataclasses.asdict(p) for p in parts]}
        print(f"{options.shape}, {options.direction}, {name}: {period:.1f} µs a call")
        for part in parts:
            print(f"  {part.time:10.2f}  after {part.gap_before:6.2f}  {part.name[:70]}")
    for name, error in failed.items():
        print(f"{options.shape}, {options.direction}, {name}: {error}", file=sys.stderr)
    if options.json:
        words = ["python -m benchmarks.attention_kernels", *(arguments or sys.argv[1:])]
        record = {
            "command": " ".join(words),
            "card": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "versions": found,
        }
        files.write_json(options.json, record)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
