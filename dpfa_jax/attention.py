"""Private attention: what is private, with which noise, at which cost in privacy.

Two mechanisms (docs/privacy.md has the proofs).

``unit='record'``: keys and values are private records, queries are public. Every query
row releases a noisy sum of clipped values and a noisy sum of bounded weights::

    w_ij = exp(min(scale q_i·k_j, U) - U)         v̄_j = v_j min(1, C/‖v_j‖)
    out_i = (Σ_j w_ij v̄_j + σ_N g) / max(Σ_j w_ij + σ_L g', floor)

``unit='sequence'``: the whole sequence is private; each softmax row over clipped values
gets noise of standard deviation z·2C.

Each (query row, query head, call) is one Gaussian release of noise multiplier z.
"""

import dataclasses
import functools
import math
from typing import Literal

import dp_accounting
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dpfa_jax import keys
from dpfa_jax.mechanisms import record_sensitivity, sequence_sensitivity
from pallas_kernels.attention import AttentionSpec, attention, check_arguments
from pallas_kernels.prng import ROUNDS, Rounds

_UNITS = ("record", "sequence")
_ADJACENCIES = {"record": ("add_remove", "replace_one"), "sequence": ("replace_one",)}


def _positive(name: str, value: object) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ValueError(f"{name}={value!r}: allowed is a finite number > 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPrivacy:
    """What one attention call hides, and how well. All of it is public.

    Attributes:
        unit: ``'record'``: one key/value row (or ``rows_per_record`` of them) is hidden,
            queries are public. ``'sequence'``: a whole sequence is hidden.
        noise_multiplier: z, the noise's standard deviation over the sensitivity.
        value_clip: C, the largest norm of a value row, per head, in the values' units.
        adjacency: ``'add_remove'`` (a record more or less) or ``'replace_one'`` (another
            record in its place). A sequence is hidden under ``'replace_one'`` only.
        logit_bound: U, for records only: logits above it count as U.
        rows_per_record: m, the most rows that one record holds. Above 1, the call needs
            ``record_ids`` and drops the rows of a record beyond the first m.
        denominator_floor: the noisy sum of weights is not divided by less. None means
            one standard deviation of its own noise.
        public_queries: the caller's statement that the queries do not depend on the
            private records. The layers ask for it where they cannot see it.
        rounds: of the ChaCha that makes the noise: 20, 12 or 8 (docs/privacy.md, section
            5). ``"threefry"``, with a 64-bit key, is FOR REPRODUCIBLE TESTS ONLY: it
            makes noise inside :func:`dpfa_jax.keys.allow_threefry_for_tests` alone, and
            its :func:`attention_event` is ``NonPrivateDpEvent``.

    Raises:
        ValueError: for a value that is not allowed; the message names it.

    Example:
        >>> AttentionPrivacy(unit="record", noise_multiplier=1.0, value_clip=1.0,
        ...                  adjacency="add_remove", logit_bound=-1.0).unit
        'record'
        >>> AttentionPrivacy(unit="record", noise_multiplier=0.0, value_clip=1.0,
        ...                  adjacency="add_remove", logit_bound=0.0)
        Traceback (most recent call last):
        ...
        ValueError: noise_multiplier=0.0: allowed is a finite number > 0.
    """

    unit: Literal["record", "sequence"]
    noise_multiplier: float
    value_clip: float
    adjacency: Literal["add_remove", "replace_one"]
    logit_bound: float | None = None
    rows_per_record: int = 1
    denominator_floor: float | None = None
    public_queries: bool = False
    rounds: Rounds = 20

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise ValueError(f"unit={self.unit!r}: allowed are {_UNITS}.")
        _positive("noise_multiplier", self.noise_multiplier)
        _positive("value_clip", self.value_clip)
        if not 1e-15 <= self.value_clip <= 1e15:
            raise ValueError(
                f"value_clip={self.value_clip!r}: allowed is 1e-15 to 1e15, so that float32 holds "
                "its square; scale the values."
            )
        allowed = _ADJACENCIES[self.unit]
        if self.adjacency not in allowed:
            raise ValueError(
                f"adjacency={self.adjacency!r}: for unit={self.unit!r} allowed are {allowed}."
            )
        m = self.rows_per_record
        if not isinstance(m, int) or isinstance(m, bool) or m < 1:
            raise ValueError(f"rows_per_record={m!r}: allowed is a whole number >= 1.")
        if not isinstance(self.rounds, int | str) or self.rounds not in ROUNDS:
            raise ValueError(f"rounds={self.rounds!r}: allowed are {ROUNDS}.")
        if self.unit == "record":
            bound = self.logit_bound
            if (
                isinstance(bound, bool)
                or not isinstance(bound, int | float)
                or not abs(bound) <= 1e30
            ):
                raise ValueError(
                    f"logit_bound={bound!r}: unit='record' needs a number from -1e30 to 1e30."
                )
            if self.denominator_floor is not None:
                _positive("denominator_floor", self.denominator_floor)
        else:
            for name, default in (
                ("logit_bound", None),
                ("rows_per_record", 1),
                ("denominator_floor", None),
            ):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r}: has no meaning for unit='sequence'; "
                        f"allowed is {default!r}."
                    )

    def guarantee(self, query_shape: tuple[int, ...], calls: int = 1) -> str:
        """What :func:`attention_event` charges for, in words, the generator included.

        Args:
            query_shape: as for :func:`attention_event`.
            calls: as for :func:`attention_event`.

        Raises:
            ValueError: as :func:`attention_event`.

        Example:
            >>> AttentionPrivacy(unit="sequence", noise_multiplier=8.0, value_clip=1.0,
            ...                  adjacency="replace_one").guarantee((2, 16, 4, 64))
            'A sequence is hidden ... The noise comes from ChaCha20 with a 256-bit key.'
        """
        event = attention_event(self, query_shape, calls)
        if self.rounds == "threefry":
            return "Nothing is hidden: the noise comes from Threefry-2x32, for tests only."
        rows, queries = "", ""
        if self.unit == "record":
            rows = f" of at most {self.rows_per_record} key/value rows"
            queries = ", for queries that do not depend on the records"
        return (
            f"A {self.unit}{rows} is hidden under {self.adjacency} by {event.count} Gaussian "
            f"releases of noise multiplier {self.noise_multiplier}{queries}. "
            f"The noise comes from ChaCha{self.rounds} with a 256-bit key."
        )

    def spec(
        self,
        *,
        scale: float,
        head_dim: int,
        num_keys: int,
        dtype: str,
        is_causal: bool = False,
        window: tuple[int, int] | None = None,
    ) -> AttentionSpec:
        """The kernel's static options: these numbers with the noise they need.

        Args:
            scale: factor on the logits.
            head_dim: the head dimension.
            num_keys: rows of the key array, padding included.
            dtype: ``'float32'``, ``'bfloat16'`` or ``'float16'``.
            is_causal: see :func:`dp_dot_product_attention`.
            window: ``(left, right)``.

        Raises:
            ValueError: if ``rounds`` is ``"threefry"`` and that was not allowed.
        """
        if self.rounds == "threefry":
            keys.check_threefry_allowed("rounds='threefry'")
        z = self.noise_multiplier
        if self.unit == "sequence":
            delta = sequence_sensitivity(
                self.value_clip, head_dim=head_dim, num_keys=num_keys, dtype=dtype
            )
            return AttentionSpec(
                mode="sequence",
                scale=scale,
                is_causal=is_causal,
                window=window,
                value_clip=self.value_clip,
                numerator_std=z * delta,
                rounds=self.rounds,
            )
        record = record_sensitivity(
            self.value_clip,
            head_dim=head_dim,
            num_keys=num_keys,
            dtype=dtype,
            adjacency=self.adjacency,
            rows_per_record=self.rows_per_record,
        )
        std = record.denominator_std(z)
        assert self.logit_bound is not None
        return AttentionSpec(
            mode="record",
            scale=scale,
            is_causal=is_causal,
            window=window,
            value_clip=self.value_clip,
            logit_bound=self.logit_bound,
            numerator_std=record.numerator_std(z),
            denominator_std=std,
            denominator_floor=std if self.denominator_floor is None else self.denominator_floor,
            rounds=self.rounds,
        )


