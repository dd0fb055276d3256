"""Block sizes by card and shape class: a table in this file, and a user's own.

Nothing is measured here, neither at import nor at a call. ``dpfa bench tune`` measures
the candidates below and writes a cache file, which goes before the table. A shape of no
class in either gets the back end's defaults, which fit every shape that it supports.

The cache file is ``$DPFA_TUNING_CACHE``, or ``dpfa_jax/attention_blocks.json`` in the
user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``).
"""

import dataclasses
import functools
import importlib
import itertools
import json
import os
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels.attention.spec import AttentionSpec

Direction = Literal["forward", "backward"]
Length = Literal["short", "long"]

CACHE_VARIABLE = "DPFA_TUNING_CACHE"
FORMAT = 1

# Keys from which a shape counts as long: the main loop then outweighs all around it.
LONG = 2048


class CacheError(ValueError):
    """A cache file that cannot be used. The message is one line and names the file."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Block sizes for one class of shapes on one card.

    Attributes:
        backend: module of kernels, such as ``'mosaic_gpu'``.
        direction: ``'forward'`` or ``'backward'``.
        card: part of JAX's ``device_kind``, such as ``'H100'``.
        head_dim: as the kernels see it: 64, 128 or 256.
        is_causal: whether the causal mask is on.
        length: ``'long'`` from :data:`LONG` keys, else ``'short'``.
        bits: of the dtype, 16 or 32.
        blocks: fields of the back end's ``Blocks``.
    """

    backend: str
    direction: Direction
    card: str
    head_dim: int
    is_causal: bool
    length: Length
    bits: int
    blocks: dict[str, int]

    def shape_class(self) -> tuple[object, ...]:
        """All fields but the sizes: what two entries for the same shapes share."""
        fields = dataclasses.asdict(self)
        del fields["blocks"]
        return tuple(fields.values())


# What is not listed runs with the back end's defaults. The forward ones gained 0.4 to 3 % over
# them on an H100, ChaCha8 and exact together, the backward ones 7 to 19 % at D = 64 and 0 to
# 2 % at D = 128 (medians of 12 to 20 samples in turns, 2026-11-23). With a causal mask and
# D = 128, three slots for dk and dv gained nothing (2026-11-24).
_BACKWARD_64 = {"dq_keys": 128, "dq_stages": 3, "dkv_warpgroups": 3}
TABLE: tuple[Entry, ...] = (
    Entry("mosaic_gpu", "forward", "H100", 64, False, "long", 16, {"stages": 3}),
    Entry("mosaic_gpu", "forward", "H100", 64, True, "long", 16, {"stages": 3}),
    Entry("mosaic_gpu", "forward", "H100", 64, False, "short", 16, {"stages": 3}),
    Entry("mosaic_gpu", "backward", "H100", 64, False, "long", 16, _BACKWARD_64),
    Entry("mosaic_gpu", "backward", "H100", 64, True, "long", 16, _BACKWARD_64),
    Entry("mosaic_gpu", "backward", "H100", 128, False, "long", 16, {"dkv_stages": 3}),
)

# What `dpfa bench tune` tries beside the defaults, by back end and direction. Groups are
# tried one after the other, the best of one kept for the next: the sizes of two kernels
# that make up one pass need not be tried in all combinations. What a compiler refuses for
# a head dimension is passed over.
Group = tuple[dict[str, int], ...]


def _grid(**choices: tuple[int, ...]) -> Group:
    """All combinations of the choices."""
    return tuple(
        dict(zip(choices, sizes, strict=True)) for sizes in itertools.product(*choices.values())
    )


_MOSAIC_GPU = _grid(keys=(64, 128), stages=(2, 3, 4), warpgroups=(1, 2, 3))
_MOSAIC_GPU_DQ = _grid(dq_keys=(64, 128), dq_stages=(2, 3), dq_warpgroups=(1, 2, 3))
_MOSAIC_GPU_DKV = _grid(dkv_rows=(64, 128), dkv_stages=(2, 3), dkv_warpgroups=(2, 3))
_TILES = (32, 64, 128)
_TRITON = _grid(rows=_TILES, keys=(32, 64), warps=(4, 8), stages=(2, 3))
_TRITON_DQ = _grid(rows=_TILES, row_keys=(32, 64), row_warps=(4, 8), row_stages=(2, 3))
_TRITON_DKV = _grid(keys=_TILES, key_rows=(32, 64), key_warps=(4, 8), key_stages=(2, 3))
_MOSAIC_TPU = _grid(query=(128, 256, 512, 1024), key=(256, 512))
CANDIDATES: dict[str, dict[Direction, tuple[Group, ...]]] = {
    "mosaic_gpu": {"forward": (_MOSAIC_GPU,), "backward": (_MOSAIC_GPU_DQ, _MOSAIC_GPU_DKV)},
    "triton": {"forward": (_TRITON,), "backward": (_TRITON_DQ, _TRITON_DKV)},
    "mosaic_tpu": {"forward": (_MOSAIC_TPU,), "backward": (_MOSAIC_TPU,)},
}


def length_class(num_keys: int) -> Length:
    """The class of a number of keys."""
    return "long" if num_keys >= LONG else "short"


