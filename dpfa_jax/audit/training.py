"""Attacks on DP-SGD: a gradient canary through ``clipped_grad``, ``add_noise`` and an optimiser.

White box: the attacker chose every example, sees the parameters and the optimiser's moments
after each step, and wants to know whether the canary took part. All others pull against the
canary, and the padding holds copies of it: a clip of the batch, a mean over the actual batch
or padding that counts would show it better than the claim allows.
"""

import dataclasses
import math
import typing
from typing import Any, Literal

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from dpfa_jax import clipping, keys, optim
from dpfa_jax.audit.bounds import check_audit
from dpfa_jax.audit.result import AuditResult, judge

CLIP, EXPECTED, OTHERS, PADDING = 0.5, 7.0, 6, 2
_LEARNING_RATE, _B1 = 1.0, 0.9
# The canary's gradient, and that of the others, in units of the clip norm.
_CANARY_SIZE, _OTHERS_SIZE = 60.0, 5.0
_INPUT = np.array([-0.6, 0.0, 0.8])
_OUTPUT = np.array([0.5, -0.5, 0.5, 0.5])
_POSITIONS = 2
# Training runs in one call; a GPU's kernels write 5120 numbers of noise for each leaf of each.
_RUNS = 1 << 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """One claim about training that :func:`audit_training` attacks.

    Attributes:
        name: for reports.
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        steps: of one run; the canary's sign changes at each.
        optimizer: what follows the noise.
        is_tied: whether the loss uses its kernel twice.
        has_nan: whether one more example's gradient is NaN.
    """

    name: str
    adjacency: Literal["add_remove", "replace_one"]
    steps: int = 1
    optimizer: Literal["sgd", "dp_adamw"] = "sgd"
    is_tied: bool = False
    has_nan: bool = False


def training_cases() -> tuple[TrainingCase, ...]:
    """The claims that ``dpfa audit`` attacks, for each engine.

    Example:
        >>> len({case.name for case in training_cases()}) == len(training_cases())
        True
    """
    cases = []
    for adjacency in ("add_remove", "replace_one"):
        for name, options in (
            ("one step", {}),
            ("two steps", {"steps": 2}),
            ("four steps of DP AdamW", {"steps": 4, "optimizer": "dp_adamw"}),
            ("a kernel used twice", {"is_tied": True}),
            ("a NaN example", {"has_nan": True}),
        ):
            full = f"training, {adjacency}, {name}"
            cases.append(TrainingCase(name=full, adjacency=adjacency, **options))
    return tuple(cases)


def engines() -> tuple[str, ...]:
    """The engines that :func:`dpfa_jax.clipped_grad` names, ``'auto'`` left out.

    Example:
        >>> "vmap" in engines()
        True
    """
    names = typing.get_args(typing.get_type_hints(clipping.clipped_grad)["engine"])
    return tuple(name for name in names if name != "auto")


def _loss(is_tied: bool) -> Any:
    def loss(params: PyTree, x: Float[Array, "p i"], t: Float[Array, "p o"]) -> Float[Array, ""]:
        """Linear in the parameters: an example's gradient is (Σ_p x⊗t, Σ_p t), twice if tied."""
        out = jnp.sum((x @ params["kernel"] + params["bias"]) * t)
        return out + jnp.sum((x @ params["kernel"]) * t) if is_tied else out

    return loss


def _canary(is_tied: bool, engine: str) -> tuple[np.ndarray, np.ndarray, float]:
    """The clipped gradient's direction in kernel and bias; the whole norm for targets of norm 1.

    An attacker looks along what the clip leaves: a clip of each leaf turns a gradient.
    """
    kernel = _POSITIONS * np.outer(_INPUT, _OUTPUT) * (2.0 if is_tied else 1.0)
    bias = _POSITIONS * _OUTPUT
    norms = np.array([np.linalg.norm(kernel), np.linalg.norm(bias)])
    size = float(np.linalg.norm(norms))
    scales = norms * math.sqrt(2) if engine == "per_layer" else (size, size)
    return kernel / scales[0], bias / scales[1], size


