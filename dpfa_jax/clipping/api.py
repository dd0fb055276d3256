"""``clipped_grad``: the sum of clipped per-example gradients of a per-example loss."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from dpfa_jax.clipping import engines, explain, vmap
from dpfa_jax.clipping.arguments import Arguments, split_arguments
from dpfa_jax.clipping.microbatch import in_microbatches, parts_of
from dpfa_jax.clipping.plan import Plan, make_plan
from dpfa_jax.clipping.trace import float_dtypes, is_narrow
from dpfa_jax.clipping.tree import Clip, check_clip_norm
from dpfa_jax.clipping.verify import check_against_single_calls
from dpfa_jax.mechanisms import gradient_sensitivity
from dpfa_jax.parallel.axes import explicit_mesh
from pallas_kernels import manual

Engine = Literal["auto", "bookkeeping", "two_pass", "per_layer", "vmap"]
_ENGINES = ("auto", "bookkeeping", "two_pass", "per_layer", "vmap")
Path = tuple[Any, ...]


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
    groups: Callable[[Path], Hashable] | None = None
    automatic: float | None = None
    trainable: Callable[[Path, Any], bool] | None = None
    batch_sharding: NamedSharding | None = None

    def sensitivity(self, adjacency: Literal["add_remove", "replace_one"]) -> float:
        """Largest L2 change of the returned sum between neighbours.

        C for ``'add_remove'``, 2C for ``'replace_one'`` (docs/privacy.md, section 4).
        """
        return gradient_sensitivity(self.l2_clip_norm, adjacency)

    def __call__(self, *args: Any, is_padding_example: Bool[Array, "b"] | None = None) -> Any:
        """The clipped sum, or ``(clipped sum, per-example aux)`` with ``has_aux``.

        Args:
            *args: the loss's positional arguments, batched where ``batch_argnums`` says.
            is_padding_example: bool[batch]; True rows contribute exactly zero. A microbatch of
                such rows alone is skipped, so put them last; their aux means nothing.

        Returns:
            A float32 tree like the arguments in ``argnums``: Σ_b min(1, C/‖g_b‖) g_b. Frozen
            leaves (``trainable``) are None.

        Raises:
            ValueError: for arguments that do not fit together, a loss that is no scalar, that
                communicates over a named axis or has side effects, or (``verify=True``) a
                sum that per-example calls do not reproduce.
        """
        sums, aux, _ = self._run(args, is_padding_example, self.l2_clip_norm)
        return (sums, aux) if self.has_aux else sums

    def _run(
        self, args: Sequence[Any], is_padding_example: Any, l2_clip_norm: float | Array
    ) -> tuple[Any, Any, Array]:
        """The sum, the per-example aux, and the per-example norms (NaN for padding)."""
        split = self._split(args)
        mesh = explicit_mesh((args, is_padding_example))
        if mesh is not None:
            return self._run_explicit(split, mesh, args, is_padding_example, l2_clip_norm)
        if is_padding_example is None:
            padding = jnp.zeros(split.examples, jnp.bool_)
        else:
            padding = jnp.asarray(is_padding_example)
            if padding.shape != (split.examples,) or padding.dtype != jnp.bool_:
                raise ValueError(
                    f"is_padding_example is {padding.dtype}{padding.shape}: "
                    f"bool({split.examples},) is needed, one for each example."
                )
        # Inside shard_map: a parameter that is the same on all devices would get the sum of
        # their examples' gradients, before the clipping. Varying, it gets its own examples'.
        axes = manual.varying_axes(padding, *split.leaves, *split.batch, *jax.tree.leaves(args))
        split.leaves, split.batch, padding = manual.vary((split.leaves, split.batch, padding), axes)
        run = self._engine(split)
        clip = dataclasses.replace(self._clip(split), l2_clip_norm=l2_clip_norm)
        if self.verify:
            check_against_single_calls(split, run, self._clip(split))
        sums, (aux, norms) = in_microbatches(
            lambda batch, padding, start: run(batch, padding, clip, start),
            split.batch,
            padding,
            self.microbatch_size,
            skip=is_padding_example is not None,
            sharding=self.batch_sharding,
        )
        norms = jnp.where(padding, jnp.nan, norms)
        sums = manual.vary(sums, axes)
        return split.unflatten(sums), split.unflatten_aux(aux), norms

    def _run_explicit(
        self, split: Arguments, mesh: Any, args: Any, padding: Any, l2_clip_norm: Any
    ) -> Any:
        """Under a mesh of Explicit axes: within, XLA splits what types do not say."""
        rows = next(iter(jax.typeof(split.batch[0]).sharding.spec), None)
        by_example = NamedSharding(mesh, PartitionSpec(rows))
        structure: list[Any] = []

        def run(args: Any, padding: Any, l2_clip_norm: Any) -> Any:
            mesh = jax.sharding.get_abstract_mesh()  # the same, of Auto axes
            inner = dataclasses.replace(self, batch_sharding=NamedSharding(mesh, by_example.spec))
            sums, aux, norms = inner._run(args, padding, l2_clip_norm)
            structure.append(jax.tree.structure(sums))
            return jax.tree.leaves(sums), aux, norms

        sums = [NamedSharding(mesh, jax.typeof(x).sharding.spec) for x in split.leaves]
        with jax.sharding.use_abstract_mesh(mesh):
            leaves, aux, norms = jax.sharding.auto_axes(
                run, axes=mesh.axis_names, out_sharding=(sums, by_example, by_example)
            )(args, padding, l2_clip_norm)
        return jax.tree.unflatten(structure[-1], leaves), aux, norms

    def explain(self, *args: Any) -> explain.Explanation:
        """Which engine runs for these arguments, and what is done with each leaf, and why.

        Arrays may be ``jax.ShapeDtypeStruct``: nothing is computed.
        """
        split = self._split(args)
        engine, why, plan = self._decide(split)
        names = tuple(jax.tree_util.keystr(path) for path in split.paths)
        return explain.Explanation(engine, why, names, plan.leaves, self._together(split))

    def _split(self, args: Sequence[Any]) -> Arguments:
        return split_arguments(
            self.loss_fn,
            args,
            argnums=self.argnums,
            batch_argnums=self.batch_argnums,
            has_aux=self.has_aux,
            trainable=self.trainable,
        )

    def _together(self, split: Arguments) -> int:
        return min(self.microbatch_size or split.examples, split.examples)

    def _clip(self, split: Arguments) -> Clip:
        if self.groups is not None:
            labels = [self.groups(path) for path in split.paths]
        elif self.engine == "per_layer":
            labels = list(split.paths)
        else:
            labels = [()] * len(split.paths)
        number = {label: n for n, label in enumerate(dict.fromkeys(labels))}
        groups = tuple(number[label] for label in labels)
        return Clip(self.l2_clip_norm, groups, self.automatic)

    def _decide(self, split: Arguments) -> tuple[str, str, Plan]:
        plan = make_plan(split.trace(), split.leaf_shapes)
        narrow = sorted(d.name for d in float_dtypes(plan.trace.jaxpr) if is_narrow(d))
        if self.engine == "two_pass" and narrow:
            raise ValueError(
                f"engine='two_pass': the loss computes in {narrow[0]}, in which small gradients "
                "would be rounded differently in the second pass than in the first, which "
                "measured them. Allowed are 'auto', 'bookkeeping', 'per_layer' and 'vmap'."
            )
        if self.engine != "auto":
            return self.engine, "asked for", plan
        groups = len(set(self._clip(split).groups))
        memory = None if narrow else explain.device_memory()
        # Of one device, as the memory is.
        own = -(-self._together(split) // parts_of(self.batch_sharding))
        return *explain.choose(plan, own, groups, memory), plan

    def _engine(self, split: Arguments) -> Callable[..., tuple[list[Array], Any]]:
        """``(batch, padding, clip, start) -> (sums, (aux, norms))`` of the engine that runs."""
        if self.engine == "vmap":
            split.checked_jaxpr()
            return functools.partial(vmap.clipped_sum, split.loss, split.leaves)
        engine, _, plan = self._decide(split)
        if engine == "vmap":
            return functools.partial(vmap.clipped_sum, split.loss, split.leaves)
        one = engines.two_pass if engine == "two_pass" else engines.bookkeeping
        return functools.partial(one, plan, split.leaves)


def clipped_grad(
    loss_fn: Callable[..., Any],
    *,
    l2_clip_norm: float,
    engine: Engine = "auto",
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    verify: bool = False,
    groups: Callable[[Path], Hashable] | None = None,
    automatic: float | None = None,
    trainable: Callable[[Path, Any], bool] | None = None,
    batch_sharding: NamedSharding | None = None,
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
        engine: how (docs/clipping.md). ``'bookkeeping'``: one backward pass, norms without
            per-example gradients. ``'two_pass'``: a second pass, less memory.
            ``'per_layer'``: each leaf, or each of ``groups``, is clipped by itself.
            ``'vmap'``: a gradient for each example in memory, the reference. ``'auto'``
            picks one for flat clipping; :meth:`ClippedGrad.explain` says which.
        argnums: which arguments are differentiated, as in ``jax.grad``.
        batch_argnums: which arguments carry a leading batch axis.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        microbatch_size: how many examples are in memory together. It changes cost, not
            the result.
        verify: at each call, compare a few examples with single calls of ``jax.grad``.
        groups: path of a leaf to a label. Leaves with one label are a group; each of k groups
            is clipped to C/√k. None: all leaves together (``'per_layer'``: one by one).
        automatic: γ > 0 replaces clipping by the factor C/(‖g‖ + γ), so that every example's
            gradient counts with nearly norm C and C merges into the learning rate.
        trainable: ``(path, leaf) -> bool``; leaves for which it is False are constants, cost
            nothing, and are None in the result.
        batch_sharding: under ``jit`` over several devices, how the batch's first axis is split.
            Only ``microbatch_size``, which counts the examples of all devices together, needs
            it: each microbatch is then split likewise, where else one device after the other
            would have the work (docs/scaling.md).

    Raises:
        ValueError: for an argument that is not allowed; the message names it.

    Sources: M. Abadi et al., Deep Learning with Differential Privacy, 2016, algorithm 1;
    ``automatic``: Z. Bu et al., Automatic Clipping, 2023 (AUTO-S).

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
    for name, function in (("groups", groups), ("trainable", trainable)):
        if function is not None and not callable(function):
            raise ValueError(f"{name}={function!r}: allowed is None or a function of a path.")
    if groups is not None and engine == "two_pass":
        raise ValueError(
            "groups: engine='two_pass' clips one norm; allowed with groups are 'auto', "
            "'bookkeeping', 'per_layer' and 'vmap'."
        )
    if batch_sharding is not None and not isinstance(batch_sharding, NamedSharding):
        raise ValueError(f"batch_sharding={batch_sharding!r}: allowed is None or a NamedSharding.")
    numbers_of = {}
    for name, value in (("argnums", argnums), ("batch_argnums", batch_argnums)):
        as_tuple = (value,) if isinstance(value, int) else tuple(value)
        if not as_tuple or any(not isinstance(i, int) or i < 0 for i in as_tuple):
            raise ValueError(f"{name}={value!r}: allowed are whole numbers >= 0.")
        numbers_of[name] = as_tuple
    both = set(numbers_of["argnums"]) & set(numbers_of["batch_argnums"])
    if both:
        raise ValueError(f"argnums and batch_argnums share {sorted(both)}: they must differ.")
    return ClippedGrad(
        loss_fn=loss_fn,
        l2_clip_norm=check_clip_norm(l2_clip_norm),
        engine=engine,
        argnums=argnums if isinstance(argnums, int) else numbers_of["argnums"],
        batch_argnums=numbers_of["batch_argnums"],
        has_aux=has_aux,
        microbatch_size=size,
        verify=verify,
        groups=groups,
        automatic=_check_gamma(automatic),
        trainable=trainable,
        batch_sharding=batch_sharding,
    )


def _check_gamma(gamma: Any) -> float | None:
    if gamma is None:
        return None
    is_number = isinstance(gamma, numbers.Real) and not isinstance(gamma, bool)
    if not (is_number and 1e-9 <= gamma < math.inf):
        raise ValueError(f"automatic={gamma!r}: allowed is None or a number from 1e-9.")
    return float(gamma)
