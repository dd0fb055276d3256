"""The one entry point: checks, the choice of a form and an implementation, and the call."""

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float, Float32

from pallas_kernels import batching, partition
from pallas_kernels.devices import PLATFORMS
from pallas_kernels.devices import wrong_device as _wrong_device
from pallas_kernels.grad_norm import common, reference, xla
from pallas_kernels.grad_norm.common import FORMS, Form, Norms

Implementation = Literal["mosaic_gpu", "triton", "mosaic_tpu", "xla", "reference"]

# Modules of kernels, best first. They are imported when first used: their compilers take a
# second to load.
_KERNELS = tuple(PLATFORMS)
_PLAIN: dict[str, Callable[..., jax.Array]] = {
    "xla": xla.grad_norm_squared,
    "reference": reference.grad_norm_squared,
}
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_folded = functools.partial(batching.folded, partitioned=partition.by_batch)


def implementations() -> tuple[str, ...]:
    """The names that ``implementation=`` accepts, best first."""
    return (*_KERNELS, *_PLAIN)


def _module(name: str) -> Any:
    return importlib.import_module(f"pallas_kernels.grad_norm.{name}")


def explain(x: Any, g: Any, *, form: Form | None = None) -> list[tuple[str, str | None]]:
    """Every implementation, best first, with the reason why it cannot do this call.

    Args:
        x: an array or a ``jax.ShapeDtypeStruct`` of shape [B, T, P].
        g: likewise, [B, T, Q].
        form: the form of the call; None is what :func:`best_form` picks.

    Returns:
        Pairs of a name and a reason; None for a reason means that it can, and the first
        such is what ``implementation=None`` takes.

    Raises:
        ValueError: for shapes, dtypes or a form that do not fit.

    Example:
        >>> x = jax.ShapeDtypeStruct((2, 8, 4), jnp.float32)
        >>> dict(explain(x, x))["xla"] is None
        True
    """
    _check_operands(x, g, form)
    form = form or common.best_form(x.shape[1], x.shape[2], g.shape[2])
    reasons = [
        (name, _wrong_device(name) or _not_split(name) or _unsupported(name, x, g, form))
        for name in _KERNELS
    ]
    return [*reasons, *((name, None) for name in _PLAIN)]


def _not_split(name: str) -> str | None:
    """Why XLA could not split the kernel over the devices that there are; None if it can."""
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    if name == "mosaic_tpu" and jax.device_count() > 1 and not manual:
        return "XLA cannot split it over several chips; inside shard_map it runs on each"
    return None


def _unsupported(name: str, x: Any, g: Any, form: Form) -> str | None:
    reason: str | None = _module(name).unsupported(x, g, form)
    return reason


def grad_norm_squared(
    x: Float[Array, "B T P"],
    g: Float[Array, "B T Q"],
    *,
    implementation: Implementation | None = None,
    form: Form | None = None,
    interpret: bool = False,
) -> Float32[Array, "B"]:
    """‖x_bᵀ g_b‖² (Frobenius) for each example: the squared norm of its weight gradient.

    For a layer y = x·W of one example, with g the gradient of the loss for y, that of W is
    xᵀg. Its norm is all that clipping needs; no [P, Q] or [T, T] array of an example is written
    to memory by the kernels, and at most a bounded part of one by ``xla``.

    The two forms, equal in real arithmetic (I. Goodfellow, *Efficient per-example gradient
    computations*, 2015; X. Li et al., *Large language models can be strong differentially
    private learners*, 2022, section 4):

    * ``direct``: Σ_pq (xᵀg)²_pq;
    * ``gram``: Σ_tt' (x_t·x_t')(g_t·g_t'), each pair once.

    Rows of zeros (padding) contribute nothing. Sums are float32 and float32 operands are
    multiplied as they are (no TF32). A result that is not finite means that an operand is not,
    or that a number in between exceeded float32; clip such an example to zero. float16
    operands below 2⁻¹⁴ are kept by NVIDIA GPUs and CPUs.

    **Rounding.** As a clipping norm the result must not be too small. In real arithmetic
    ‖x_bᵀ g_b‖² is at most ``upper_bound(result, x, g, form)``; :func:`upper_bound` states the
    bound and derives it. In short, with S = Σ_t ‖x_t‖‖g_t‖: the direct form loses at most
    (T + 1)·2⁻²²·S of the norm and 2⁻¹³ of its square, the Gram form (P + Q + 2)·2⁻²²·S² +
    2⁻¹³·S² of the *square* (to first order).

    The kernels work under ``jit`` and ``vmap`` (mapped axes become part of the batch); they
    have no gradient.

    Args:
        x: [B, T, P], float32, bfloat16 or float16.
        g: [B, T, Q], same dtype.
        implementation: a name from :func:`implementations`; None takes the first that can do
            the call on this machine (:func:`explain` tells which, and why).
        form: None takes the one with fewer multiply-adds, :func:`best_form`.
        interpret: run the kernels named by ``implementation`` in Pallas's interpreter, on any
            device. Slow; for tests.

    Returns:
        float32 [B], never negative.

    Raises:
        ValueError: for shapes, dtypes or names that do not fit.

    Example:
        >>> x = jnp.asarray([[[1.0, 2.0], [0.0, 1.0]]])
        >>> g = jnp.asarray([[[1.0], [3.0]]])
        >>> float(grad_norm_squared(x, g)[0])  # xᵀg = (1, 5)
        26.0
    """
    _check_operands(x, g, form)
    form = form or common.best_form(x.shape[1], x.shape[2], g.shape[2])
    _check_implementation(x, g, form, implementation, interpret)
    name: str = implementation or next(n for n, no in explain(x, g, form=form) if no is None)
    if name in _PLAIN:
        return _PLAIN[name](x, g, form)
    run = _folded(_module(name), "grad_norm_squared", form, interpret=interpret)
    return run(x, g)  # type: ignore[no-any-return]


