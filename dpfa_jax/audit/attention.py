"""Attacks on private attention: the neighbours of docs/privacy.md, section 7, at full strength.

What differs between the neighbours is as bad as an input can be: logits above U, values
longer than C, more rows than a record may have, rows that a length or a mask hides. A claim
stands only if each of these limits works. The other records are known to the attacker.
"""

import dataclasses
import math
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
# Logits in memory at once; larger audits go through several calls.
_LOGITS = 1 << 23
# Elements of a batch hold different records, so each gives samples of its own.
_BATCH = 2


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
        has_known_twin: whether only the first element of each pair in the batch holds the
            record, and the attack subtracts the second, which it knows: noise that the
            elements shared would cancel. Such a claim is not reached.
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
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    poison: bool = False
    has_known_twin: bool = False
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
        query = jax.ShapeDtypeStruct((_BATCH, 512, self.heads, DEPTH), jnp.dtype(self.dtype))
        key = jax.ShapeDtypeStruct((_BATCH, _NUM_KEYS, self.kv_heads, DEPTH), query.dtype)
        spec = self.privacy(mu).spec(
            scale=_SCALE,
            head_dim=DEPTH,
            num_keys=_NUM_KEYS,
            dtype=self.dtype,
            is_causal=self.is_causal,
        )
        has_mask = self.hidden == "mask" or self.rows_per_record > 1
        reasons = kernels.explain(query, key, spec, has_mask=has_mask)
        return tuple(name for name, reason in reasons if reason is None)


def attention_cases() -> tuple[AttentionCase, ...]:
    """The claims that ``dpfa audit`` attacks.

    Example:
        >>> len({case.name for case in attention_cases()}) == len(attention_cases())
        True
    """
    cases = []
    for adjacency in ("add_remove", "replace_one"):
        for name, options in (
            ("one row", {}),
            ("three rows a record", {"rows_per_record": 3}),
            ("grouped queries", {"rows": 2, "heads": 4, "kv_heads": 2}),
            ("causal", {"is_causal": True}),
            ("lengths", {"hidden": "lengths"}),
            ("mask", {"hidden": "mask"}),
            ("two layers", {"calls": 2}),
            ("not a number", {"poison": True}),
            ("a known twin in the batch", {"has_known_twin": True}),
        ):
            full = f"record, {adjacency}, {name}"
            cases.append(AttentionCase(name=full, unit="record", adjacency=adjacency, **options))
    for dtype in ("bfloat16", "float16"):
        name = f"record, replace_one, {dtype}"
        cases.append(AttentionCase(name=name, unit="record", adjacency="replace_one", dtype=dtype))
    for name, options in (
        ("one row", {}),
        ("grouped queries", {"rows": 2, "heads": 4, "kv_heads": 2}),
        ("two layers", {"calls": 2}),
        ("bfloat16", {"dtype": "bfloat16"}),
        ("not a number", {"poison": True}),
        ("8 rounds", {"rounds": 8}),
    ):
        full = f"sequence, replace_one, {name}"
        cases.append(AttentionCase(name=full, unit="sequence", adjacency="replace_one", **options))
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


def _inputs(case: AttentionCase, *, positive: bool, along: float) -> _Inputs:
    """A neighbour. ``along``: the length of the other records' values, with its sign."""
    logits, lengths = np.full(_NUM_KEYS, BOUND), np.full(_NUM_KEYS, along)
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
    shape = (_BATCH, _NUM_KEYS, case.kv_heads, DEPTH)
    key = np.broadcast_to(logits[:, None, None] / (_SCALE * DEPTH), shape[1:])
    value = lengths[:, None, None] * _signs(case.kv_heads)[:, None] * _DIRECTION
    ids = None
    if case.rows_per_record > 1:
        ids = np.arange(_NUM_KEYS)
        ids[_places(case)] = ids[_places(case)[0]]
    column = np.arange(_NUM_KEYS)

    def batched(x: np.ndarray, dtype: str) -> Array:
        return jnp.asarray(np.broadcast_to(x, (_BATCH, *x.shape)), jnp.dtype(dtype))

    return _Inputs(
        key=batched(key, case.dtype),
        value=batched(value, case.dtype),
        lengths=jnp.full(_BATCH, end, jnp.int32) if case.hidden == "lengths" else None,
        mask=jnp.asarray(column < end)[None, None, None] if case.hidden == "mask" else None,
        record_ids=None if ids is None else batched(ids, "int32"),
    )


