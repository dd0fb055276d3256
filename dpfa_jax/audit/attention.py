"""Attacks on private attention: the neighbours of docs/privacy.md, section 7, at full strength.

What differs between the neighbours is as bad as an input can be: logits above U, values
longer than C, more rows than a record may have, rows that a length or a mask hides. A claim
stands only if each of these limits works. The other records are known to the attacker.
"""

import dataclasses
import math
import typing
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dpfa_jax import keys
from dpfa_jax.attention import AttentionPrivacy, attention_event, dp_dot_product_attention
from dpfa_jax.attention_fn import attention_fn, noise_key
from dpfa_jax.audit.bounds import check_audit
from dpfa_jax.audit.result import AuditResult, judge
from pallas_kernels import attention as kernels

DEPTH, CLIP, BOUND = 4, 1.25, 0.5
_SCALE = DEPTH**-0.5
_DIRECTION = np.array([0.5, -0.5, 0.1, 0.7])
_DIRECTION /= np.linalg.norm(_DIRECTION)
_NUM_KEYS, _CANARY, _HIDDEN = 320, 256, 32
_OVER_BOUND, _OVER_CLIP, _NO_WEIGHT = BOUND + 4.0, 30.0 * CLIP, -1e4
# Rows of an element of the batch that see the record; each group of ``case.rows`` is a sample.
_ROWS, _TWIN_ROWS = 256, 128
# Logits in memory at once; larger audits go through several calls of one compiled program.
_LOGITS, _LOGITS_GPU = 1 << 23, 1 << 27
# Outputs in 16 bits are rounded: fewer other records let the noise be larger than that.
_FEW = np.arange(_NUM_KEYS) % 10 < 3

_Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One claim about attention that :func:`audit_attention` attacks.

    Attributes:
        name: for reports.
        unit: as in :class:`dpfa_jax.AttentionPrivacy`.
        adjacency: likewise.
        rows_per_record: likewise; the attack's record brings twice as many.
        rows: query rows that see one record.
        heads: query heads.
        kv_heads: key/value heads; fewer than ``heads`` means grouped queries.
        calls: layers that see one record, through ``attention_fn`` and ``noise_key``.
        is_causal: whether rows see only the columns up to their own.
        hidden: what hides columns in which the attack stands once more.
        dtype: of queries, keys and values.
        poison: whether the record is NaN; such a claim is not reached.
        twin: what else is released with the same values but not on the record, and so known
            to the attack, which subtracts it: the next element of the ``'batch'``, or a
            ``'row'`` that sees only the columns before the record (``is_causal``). Noise that
            the two shared would cancel. Such a claim is not reached.
        rounds: as in :class:`dpfa_jax.AttentionPrivacy`.
    """

    name: str
    unit: Literal["record", "sequence"]
    adjacency: Literal["add_remove", "replace_one"]
    rows_per_record: int = 1
    rows: int = 1
    heads: int = 1
    kv_heads: int = 1
    calls: int = 1
    is_causal: bool = False
    hidden: Literal["lengths", "mask"] | None = None
    dtype: _Dtype = "float32"
    poison: bool = False
    twin: Literal["batch", "row"] | None = None
    rounds: Literal[20, 12, 8] = 20

    def privacy(self, mu: float) -> AttentionPrivacy:
        """What is claimed when the whole release should have this μ."""
        releases = self.rows * self.heads * self.calls
        record = {"logit_bound": BOUND, "rows_per_record": self.rows_per_record}
        return AttentionPrivacy(
            unit=self.unit,
            noise_multiplier=math.sqrt(releases) / mu,
            value_clip=CLIP,
            adjacency=self.adjacency,
            public_queries=True,
            rounds=self.rounds,
            **(record if self.unit == "record" else {}),  # type: ignore[arg-type]
        )

    def implementations(self, mu: float = 1.0) -> tuple[str, ...]:
        """The implementations that can do this case on this machine, best first."""
        query = jax.ShapeDtypeStruct((2, 2 * _ROWS, self.heads, DEPTH), jnp.dtype(self.dtype))
        key = jax.ShapeDtypeStruct((2, _NUM_KEYS, self.kv_heads, DEPTH), query.dtype)
        has_mask = self.hidden == "mask" or self.rows_per_record > 1
        reasons = kernels.explain(query, key, _spec(self, mu), has_mask=has_mask)
        return tuple(name for name, reason in reasons if reason is None)


def attention_cases() -> tuple[AttentionCase, ...]:
    """The claims that ``dpfa audit`` attacks.

    Example:
        >>> len({case.name for case in attention_cases()}) == len(attention_cases())
        True
    """
    cases = []
    records: dict[str, dict[str, Any]] = {
        "one row": {},
        "three rows a record": {"rows_per_record": 3},
        "grouped queries": {"rows": 2, "heads": 4, "kv_heads": 2},
        "causal": {"is_causal": True},
        "lengths": {"hidden": "lengths"},
        "mask": {"hidden": "mask"},
        "two layers": {"calls": 2},
        "not a number": {"poison": True},
        "a known twin in the batch": {"twin": "batch"},
        "a known twin row": {"twin": "row", "is_causal": True},
    }
    sequences: dict[str, dict[str, Any]] = {
        "one row": {},
        "grouped queries": {"rows": 2, "heads": 4, "kv_heads": 2},
        "two layers": {"calls": 2},
        "not a number": {"poison": True},
        "8 rounds": {"rounds": 8},
    }
    # The fastest kernels take 16 bits only, and no mask.
    no_mask = [name for name in records if name not in ("three rows a record", "mask")]
    for dtype in typing.get_args(_Dtype):
        names = {"float32": list(records), "bfloat16": no_mask}.get(dtype, ["one row"])
        suffix = "" if dtype == "float32" else f", {dtype}"
        for adjacency in ("add_remove", "replace_one"):
            cases += [
                AttentionCase(
                    name=f"record, {adjacency}, {name}{suffix}", unit="record",
                    adjacency=adjacency, dtype=dtype, **records[name],
                )
                for name in names
            ]  # fmt: skip
        cases += [
            AttentionCase(
                name=f"sequence, replace_one, {name}{suffix}", unit="sequence",
                adjacency="replace_one", dtype=dtype, **options,
            )
            for name, options in sequences.items()
            if dtype != "float16" or name == "one row"
        ]  # fmt: skip
    return tuple(cases)


class _Inputs(NamedTuple):
    """One neighbour: arrays for :func:`dp_dot_product_attention`."""

    key: Float[Array, "b s k h"]
    value: Float[Array, "b s k h"]
    lengths: Array | None
    mask: Array | None
    record_ids: Array | None


def _places(case: AttentionCase) -> np.ndarray:
    """The columns of the attack's record; only the first ``rows_per_record`` may count."""
    if case.rows_per_record == 1:
        return np.array([_CANARY])
    return np.arange(3, _CANARY, 17)[: 2 * case.rows_per_record]


def _has_few(case: AttentionCase) -> bool:
    return case.dtype != "float32" and case.adjacency == "add_remove"


def _inputs(case: AttentionCase, *, positive: bool, along: float, batch: int) -> _Inputs:
    """A neighbour. ``along``: the length of the other records' values, with its sign."""
    logits, lengths = np.full(_NUM_KEYS, BOUND), np.full(_NUM_KEYS, along)
    if _has_few(case):
        logits[~_FEW] = _NO_WEIGHT
    end = _NUM_KEYS - _HIDDEN if case.hidden else _NUM_KEYS
    if case.unit == "sequence":
        at: Any = slice(None)
        logits = np.random.default_rng(int(positive)).normal(size=_NUM_KEYS)
    else:
        at = np.concatenate([_places(case), np.arange(end, _NUM_KEYS)])
    if positive:
        if case.unit == "record":
            logits[at] = _OVER_BOUND
        lengths[at] = _OVER_CLIP
    elif case.adjacency == "replace_one":
        if case.unit == "record":
            logits[at] = _OVER_BOUND
        lengths[at] = -_OVER_CLIP
    else:
        logits[at] = _NO_WEIGHT
    if case.poison and positive:
        logits[_CANARY], lengths[_CANARY] = np.nan, np.nan
    shape = (_NUM_KEYS, case.kv_heads, DEPTH)
    key = np.broadcast_to(logits[:, None, None] / (_SCALE * DEPTH), shape)
    value = lengths[:, None, None] * _signs(case.kv_heads)[:, None] * _DIRECTION
    ids = None
    if case.rows_per_record > 1:
        ids = np.arange(_NUM_KEYS)
        ids[_places(case)] = ids[_places(case)[0]]
    column = np.arange(_NUM_KEYS)

    def batched(x: np.ndarray, dtype: str) -> Array:
        return jnp.asarray(np.broadcast_to(x.astype(jnp.dtype(dtype)), (batch, *x.shape)))

    return _Inputs(
        key=batched(key, case.dtype),
        value=batched(value, case.dtype),
        lengths=jnp.full(batch, end, jnp.int32) if case.hidden == "lengths" else None,
        mask=jnp.asarray(column < end)[None, None, None] if case.hidden == "mask" else None,
        record_ids=None if ids is None else batched(ids, "int32"),
    )


