"""``clipped_grad``: the sum of clipped per-example gradients of a per-example loss."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dpfa_jax.clipping import vmap
from dpfa_jax.clipping.tree import check_clip_norm
from dpfa_jax.mechanisms import gradient_sensitivity

_ENGINES = ("auto", "vmap")


@dataclasses.dataclass(frozen=True)
class ClippedGrad:
    """What :func:`clipped_grad` returns: a function of the loss's arguments.

    Every field is public. Call it like the loss, with a leading batch axis on the
    arguments in ``batch_argnums``.
    """

    loss_fn: Callable[..., Any]
    l2_clip_norm: float
    engine: str
    argnums: int | tuple[int, ...]
    batch_argnums: tuple[int, ...]
    has_aux: bool
    microbatch_size: int | None
    verify: bool

    def sensitivity(self, adjacency: Literal["add_remove", "replace_one"]) -> float:
        """Largest L2 change of the returned sum between neighbours.

        C for ``'add_remove'``, 2C for ``'replace_one'`` (docs/privacy.md, section 4).
        """
        return gradient_sensitivity(self.l2_clip_norm, adjacency)

    def __call__(self, *args: Any, is_padding_example: Bool[Array, "b"] | None = None) -> Any:
        """The clipped sum, or ``(clipped sum, per-example aux)`` with ``has_aux``.

        Args:
            *args: the loss's positional arguments, batched where ``batch_argnums`` says.
            is_padding_example: bool[batch]; True rows contribute exactly zero.

        Returns:
            A float32 tree like the arguments in ``argnums``: Σ_b min(1, C/‖g_b‖) g_b.

        Raises:
            ValueError: for arguments that do not fit together, a loss that is no scalar,
                or (``verify=True``) a sum that per-example calls do not reproduce.
        """
        batch = self._batch_size(args)
        if is_padding_example is None:
            padding = jnp.zeros(batch, jnp.bool_)
        else:
            padding = jnp.asarray(is_padding_example)
            if padding.shape != (batch,) or padding.dtype != jnp.bool_:
                raise ValueError(
                    f"is_padding_example is {padding.dtype}{padding.shape}: bool({batch},) is "
                    "needed, one for each example."
                )
        total, aux = vmap.clipped_sum(
            self._per_example,
            args,
            self.batch_argnums,
            padding,
            l2_clip_norm=self.l2_clip_norm,
            microbatch_size=self.microbatch_size,
        )
        if self.verify:
            self._verify(args, batch)
        return (total, aux) if self.has_aux else total

    def _per_example(self, *args: Any) -> tuple[Any, Any]:
        def loss(*inner: Any) -> tuple[jax.Array, Any]:
            out = self.loss_fn(*inner)
            if self.has_aux and not (isinstance(out, tuple) and len(out) == 2):
                raise ValueError(
                    f"has_aux=True: loss_fn must return (loss, aux); it returned a "
                    f"{type(out).__name__}."
                )
            value, aux = out if self.has_aux else (out, ())
            value = jnp.asarray(value)
            if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(
                    f"loss_fn returned {value.dtype}{value.shape} for one example: a floating "
                    "scalar is needed. It is called with one example, without a batch axis."
                )
            return value, aux

        return jax.grad(loss, argnums=self.argnums, has_aux=True)(*args)

    def _batch_size(self, args: Sequence[Any]) -> int:
        argnums = (self.argnums,) if isinstance(self.argnums, int) else self.argnums
        for name, numbers in (("argnums", argnums), ("batch_argnums", self.batch_argnums)):
            if max(numbers) >= len(args):
                raise ValueError(f"{name}={numbers}: only {len(args)} positional arguments given.")
        for i in argnums:
            for leaf in jax.tree.leaves(args[i]):
                if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                    raise ValueError(
                        f"argument {i} (argnums) has a {jnp.result_type(leaf)} leaf: gradients "
                        "need floating-point leaves."
                    )
        if not jax.tree.leaves([args[i] for i in argnums]):
            raise ValueError(f"argnums={argnums}: these arguments hold no arrays.")
        shapes = [jnp.shape(x) for i in self.batch_argnums for x in jax.tree.leaves(args[i])]
        if not shapes or any(not s for s in shapes) or len({s[0] for s in shapes}) != 1:
            raise ValueError(
                f"batch_argnums={self.batch_argnums}: every leaf needs the same leading batch "
                f"axis; the shapes are {shapes}."
            )
        if shapes[0][0] == 0:
            raise ValueError("the batch is empty: pad it, and mark padding in is_padding_example.")
        return int(shapes[0][0])

    def _verify(self, args: Sequence[Any], batch: int) -> None:
        """Compares a few examples' gradients with calls of one example each."""
        leaves = jax.tree.leaves(list(args))
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            raise ValueError("verify=True: compares numbers, so call it outside jit (once).")
        few = min(batch, 4)
        in_axes = tuple(0 if i in self.batch_argnums else None for i in range(len(args)))

        def cut(i: int | slice) -> list[Any]:
            return [
                jax.tree.map(lambda x: x[i], a) if n in self.batch_argnums else a
                for n, a in enumerate(args)
            ]

        together, _ = jax.vmap(self._per_example, in_axes=in_axes)(*cut(slice(0, few)))
        for i in range(few):
            alone, _ = self._per_example(*cut(i))
            for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
                x, y = np.asarray(a, np.float64), np.asarray(b[i], np.float64)
                tolerance = 1e-3 if a.dtype == jnp.float32 else 5e-2
                size = np.abs(x[np.isfinite(x)]).max(initial=1e-6)
                if not np.allclose(x, y, tolerance, tolerance * size, equal_nan=True):
                    raise ValueError(
                        f"verify: the gradient of example {i} changes when other examples are "
                        "in its batch. Some operation of loss_fn mixes examples; no clipping "
                        "bounds its sensitivity."
                    )