def _batch(case: TrainingCase, *, positive: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets for a step of sign +1, and which slots are padding."""
    _, _, norm = _canary(case.is_tied, "vmap")
    size = 1 + OTHERS + PADDING + int(case.has_nan)
    along = np.zeros(size)
    along[1 : 1 + OTHERS] = -_OTHERS_SIZE
    if positive:
        along[0] = _CANARY_SIZE
        along[1 + OTHERS : 1 + OTHERS + PADDING] = _CANARY_SIZE
    elif case.adjacency == "replace_one":
        along[0] = -_CANARY_SIZE
    if case.has_nan:
        along[-1] = np.nan
    is_padding = np.zeros(size, np.bool_)
    is_padding[1 + OTHERS : 1 + OTHERS + PADDING] = True
    is_padding[0] = not positive and case.adjacency == "add_remove"
    x = np.broadcast_to(_INPUT, (size, _POSITIONS, _INPUT.size))
    t = (along * CLIP / norm)[:, None, None] * np.broadcast_to(
        _OUTPUT, (size, _POSITIONS, _OUTPUT.size)
    )
    return x.astype(np.float32), t.astype(np.float32), is_padding


def _chain(
    case: TrainingCase, z: float, rng: Key[Array, ""]
) -> tuple[optax.GradientTransformation, float]:
    """The user's optimiser, and the standard deviation of a released coordinate."""
    std = optim.noise_std(CLIP, z, EXPECTED, case.adjacency)
    noise = optim.add_noise(CLIP, z, EXPECTED, rng, adjacency=case.adjacency)
    if case.optimizer == "sgd":
        return optax.chain(noise, optax.sgd(_LEARNING_RATE)), std
    return optax.chain(noise, optim.dp_adamw(0.1, std, b1=_B1)), std


def _train(case: TrainingCase, z: float, engine: str) -> Any:
    """The compiled attack: a batch and a key for each run to the scores of the runs."""
    grad = clipping.clipped_grad(
        _loss(case.is_tied),
        l2_clip_norm=CLIP,
        engine=engine,  # type: ignore[arg-type]
        batch_argnums=(1, 2),
    )
    kernel, bias, _ = _canary(case.is_tied, engine)

    def project(tree: PyTree) -> Array:
        k, b = jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32)
        return jnp.sum(tree["kernel"] * k) + jnp.sum(tree["bias"] * b)

    def run(rng: Key[Array, ""], x: Array, t: Array, is_padding: Array) -> Array:
        tx, std = _chain(case, z, rng)
        params = {
            "kernel": jnp.zeros((_INPUT.size, _OUTPUT.size)),
            "bias": jnp.zeros(_OUTPUT.size),
        }
        state = tx.init(params)
        score = jnp.float32(0.0)
        moment = jnp.float32(0.0)
        for step in range(case.steps):
            sign = jnp.float32(1 - 2 * (step % 2))
            total = grad(params, x, sign * t, is_padding_example=is_padding)
            before = params
            updates, state = tx.update(total, state, params)
            params = optax.apply_updates(params, updates)
            if case.optimizer == "sgd":
                released = (project(before) - project(params)) / _LEARNING_RATE
            else:  # the first moment is a decaying mean of what was released
                after = project(optax.tree_utils.tree_get(state, "mu"))
                released = (after - _B1 * moment) / (1 - _B1)
                moment = after
            score = score + sign * released / std
        return score / math.sqrt(case.steps)

    return jax.jit(jax.vmap(run, in_axes=(0, None, None, None)))


def audit_training(
    case: TrainingCase,
    *,
    rng: Key[Array, ""] | keys.SecureKey,
    engine: str = "vmap",
    samples: int = 20_000,
    mu: float = 1.0,
    delta: float = 1e-5,
    confidence: float = 0.99,
) -> AuditResult:
    """Attacks one claim with whole training runs, and says whether it stands.

    Each sample is one run: ``steps`` steps of ``clipped_grad``, ``add_noise`` and the
    optimiser, under a noise key of its own. Every example is in every batch (no
    sampling), so the claim is ``steps`` Gaussian releases, which the attack can reach.

    Args:
        case: what is claimed.
        rng: a noise key for this audit alone; its children make all noise.
        engine: one of :func:`engines`.
        samples: how many runs of each neighbour, 20 or more.
        mu: the privacy level at which the case is audited.
        delta: where ε is compared.
        confidence: of the lower bound.

    Raises:
        ValueError: for a number, key or engine that is not allowed, and where the engine
            refuses the loss.

    Example:
        >>> case = training_cases()[0]
        >>> audit_training(case, rng=keys.SecureKey.generate(), samples=200).name
        'training, add_remove, one step, vmap'
    """
    check_audit(samples, mu)
    z = math.sqrt(case.steps) / mu
    train = _train(case, z, engine)
    root = keys.take_key(rng)
    calls = -(-samples // _RUNS)
    runs = -(-samples // calls)

    def scores(positive: bool) -> np.ndarray:
        mine = jax.random.fold_in(root, int(positive))
        batch = tuple(jnp.asarray(x) for x in _batch(case, positive=positive))
        parts = []
        for i in range(calls):
            each = jax.random.split(jax.random.fold_in(mine, i), runs)
            parts.append(train(each, *batch))
        return np.concatenate([np.asarray(x, np.float64) for x in parts])[:samples]

    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(z), case.steps)
    return judge(
        f"{case.name}, {engine}",
        event,
        case.adjacency,
        scores(False),
        scores(True),
        delta=delta,
        confidence=confidence,
    )