def cache_path() -> Path:
    """Where the user's own table is, whether it exists or not."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else Path.home() / ".cache"
    return folder / "dpfa_jax" / "attention_blocks.json"


def lookup(
    backend: str,
    direction: Direction,
    *,
    device_kind: str,
    head_dim: int,
    is_causal: bool,
    num_keys: int,
    dtype: Any,
    with_cache: bool = True,
) -> dict[str, int] | None:
    """The block sizes for a call; None where the back end's defaults are to be taken.

    Args:
        backend: module of kernels.
        direction: ``'forward'`` or ``'backward'``.
        device_kind: of the JAX device.
        head_dim: as the kernels see it, padding included.
        is_causal: whether the causal mask is on.
        num_keys: S, padding included.
        dtype: of the operands.
        with_cache: False leaves out the user's file.

    Returns:
        Fields of the back end's ``Blocks``.

    Raises:
        CacheError: for a user's file that cannot be used.
    """
    wanted = (head_dim, is_causal, length_class(num_keys), 8 * jnp.dtype(dtype).itemsize)
    for entry in (*(read_cache() if with_cache else ()), *TABLE):
        if (entry.backend, entry.direction) != (backend, direction):
            continue
        shape = (entry.head_dim, entry.is_causal, entry.length, entry.bits)
        if shape == wanted and entry.card in device_kind:
            return dict(entry.blocks)
    return None


def tuned_blocks(
    backend: str, query: Any, key: Any, spec: AttentionSpec, *, device_kind: str
) -> tuple[Any, Any]:
    """Block sizes forward and backward for a call, as the back end's own dataclasses.

    Args:
        backend: module of kernels.
        query: an array or ``jax.ShapeDtypeStruct`` [B, T, N, H], H as the kernels see it.
        key: likewise, [B, S, K, H].
        spec: static options of the call.
        device_kind: of the JAX device.

    Returns:
        A pair; None in it stands for the back end's defaults.
    """

    def one(direction: Direction) -> Any:
        sizes = lookup(
            backend,
            direction,
            device_kind=device_kind,
            head_dim=query.shape[3],
            is_causal=spec.is_causal,
            num_keys=key.shape[1],
            dtype=query.dtype,
        )
        return None if sizes is None else make_blocks(backend, direction, sizes)

    return one("forward"), one("backward")


def read_cache(path: Path | None = None) -> tuple[Entry, ...]:
    """The entries of a cache file; none if there is no file.

    Args:
        path: the file; None means :func:`cache_path`.

    Raises:
        CacheError: if the file cannot be read, or holds what no back end knows.
    """
    path = path or cache_path()
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}") from error
    # A changed file is read anew.
    return _read(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: Path, modified: int, size: int) -> tuple[Entry, ...]:
    del modified, size
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _bad(path, f"is no JSON: {error}") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        found = contents.get("format") if isinstance(contents, dict) else None
        raise _bad(path, f"has format={found!r}, {FORMAT} is known")
    entries = contents.get("entries")
    if not isinstance(entries, list):
        raise _bad(path, "has no list 'entries'")
    return tuple(_entry(path, i, raw) for i, raw in enumerate(entries))


_KINDS: dict[str, type] = {"head_dim": int, "is_causal": bool, "bits": int, "card": str}
_CHOICES = {"direction": ("forward", "backward"), "length": ("short", "long")}


def _entry(path: Path, index: int, raw: Any) -> Entry:
    where = f"entries[{index}]"
    names = [field.name for field in dataclasses.fields(Entry)]
    if not isinstance(raw, dict) or not set(names) <= raw.keys():
        raise _bad(path, f"{where} needs the keys {', '.join(names)}")
    for name, kind in _KINDS.items():
        if type(raw[name]) is not kind:
            raise _bad(path, f"{where}.{name}={raw[name]!r} is no {kind.__name__}")
    for name, allowed in _CHOICES.items():
        if raw[name] not in allowed:
            raise _bad(path, f"{where}.{name}={raw[name]!r}, allowed are {allowed}")
    if not raw["card"]:
        raise _bad(path, f"{where}.card is empty, which would fit every card")
    if raw["backend"] not in tuple(CANDIDATES):
        raise _bad(path, f"{where}.backend={raw['backend']!r}, known are {tuple(CANDIDATES)}")
    try:
        make_blocks(raw["backend"], raw["direction"], raw["blocks"])
    except ValueError as error:
        raise _bad(path, f"{where}.blocks={raw['blocks']!r}: {error}") from error
    return Entry(**{name: raw[name] for name in names})


def make_blocks(backend: str, direction: Direction, sizes: Any) -> Any:
    """The dataclass of block sizes that a back end takes for a direction.

    That is ``Blocks``; for the backward pass, ``BackwardBlocks`` or else ``Blocks`` of the
    module in which ``backward`` is written.

    Args:
        backend: module of kernels.
        direction: ``'forward'`` or ``'backward'``.
        sizes: the fields that differ from the defaults.

    Raises:
        ValueError: for fields or values that the back end does not have.

    Example:
        >>> make_blocks("mosaic_tpu", "forward", {"query": 256, "key": 128}).query
        256
    """
    module = importlib.import_module(f"pallas_kernels.attention.{backend}")
    kind = module.Blocks
    if direction == "backward":
        home = importlib.import_module(module.backward.__module__)
        kind = getattr(home, "BackwardBlocks", getattr(home, "Blocks", kind))
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    if not isinstance(sizes, dict) or not set(sizes) <= set(known):
        raise ValueError(f"allowed are the names {', '.join(known)}")
    for name, size in sizes.items():
        if type(size) is not type(known[name]) or (type(size) is int and size < 1):
            raise ValueError(f"{name} must be like its default, {known[name]!r}, and not below 1")
    return kind(**sizes)


def cache_contents(entries: tuple[Entry, ...]) -> dict[str, Any]:
    """What a cache file with these entries holds; later ones replace earlier ones."""
    latest = {entry.shape_class(): entry for entry in entries}
    return {"format": FORMAT, "entries": [dataclasses.asdict(e) for e in latest.values()]}


def _bad(path: Path, what: str) -> CacheError:
    return CacheError(f"{path} {what}. Delete it, or write it anew with `dpfa bench tune`.")