def clipped_grad(
    loss_fn: Callable[..., Any],
    *,
    l2_clip_norm: float,
    engine: Literal["auto", "vmap"] = "auto",
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    verify: bool = False,
) -> ClippedGrad:
    """The sum over a batch of per-example gradients, each clipped to norm C.

    Guarantee. For any parameters, the sum changes by at most
    ``sensitivity(adjacency)`` in L2 norm when one example is added or removed (or
    replaced). An example whose gradient is not finite contributes zero. What is
    returned is private data: add noise (:func:`dpfa_jax.add_noise`) before anything else
    sees it. The per-example aux is private data too.

    Args:
        loss_fn: the loss of **one** example: ``loss_fn(params, example, ...) -> scalar``, or
            ``(scalar, aux)`` with ``has_aux``. It never sees a batch axis.
        l2_clip_norm: C, finite and above 0.
        engine: ``'vmap'``, or ``'auto'``, which picks it.
        argnums: which arguments are differentiated, as in ``jax.grad``.
        batch_argnums: which arguments carry a leading batch axis.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        microbatch_size: how many examples' gradients are in memory together. It changes
            cost, not the result.
        verify: at each call, compare a few gradients with those of single calls.

    Raises:
        ValueError: for an argument that is not allowed; the message names it.

    Source: M. Abadi et al., Deep Learning with Differential Privacy, 2016, algorithm 1.

    Example:
        >>> def loss(w, x):
        ...     return jnp.sum(w * x)
        >>> grad = clipped_grad(loss, l2_clip_norm=1.0)
        >>> examples = jnp.array([[3.0, 4.0], [0.0, 0.5]])
        >>> [f"{x:.3f}" for x in grad(jnp.ones(2), examples)]
        ['0.600', '1.300']
        >>> grad.sensitivity("replace_one")
        2.0
    """
    if engine not in _ENGINES:
        raise ValueError(f"engine={engine!r}: allowed are {_ENGINES}.")
    size = microbatch_size
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"microbatch_size={size!r}: allowed is None or a whole number >= 1.")
    numbers = {}
    for name, value in (("argnums", argnums), ("batch_argnums", batch_argnums)):
        as_tuple = (value,) if isinstance(value, int) else tuple(value)
        if not as_tuple or any(not isinstance(i, int) or i < 0 for i in as_tuple):
            raise ValueError(f"{name}={value!r}: allowed are whole numbers >= 0.")
        numbers[name] = as_tuple
    both = set(numbers["argnums"]) & set(numbers["batch_argnums"])
    if both:
        raise ValueError(f"argnums and batch_argnums share {sorted(both)}: they must differ.")
    return ClippedGrad(
        loss_fn=loss_fn,
        l2_clip_norm=check_clip_norm(l2_clip_norm),
        engine="vmap",
        argnums=argnums if isinstance(argnums, int) else numbers["argnums"],
        batch_argnums=numbers["batch_argnums"],
        has_aux=has_aux,
        microbatch_size=size,
        verify=verify,
    )
