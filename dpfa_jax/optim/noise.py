"""Gaussian noise on a clipped sum: the release of DP-SGD.

    released = (Σ_b clip(g_b, C) + N(0, (z C k)²)) / expected_batch_size

with k = 1 for ``add_remove`` and 2 for ``replace_one`` (docs/privacy.md, section 4). The
divisor is a public constant, never the actual batch size.
"""

import hashlib
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Key, PyTree, UInt32

from dpfa_jax import keys
from dpfa_jax.clipping.tree import check_clip_norm, clip_and_sum
from dpfa_jax.mechanisms import check_correlation, gradient_sensitivity
from dpfa_jax.parallel import axes
from pallas_kernels import prng

# Noisy sums are rounded to a multiple of a power of two near σ·2⁻¹⁰: the last digits of an
# unrounded float tell from which sum it came (docs/privacy.md, section 5).
_GRID = 10
# Noise is this much larger than asked, for the rounding of the sum of clipped gradients,
# which may move it by a little more than C (docs/privacy.md, section 4).
_ROUNDING = 1.0 + 2.0**-10


class DPNoiseState(NamedTuple):
    """How many releases were made, and the key that made them.

    The key is a secret. Restoring an old state and going on with other data reuses
    noise: save :func:`without_keys` of the state, and restore with
    :func:`with_fresh_key`.
    """

    step: UInt32[Array, ""]
    key: Key[Array, ""]


def noise_std(
    l2_clip_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    adjacency: str = "add_remove",
) -> float:
    """Standard deviation of the noise on each coordinate of the released mean: z C k / B.

    Example:
        >>> noise_std(1.0, 2.0, 100.0)
        0.02
    """
    z = noise_multiplier
    # Within these, float32 holds the noise and the spacing of its grid.
    if not (isinstance(z, numbers.Real) and (z == 0 or 1e-9 <= z <= 1e9)):
        raise ValueError(f"noise_multiplier={z!r}: allowed is 0, or a number from 1e-9 to 1e9.")
    if not (isinstance(expected_batch_size, numbers.Real) and 0 < expected_batch_size < math.inf):
        raise ValueError(
            f"expected_batch_size={expected_batch_size!r}: allowed is a finite number > 0."
        )
    sensitivity = gradient_sensitivity(check_clip_norm(l2_clip_norm), adjacency)
    return float(z) * sensitivity / float(expected_batch_size)


def add_noise(
    l2_clip_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    rng: Key[Array, ""] | keys.SecureKey,
    *,
    adjacency: str = "add_remove",
    correlation: float = 0.0,
    axis_name: axes.AxisNames | None = None,
    specs: PyTree | None = None,
) -> optax.GradientTransformation:
    """Optax: a clipped **sum** in (:func:`dpfa_jax.clipped_grad`), a private mean out.

    Guarantee. If the sum's sensitivity is at most k·C, each update is one
    ``GaussianDpEvent(noise_multiplier)`` under ``adjacency``. Everything behind it in a
    chain is post-processing.

    Noise is float32, from ChaCha20 under ``rng``, independent for each leaf and step; the
    noisy sum is rounded to a public grid and divided by the public batch size. Updates
    leave in the dtype they came in.

    With ``correlation`` λ > 0, step t adds σ (g_t − λ g_{t−1}): a part of the noise before is
    made again from its counters, and cancelled; no copy of it is kept. Sums over steps, which
    is what training follows, are then less noisy by 1 − λ. The steps are no independent
    releases any more: all of a run together are one
    :func:`dpfa_jax.accounting.correlated_noise_event`, and no step has an event of its own.

    Several devices (docs/scaling.md). The noise is that of one device, bit for bit, and is added
    once. Under ``jit`` nothing has to be said: each device makes the noise of the part of the
    sum that it holds. Inside ``shard_map`` and ``pmap`` a sum that is one device's own
    is refused, or with ``axis_name`` added up first.

    Args:
        l2_clip_norm: C, the clip norm of the sum's terms.
        noise_multiplier: z; 0 adds no noise (and protects nothing).
        expected_batch_size: the public divisor.
        rng: a key for this transformation alone. There is no default; a second use raises.
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        correlation: λ, from 0 to below 1.
        axis_name: inside ``shard_map`` or ``pmap``, the mesh axes over which the sums are still
            to be added up (``jax.lax.psum``); ``()`` says that this was done. None is for
            ``jit``, and for ``shard_map`` where types show that it was done.
        specs: inside ``shard_map``, a tree of ``PartitionSpec`` like the sum: how each leaf, of
            which a device holds a part, is split. None: every device holds all of it.

    Raises:
        ValueError: for a missing or unsuited key, a number that is not allowed, or a sum that
            is not over all devices.

    Example:
        >>> from dpfa_jax import SecureKey
        >>> tx = optax.chain(add_noise(1.0, 1.1, 256, SecureKey.generate()), optax.sgd(0.1))
        >>> state = tx.init({"w": jnp.zeros(3)})
        >>> updates, state = tx.update({"w": jnp.ones(3)}, state)
        >>> int(state[0].step)
        1
    """
    std = noise_std(l2_clip_norm, noise_multiplier, expected_batch_size, adjacency)
    sum_std = inflated_sum_std(std, expected_batch_size)
    check_correlation(correlation)
    key = keys.take_key(rng)

    def init(params: PyTree) -> DPNoiseState:
        del params
        return DPNoiseState(jnp.uint32(0), key)

    def update(
        updates: PyTree, state: DPNoiseState, params: PyTree | None = None
    ) -> tuple[PyTree, DPNoiseState]:
        del params
        split = None if specs is None else _specs_of(updates, specs)
        updates = axes.whole_sum(updates, state.key, axis_name, split)
        drawn = [(_step_words(state.key, state.step), jnp.float32(1.0))]
        if correlation:
            weight = jnp.where(state.step > 0, jnp.float32(-correlation), 0.0)
            drawn.append((_step_words(state.key, state.step - jnp.uint32(1)), weight))
        mean = _release(updates, drawn, sum_std, expected_batch_size, split)
        return mean, DPNoiseState(state.step + jnp.uint32(1), state.key)

    return optax.GradientTransformation(init, update)


