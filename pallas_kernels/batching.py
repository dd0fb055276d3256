"""Kernel calls under ``vmap``."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels import partition


@functools.cache
def folded(
    backend: Any, name: str, *static: Any, split: bool = False, **options: Any
) -> Callable[..., Any]:
    """A kernel call for which ``vmap`` makes the batch longer instead of adding an axis.

    Args:
        backend: the module of kernels.
        name: a function of it, whose operands and results have the batch as first axis.
        static: further arguments of it, hashable.
        split: whether XLA may split the call over devices along the batch.
        options: further keywords of it, hashable.
    """
    function = getattr(backend, name)

    def kernel(*operands: Any) -> Any:
        return function(*operands, *static, **options)

    kernel = partition.split_by_batch(kernel) if split else kernel

    @custom_vmap
    def run(*operands: Any) -> Any:
        return kernel(*operands)

    @run.def_vmap
    def _(axis_size: int, is_mapped: Any, *operands: Any) -> Any:
        def fold(x: jax.Array, mapped: bool) -> jax.Array:
            if not mapped:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = run(*jax.tree.map(fold, operands, tuple(is_mapped)))
        apart = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), results)
        return apart, jax.tree.map(lambda _: True, apart)

    return run  # type: ignore[no-any-return]
