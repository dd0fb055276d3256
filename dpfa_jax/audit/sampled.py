"""An attack on DP-SGD with Poisson sampling: the claim that sampling amplifies privacy.

White box. A canary of gradient C joins each batch as :class:`dpfa_jax.PoissonSampler` says; the
others' gradients are orthogonal to it. The attacker sees each step's noisy mean and scores a
run by its likelihood ratio, the best score there is (J. Neyman and E. Pearson, 1933):

    Σ_t log(1 − q + q exp(s r_t − s²/2)),    s = 1/z for add_remove, 1/(2z) for replace_one

with r_t the mean along the canary, in deviations of the noise. Under replace_one the canary of
neighbour 0 points the other way, and its ratio, with −r_t, is subtracted.
"""

import dataclasses
from typing import Any, Literal

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dpfa_jax import clipping, keys
from dpfa_jax.audit import training
from dpfa_jax.audit.bounds import check_audit
from dpfa_jax.audit.curves import MakeEvent
from dpfa_jax.audit.result import AuditResult, judge
from dpfa_jax.sampling import PoissonSampler

_ORTHOGONAL = np.array([0.5, 0.5, 0.5, -0.5])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledCase:
    """One claim about sampled training that :func:`audit_sampled` attacks.

    Attributes:
        name: for reports.
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        sampling_probability: q.
        noise_multiplier: z of one step.
        steps: of one run.
    """

    name: str
    adjacency: Literal["add_remove", "replace_one"]
    sampling_probability: float
    noise_multiplier: float
    steps: int


def sampled_cases() -> tuple[SampledCase, ...]:
    """The claims that ``dpfa audit`` attacks.

    Example:
        >>> len({case.name for case in sampled_cases()}) == len(sampled_cases())
        True
    """
    return tuple(
        SampledCase(
            name=f"sampled training, {adjacency}, q = {q}, z = {z}, {steps} steps",
            adjacency=adjacency,
            sampling_probability=q,
            noise_multiplier=z,
            steps=steps,
        )
        for adjacency in ("add_remove", "replace_one")
        # Little noise: who never joins is safe by that alone. More: many smaller losses.
        for q, z, steps in (
            ((0.25, 0.5, 4), (0.5, 1.0, 8))
            if adjacency == "add_remove"
            else ((0.25, 0.25, 4), (0.5, 0.5, 8))
        )
    )


def _releases(case: SampledCase, engine: str) -> Any:
    """The compiled attack: noise keys and memberships to the releases along the canary."""
    grad = clipping.clipped_grad(
        training._loss(False),
        l2_clip_norm=training.CLIP,
        engine=engine,  # type: ignore[arg-type]
        batch_argnums=(1, 2),
    )
    kernel, bias, norm = training._canary(False, engine)
    size = 1 + training.OTHERS
    x = jnp.asarray(np.broadcast_to(training._INPUT, (size, 2, 3)), jnp.float32)
    targets = np.tile(_ORTHOGONAL, (size, 2, 1)) * 5.0
    targets[0] = training._OUTPUT * 60.0
    targets = targets * training.CLIP / norm

    def run(rng: Key[Array, ""], joins: Array, sign: Array) -> Array:
        chain = training.TrainingCase(name="", adjacency=case.adjacency)
        tx, std = training._chain(chain, case.noise_multiplier, rng)
        params = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}
        state = tx.init(params)
        t = jnp.asarray(targets, jnp.float32).at[0].multiply(sign)

        def step(state: Any, joined: Array) -> tuple[Any, Array]:
            padding = jnp.zeros(size, jnp.bool_).at[0].set(~joined)
            total = grad(params, x, t, is_padding_example=padding)
            updates, state = tx.update(total, state, params)
            along = jnp.sum(updates["kernel"] * jnp.asarray(kernel, jnp.float32))
            along = along + jnp.sum(updates["bias"] * jnp.asarray(bias, jnp.float32))
            return state, -along / std  # SGD with a rate of one steps against the mean

        return jax.lax.scan(step, state, joins)[1]

    return jax.jit(jax.vmap(run, in_axes=(0, 0, None)))


