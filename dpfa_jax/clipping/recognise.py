"""What is recognised: steps that leave a view of a leaf, and uses whose gradient has a rule.

Each function takes an equation of a jaxpr and the view among its inputs, and returns None
for what it does not know: the leaf is then materialised.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.lax import GatherScatterMode

from dpfa_jax.clipping.views import View

Path = tuple[int, ...]


class Axes(NamedTuple):
    """Which axes of an array are batched over, summed over, and kept by a site."""

    stack: tuple[int, ...]
    summed: tuple[int, ...]
    kept: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of one leaf, whose gradient is Σ_t left_t ⊗ right_t.

    One factor is made of the other operand (activations, or indices), one of the output's
    cotangent. ``left`` and ``right`` are the parts of the view's base that they cover;
    the left one holds the base's first dimension that is not batched.

    Attributes:
        path: the equation's number, after those of the equations around it.
        kind: what the equation does.
        view: what it reads.
        operand: which of its inputs is the other operand.
        scans: lengths of the scans around it, outermost first.
        operand_axes: of the other operand; for a convolution, of its patches.
        cotangent_axes: of the output's cotangent.
        stack_dims: dimensions of the base that are batched over.
        left_dims: dimensions of the base that the left factor covers.
        right_dims: and the right one.
        operand_is_left: whether the left factor is the one made of the operand.
        output: shape and dtype of the equation's output.
        operand_shape: shape of the other operand.
        params: the equation's parameters.
    """

    path: Path
    kind: Literal["dot", "gather", "dynamic_slice", "conv"]
    view: View
    operand: int
    scans: tuple[int, ...]
    operand_axes: Axes
    cotangent_axes: Axes
    stack_dims: tuple[int, ...]
    left_dims: tuple[int, ...]
    right_dims: tuple[int, ...]
    operand_is_left: bool
    output: jax.ShapeDtypeStruct
    operand_shape: tuple[int, ...]
    params: dict[str, Any] = dataclasses.field(compare=False, repr=False)

    @property
    def layout(self) -> tuple[Any, ...]:
        """Sites with the same layout have factors that can be multiplied with each other."""
        return (self.view.steps, self.stack_dims, self.left_dims, self.right_dims)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """S, T, and the widths of the left and of the right factor."""
        base = self.view.base_shape
        stack = [base[i] for i in self.stack_dims]
        stack += [n for d, n in enumerate(self.scans) if d in self.view.stacked]
        rows = [self.output.shape[i] for i in self.cotangent_axes.summed]
        rows += [n for d, n in enumerate(self.scans) if d not in self.view.stacked]
        sides = ([base[i] for i in dims] for dims in (self.left_dims, self.right_dims))
        s, t, a, b = (int(np.prod(x, dtype=np.int64)) for x in (stack, rows, *sides))
        return s, t, a, b


# --- views -----------------------------------------------------------------------------


def _one(view: View | None) -> list[View | None] | None:
    return None if view is None else [view]


def _cast(view: View, eqn: Any) -> list[View | None] | None:
    floating = jax.numpy.issubdtype(eqn.outvars[0].aval.dtype, np.floating)
    return _one(view if floating else None)


def _same_entries(view: View, eqn: Any) -> list[View | None] | None:
    """A reshape, or a broadcast or squeeze that only adds or drops axes of length one."""
    shape = tuple(eqn.outvars[0].aval.shape)
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        return None
    if eqn.primitive.name == "broadcast_in_dim":
        dims = eqn.params["broadcast_dimensions"]
        added = [n for i, n in enumerate(shape) if i not in dims]
        if any(n != 1 for n in added) or tuple(shape[i] for i in dims) != view.shape:
            return None
    return _one(view.reshaped(shape))


def _slice(view: View, eqn: Any) -> list[View | None] | None:
    if eqn.params["strides"] is not None and any(s != 1 for s in eqn.params["strides"]):
        return None
    return [view.sliced(tuple(eqn.params["start_indices"]), tuple(eqn.params["limit_indices"]))]


