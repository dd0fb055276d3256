"""The plot of ``dpfa bench scaling``: throughput and attention against the ideal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def _lines(result: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Of each line of the left plot, its points: devices, and how many times one device."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell in result["cells"]:
        if "share" in cell and cell["devices"] > 1:
            name = f"{cell['model']}, {cell['layout']}, {cell['mode']}"
            lines.setdefault(name, [(1, 1.0)])
            lines[name].append((cell["devices"], cell["devices"] * cell["share"]))
    return lines


def _attention_lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get("speed_up") and row["devices"] is not None:
            name = f"{row['version']}, {row['direction']}"
            lines.setdefault(name, []).append((row["devices"], row["speed_up"]))
    return lines


def figure(result: dict[str, Any]) -> Figure:
    """Training on the left, sequence-parallel attention on the right; dotted is the ideal."""
    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    sides = (
        ("training steps: tokens/s over one device's", _lines(result)),
        ("attention over split keys: speed-up", _attention_lines(result.get("attention", ()))),
    )
    for place, (title, lines) in enumerate(sides, 1):
        axes = drawn.add_subplot(1, 2, place)
        most = max((n for points in lines.values() for n, _ in points), default=1)
        axes.plot([1, most], [1, most], ":", color="gray", label="ideal")
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        axes.set(title=title, xlabel="devices", ylabel="times one device")
        axes.legend(fontsize="small")
    drawn.suptitle(f"{result['card']}, {result['date'][:10]}", fontsize="medium")
    return drawn


def write(result: dict[str, Any], path: Path) -> None:
    """Writes :func:`figure` as SVG."""
    figure(result).savefig(path, format="svg", metadata={"Date": None})
