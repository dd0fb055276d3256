"""What private attention hides, and what that costs.

:class:`AttentionPrivacy` holds the public numbers of the two mechanisms (see
:mod:`dpfa_jax.attention`), :func:`attention_event` says what calls with them cost.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import dp_accounting

from dpfa_jax import keys
from dpfa_jax.mechanisms import Summation, record_sensitivity, sequence_sensitivity
from pallas_kernels.attention import AttentionSpec
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
        noise_multiplier: z, the noise's standard deviation over the sensitivity. A tuple
            has one for each query head; heads that follow one another with the same number
            share a call of the kernels.
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
    noise_multiplier: float | tuple[float, ...]
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
        self._check_multiplier()
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

    def _check_multiplier(self) -> None:
        z = self.noise_multiplier
        try:
            for one in z if isinstance(z, tuple) and z else (z,):
                _positive("noise_multiplier", one)
        except ValueError:
            if not isinstance(z, tuple | list):
                raise
            raise ValueError(
                f"noise_multiplier={z!r}: allowed is a finite number > 0, or a tuple of them, one "
                "for each query head."
            ) from None

    def multipliers(self, num_heads: int) -> tuple[float, ...]:
        """The multiplier z of each of ``num_heads`` query heads.

        Raises:
            ValueError: if it is a tuple of another length.

        Example:
            >>> p = AttentionPrivacy(unit="sequence", noise_multiplier=(1.0, 2.0), value_clip=1.0,
            ...                      adjacency="replace_one")
            >>> p.multipliers(2)
            (1.0, 2.0)
        """
        z = self.noise_multiplier
        if not isinstance(z, tuple):
            return (z,) * num_heads
        if len(z) != num_heads:
            raise ValueError(
                f"noise_multiplier={z!r}: it has {len(z)} numbers and the query {num_heads} heads; "
                "one for each head is needed, or a single number."
            )
        return z

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
        attention_event(self, query_shape, calls)  # checks the arguments
        if self.rounds == "threefry":
            return "Nothing is hidden: the noise comes from Threefry-2x32, for tests only."
        rows, queries = "", ""
        if self.unit == "record":
            rows = f" of at most {self.rows_per_record} key/value rows"
            queries = ", for queries that do not depend on the records"
        releases = query_shape[1] * calls
        if isinstance(self.noise_multiplier, tuple):
            noise = f"{releases} Gaussian releases of each head, of noise multipliers"
        else:
            noise = f"{releases * query_shape[2]} Gaussian releases of noise multiplier"
        return (
            f"A {self.unit}{rows} is hidden under {self.adjacency} by {noise} "
            f"{self.noise_multiplier}{queries}. "
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
        head: int | None = None,
        summation: Summation = "any",
    ) -> AttentionSpec:
        """The kernel's static options: these numbers with the noise they need.

        Args:
            scale: factor on the logits.
            head_dim: the head dimension.
            num_keys: rows of the key array, padding included.
            dtype: ``'float32'``, ``'bfloat16'`` or ``'float16'``.
            is_causal: see :func:`dp_dot_product_attention`.
            window: ``(left, right)``.
            head: the query head that it is for; needed where each has its own multiplier.
            summation: see :func:`dpfa_jax.mechanisms.record_sensitivity`.

        Raises:
            ValueError: if ``rounds`` is ``"threefry"`` and that was not allowed, or without
                ``head`` where it is needed.
        """
        if self.rounds == "threefry":
            keys.check_threefry_allowed("rounds='threefry'")
        z = self.noise_multiplier
        if isinstance(z, tuple):
            if head is None or not 0 <= head < len(z):
                raise ValueError(
                    f"head={head!r}: allowed is a number from 0 to {len(z) - 1}, because "
                    f"noise_multiplier={z!r} has one for each head."
                )
            z = z[head]
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
            summation=summation,
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
    privacy: AttentionPrivacy | Sequence[AttentionPrivacy | None] | None,
    query_shape: tuple[int, ...],
    calls: int = 1,
) -> dp_accounting.DpEvent:
    """The privacy cost of ``calls`` calls on the same records, as a ``DpEvent``.

    Every query row of every query head is one release: R = T·N·calls of them, each a
    Gaussian of multiplier z. The elements of a batch hold different records (different
    sequences), so the batch does not multiply the cost; where a person's records stand
    in several batch elements, put that number into ``calls``.

    Where each head has its own multiplier, the event is composed of T·calls releases of each.
    For layers with their own privacy, pass a list of one for each layer.

    The event's ``noise_multiplier`` is noise over *sensitivity*, the factor 2 of
    ``replace_one`` included; :class:`dpfa_jax.Accountant` reads it so. A ``DpEvent`` has
    no place for the generator of the noise; :meth:`AttentionPrivacy.guarantee` names it.

    Args:
        privacy: what the calls hide; None costs everything (``NonPrivateDpEvent``), and
            so does noise from a generator for tests (``rounds="threefry"``). A list or tuple:
            of the layers that see the same records, each called ``calls`` times with queries
            of ``query_shape``.
        query_shape: [B, T, N, H], as given to :func:`dp_dot_product_attention`.
        calls: how many calls (layers, steps) see the same records.

    Raises:
        ValueError: for a shape that is not four positive numbers, ``calls`` < 1, multipliers
            for another number of heads, or layers that do not hide the same thing.

    Example:
        >>> p = AttentionPrivacy(unit="sequence", noise_multiplier=8.0, value_clip=1.0,
        ...                      adjacency="replace_one")
        >>> attention_event(p, (2, 16, 4, 64)).count
        64
        >>> last = dataclasses.replace(p, noise_multiplier=(4.0, 8.0, 8.0, 8.0))
        >>> layers = attention_event([p, last], (2, 16, 4, 64))
        >>> print(layers.events[1].events[0])
        SelfComposedDpEvent(event=GaussianDpEvent(noise_multiplier=4.0), count=16)
    """
    if len(query_shape) != 4 or any(int(n) != n or n < 1 for n in query_shape):
        raise ValueError(f"query_shape={query_shape!r}: four positive numbers, [B, T, N, H].")
    if not isinstance(calls, int) or isinstance(calls, bool) or calls < 1:
        raise ValueError(f"calls={calls!r}: allowed is a whole number >= 1.")
    if isinstance(privacy, list | tuple):
        return _layers_event(privacy, query_shape, calls)
    if privacy is None:
        return dp_accounting.NonPrivateDpEvent()
    if not isinstance(privacy, AttentionPrivacy):
        raise ValueError(
            f"privacy is a {type(privacy).__name__}: AttentionPrivacy, None, or a list of them."
        )
    rows, heads = int(query_shape[1]) * calls, int(query_shape[2])
    multipliers = privacy.multipliers(heads)
    if privacy.rounds == "threefry":
        return dp_accounting.NonPrivateDpEvent()
    if not isinstance(privacy.noise_multiplier, tuple):
        event = dp_accounting.GaussianDpEvent(privacy.noise_multiplier)
        return dp_accounting.SelfComposedDpEvent(event, rows * heads)
    each = [
        dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(z), rows)
        for z in multipliers
    ]
    return dp_accounting.ComposedDpEvent(each)


def _layers_event(
    layers: Sequence[AttentionPrivacy | None], query_shape: tuple[int, ...], calls: int
) -> dp_accounting.DpEvent:
    events = [attention_event(layer, query_shape, calls) for layer in layers]
    hidden = {
        (layer.unit, layer.adjacency, layer.rows_per_record)
        for layer in layers
        if layer is not None
    }
    if not layers or len(hidden) > 1:
        raise ValueError(
            f"privacy: {len(layers)} layers that hide {sorted(hidden)}; allowed are layers with "
            "one unit, adjacency and rows_per_record, at least one."
        )
    return dp_accounting.ComposedDpEvent(events)
