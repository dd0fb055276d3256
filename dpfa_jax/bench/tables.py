"""A bench's result for the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpfa_jax.bench.cases import Shape

_COLOURS = {"met": "green", "missed": "red", "not measured": "yellow"}


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """A table that fits into 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ratio(entry: dict[str, Any], other: str | None) -> str:
    found = entry.get("ratios", {}).get(other)
    if found is None:
        return "–"
    low, high = found["interval"]
    return f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def _memory(extra: int | None) -> str:
    return "–" if extra is None else f"{extra / 2**20:.1f}"


def _cell(cell: dict[str, Any], separate: str) -> Table:
    title = f"{Shape(**cell['shape'])}, {cell['direction']}"
    right = ("ms", "±", "TFLOP/s", "best peer/this", "steps/this", "MiB")
    table = _table(title, ("version",), right)
    for entry in cell["versions"]:
        if "error" in entry:
            continue
        steps = entry.get("ratios", {}).get(separate)
        best = entry["name"] == cell["baseline"]
        table.add_row(
            entry["name"] + (" *" if len(entry["samples_ms"]) < 20 else ""),
            f"{entry['median_ms']:.4g}",
            f"{entry['quartile_distance_ms']:.1g}",
            f"{entry['tflops']:.3g}",
            "best peer" if best else _ratio(entry, cell["baseline"]),
            "–" if steps is None else f"{steps['ratio']:.2f}",
            _memory(entry["extra_bytes"]),
        )
    return table


def _targets(targets: list[dict[str, Any]]) -> Table:
    title = "targets: time of the other over ours, worst shape of each"
    table = _table(title, ("what", "pass", "against"), ("figure", "must", "aim"))
    for target in targets:
        figure = "–" if target["figure"] is None else f"{target['figure']:.2f}"
        if target["interval"] is not None:
            figure += "\n[{:.2f}, {:.2f}]".format(*target["interval"])
        bounds = []
        for name in ("must", "aim"):
            reached = target[f"{name}_reached"]
            if reached is None:
                bounds.append("–")
            else:
                word = "?" if reached == "not measured" else reached
                bounds.append(f"{target[name]:.2f} [{_COLOURS[reached]}]{word}[/]")
        short = {"forward": "fwd", "forward+backward": "fwd+bwd"}
        direction = short.get(target["direction"], target["direction"])
        table.add_row(target["name"], direction, target["against"], escape(figure), *bounds)
    return table


def print_result(result: dict[str, Any], *, separate: str, console: Console | None = None) -> None:
    """Prints every shape's table, what failed and why, and the targets."""
    console = console or Console()
    console.print(
        f"{result['card']}, jax {result['versions']['jax']}, {result['date']}, "
        f"{result['dtype']}. Medians; ± is the distance of the quartiles; [95 % bootstrap "
        "intervals]; MiB beyond inputs and outputs; * fewer than 20 samples.",
        markup=False,
        highlight=False,
    )
    for cell in result["cells"]:
        if any("error" not in entry for entry in cell["versions"]):
            console.print(_cell(cell, separate))
        failed: dict[str, list[str]] = {}
        for entry in cell["versions"]:
            if "error" in entry:
                failed.setdefault(entry["error"], []).append(entry["name"])
        if failed:
            where = f"{Shape(**cell['shape'])}, {cell['direction']}"
            console.print(f"no figures at {where}:", highlight=False)
        for error, names in failed.items():
            console.print(f"  {'; '.join(names)}: {error}", markup=False, highlight=False)
    console.print(_targets(result["targets"]))
