"""Compares an engine with one call of ``jax.grad`` for each of a few examples."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.clipping.arguments import Arguments
from dpfa_jax.clipping.tree import Clip, clip_and_sum, per_example_norms

_EXAMPLES = 4


def check_against_single_calls(
    split: Arguments, run: Callable[..., tuple[list[Any], Any]], clip: Clip
) -> None:
    """Each of the first examples, clipped in a batch, beside the same clipped alone.

    The clip norm is set to half the example's norm, so that a wrong norm shows.

    Raises:
        ValueError: inside ``jit``, or if they disagree.
    """
    if any(isinstance(x, jax.core.Tracer) for x in (*split.leaves, *split.batch)):
        raise ValueError("verify=True: compares numbers, so call it outside jit (once).")
    few = min(split.examples, _EXAMPLES)
    batch = [jnp.asarray(x)[:few] for x in split.batch]
    short = any(jnp.dtype(x.dtype).itemsize < 4 for x in jax.tree.leaves(split.leaf_shapes))
    tolerance = 5e-2 if short else 2e-3
    # Gradients far below C may be all rounding.
    floor = 1e-2 * min(float(clip.l2_clip_norm), 1.0)

    def loss(leaves: list[Any], example: list[Any]) -> Any:
        return split.loss(*leaves, *example)[0]

    def clipped(padding: jax.Array, bound: jax.Array) -> list[jax.Array]:
        return run(batch, padding, dataclasses.replace(clip, l2_clip_norm=bound))[0]

    single, clipped = jax.jit(jax.grad(loss)), jax.jit(clipped)
    for i in range(few):
        rows = [g[None] for g in single(list(split.leaves), [x[i] for x in batch])]
        norm = float(per_example_norms(rows)[0])
        bound = min(norm / 2, 1e9) if np.isfinite(norm) and norm > 2e-9 else clip.l2_clip_norm
        expected = clip_and_sum(rows, dataclasses.replace(clip, l2_clip_norm=bound), None)
        actual = clipped(jnp.arange(few) != i, jnp.float32(bound))
        largest = max(float(jnp.max(jnp.abs(x), initial=0.0)) for x in expected)
        for x, y in zip(expected, actual, strict=True):
            if not np.allclose(x, y, rtol=0, atol=tolerance * max(largest, floor)):
                raise ValueError(
                    f"verify: the gradient of example {i} as clipped in a batch is not that of a "
                    "single call. Some operation of loss_fn mixes examples, so that no clipping "
                    "bounds its sensitivity, or an engine is wrong: try engine='vmap'."
                )