def _split(view: View, eqn: Any) -> list[View | None] | None:
    axis, begin = eqn.params["axis"], 0
    parts: list[View | None] = []
    for n in eqn.params["sizes"]:
        start, limit = [0] * len(view.shape), list(view.shape)
        start[axis], limit[axis] = begin, begin + int(n)
        parts.append(view.sliced(tuple(start), tuple(limit)))
        begin += int(n)
    return parts


VIEW_OPS: dict[str, Callable[[View, Any], list[View | None] | None]] = {
    "convert_element_type": _cast,
    "copy": lambda view, eqn: [view],
    # Where a value lies, and along which axes its type varies: its entries are the same.
    "sharding_constraint": lambda view, eqn: [view],
    "pvary": lambda view, eqn: [view],
    "optimization_barrier": lambda view, eqn: [view] if len(eqn.invars) == 1 else None,
    "transpose": lambda view, eqn: [view.transposed(tuple(eqn.params["permutation"]))],
    "reshape": _same_entries,
    "squeeze": _same_entries,
    "broadcast_in_dim": _same_entries,
    "slice": _slice,
    "split": _split,
}


# --- sites -----------------------------------------------------------------------------


def _site(
    eqn: Any,
    path: Path,
    scans: tuple[int, ...],
    view: View,
    *,
    kind: Literal["dot", "gather", "dynamic_slice", "conv"],
    operand: int,
    operand_axes: Axes,
    cotangent_axes: Axes,
    stack_dims: tuple[int, ...],
    operand_dims: tuple[int, ...],
    cotangent_dims: tuple[int, ...],
) -> Site:
    """Puts the two factors in the order that :class:`Site` promises."""
    operand_is_left = min(operand_dims, default=-1) < min(cotangent_dims, default=-1)
    sides = (operand_dims, cotangent_dims)
    left, right = sides if operand_is_left else sides[::-1]
    out = eqn.outvars[0].aval
    return Site(
        path, kind, view, operand, scans, operand_axes, cotangent_axes, stack_dims, left, right,
        operand_is_left, jax.ShapeDtypeStruct(out.shape, out.dtype),
        tuple(eqn.invars[operand].aval.shape), eqn.params,
    )  # fmt: skip


