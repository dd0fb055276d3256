"""Private attention: what is private, with which noise, at which cost in privacy.

Two mechanisms (docs/privacy.md has the proofs).

``unit='record'``: keys and values are private records, queries are public. Every query
row releases a noisy sum of clipped values and a noisy sum of bounded weights::

    w_ij = exp(min(scale q_i·k_j, U) - U)         v̄_j = v_j min(1, C/‖v_j‖)
    out_i = (Σ_j w_ij v̄_j + σ_N g) / max(Σ_j w_ij + σ_L g', floor)

``unit='sequence'``: the whole sequence is private; each softmax row over clipped values
gets noise of standard deviation z·2C.

Each (query row, query head, call) is one Gaussian release of noise multiplier z, the same
for all heads or one for each.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dpfa_jax import keys
from dpfa_jax.attention_privacy import AttentionPrivacy as AttentionPrivacy
from dpfa_jax.attention_privacy import attention_event as attention_event
from dpfa_jax.device_axes import DeviceAxes, positions
from pallas_kernels.attention import AttentionSpec, attention, attention_by_head, check_arguments


def _window(local_window_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if local_window_size is None:
        return None
    size = local_window_size
    pair = size if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or any(not isinstance(x, int) or x < 0 for x in pair):
        raise ValueError(
            f"local_window_size={local_window_size!r}: allowed is a whole number >= 0 "
            "or a pair (left, right) of them."
        )
    return pair[0], pair[1]


def _keep_first_rows(record_ids: Int[Array, "B S"], most: int) -> Bool[Array, "B S"]:
    """Which rows are among the first ``most`` of their record."""

    def one(ids: jax.Array) -> jax.Array:
        order = jnp.argsort(ids, stable=True)
        ordered = ids[order]
        first = jnp.searchsorted(ordered, ordered, side="left").astype(jnp.int32)
        rank = jnp.arange(ids.size, dtype=jnp.int32) - first
        return jnp.zeros(ids.size, jnp.bool_).at[order].set(rank < most)

    return jax.vmap(one)(record_ids)


def dp_dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    privacy: AttentionPrivacy | None = None,
    rng: Key[Array, ""] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    mask: Bool[Array, "#B #N #T S"] | None = None,
    record_ids: Int[Array, "B S"] | None = None,
    implementation: Literal["reference", "xla"] | None = None,
    device_axes: DeviceAxes | None = None,
) -> Float[Array, "B T N H"]:
    """Attention, exact or private, with the arguments of ``jax.nn.dot_product_attention``.

    ``privacy=None`` is exact softmax attention without noise. Otherwise see the module's
    docstring and :class:`AttentionPrivacy`.

    Guarantee. The output, and everything computed from it, hides one record (or one
    sequence) at the cost of :func:`attention_event`. For records this holds if the
    queries do not depend on them. It says nothing about gradients with respect to the
    inputs, nor about any other path from the inputs (docs/sharp_edges.md). Shapes are
    public; lengths and masks may be private where they concern a record's own column.

    Args:
        query: [B, T, N, H], float32, bfloat16 or float16.
        key: [B, S, K, H]; N is a multiple of K (grouped queries).
        value: [B, S, K, H].
        privacy: what to hide, or None.
        rng: a key<chacha20> array, for this call alone; required if ``privacy`` is set.
            Under ``jax.vmap`` an unmapped key still gives every lane its own noise.
        scale: factor on the logits, a Python number (it is public); None means 1/√H.
        is_causal: row t sees the columns s <= t.
        key_value_seq_lengths: [B], how many keys of each element exist.
        local_window_size: w or (left, right): row t sees t - left <= s <= t + right.
        mask: bool, broadcastable to [B, N, T, S]; False hides a column.
        record_ids: [B, S] integers, which record each row belongs to; with
            ``rows_per_record`` above 1 only.
        implementation: ``'xla'``, ``'reference'``, or None, which picks.
        device_axes: inside ``shard_map`` and ``pmap``, with ``privacy``: which of their axes
            split the ``'batch'`` and the ``'heads'``, as ``{axis: meaning}``. With the same
            key on all devices, these then make the noise that one device makes. ``'key'``
            says that each device has a key of its own, ``'same'`` that nothing differs.
            Under ``jit`` alone, sharded arrays need none of this.

    Returns:
        [B, T, N, H] in the dtype of ``query``. A row that sees nothing gives zero (plus
        noise, if any).

    Raises:
        ValueError: at trace time, for a missing, unsuited or reused key, one that would
            make the same noise on several devices, shapes that do not fit, and unknown
            options.

    Example:
        >>> from dpfa_jax import SecureKey
        >>> q, k = jnp.ones((1, 5, 2, 8)), jnp.ones((1, 9, 2, 8))
        >>> privacy = AttentionPrivacy(unit="record", noise_multiplier=2.0, value_clip=1.0,
        ...                            adjacency="add_remove", logit_bound=2.0)
        >>> rng = SecureKey.generate().key()
        >>> dp_dot_product_attention(q, k, k, privacy=privacy, rng=rng).shape
        (1, 5, 2, 8)
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    depth = max(1, query.shape[-1]) if query.ndim else 1  # empty axes are refused below
    if scale is None:
        scale = 1.0 / math.sqrt(depth)
    elif isinstance(scale, jax.core.Tracer) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: a finite Python number is needed; it is public.")
    window = _window(local_window_size)
    lengths, mask, record_ids = (
        None if x is None else jnp.asarray(x) for x in (key_value_seq_lengths, mask, record_ids)
    )
    options: dict[str, Any] = {"lengths": lengths, "implementation": implementation}

    if privacy is None:
        if record_ids is not None:
            raise ValueError("record_ids: has no meaning without privacy.")
        if rng is not None:
            raise ValueError("rng: privacy=None adds no noise; leave the key out.")
        exact = AttentionSpec(mode="exact", scale=float(scale), is_causal=is_causal, window=window)
        return attention(query, key, value, exact, **options, mask=mask)

    if not isinstance(privacy, AttentionPrivacy):
        raise ValueError(f"privacy is a {type(privacy).__name__}: AttentionPrivacy or None.")
    rng = keys.check_noise_key(rng)
    if rng.shape != ():
        raise ValueError(f"rng has shape {rng.shape}: one key is needed, shape ().")
    if (record_ids is None) != (privacy.rows_per_record == 1):
        raise ValueError(
            f"rows_per_record={privacy.rows_per_record} with record_ids="
            f"{'None' if record_ids is None else 'an array'}: record_ids is needed above 1, "
            "to drop the rows that exceed it, and has no meaning at 1."
        )
    make_spec = functools.partial(
        privacy.spec,
        scale=float(scale),
        head_dim=depth,
        num_keys=key.shape[1] if key.ndim > 1 else 0,
        dtype=str(query.dtype),
        is_causal=is_causal,
        window=window,
    )
    # One for all heads, or one for each.
    z = privacy.noise_multiplier
    specs = [make_spec(head=h) for h in (range(len(z)) if isinstance(z, tuple) else (None,))]
    # All that can be refused is refused before the key counts as used.
    for spec in dict.fromkeys(specs):
        check_arguments(query, key, value, spec, lengths, mask, implementation)
    privacy.multipliers(query.shape[2])
    if record_ids is not None:
        if record_ids.shape != key.shape[:2]:
            raise ValueError(f"record_ids has shape {record_ids.shape}: {key.shape[:2]} is needed.")
        keep = _keep_first_rows(record_ids, privacy.rows_per_record)[:, None, None, :]
        mask = keep if mask is None else mask & keep
    operands = (query, key, value, lengths, mask)
    batch, heads = positions(rng, [x for x in operands if x is not None], device_axes)
    if heads.parts > 1 and len(specs) > 1:
        raise ValueError(
            f"device_axes={device_axes!r}: 'heads' with one noise_multiplier for each head is not "
            "supported; use one number, or jit with sharded arrays."
        )
    options |= {
        "key_words": keys.consume(rng),
        "mask": mask,
        "first_batch": batch.part * query.shape[0],
        "batch_in_all": batch.parts * query.shape[0],
    }
    if len(specs) == 1:
        first_head = heads.part * query.shape[2]
        return attention(query, key, value, specs[0], first_head=first_head, **options)
    return attention_by_head(query, key, value, specs, **options)
