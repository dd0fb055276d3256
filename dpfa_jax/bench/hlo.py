"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"[a-z]+(\d*)\w*\[([\d,]*)\]")
# What these start is a tuple: operands, results and, of a permutation, two numbers of its own.
_WITH_OPERANDS = ("all-gather", "collective-permute")


class Collective(NamedTuple):
    """One instruction: its kind, and the elements and bytes of its results on one device."""

    kind: str
    elements: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collectives of a program (``compiled.as_text()``), in its order, each once.

    Example:
        >>> collectives("  %a = f32[4,2]{1,0} all-reduce(%b), channel_id=1")
        [Collective(kind='all-reduce', elements=8, bytes=32)]
    """
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(re.sub(r"/\*.*?\*/", "", line))
        if match is None:
            continue
        arrays = _ARRAY.findall(match[1])
        if match[3] and match[2] in _WITH_OPERANDS:
            arrays = [(bits, dims) for bits, dims in arrays if dims]
            arrays = arrays[len(arrays) // 2 :]
        counts = [math.prod(int(n) for n in dims.split(",") if n) for _, dims in arrays]
        size = sum(n * int(bits or 8) // 8 for n, (bits, _) in zip(counts, arrays, strict=True))
        found.append(Collective(match[2], sum(counts), size))
    return found