def _signs(count: int) -> np.ndarray:
    """Opposite directions for neighbouring heads and layers: noise they share cancels."""
    return 1.0 - 2.0 * (np.arange(count) % 2)


class _Shape(NamedTuple):
    """Of one call: elements of the batch, query rows, how many of these are not scored."""

    batch: int
    rows: int
    first: int


def _shape(case: AttentionCase, samples: int) -> _Shape:
    """Many samples in one call: groups of rows, and elements of the batch."""
    per_sample = 2 if case.twin == "batch" else 1
    groups = min(_ROWS // case.rows, -(-samples * per_sample // 2))
    first = _CANARY if case.is_causal else 0
    if case.twin == "row":
        groups, first = _TWIN_ROWS, _CANARY - _TWIN_ROWS
    rows = first + (2 if case.twin == "row" else 1) * groups * case.rows
    logits = _LOGITS_GPU if jax.default_backend() == "gpu" else _LOGITS
    most = max(1, logits // (2 * rows * case.heads * _NUM_KEYS))
    return _Shape(2 * min(most, -(-samples * per_sample // (2 * groups))), rows, first)


def _attend(
    case: AttentionCase, mu: float, implementation: str | None, shape: _Shape, along: float
) -> Any:
    """The compiled call: a neighbour and a key to scores, as :func:`audit_attention` says."""
    query = jnp.ones((shape.batch, shape.rows, case.heads, DEPTH), jnp.dtype(case.dtype))
    privacy, chosen = case.privacy(mu), implementation  # a name that explain() allows
    signs = [jnp.asarray(sign, query.dtype) for sign in _signs(case.calls)]
    spec = _spec(case, mu)
    total, std = np.ones(shape.rows), spec.numerator_std
    if case.unit == "record":
        std = math.hypot(spec.numerator_std, along * spec.denominator_std)
        total = _others_seen(case, shape.rows)
    unit = jnp.asarray(total[shape.first :, None] / std, jnp.float32)
    head_sign = np.repeat(_signs(case.kv_heads), case.heads // case.kv_heads)
    sign = jnp.asarray(head_sign * _signs(case.calls)[:, None, None, None], jnp.float32)
    direction = jnp.asarray(_DIRECTION, jnp.float32)

    def attend(x: _Inputs, rng: Key[Array, ""]) -> Array:
        if case.calls == 1:
            out = dp_dot_product_attention(
                query,
                x.key,
                x.value,
                privacy=privacy,
                rng=rng,
                is_causal=case.is_causal,
                key_value_seq_lengths=x.lengths,
                mask=x.mask,
                record_ids=x.record_ids,
                implementation=chosen,  # type: ignore[arg-type]
            )
            return out[None]
        layer = attention_fn(privacy, implementation=chosen)  # type: ignore[arg-type]
        with noise_key(rng):
            return jnp.stack([layer(query, x.key, sign * x.value) for sign in signs])

    def scores(x: _Inputs, rng: Key[Array, ""]) -> Array:
        out = attend(x, rng)[:, :, shape.first :].astype(jnp.float32)
        score = (jnp.sum(out * direction, axis=-1) * sign - jnp.float32(along)) * unit
        if case.twin == "batch":
            score = (score[:, 0::2] - score[:, 1::2]) * jnp.float32(2**-0.5)
        if case.twin == "row":
            score = (score[:, :, _TWIN_ROWS:] - score[:, :, :_TWIN_ROWS]) * jnp.float32(2**-0.5)
        score = score.reshape(case.calls, -1, case.rows, case.heads)
        releases = case.calls * case.rows * case.heads
        return jnp.sum(score, axis=(0, 2, 3)) * jnp.float32(releases**-0.5)

    return jax.jit(scores)


def _spec(case: AttentionCase, mu: float) -> kernels.AttentionSpec:
    return case.privacy(mu).spec(
        scale=_SCALE, head_dim=DEPTH, num_keys=_NUM_KEYS, dtype=case.dtype,
        is_causal=case.is_causal,
    )  # fmt: skip


def audit_attention(
    case: AttentionCase,
    *,
    rng: Key[Array, ""] | keys.SecureKey,
    samples: int = 20_000,
    mu: float = 1.0,
    implementation: str | None = None,
    delta: float = 1e-5,
    confidence: float = 0.99,
) -> AuditResult:
    """Attacks one claim with the real op, and says whether it stands.

    Each sample is the whole release on one record: ``rows`` query rows of all ``heads`` in
    ``calls`` calls. The claim is what :func:`dpfa_jax.attention_event` charges for it.

    The statistic. Far from the floor, out − N/L moves by (ΔN − r ΔL)/L and has noise
    (σ_N g − r σ_L g′)/L, with r = N/L the others' value. For ``add_remove`` (ΔN, ΔL) is (C,
    1) and the best r is −C′²/C: a shift of 1/z standard deviations. For ``replace_one`` it is
    (2C, 0) and r = 0 does. Scores are in units of the noise that was meant.

    Args:
        case: what is claimed.
        rng: a noise key for this audit alone; its children make all noise.
        samples: how many of each neighbour, 20 or more.
        mu: the privacy level at which the case is audited.
        implementation: a name from :meth:`AttentionCase.implementations`, or None.
        delta: where ε is compared.
        confidence: of the lower bound.

    Raises:
        ValueError: for a number, key or implementation that is not allowed.

    Example:
        >>> case = attention_cases()[0]
        >>> audit_attention(case, rng=keys.SecureKey.generate(), samples=200).name
        'record, add_remove, one row'
    """
    check_audit(samples, mu)
    root = keys.take_key(rng)
    along, spec = 0.0, _spec(case, mu)
    if case.adjacency == "add_remove":
        along = -((spec.numerator_std / spec.denominator_std) ** 2) / CLIP
    shape = _shape(case, samples)
    attend = _attend(case, mu, implementation, shape, along)

    def scores(positive: bool) -> np.ndarray:
        inputs = _inputs(case, positive=positive, along=along, batch=shape.batch)
        if case.twin == "batch":
            twin = _inputs(case, positive=False, along=along, batch=shape.batch)
            pairs = zip(inputs[:2], twin[:2], strict=True)
            key, value = (x.at[1::2].set(y[1::2]) for x, y in pairs)
            inputs = inputs._replace(key=key, value=value)
        mine = jax.random.fold_in(root, int(positive))
        parts: list[Array] = []
        count = 0
        while count < samples:
            parts.append(attend(inputs, jax.random.fold_in(mine, len(parts))))
            count += parts[-1].size
        return np.concatenate([np.asarray(x, np.float64) for x in parts])[:samples]

    event = attention_event(case.privacy(mu), (1, case.rows, case.heads, DEPTH), case.calls)
    name = case.name if implementation is None else f"{case.name}, {implementation}"
    return judge(
        name,
        event,
        case.adjacency,
        scores(False),
        scores(True),
        delta=delta,
        confidence=confidence,
        is_tight=not (case.poison or case.twin),
    )


def _others_seen(case: AttentionCase, num_rows: int) -> np.ndarray:
    """How many of the other records each row sees, all of weight one."""
    counts = np.where(_FEW, 1.0, 0.0) if _has_few(case) else np.ones(_NUM_KEYS)
    counts[_places(case)] = 1.0 if case.adjacency == "replace_one" else 0.0
    if case.rows_per_record > 1 and case.adjacency == "replace_one":
        counts[_places(case)[case.rows_per_record :]] = 0.0
    if case.hidden:
        counts[-_HIDDEN:] = 0.0
    seen = np.cumsum(counts)
    last = np.arange(num_rows) if case.is_causal else np.full(num_rows, _NUM_KEYS - 1)
    return seen[np.minimum(last, _NUM_KEYS - 1)]
