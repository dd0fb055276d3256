"""``dpfa bench ledger``: what a charge costs, and how fast large compositions answer."""

import datetime
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import dp_accounting

from dpfa_jax.accounting import Accountant, renyi
from dpfa_jax.bench.files import write_json
from dpfa_jax.bench.timing import BenchError
from dpfa_jax.ledger import Ledger
from dpfa_jax.versions import package_versions

_PACKAGES = ("dpfa_jax", "sqlalchemy", "dp-accounting", "numpy")
_DELTA = 1e-6
_IDENTICAL, _DIFFERENT = 10**6, 10**4


def _step(q: float, z: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))


def _charges(folder: Path, count: int, depth: int) -> dict[str, Any]:
    """Times ``count`` charges of single training steps, below ``depth`` − 1 other scopes."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        ledger = Ledger(Path(inside) / "ledger.sqlite")
        parent = None
        for level in ("organisation", "tenant", "data_set", "run")[4 - depth :]:
            ledger.open_budget(
                level, epsilon=8.0, delta=_DELTA, adjacency="add_remove", unit="user",
                level=level, parent=parent,
            )  # fmt: skip
            parent = level
        assert parent is not None
        samples = []
        for i in range(count):
            start = time.perf_counter()
            ledger.charge(parent, f"step {i}", _step(0.01, 1.0))
            samples.append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
        Ledger(Path(inside) / "ledger.sqlite")
        opening = time.perf_counter() - start
    return {
        "scopes": depth,
        "charges": count,
        "median_ms": statistics.median(samples),
        "p99_ms": statistics.quantiles(samples, n=100)[98],
        "largest_ms": max(samples),
        "open_and_check_s": opening,
        "samples_ms": [round(s, 3) for s in samples],
    }


def _timed(work: Any) -> tuple[float, float, float]:
    start, cpu = time.perf_counter(), time.process_time()
    epsilon = work()
    return epsilon, time.perf_counter() - start, time.process_time() - cpu


def _compositions() -> list[dict[str, Any]]:
    found = []

    def add(what: str, epsilon: float, seconds: float, cpu: float) -> None:
        found.append({"what": what, "epsilon": epsilon, "seconds": seconds, "cpu_seconds": cpu})

    def steps() -> list[tuple[dp_accounting.DpEvent, int]]:
        different = ((_step(0.001, 5.0 + i / 1000), 1) for i in range(1, _DIFFERENT + 1))
        return [(_step(0.001, 5.0), _IDENTICAL), *different]

    def gaussians() -> float:
        accountant = Accountant("add_remove")
        accountant.compose(dp_accounting.SelfComposedDpEvent(_step(0.001, 5.0), _IDENTICAL))
        for i in range(_DIFFERENT):
            accountant.compose(dp_accounting.GaussianDpEvent(500.0 + i))
        return accountant.epsilon(_DELTA)

    add("PLD: 10^6 equal sampled steps, 10^4 different Gaussians, from nothing",
        *_timed(gaussians))  # fmt: skip

    def merged() -> float:
        accountant = Accountant("add_remove")
        for event, count in steps():
            accountant.compose(event, count)
        return accountant.epsilon(_DELTA)

    add("PLD: 10^6 equal and 10^4 different sampled steps, counted as a few kinds, from nothing",
        *_timed(merged))  # fmt: skip
    orders = renyi.Orders.for_budget(2.0, _DELTA)
    total = renyi.nothing(orders.alphas)

    def sampled() -> float:
        nonlocal total
        for event, count in steps():
            total = total.plus(renyi.renyi_cost(event, "add_remove", orders.alphas), count)
        return orders.epsilon(total, _DELTA)

    add("Renyi filter: 10^6 equal and 10^4 different sampled steps, from nothing",
        *_timed(sampled))  # fmt: skip
    event = _step(0.001, 5.0005)

    def one_more() -> float:
        cost = renyi.renyi_cost(event, "add_remove", orders.alphas)
        return orders.epsilon(total.plus(cost), _DELTA)

    add("Renyi filter: the next event's decision after these", *_timed(one_more))
    return found


def run(
    *, charges: int = 1000, folder: Path | None = None, json_path: Path, command: str
) -> dict[str, Any]:
    """Measures, and writes every sample to ``json_path``.

    Raises:
        BenchError: for a number of charges below 100.
    """
    if charges < 100:
        raise BenchError(f"--charges {charges}: allowed is a whole number >= 100.")
    folder = folder or Path(tempfile.gettempdir())
    if not folder.is_dir():
        raise BenchError(f"--folder {folder}: a folder that exists is needed.")
    result = {
        "what": "dpfa_jax.Ledger on SQLite (WAL, synchronous FULL), one process",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "cores": os.cpu_count(),
        "versions": package_versions(_PACKAGES),
        "charges": [_charges(folder, charges, depth) for depth in (1, 4)],
        "compositions": _compositions(),
    }
    write_json(json_path, result)
    return result


def show(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"charge, {c['scopes']} nested scope(s): median {c['median_ms']:.2f} ms, "
        f"p99 {c['p99_ms']:.2f} ms; opening and checking {c['charges']} charges "
        f"{c['open_and_check_s']:.2f} s"
        for c in result["charges"]
    ]
    lines += [
        f"{c['what']}: {c['seconds']:.3f} s, {c['cpu_seconds']:.3f} s of CPU time "
        f"(epsilon {c['epsilon']:.3f})"
        for c in result["compositions"]
    ]
    return "\n".join(lines)
