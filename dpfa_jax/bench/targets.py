"""The speed that the kernels must reach, and what a run says about it.

Figures are times of the other over ours, on one H100: 1.00 is as fast as the best
attention without privacy in JAX, more is faster. A target that covers several shapes is
judged by the worst of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from dpfa_jax.bench import ours, peers
from dpfa_jax.bench.cases import Direction, Shape

# The best peer of the family 'jax' in the same cell, whichever that is.
BEST_PEER = "best peer"

# float32 numbers for each row of each head that count as statistics of the rows: the
# denominator or log-sum-exp, delta, a clipping factor and the like. A copy of any
# operand would be 32 or more.
STATISTICS = 8.0


@dataclasses.dataclass(frozen=True)
class Target:
    """One figure to reach: time of ``against`` over time of ``version``."""

    name: str
    version: str
    direction: Direction
    covers: Callable[[Shape], bool]
    must: float | None
    aim: float
    against: str = BEST_PEER


def _length(low: int, high: int | None = None, head_dim: int | None = None) -> Any:
    def covers(shape: Shape) -> bool:
        fits = low <= shape.length <= (high or shape.length)
        return fits and head_dim in (None, shape.head_dim)

    return covers


def _first_shape(shape: Shape) -> bool:
    return (shape.batch, shape.length, shape.heads, shape.head_dim) == (4, 4096, 16, 128)


_AT_4096_128 = _length(4096, 4096, 128)
_FROM_16384 = _length(16384, None, 128)
_FROM_4096_128 = _length(4096, None, 128)
_FROM_4096 = _length(4096)
_AT_4096 = _length(4096, 4096)
_AT_1024 = _length(1024, 1024)

TARGETS = (
    Target("ChaCha8, T=4096, D=128", ours.CHACHA8, "forward", _AT_4096_128, 0.93, 1.06),
    Target("ChaCha8, T>=16384, D=128", ours.CHACHA8, "forward", _FROM_16384, 1.00, 1.08),
    Target("ChaCha20, T=4096, D=128", ours.CHACHA20, "forward", _AT_4096_128, 0.87, 1.00),
    Target("ChaCha20, T>=16384, D=128", ours.CHACHA20, "forward", _FROM_16384, 0.98, 1.06),
    Target(
        "ChaCha8, norms, T>=4096, D=128",
        ours.CHACHA8_NORMS, "forward", _FROM_4096_128, 1.00, 1.12,
    ),
    Target("ChaCha8, T=4096, D=64", ours.CHACHA8, "forward", _length(4096, 4096, 64), 0.93, 1.06),
    Target("ChaCha8, T=1024", ours.CHACHA8, "forward", _AT_1024, 0.75, 0.95),
    Target("ChaCha8, T>=4096", ours.CHACHA8, "forward+backward", _FROM_4096, 0.90, 1.03),
    Target("exact, T>=4096", ours.EXACT, "forward", _FROM_4096, 0.95, 1.00),
    Target("exact, T>=4096", ours.EXACT, "forward+backward", _FROM_4096, 0.90, 1.00),
    Target("ChaCha8, T=1024", ours.CHACHA8, "forward", _AT_1024, 1.55, 2.0, peers.SEPARATE),
    Target("ChaCha8, T=4096", ours.CHACHA8, "forward", _AT_4096, 1.2, 1.5, peers.SEPARATE),
    Target(
        "ChaCha8, first shape", ours.CHACHA8, "forward", _first_shape, None, 1.00,
        peers.TORCH_CUDNN,
    ),
    Target(
        "ChaCha8, first shape", ours.CHACHA8, "forward+backward", _first_shape, None, 1.00,
        peers.TORCH_CUDNN,
    ),
)  # fmt: skip

Verdict = Literal["met", "missed", "not measured"]


def _verdict(figure: float | None, bound: float) -> Verdict:
    if figure is None:
        return "not measured"
    return "met" if figure >= bound else "missed"


def judge(cells: list[dict[str, Any]], *, samples: int = 20) -> list[dict[str, Any]]:
    """Each target with its figure, from the cells that :mod:`dpfa_jax.bench.attention` makes.

    A figure needs at least ``samples`` samples of both sides. Where one covered shape
    has none, the target counts as not measured: a worst case over the rest proves
    nothing.
    """
    verdicts = []
    for target in TARGETS:
        figures: list[dict[str, Any]] = []
        for cell in cells:
            if cell["direction"] != target.direction or not target.covers(Shape(**cell["shape"])):
                continue
            entries = {entry["name"]: entry for entry in cell["versions"]}
            entry = entries.get(target.version, {})
            other = cell["baseline"] if target.against == BEST_PEER else target.against
            pair = (entry, entries.get(other, {}))
            enough = all(len(e.get("samples_ms", ())) >= samples for e in pair)
            ratio = entry.get("ratios", {}).get(other) if enough else None
            figures.append({"shape": cell["shape"], "other": other, **(ratio or {"ratio": None})})
        known = [f for f in figures if f["ratio"] is not None]
        worst = min(known, key=lambda f: f["ratio"]) if known else None
        figure = worst["ratio"] if worst and len(known) == len(figures) else None
        verdicts.append(
            {
                "name": target.name,
                "version": target.version,
                "direction": target.direction,
                "against": target.against,
                "must": target.must,
                "aim": target.aim,
                "figure": figure,
                "interval": worst["interval"] if worst and figure is not None else None,
                "must_reached": None if target.must is None else _verdict(figure, target.must),
                "aim_reached": _verdict(figure, target.aim),
                "shapes": figures,
            }
        )
    return [*verdicts, _memory(cells)]


def _memory(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Extra device memory of our default versions, as float32 numbers a row and head."""
    names = (ours.EXACT, ours.CHACHA8, ours.CHACHA20, ours.CHACHA8_NORMS, ours.CHACHA20_NORMS)
    figures = []
    for cell in cells:
        shape = Shape(**cell["shape"])
        rows = shape.batch * shape.heads * shape.length
        for entry in cell["versions"]:
            extra = entry.get("extra_bytes")
            if entry["name"] in names and extra is not None:
                numbers = extra / (4 * rows)
                figures.append(
                    {
                        "shape": cell["shape"],
                        "direction": cell["direction"],
                        "version": entry["name"],
                        "ratio": numbers,
                    }
                )
    worst = max((f["ratio"] for f in figures), default=None)
    reached = "not measured" if worst is None else "met" if worst <= STATISTICS else "missed"
    return {
        "name": "extra memory, float32 numbers a row and head",
        "version": "all of ours",
        "direction": "both",
        "against": "beyond inputs and outputs",
        "must": STATISTICS,
        "aim": STATISTICS,
        "figure": worst,
        "interval": None,
        "must_reached": reached,
        "aim_reached": reached,
        "shapes": figures,
    }