def _memberships(
    case: SampledCase, population: int, rng: Key[Array, ""]
) -> tuple[np.ndarray, PoissonSampler]:
    """bool[population, steps]. Each record of the population is the canary of one run."""
    q = case.sampling_probability
    sampler = PoissonSampler(population, q, population, rng)
    joins = np.zeros((population, case.steps), np.bool_)
    for step in range(case.steps):
        batch = sampler.sample(step)
        joins[batch.indices[~batch.is_padding_example], step] = True
    return joins, sampler


def _score(case: SampledCase, r: Float[np.ndarray, "n t"]) -> Float[np.ndarray, "n"]:
    q = case.sampling_probability
    s = 1.0 / case.noise_multiplier / (2 if case.adjacency == "replace_one" else 1)

    score = likelihood_ratio(r, q, s)
    if case.adjacency == "replace_one":
        score = score - likelihood_ratio(-r, q, s)
    return score.sum(axis=1)


def likelihood_ratio(x: np.ndarray, q: float, shift: float) -> np.ndarray:
    """log(dP/dQ) at x, P a unit normal moved by ``shift`` with probability q, Q one at rest."""
    if q == 1.0:
        return shift * x - shift * shift / 2
    return np.logaddexp(np.log1p(-q), np.log(q) + shift * x - shift * shift / 2)


def audit_sampled(
    case: SampledCase,
    *,
    rng: Key[Array, ""] | keys.SecureKey,
    engine: str = "auto",
    samples: int = 20_000,
    make_event: MakeEvent | None = None,
    delta: float = 1e-5,
    confidence: float = 0.99,
) -> AuditResult:
    """Attacks one claim about sampled training, and says whether it stands.

    Each sample is one run of ``steps`` steps: Poisson sampling, ``clipped_grad``,
    ``add_noise``, SGD. The claim is what the sampler's own event costs.

    Args:
        case: what is claimed.
        rng: a noise key for this audit alone; its children make all noise and all batches.
        engine: of ``clipped_grad``.
        samples: how many runs of each neighbour, 20 or more.
        make_event: what a run with a given noise multiplier claims; then the verdict is on
            "broken" alone. None: ``steps`` times the sampler's own event.
        delta: where ε is compared.
        confidence: of the lower bound.

    Raises:
        ValueError: for a number, key or engine that is not allowed.

    Example:
        >>> case = sampled_cases()[0]
        >>> audit_sampled(case, rng=keys.SecureKey.generate(), samples=200).samples
        200
    """
    check_audit(samples, 1.0)
    root = keys.take_key(rng)
    releases = _releases(case, engine)
    calls = -(-samples // training._RUNS)
    runs = -(-samples // calls)

    def scores(positive: bool) -> tuple[np.ndarray, PoissonSampler]:
        noise, sampling = jax.random.split(jax.random.fold_in(root, int(positive)))
        joins, sampler = _memberships(case, calls * runs, sampling)
        if not positive and case.adjacency == "add_remove":
            joins[:] = False
        sign = jnp.float32(1.0 if positive else -1.0)
        parts = [
            releases(
                jax.random.split(jax.random.fold_in(noise, i), runs),
                jnp.asarray(joins[i * runs : (i + 1) * runs]),
                sign,
            )
            for i in range(calls)
        ]
        r = np.concatenate([np.asarray(x, np.float64) for x in parts])[:samples]
        return _score(case, r), sampler

    negatives, _ = scores(False)
    positives, sampler = scores(True)

    def plain(z: float) -> dp_accounting.DpEvent:
        return dp_accounting.SelfComposedDpEvent(sampler.event(z), case.steps)

    family = make_event or plain
    return judge(
        f"{case.name}, {engine}",
        family(case.noise_multiplier),
        case.adjacency,
        negatives,
        positives,
        delta=delta,
        confidence=confidence,
        make_event=family,
        is_tight=make_event is None,
    )
