"""A loss's arguments as flat lists: trainable leaves, the batch, and everything else."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax.clipping.trace import Trace, checked_jaxpr, find_sites
from pallas_kernels import manual


@dataclasses.dataclass
class Arguments:
    """One call's arguments.

    Attributes:
        loss: ``(*leaves, *example) -> (loss, *aux)`` of one example; all other arguments
            are closed over.
        leaves: the trainable leaves.
        paths: their paths.
        batch: the batched arguments' leaves.
        examples: the batch size.
        unflatten: sums, one for each leaf, to the tree that the caller gets.
    """

    loss: Callable[..., Sequence[Any]]
    leaves: list[Any]
    paths: list[tuple[Any, ...]]
    batch: list[Any]
    examples: int
    unflatten: Callable[[Sequence[Any]], Any]
    _aux: list[Any]

    @property
    def leaf_shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the leaves."""
        return [_shape(x, 0) for x in self.leaves]

    @property
    def example_shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example."""
        return [_shape(x, 1) for x in self.batch]

    def checked_jaxpr(self) -> Any:
        """The loss's jaxpr; ValueError if an example can reach another through it."""
        return checked_jaxpr(self.loss, self.leaf_shapes, self.example_shapes)

    def trace(self) -> Trace:
        """The loss, with every leaf's uses."""
        return find_sites(self.checked_jaxpr(), len(self.leaves))

    def unflatten_aux(self, aux: Sequence[Any]) -> Any:
        """The auxiliary outputs as the tree that the loss returns."""
        return jax.tree.unflatten(self._aux[-1], aux)


def _shape(x: Any, drop: int) -> jax.ShapeDtypeStruct:
    weak = bool(getattr(x, "weak_type", isinstance(x, float | int)))
    # Inside shard_map the type also says along which axes the value differs between devices.
    shape, dtype = jnp.shape(x)[drop:], jax.dtypes.result_type(x)
    return manual.shape_like(shape, dtype, x, weak_type=weak)


def split_arguments(
    loss_fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    argnums: int | tuple[int, ...],
    batch_argnums: tuple[int, ...],
    has_aux: bool,
    trainable: Callable[[tuple[Any, ...], Any], bool] | None,
) -> Arguments:
    """Checks the arguments against each other and flattens them.

    Raises:
        ValueError: naming the argument, before anything is computed.
    """
    differentiated = (argnums,) if isinstance(argnums, int) else argnums
    for name, numbers in (("argnums", differentiated), ("batch_argnums", batch_argnums)):
        if max(numbers) >= len(args):
            raise ValueError(f"{name}={numbers}: only {len(args)} positional arguments given.")
    given = [args[i] for i in differentiated]
    with_paths, structure = jax.tree_util.tree_flatten_with_path(
        given[0] if isinstance(argnums, int) else tuple(given)
    )
    chosen = [trainable is None or bool(trainable(p, x)) for p, x in with_paths]
    for (path, leaf), use in zip(with_paths, chosen, strict=True):
        if use and not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            where = differentiated[0] if isinstance(argnums, int) else differentiated[path[0].idx]
            raise ValueError(
                f"argument {where} (argnums) has a {jnp.result_type(leaf)} leaf: gradients "
                "need floating-point leaves."
            )
    if not any(chosen):
        raise ValueError(
            f"argnums={differentiated}: these arguments hold no arrays"
            + ("." if trainable is None else " that trainable() accepts.")
        )
    batch_trees = [args[i] for i in batch_argnums]
    batch, batch_structure = jax.tree.flatten(batch_trees)
    shapes = [jnp.shape(x) for x in batch]
    if not shapes or any(not s for s in shapes) or len({s[0] for s in shapes}) != 1:
        raise ValueError(
            f"batch_argnums={batch_argnums}: every leaf needs the same leading batch "
            f"axis; the shapes are {shapes}."
        )
    if shapes[0][0] == 0:
        raise ValueError("the batch is empty: pad it, and mark padding in is_padding_example.")
    leaves = [x for (_, x), use in zip(with_paths, chosen, strict=True) if use]
    aux_structure: list[Any] = []

    def loss(*flat: Any) -> list[Any]:
        values = iter(flat[: len(leaves)])
        tree = jax.tree.unflatten(
            structure,
            [next(values) if use else x for (_, x), use in zip(with_paths, chosen, strict=True)],
        )
        full = list(args)
        for i, x in zip(differentiated, (tree,) if isinstance(argnums, int) else tree, strict=True):
            full[i] = x
        example = jax.tree.unflatten(batch_structure, flat[len(leaves) :])
        for i, x in zip(batch_argnums, example, strict=True):
            full[i] = x
        value, aux = _call(loss_fn, full, has_aux)
        flat_aux, tree_of_aux = jax.tree.flatten(aux)
        aux_structure.append(tree_of_aux)
        return [value, *flat_aux]

    def unflatten(sums: Sequence[Any]) -> Any:
        values = iter(sums)
        return jax.tree.unflatten(structure, [next(values) if use else None for use in chosen])

    paths = [p for (p, _), use in zip(with_paths, chosen, strict=True) if use]
    return Arguments(loss, leaves, paths, batch, shapes[0][0], unflatten, aux_structure)


def _call(loss_fn: Callable[..., Any], args: Sequence[Any], has_aux: bool) -> tuple[Any, Any]:
    out = loss_fn(*args)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(
            f"has_aux=True: loss_fn must return (loss, aux); it returned a {type(out).__name__}."
        )
    value, aux = out if has_aux else (out, ())
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"loss_fn returned {value.dtype}{value.shape} for one example: a floating "
            "scalar is needed. It is called with one example, without a batch axis."
        )
    return value, aux
