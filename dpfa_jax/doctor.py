"""``dpfa doctor``: which implementation each feature gets on this machine, and why.

An implementation does a call's backward pass if it does its forward pass, so one name
stands for both.
"""

import dataclasses
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from dpfa_jax.attention import AttentionPrivacy
from dpfa_jax.versions import package_versions
from pallas_kernels.attention import AttentionSpec, explain, tuning

_LENGTH = 1024
_HEADS = 8
_DTYPES = ("bfloat16", "float16", "float32")
# 80 stands for all that are padded to the next of the others.
_HEAD_DIMS = (64, 80, 128, 256)
_PRIVACY: dict[str, AttentionPrivacy | None] = {
    "exact": None,
    "record": AttentionPrivacy(
        unit="record",
        noise_multiplier=1.0,
        value_clip=1.0,
        adjacency="add_remove",
        logit_bound=1.0,
    ),
    "sequence": AttentionPrivacy(
        unit="sequence", noise_multiplier=1.0, value_clip=1.0, adjacency="replace_one"
    ),
}


@dataclasses.dataclass(frozen=True)
class Feature:
    """What a call asks for beside plain self-attention.

    Key/value lengths are not told to :func:`pallas_kernels.attention.explain`: every
    implementation takes them. They are listed because people look for them.
    """

    name: str
    is_causal: bool = False
    window: tuple[int, int] | None = None
    has_mask: bool = False
    kv_heads: int = _HEADS
    num_keys: int = _LENGTH


FEATURES = (
    Feature("plain"),
    Feature("causal", is_causal=True),
    Feature("window", window=(128, 128)),
    Feature("lengths"),
    Feature("mask", has_mask=True),
    Feature("GQA", kv_heads=2),
    Feature("MQA", kv_heads=1),
    Feature("cross", num_keys=_LENGTH + 77),
)


def _spec(mode: str, dtype: str, head_dim: int, feature: Feature) -> AttentionSpec:
    privacy = _PRIVACY[mode]
    scale = head_dim**-0.5
    if privacy is None:
        return AttentionSpec(
            mode="exact", scale=scale, is_causal=feature.is_causal, window=feature.window
        )
    return privacy.spec(
        scale=scale,
        head_dim=head_dim,
        num_keys=feature.num_keys,
        dtype=dtype,
        is_causal=feature.is_causal,
        window=feature.window,
    )


def examine() -> dict[str, Any]:
    """Versions, devices, and every combination's implementation with what stood above it.

    Raises:
        tuning.CacheError: for a file of block sizes that would stop every call.
    """
    calls = []
    for mode, dtype, head_dim, feature in itertools.product(
        _PRIVACY, _DTYPES, _HEAD_DIMS, FEATURES
    ):
        query = jax.ShapeDtypeStruct((2, _LENGTH, _HEADS, head_dim), jnp.dtype(dtype))
        key = jax.ShapeDtypeStruct((2, feature.num_keys, feature.kv_heads, head_dim), query.dtype)
        spec = _spec(mode, dtype, head_dim, feature)
        reasons = explain(query, key, spec, has_mask=feature.has_mask)
        first = next(i for i, (_, reason) in enumerate(reasons) if reason is None)
        calls.append(
            {
                "mode": mode,
                "dtype": dtype,
                "head_dim": head_dim,
                "feature": feature.name,
                "forward": reasons[first][0],
                "backward": reasons[first][0],
                "not": dict(reasons[:first]),
            }
        )
    path = tuning.cache_path()
    return {
        "versions": package_versions(),
        "backend": jax.default_backend(),
        "devices": [
            {
                "kind": device.device_kind,
                "platform": device.platform,
                "compute_capability": getattr(device, "compute_capability", None),
            }
            for device in jax.devices()
        ],
        "block_sizes": {"file": str(path), "entries": len(tuning.read_cache(path))},
        "calls": calls,
    }


def _table(calls: list[dict[str, Any]]) -> Table:
    """One row for each mode and implementation; equal dtypes and head dims are merged."""
    table = Table(
        title="implementation, forward and backward", title_justify="left", box=box.SIMPLE_HEAD
    )
    for title in ("mode", "dtype", "head dim", "features", "implementation"):
        table.add_column(title)
    # (mode, features by implementation) -> dtype -> head dims.
    merged: dict[tuple[str, Any], dict[str, list[str]]] = {}
    for (mode, dtype, head_dim), group in itertools.groupby(
        calls, key=lambda c: (c["mode"], c["dtype"], c["head_dim"])
    ):
        features: dict[str, list[str]] = {}
        for call in group:
            features.setdefault(call["forward"], []).append(call["feature"])
        frozen = tuple((name, ", ".join(those)) for name, those in features.items())
        merged.setdefault((mode, frozen), {}).setdefault(dtype, []).append(str(head_dim))
    for (mode, by_name), dtypes in merged.items():
        dims: dict[str, list[str]] = {}
        for dtype, head_dims in dtypes.items():
            dims.setdefault(", ".join(head_dims), []).append(dtype)
        for head_dims_text, those in dims.items():
            for name, features_text in by_name:
                table.add_row(mode, "\n".join(those), head_dims_text, features_text, name)
    return table


def _why_not(calls: list[dict[str, Any]]) -> list[str]:
    """One line for each implementation and reason, with what it concerns."""
    concerned: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for call in calls:
        for name, reason in call["not"].items():
            concerned.setdefault((name, reason), []).append(call)
    lines = []
    for (name, reason), those in concerned.items():
        where = []
        for axis in ("mode", "dtype", "head_dim", "feature"):
            values = {str(call[axis]): None for call in those}
            if len(values) < len({call[axis] for call in calls}):
                where.append("/".join(values))
        lines.append(f"{name} ({', '.join(where) or 'all'}): {reason}")
    return lines


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Prints what :func:`examine` found."""
    console = console or Console()
    installed = (f"{name} {v or 'not installed'}" for name, v in report["versions"].items())
    console.print(", ".join(installed), highlight=False)
    for number, device in enumerate(report["devices"]):
        capability = device["compute_capability"]
        more = f", compute capability {capability}" if capability else ""
        console.print(f"device {number}: {device['kind']}{more}", highlight=False)
    sizes = report["block_sizes"]
    found = f"{sizes['entries']} entries of your own" if sizes["entries"] else "none of your own"
    console.print(
        f"block sizes: {found} in {sizes['file']}", highlight=False, markup=False, soft_wrap=True
    )
    console.print(_table(report["calls"]))
    lines = _why_not(report["calls"])
    if lines:
        console.print("why not the better ones:")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def run(*, as_json: bool, console: Console | None = None) -> None:
    """Examines the machine and prints the result, as tables or as JSON."""
    report = examine()
    if as_json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        print_report(report, console)