def attention_event(
    privacy: AttentionPrivacy | None, query_shape: tuple[int, ...], calls: int = 1
) -> dp_accounting.DpEvent:
    """The privacy cost of ``calls`` calls on the same records, as a ``DpEvent``.

    Every query row of every query head is one release: R = T·N·calls of them, each a
    Gaussian of multiplier z. The elements of a batch hold different records (different
    sequences), so the batch does not multiply the cost; where a person's records stand
    in several batch elements, put that number into ``calls``.

    The event's ``noise_multiplier`` is noise over *sensitivity*, the factor 2 of
    ``replace_one`` included; :class:`dpfa_jax.Accountant` reads it so. A ``DpEvent`` has
    no place for the generator of the noise; :meth:`AttentionPrivacy.guarantee` names it.

    Args:
        privacy: what the calls hide; None costs everything (``NonPrivateDpEvent``), and
            so does noise from a generator for tests (``rounds="threefry"``).
        query_shape: [B, T, N, H], as given to :func:`dp_dot_product_attention`.
        calls: how many calls (layers, steps) see the same records.

    Raises:
        ValueError: for a shape that is not four positive numbers, or ``calls`` < 1.

    Example:
        >>> p = AttentionPrivacy(unit="sequence", noise_multiplier=8.0, value_clip=1.0,
        ...                      adjacency="replace_one")
        >>> attention_event(p, (2, 16, 4, 64)).count
        64
    """
    if len(query_shape) != 4 or any(int(n) != n or n < 1 for n in query_shape):
        raise ValueError(f"query_shape={query_shape!r}: four positive numbers, [B, T, N, H].")
    if not isinstance(calls, int) or isinstance(calls, bool) or calls < 1:
        raise ValueError(f"calls={calls!r}: allowed is a whole number >= 1.")
    if privacy is None or privacy.rounds == "threefry":
        return dp_accounting.NonPrivateDpEvent()
    releases = int(query_shape[1]) * int(query_shape[2]) * calls
    event = dp_accounting.GaussianDpEvent(privacy.noise_multiplier)
    return dp_accounting.SelfComposedDpEvent(event, releases)


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