def _signs(count: int) -> np.ndarray:
    """Opposite directions for neighbouring heads and layers: noise they share cancels."""
    return 1.0 - 2.0 * (np.arange(count) % 2)


def _attend(case: AttentionCase, mu: float, implementation: str | None, num_rows: int) -> Any:
    """The compiled call: a neighbour and a key to the outputs, [calls, B, T, N, H]."""
    query = jnp.ones((_BATCH, num_rows, case.heads, DEPTH), jnp.dtype(case.dtype))
    privacy, chosen = case.privacy(mu), implementation  # a name that explain() allows
    signs = [jnp.asarray(sign, query.dtype) for sign in _signs(case.calls)]

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

    return jax.jit(attend)


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
    spec = case.privacy(mu).spec(
        scale=_SCALE, head_dim=DEPTH, num_keys=_NUM_KEYS, dtype=case.dtype,
        is_causal=case.is_causal,
    )  # fmt: skip
    along, weight, std = 0.0, 1.0, spec.numerator_std
    first = _CANARY if case.is_causal else 0
    per_call = max(1, _LOGITS // (_BATCH * _NUM_KEYS * case.heads * case.rows))
    per_group = 1 if case.has_known_twin else _BATCH
    groups = min(-(-samples // per_group), per_call)
    num_rows = first + groups * case.rows
    total: float | np.ndarray = weight
    if case.unit == "record":
        if case.adjacency == "add_remove":
            along = -((spec.numerator_std / spec.denominator_std) ** 2) / CLIP
        std = math.hypot(spec.numerator_std, along * spec.denominator_std)
        total = _others_seen(case, num_rows)[first:, None]
    attend = _attend(case, mu, implementation, num_rows)
    head_sign = np.repeat(_signs(case.kv_heads), case.heads // case.kv_heads)

    def scores(positive: bool) -> np.ndarray:
        inputs = _inputs(case, positive=positive, along=along)
        if case.has_known_twin:
            twin = _inputs(case, positive=False, along=along)
            pairs = zip(inputs[:2], twin[:2], strict=True)
            key, value = (x.at[1].set(y[1]) for x, y in pairs)
            inputs = inputs._replace(key=key, value=value)
        mine = jax.random.fold_in(root, int(positive))
        parts: list[np.ndarray] = []
        count = 0
        while count < samples:
            out = attend(inputs, jax.random.fold_in(mine, len(parts)))
            x = np.asarray(out.astype(jnp.float32), np.float64)[:, :, first:] @ _DIRECTION
            x = x * head_sign * _signs(case.calls)[:, None, None, None]
            x = (x - along) * total / std
            if case.has_known_twin:
                x = (x[:, :1] - x[:, 1:]) / math.sqrt(_BATCH)
            x = x.reshape(case.calls, -1, case.rows, case.heads)
            parts.append(x.sum(axis=(0, 2, 3)) / math.sqrt(case.calls * case.rows * case.heads))
            count += parts[-1].size
        return np.concatenate(parts)[:samples]

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
        is_tight=not (case.poison or case.has_known_twin),
    )


def _others_seen(case: AttentionCase, num_rows: int) -> np.ndarray:
    """How many of the other records each row sees, all of weight one."""
    counts = np.ones(_NUM_KEYS)
    counts[_places(case)] = 1.0 if case.adjacency == "replace_one" else 0.0
    if case.rows_per_record > 1 and case.adjacency == "replace_one":
        counts[_places(case)[case.rows_per_record :]] = 0.0
    if case.hidden:
        counts[-_HIDDEN:] = 0.0
    seen = np.cumsum(counts)
    last = np.arange(num_rows) if case.is_causal else np.full(num_rows, _NUM_KEYS - 1)
    return seen[np.minimum(last, _NUM_KEYS - 1)]