def inflated_sum_std(std: float, expected_batch_size: float) -> float:
    """The noise on the sum, from that on the mean: larger than asked, for the sum's rounding."""
    return std * expected_batch_size * _ROUNDING


def grid_spacing(sum_std: float) -> float:
    """The public grid of the noisy sum: a power of two."""
    return float(2.0 ** (math.floor(math.log2(sum_std)) - _GRID))


def _step_words(key: jax.Array, step: jax.Array) -> jax.Array:
    """The words of the key that all leaves' noise of a step comes from."""
    return axes.agreed_words(keys.purpose_words(key, step, keys.GRADIENT))


def _specs_of(updates: PyTree, specs: PyTree) -> list[PartitionSpec]:
    def is_spec(x: Any) -> bool:
        return x is None or isinstance(x, PartitionSpec)

    given, structure = jax.tree.flatten(specs, is_leaf=is_spec)
    wanted = jax.tree.structure(updates)
    if str(structure) != str(wanted) or not all(map(is_spec, given)):
        raise ValueError(
            f"specs={specs}: a tree of PartitionSpec like the updates is needed, {wanted}."
        )
    return [PartitionSpec() if spec is None else spec for spec in given]


def _normals(
    words: jax.Array,
    leaves: Sequence[jax.Array],
    nonces: Sequence[tuple[int, int, int]],
    specs: Sequence[PartitionSpec] | None,
) -> list[jax.Array]:
    """Gaussians like the leaves; of each, every device makes the part that it holds."""
    mesh = axes.explicit_mesh(leaves)
    if mesh is None and not axes.manual_axes():
        return prng.normals_like(words, leaves, nonces)
    if mesh is not None:
        found = [jax.typeof(x).sharding.spec for x in leaves]

        def local(words: jax.Array) -> list[jax.Array]:
            shapes = [x.shape for x in leaves]
            return prng.local_normals(words, shapes, nonces, found, mesh.shape)

        made = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(), out_specs=found)
        return list(made(words))
    sizes = jax.sharding.get_abstract_mesh().shape
    split = specs or [PartitionSpec()] * len(leaves)
    shapes = []
    for x, spec in zip(leaves, split, strict=True):
        ways = [math.prod(sizes[a] for a in d) for d in prng.axes_by_dimension(spec, x.ndim)]
        shapes.append(tuple(n * k for n, k in zip(x.shape, ways, strict=True)))
    return prng.local_normals(words, shapes, nonces, split, sizes)