def grad_norm_with_rows(
    x: Float[Array, "B T P"],
    g: Float[Array, "B T Q"],
    *,
    implementation: Implementation | None = None,
    form: Form | None = None,
    interpret: bool = False,
) -> Norms:
    """:func:`grad_norm_squared`, and what its rounding is relative to.

    Where an implementation has the Gram matrices' diagonals at hand, the rest costs nothing;
    elsewhere it is a pass over both operands.

    Args:
        x: as for :func:`grad_norm_squared`, like all other arguments.
        g: likewise.
        implementation: likewise.
        form: likewise.
        interpret: likewise.

    Returns:
        :class:`Norms`, each float32 [B].

    Raises:
        ValueError: for shapes, dtypes or names that do not fit.

    Example:
        >>> x = jnp.asarray([[[3.0, 4.0], [0.0, 1.0]]])
        >>> g = jnp.asarray([[[1.0], [-2.0]]])
        >>> [float(v[0]) for v in grad_norm_with_rows(x, g)]  # xᵀg = (3, 2)
        [13.0, 7.0, 26.0, 5.0]
    """
    _check_operands(x, g, form)
    form = form or common.best_form(x.shape[1], x.shape[2], g.shape[2])
    _check_implementation(x, g, form, implementation, interpret)
    name: Any = implementation or next(n for n, no in explain(x, g, form=form) if no is None)
    if form == "gram" and name == "xla":
        return xla.gram_with_rows(x, g)
    if form == "gram" and name == "mosaic_gpu":
        run = _folded(_module(name), "gram_with_rows", interpret=interpret)
        return run(x, g)[0]  # type: ignore[no-any-return]
    squared = grad_norm_squared(x, g, implementation=name, form=form, interpret=interpret)
    return common.norms_with_rows(squared, *(common.row_squares(y) for y in (x, g)))


def grad_norms_with_rows(
    pairs: Sequence[tuple[Float[Array, "B T _p"], Float[Array, "B T _q"]]],
) -> list[Norms]:
    """:func:`grad_norm_with_rows` of several leaves, in few launches where that is faster.

    On Hopper GPUs leaves of one B, T and dtype whose best form is Gram's share a launch, up
    to eight and next to each other in ``pairs``: order them as their gradients come.

    Args:
        pairs: x and g of each leaf, as for :func:`grad_norm_squared`.

    Returns:
        One :class:`Norms` for each leaf.

    Raises:
        ValueError: for shapes or dtypes that do not fit.

    Example:
        >>> x = jnp.asarray([[[3.0, 4.0], [0.0, 1.0]]])
        >>> g = jnp.asarray([[[1.0], [-2.0]]])
        >>> [float(v.squared[0]) for v in grad_norms_with_rows([(x, g), (g, g)])]
        [13.0, 25.0]
    """

    def launch(pair: tuple[jax.Array, jax.Array]) -> tuple[Any, ...] | None:
        """What pairs of one launch have in common; None for a launch of its own."""
        x, g = pair
        _check_operands(x, g, None)
        form = common.best_form(x.shape[1], x.shape[2], g.shape[2])
        name = next(n for n, no in explain(x, g, form=form) if no is None)
        together = form == "gram" and name == "mosaic_gpu"
        return (x.shape[:2], x.dtype) if together else None

    found: list[Norms] = []
    for key, same in itertools.groupby(pairs, launch):
        if key is None:
            found += [grad_norm_with_rows(x, g) for x, g in same]
            continue
        run = _folded(_module("mosaic_gpu"), "gram_with_rows", interpret=False)
        for some in itertools.batched(same, _module("mosaic_gpu").MOST_LEAVES):
            found += run(*(y for pair in some for y in pair))
    return found


def _check_operands(x: Any, g: Any, form: str | None) -> None:
    for name, y in (("x", x), ("g", g)):
        if len(y.shape) != 3:
            raise ValueError(
                f"{name} has shape {y.shape}: three axes are needed, [B, T, width]; fold "
                "others into the batch or the rows."
            )
        if y.dtype not in _DTYPES:
            raise ValueError(f"{name} is {y.dtype}: allowed are float32, bfloat16 and float16.")
        if 0 in y.shape:
            raise ValueError(f"{name} has shape {y.shape}: no axis may be empty.")
    if x.dtype != g.dtype:
        raise ValueError(f"x is {x.dtype} and g is {g.dtype}: one dtype is needed.")
    if x.shape[:2] != g.shape[:2]:
        raise ValueError(
            f"x has shape {x.shape} and g {g.shape}: the examples (first axis) and their rows "
            "(second) must agree."
        )
    if form is not None and form not in FORMS:
        raise ValueError(f"form={form!r}: allowed are None, {', '.join(map(repr, FORMS))}.")


def _check_implementation(
    x: Any, g: Any, form: Form, implementation: str | None, interpret: bool
) -> None:
    if implementation is not None and implementation not in implementations():
        raise ValueError(
            f"implementation={implementation!r}: allowed are None, "
            + ", ".join(map(repr, implementations()))
            + "."
        )
    if interpret and implementation not in _KERNELS:
        raise ValueError(
            f"interpret=True with implementation={implementation!r}: name the kernels to "
            f"interpret, one of {_KERNELS}."
        )
    if implementation in _KERNELS:
        reason = None if interpret else _wrong_device(implementation)
        reason = reason or _unsupported(implementation, x, g, form)
        if reason:
            raise ValueError(
                f"implementation={implementation!r} cannot do this call: {reason}. "
                "None picks one that can."
            )