def _check_varying(rng: jax.Array, operands: tuple[jax.Array, ...]) -> None:
    """Inside ``shard_map``: data that differs between devices needs keys that do."""

    def varying(x: jax.Array) -> frozenset[str]:
        # No default: without this attribute the check would pass everything in silence.
        return frozenset(jax.typeof(x).manual_axis_type.varying)

    missing = frozenset().union(*map(varying, operands)) - varying(rng)
    if missing:
        axes = ", ".join(sorted(map(str, missing)))
        raise ValueError(
            f"rng: the data differs along the mesh axis {axes} and the key does not, so every "
            "device would add the same noise. Use jax.random.fold_in(rng, "
            "jax.lax.axis_index(axis)) for each such axis."
        )


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

    Returns:
        [B, T, N, H] in the dtype of ``query``. A row that sees nothing gives zero (plus
        noise, if any).

    Raises:
        ValueError: at trace time, for a missing, unsuited or reused key, shapes that do
            not fit, and unknown options.

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
    run = functools.partial(attention, lengths=lengths, implementation=implementation)

    if privacy is None:
        if record_ids is not None:
            raise ValueError("record_ids: has no meaning without privacy.")
        if rng is not None:
            raise ValueError("rng: privacy=None adds no noise; leave the key out.")
        spec = AttentionSpec(mode="exact", scale=float(scale), is_causal=is_causal, window=window)
        return run(query, key, value, spec, mask=mask)

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
    spec = privacy.spec(
        scale=float(scale),
        head_dim=depth,
        num_keys=key.shape[1] if key.ndim > 1 else 0,
        dtype=str(query.dtype),
        is_causal=is_causal,
        window=window,
    )
    # All that can be refused is refused before the key counts as used.
    check_arguments(query, key, value, spec, lengths, mask, implementation)
    if record_ids is not None:
        if record_ids.shape != key.shape[:2]:
            raise ValueError(f"record_ids has shape {record_ids.shape}: {key.shape[:2]} is needed.")
        keep = _keep_first_rows(record_ids, privacy.rows_per_record)[:, None, None, :]
        mask = keep if mask is None else mask & keep
    operands = (query, key, value, lengths, mask)
    _check_varying(rng, tuple(x for x in operands if x is not None))
    return run(query, key, value, spec, key_words=keys.consume(rng), mask=mask)