def _release(
    updates: PyTree,
    drawn: Sequence[tuple[jax.Array, jax.Array]],
    std: float,
    divisor: float,
    specs: Sequence[PartitionSpec] | None = None,
) -> PyTree:
    """(updates + std Σ weight · noise, rounded to the grid) / divisor.

    The noise is written once and read once, by whatever reads the gradient next.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
    if not std:
        mean = [(x.astype(jnp.float32) / jnp.float32(divisor)).astype(x.dtype) for _, x in leaves]
        return jax.tree.unflatten(structure, mean)
    spacing = grid_spacing(std)
    nonces = [_leaf_nonce(path) for path, _ in leaves]
    arrays = [x for _, x in leaves]
    made = [(_normals(words, arrays, nonces, specs), weight) for words, weight in drawn]
    released = []
    for n, (_, x) in enumerate(leaves):
        (first, _), *others = made
        g = first[n]
        for noise, weight in others:
            g = g + weight * noise[n]
        noisy = x.astype(jnp.float32) + jnp.float32(std) * g
        rounded = jnp.round(noisy / spacing) * spacing
        released.append((rounded / jnp.float32(divisor)).astype(x.dtype))
    return jax.tree.unflatten(structure, released)


def _leaf_nonce(path: tuple[Any, ...]) -> tuple[int, int, int]:
    """Three words that name a leaf within a step's stream: a hash of its path.

    Not its number: ``optax.multi_transform`` shows one transformation several trees with
    leaves left out, and the first leaf of each would get the same noise.
    """
    digest = hashlib.sha256(jax.tree_util.keystr(path).encode()).digest()
    first, second, third = (int(word) for word in np.frombuffer(digest[:12], "<u4"))
    return first, second, third


def dp_aggregate(
    l2_clip_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    rng: Key[Array, ""] | keys.SecureKey,
    *,
    adjacency: str = "add_remove",
    axis_name: axes.AxisNames | None = None,
) -> optax.GradientTransformation:
    """Optax: per-example gradients in (leading batch axis), a private mean out.

    Takes the place of ``optax.contrib.differentially_private_aggregate``. A NaN or
    infinite example contributes zero, an empty batch releases pure noise, the key is
    mandatory, the noise is float32, and the mean divides by a public constant.

    The arguments and the guarantee are those of :func:`add_noise`; here the clipping is
    included, so the sensitivity is C·k by construction.

    Raises:
        ValueError: as :func:`add_noise`; and for updates without a common batch axis.

    Example:
        >>> from dpfa_jax import SecureKey
        >>> tx = dp_aggregate(1.0, 1.1, 2.0, SecureKey.generate())
        >>> per_example = {"w": jnp.array([[3.0, 4.0], [jnp.nan, 0.0]])}
        >>> mean, _ = tx.update(per_example, tx.init({"w": jnp.zeros(2)}))
        >>> bool(jnp.isfinite(mean["w"]).all())
        True
    """
    noise = add_noise(
        l2_clip_norm,
        noise_multiplier,
        expected_batch_size,
        rng,
        adjacency=adjacency,
        axis_name=axis_name,
    )

    def update(
        updates: PyTree, state: DPNoiseState, params: PyTree | None = None
    ) -> tuple[PyTree, DPNoiseState]:
        shapes = [x.shape for x in jax.tree.leaves(updates)]
        if not shapes or any(not s for s in shapes) or len({s[0] for s in shapes}) != 1:
            raise ValueError(
                "updates: per-example gradients are needed, every leaf with the same leading "
                f"batch axis; the shapes are {shapes}."
            )
        total = clip_and_sum(updates, l2_clip_norm, None)
        mean, state = noise.update(total, state, params)
        return jax.tree.map(lambda x, u: x.astype(u.dtype), mean, updates), state

    return optax.GradientTransformation(noise.init, update)


def _is_state(x: Any) -> bool:
    return isinstance(x, DPNoiseState)


def without_keys(opt_state: PyTree) -> PyTree:
    """``opt_state`` with every noise key replaced by None: what may be written to disk."""
    return jax.tree.map(
        lambda s: s._replace(key=None) if _is_state(s) else s, opt_state, is_leaf=_is_state
    )


def with_fresh_key(opt_state: PyTree, rng: Key[Array, ""] | keys.SecureKey) -> PyTree:
    """``opt_state`` with ``rng`` as the noise key, each noise state with a child of its own.

    Raises:
        ValueError: for an unsuited key, or if there is no noise state to give it to.
    """
    key = keys.take_key(rng)
    count = 0

    def renew(state: Any) -> Any:
        nonlocal count
        if not _is_state(state):
            return state
        count += 1
        return state._replace(key=jax.random.fold_in(key, count))

    renewed = jax.tree.map(renew, opt_state, is_leaf=_is_state)
    if not count:
        raise ValueError("opt_state: holds no noise state (add_noise or dp_aggregate).")
    return renewed
