"""Attention whose keys and values lie on several devices (sequence or context parallel).

Record-level private attention splits over the keys exactly: N and L are plain sums, counted
as integers, so every device sums its own records, the sums are added, and noise is added
once. The release is the same, bit for bit, on any number of devices
(docs/privacy.md, section 1, "Several devices").

``privacy=None`` is exact attention, put together by an online softmax.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float, Int, Key

from dpfa_jax import keys
from dpfa_jax.attention_privacy import AttentionPrivacy
from dpfa_jax.parallel import attention_collectives
from dpfa_jax.parallel.attention_parts import Plan
from dpfa_jax.parallel.axes import manual_axes
from pallas_kernels.attention import (
    AttentionSpec,
    check_arguments,
    common,
    fused,
    partial_backend,
)

Strategy = Literal["reduce", "ring"]

# Rows and keys of one kernel call where its size must not depend on the number of devices.
_MOST_KEYS = 8192
# With fewer rows on a device its matrix units idle.
_ROWS = 64


def dp_sequence_parallel_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mesh: jax.sharding.Mesh | None = None,
    axis: str,
    batch_axis: str | None = None,
    head_axis: str | None = None,
    privacy: AttentionPrivacy | None = None,
    rng: Key[Array, ""] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    strategy: Strategy | None = None,
    implementation: Literal["mosaic_gpu", "triton", "mosaic_tpu", "xla"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention, exact or private, over keys and values that are split over ``axis``.

    Works inside and outside ``jax.jit``, on global arrays; gradients are those of
    :func:`dpfa_jax.dp_dot_product_attention`. Not inside ``shard_map`` or ``pmap``, where it
    would be mapped twice.

    Guarantee. As :func:`dpfa_jax.dp_dot_product_attention` with ``unit='record'``, at the
    same cost (:func:`dpfa_jax.attention_event`), whatever the number of devices. Noise is
    added once, by the device that finishes a row, and is the same for any number of
    devices. What travels between devices is not private: all of them, and the network, lie
    inside the trust boundary.

    Args:
        query: [B, T, N, H], float32, bfloat16 or float16.
        key: [B, S, K, H]; N is a multiple of K. A length S that is a multiple of 512 times
            the devices (8192 times on Hopper GPUs, for many keys) is not copied for padding.
        value: [B, S, K, H].
        mesh: the devices; None takes that of ``jax.set_mesh``.
        axis: the mesh axis over which keys and values are split, and the rows of the result.
        batch_axis: mesh axis of the batch (data parallel), or None.
        head_axis: mesh axis of the heads (tensor parallel), or None.
        privacy: what to hide (``unit='record'``), or None.
        rng: a key<chacha20> array, for this call alone, the same for all devices; required
            if ``privacy`` is set.
        scale: factor on the logits, a Python number (it is public); None means 1/√H.
        is_causal: row t sees the columns s <= t; T = S is needed.
        key_value_seq_lengths: [B], how many keys of each element exist.
        strategy: ``'reduce'``: all queries on every device, sums travel. ``'ring'``: queries
            are split like the keys, and keys travel. None takes what sends fewer bytes.
        implementation: who sums; None takes the best on this machine.

    Returns:
        [B, T, N, H] in the dtype of ``query``, its rows split over ``axis``.

    Raises:
        ValueError: at trace time, for a missing, unsuited or reused key, axes that the mesh
            does not have or that do not divide the batch or the heads, shapes that do not
            fit, and what is not supported: ``unit='sequence'``, ``rows_per_record`` above
            1, multipliers for each head.

    Example:
        >>> import dpfa_jax
        >>> mesh = jax.make_mesh((1,), ("keys",))
        >>> privacy = dpfa_jax.AttentionPrivacy(
        ...     unit="record", noise_multiplier=2.0, value_clip=1.0, adjacency="add_remove",
        ...     logit_bound=2.0, public_queries=True)
        >>> q, k = jnp.ones((1, 5, 2, 8)), jnp.ones((1, 900, 2, 8))
        >>> rng = dpfa_jax.SecureKey.generate().key()
        >>> dp_sequence_parallel_attention(q, k, k, mesh=mesh, axis="keys", privacy=privacy,
        ...                                rng=rng).shape
        (1, 5, 2, 8)
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    if scale is None:
        scale = 1.0 / math.sqrt(max(1, query.shape[-1]) if query.ndim else 1)
    elif isinstance(scale, jax.core.Tracer) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: a finite Python number is needed; it is public.")
    if strategy not in (None, "reduce", "ring"):
        raise ValueError(f"strategy={strategy!r}: allowed are None, 'reduce' and 'ring'.")
    lengths = None if key_value_seq_lengths is None else jnp.asarray(key_value_seq_lengths)
    spec = _spec(query, key, privacy, rng, float(scale), is_causal)
    check_arguments(query, key, value, spec, lengths, None, None)
    mesh, devices = _check_mesh(query, key, mesh, axis, batch_axis, head_axis)
    mesh = _automatic(mesh, (query, key, value))
    if is_causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"is_causal=True with {query.shape[1]} rows and {key.shape[1]} keys: as many rows as "
            "keys are needed where they are split over devices."
        )
    plan = make_plan(
        query, key, spec, mesh=mesh, devices=devices, axis=axis, batch_axis=batch_axis,
        head_axis=head_axis, strategy=strategy, implementation=implementation,
    )  # fmt: skip
    words = None if privacy is None else keys.consume(keys.check_noise_key(rng))
    return run(plan, query, key, value, lengths=lengths, words=words)


def _spec(
    query: jax.Array,
    key: jax.Array,
    privacy: AttentionPrivacy | None,
    rng: Any,
    scale: float,
    is_causal: bool,
) -> AttentionSpec:
    if privacy is None:
        if rng is not None:
            raise ValueError("rng: privacy=None adds no noise; leave the key out.")
        return AttentionSpec(mode="exact", scale=scale, is_causal=is_causal)
    if not isinstance(privacy, AttentionPrivacy):
        raise ValueError(f"privacy is a {type(privacy).__name__}: AttentionPrivacy or None.")
    if privacy.unit != "record":
        raise ValueError(
            f"privacy.unit={privacy.unit!r}: keys are split over devices for 'record' only."
        )
    if privacy.rows_per_record != 1:
        raise ValueError(
            f"privacy.rows_per_record={privacy.rows_per_record}: only 1 is allowed where keys are "
            "split over devices, because a record's rows may lie on several of them."
        )
    if isinstance(privacy.noise_multiplier, tuple):
        raise ValueError(
            f"privacy.noise_multiplier={privacy.noise_multiplier!r}: one number for all heads is "
            "needed where keys are split over devices."
        )
    if keys.check_noise_key(rng).shape != ():
        raise ValueError(f"rng has shape {rng.shape}: one key is needed, shape ().")
    num_keys = max(1, key.shape[1]) if key.ndim > 1 else 1
    spec = privacy.spec(
        scale=scale, head_dim=max(1, query.shape[-1]) if query.ndim else 1, num_keys=num_keys,
        dtype=str(query.dtype), is_causal=is_causal, summation="chunks",
    )  # fmt: skip
    # What the sensitivity counts on; see _chunk_error in dpfa_jax/mechanisms/attention.py.
    share = max(1.02 * 2.0**-11, num_keys * 2.0**-28)
    units = common.sum_units(spec, num_keys)
    if units.numerator > share * spec.value_clip or units.denominator > share:
        raise ValueError(
            f"privacy.noise_multiplier={privacy.noise_multiplier}: too large for sums of "
            f"{num_keys} keys in 32 bits."
        )
    return spec


def _check_mesh(
    query: jax.Array,
    key: jax.Array,
    mesh: Any,
    axis: str,
    batch_axis: str | None,
    head_axis: str | None,
) -> tuple[Any, int]:
    """The mesh, and the number of devices over which keys are split."""
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise ValueError("mesh=None: give a mesh, or call inside `with jax.set_mesh(mesh):`.")
    given = {"axis": axis, "batch_axis": batch_axis, "head_axis": head_axis}
    named = {argument: name for argument, name in given.items() if name is not None}
    for argument, name in named.items():
        if name not in mesh.shape:
            raise ValueError(
                f"{argument}={name!r}: the mesh has the axes {tuple(mesh.axis_names)}."
            )
        if list(named.values()).count(name) > 1:
            raise ValueError(
                f"{argument}={name!r}: each of {tuple(named)} needs an axis of its own."
            )
    for argument, count, what in (
        ("batch_axis", query.shape[0], "batch elements"),
        ("head_axis", key.shape[2], "key heads"),
    ):
        if argument in named and count % mesh.shape[named[argument]]:
            raise ValueError(
                f"{argument}={named[argument]!r} has {mesh.shape[named[argument]]} devices, which "
                f"do not divide the {count} {what}."
            )
    manual = manual_axes()
    if manual:
        raise ValueError(
            f"axis: inside shard_map or pmap over {list(manual)}; call it outside, on the "
            "global arrays."
        )
    return mesh, int(mesh.shape[axis])


def make_plan(
    query: Any,
    key: Any,
    spec: AttentionSpec,
    *,
    mesh: Any,
    devices: int,
    axis: str,
    batch_axis: str | None = None,
    head_axis: str | None = None,
    strategy: Strategy | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Plan:
    """The plan of a call whose arguments have been checked.

    Args:
        query: an array or ``jax.ShapeDtypeStruct`` [B, T, N, H].
        key: likewise, [B, S, K, H].
        spec: the kernels' options.
        mesh: the devices.
        devices: on ``axis``.
        axis: of the keys.
        batch_axis: of the batch.
        head_axis: of the heads.
        strategy: as for :func:`dp_sequence_parallel_attention`.
        implementation: likewise.
        interpret: run the named kernels in Pallas's interpreter.

    Raises:
        ValueError: if the implementation cannot do it.
    """
    (_, num_rows, heads, depth), (num_keys, kv_heads) = query.shape, key.shape[1:3]
    own = -(-num_keys // devices)
    some_keys = jax.ShapeDtypeStruct((key.shape[0], own, *key.shape[2:]), key.dtype)
    backend = partial_backend(query, some_keys, spec, implementation, interpret=interpret)
    if strategy is None:
        # Sums are 32 bits wide, and queries may have to be gathered.
        width = query.dtype.itemsize
        sums, rows = num_rows * heads * (depth + 1) * 4, num_rows * heads * depth * width
        strategy = "reduce" if sums + rows <= 2 * num_keys * kv_heads * depth * width else "ring"
    # Not a function of the number of devices: the same parts are then rounded.
    block = max(
        common.HOPPER_CHUNK, min(_MOST_KEYS, 1 << (max(num_keys // 16, 1).bit_length() - 1))
    )
    if not spec.is_causal and not getattr(backend, "SUMS_END_TOGETHER", False):
        block = 0
    return Plan(
        spec, backend, mesh, axis, batch_axis, head_axis, strategy == "ring", num_keys, block,
        interpret,
    )  # fmt: skip


def _automatic(mesh: Any, operands: Sequence[jax.Array]) -> Any:
    """The mesh with ``Auto`` axes, where no operand's type says how it is split.

    ``jax.make_mesh`` makes ``Explicit`` axes, along which arrays without such a type fit nowhere.
    """
    typed = [kind for x in operands for kind in jax.typeof(x).sharding.mesh.axis_types]
    if not isinstance(mesh, Mesh) or AxisType.Explicit in typed:
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def run(
    plan: Plan,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    lengths: jax.Array | None,
    words: jax.Array | None,
) -> Float[Array, "B T N H"]:
    """The call of a plan: pads rows, keys and head dimensions, and takes the padding off."""
    batch, num_rows, _, depth = query.shape
    num_keys, devices = key.shape[1], int(plan.mesh.shape[plan.axis])
    operands = [x for x in (query, key, value, lengths) if x is not None]
    counters = jnp.arange(batch, dtype=jnp.uint32)
    if words is not None:
        counters = common.batch_counters(words, batch, operands)
    if lengths is None:
        lengths = jnp.full((batch,), num_keys, jnp.int32)
    lengths = jnp.clip(lengths, 0, num_keys).astype(jnp.int32)
    # The same parts for any number of devices, and whole chunks (Hopper's are the longest).
    columns = -num_keys % (devices * (plan.block or common.CHUNK))
    rows = -num_rows % math.lcm(devices, _ROWS)
    if plan.spec.is_causal:
        rows = columns
    is_kernel = plan.backend.__name__ != "pallas_kernels.attention.chunked"
    wide = fused.padded_head_dim(depth) - depth if is_kernel else 0
    query, key, value = (
        jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, wide)]) if more or wide else x
        for x, more in ((query, rows), (key, columns), (value, columns))
    )
    out = attention_collectives.attention(plan, query, key, value, lengths, counters, words)
    return out[:, :num_rows, :, :depth]