def _by_base(axes: Sequence[int], dims: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes and the dimensions of the base that they stand for, in the base's order."""
    pairs = sorted(zip(dims, axes, strict=True))
    return tuple(a for _, a in pairs), tuple(d for d, _ in pairs)


def _dot(eqn: Any, which: int, view: View, path: Path, scans: tuple[int, ...]) -> Site | None:
    contract, batch = eqn.params["dimension_numbers"]
    other = 1 - which
    w_contract, w_batch, x_contract, x_batch = (
        tuple(contract[which]), tuple(batch[which]), tuple(contract[other]), tuple(batch[other]),
    )  # fmt: skip
    w_free = [i for i in range(len(view.shape)) if i not in (*w_contract, *w_batch)]
    x_ndim = len(eqn.invars[other].aval.shape)
    x_free = [i for i in range(x_ndim) if i not in (*x_contract, *x_batch)]
    if not jax.numpy.issubdtype(eqn.invars[other].aval.dtype, np.floating):
        return None
    base = view.order
    # The output's axes: batch, then the left-hand side's free ones, then the right's.
    out_batch = list(range(len(w_batch)))
    first, second = (w_free, x_free) if which == 0 else (x_free, w_free)
    out_first = [len(out_batch) + i for i in range(len(first))]
    out_second = [len(out_batch) + len(first) + i for i in range(len(second))]
    out_w, out_x = (out_first, out_second) if which == 0 else (out_second, out_first)

    stack_dims = [base[i] for i in w_batch]
    x_stack, dims = _by_base(x_batch, stack_dims)
    g_stack, _ = _by_base(out_batch, stack_dims)
    x_kept, operand_dims = _by_base(x_contract, [base[i] for i in w_contract])
    g_kept, cotangent_dims = _by_base(out_w, [base[i] for i in w_free])
    return _site(
        eqn, path, scans, view,
        kind="dot",
        operand=other,
        operand_axes=Axes(x_stack, tuple(x_free), x_kept),
        cotangent_axes=Axes(g_stack, tuple(out_x), g_kept),
        stack_dims=dims,
        operand_dims=operand_dims,
        cotangent_dims=cotangent_dims,
    )  # fmt: skip


def _gather(eqn: Any, which: int, view: View, path: Path, scans: tuple[int, ...]) -> Site | None:
    """Rows of a table: one indexed axis, the others whole."""
    d = eqn.params["dimension_numbers"]
    sizes, shape = tuple(eqn.params["slice_sizes"]), view.shape
    if which != 0 or d.operand_batching_dims or len(d.start_index_map) != 1:
        return None
    (axis,) = d.start_index_map
    whole = all(n == shape[i] for i, n in enumerate(sizes) if i != axis)
    modes = (
        GatherScatterMode.CLIP,
        GatherScatterMode.FILL_OR_DROP,
        GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    if d.collapsed_slice_dims != (axis,) or not whole or eqn.params["mode"] not in modes:
        return None
    out = range(len(eqn.outvars[0].aval.shape))
    rest = [i for i in range(len(shape)) if i != axis]
    kept, dims = _by_base(d.offset_dims, [view.order[i] for i in rest])
    rows = tuple(i for i in out if i not in d.offset_dims)
    return _site(
        eqn, path, scans, view,
        kind="gather",
        operand=1,
        operand_axes=Axes((), tuple(range(len(rows))), ()),
        cotangent_axes=Axes((), rows, kept),
        stack_dims=(),
        operand_dims=(view.order[axis],),
        cotangent_dims=dims,
    )  # fmt: skip


def _dynamic_slice(
    eqn: Any, which: int, view: View, path: Path, scans: tuple[int, ...]
) -> Site | None:
    """One row of a table: length one along one axis, whole along the others."""
    sizes, shape = tuple(eqn.params["slice_sizes"]), view.shape
    part = [i for i, n in enumerate(sizes) if n != shape[i]]
    if which != 0 or len(part) != 1 or sizes[part[0]] != 1:
        return None
    (axis,) = part
    rest = [i for i in range(len(shape)) if i != axis]
    kept, dims = _by_base(rest, [view.order[i] for i in rest])
    return _site(
        eqn, path, scans, view,
        kind="dynamic_slice",
        operand=1 + axis,
        operand_axes=Axes((), (), ()),
        cotangent_axes=Axes((), (axis,), kept),
        stack_dims=(),
        operand_dims=(view.order[axis],),
        cotangent_dims=dims,
    )  # fmt: skip


def _conv(eqn: Any, which: int, view: View, path: Path, scans: tuple[int, ...]) -> Site | None:
    """A convolution without groups: a matrix product with the input's patches."""
    p = eqn.params
    if which != 1 or p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        return None
    numbers = p["dimension_numbers"]
    out_batch, out_features, *out_space = numbers.out_spec
    k_out, k_in, *k_space = numbers.rhs_spec
    window = len(k_space)
    # patches(): [batch, *output positions, input features, *window].
    axes = [window + 1, *range(window + 2, 2 * window + 2)]
    kept, operand_dims = _by_base(axes, [view.order[i] for i in (k_in, *k_space)])
    return _site(
        eqn, path, scans, view,
        kind="conv",
        operand=0,
        operand_axes=Axes((), tuple(range(window + 1)), kept),
        cotangent_axes=Axes((), (out_batch, *out_space), (out_features,)),
        stack_dims=(),
        operand_dims=operand_dims,
        cotangent_dims=(view.order[k_out],),
    )  # fmt: skip


SITE_OPS: dict[str, Callable[[Any, int, View, Path, tuple[int, ...]], Site | None]] = {
    "dot_general": _dot,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "conv_general_dilated": _conv,
}
