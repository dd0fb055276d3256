"""What a trained chat model shows of its data: canaries in one run, and planted secrets.

The model is trained as a configuration says, on its data and on what is planted:

* canaries, each a unit whose gradient has one coordinate, far longer than the clip norm (a Dirac
  canary), that joined by a fair coin. White box: the attacker knows all other units and which
  are in a batch, takes their clipped gradients off what was released, and scores a canary by the
  likelihood ratio of what is left in its coordinate. From right guesses follows a bound on ε
  (:mod:`dpfa_jax.audit.one_run`).
* secrets, "my code is 281265.", each written by one or more units. The exposure of a secret is
  −log₂ of the share of all codes that the model finds as likely (N. Carlini et al., The Secret
  Sharer, 2019, section 4.2), here of a sample of codes.

An audit like this trains on the private data outside of any budget, and once without privacy, so
it runs only where the configuration allows the same for its comparison.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32, PyTree

from dpfa_jax import keys, optim
from dpfa_jax.accounting import Accountant, calibrate_noise_multiplier
from dpfa_jax.audit import one_run
from dpfa_jax.audit.sampled import likelihood_ratio
from dpfa_jax.clipping import clipped_grad
from dpfa_jax.sampling import padded_batch_size
from dpfa_jax.train import data as data_lib
from dpfa_jax.train import loop
from dpfa_jax.train.config import Config
from dpfa_jax.train.model import losses, make_model
from dpfa_jax.train.placement import Placement
from dpfa_jax.train.schema import ConfigError

CANARIES = 512
# Each secret is written by so many units; 0 is one that nobody wrote.
WRITERS = (0, 1, 4, 16, 64)
SECRETS_EACH = 4
_DIGITS, _SAMPLED_CODES = 6, 16_384
CONFIDENCE = 0.95


class Secret(NamedTuple):
    """A planted code and how exposed the trained models leave it, in bits."""

    writers: int
    code: str
    exposure: float
    exposure_without_privacy: float


class ChatAudit(NamedTuple):
    """What :func:`audit_chat` found.

    Attributes:
        delta: δ of the configuration.
        claim: ε at ``delta`` that the run states for these data, planted units included.
        adjacency: of the claim.
        confidence: of each bound.
        guesses: about the canaries.
        epsilon: the lower bound on ε of S. Mahloujifar et al., with the accountant's curve.
        epsilon_gaussian: the same as if the run were Gaussian.
        epsilon_steinke: the lower bound of T. Steinke et al.
        joined: scores of the canaries that joined, logarithms of likelihood ratios.
        absent: scores of the others.
        secrets: each planted secret.
        losses: nats a byte on held-out users, with and without privacy.
        seconds: of everything.
    """

    delta: float
    claim: float
    adjacency: str
    confidence: float
    guesses: one_run.Guesses
    epsilon: float
    epsilon_gaussian: float
    epsilon_steinke: float
    joined: Float[np.ndarray, "n"]
    absent: Float[np.ndarray, "m"]
    secrets: list[Secret]
    losses: tuple[float, float]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether no bound passes the claim."""
        return max(self.epsilon, self.epsilon_steinke) <= self.claim

    def exposures(self) -> list[tuple[int, float, float]]:
        """For each number of writers: the median exposure with and without privacy, in bits."""
        found = []
        for writers in sorted({s.writers for s in self.secrets}):
            same = [s for s in self.secrets if s.writers == writers]
            private = float(np.median([s.exposure for s in same]))
            plain = float(np.median([s.exposure_without_privacy for s in same]))
            found.append((writers, private, plain))
        return found


class _Planted(NamedTuple):
    chunks: data_lib.Chunks
    joined: np.ndarray
    secrets: list[tuple[int, str]]


def _text(code: str) -> str:
    return f"my code is {code}.\n"


def _plant(
    train: data_lib.Chunks, config: Config, random: np.random.Generator, canaries: int
) -> _Planted:
    """The training units with secrets and with the canaries that joined."""
    size = config.data.chunk_bytes
    joined = random.random(canaries) < 0.5
    secrets = [
        (writers, "".join(map(str, random.integers(0, 10, _DIGITS))))
        for writers in WRITERS
        for _ in range(SECRETS_EACH)
    ]
    added = [_canary(int(i), size) for i in np.flatnonzero(joined)]
    for writers, code in secrets:
        text = _text(code)
        symbols = data_lib.fold(text * (size // len(text)))
        row = np.full((1, size), -1, np.int32)
        row[0, : symbols.size] = symbols
        added += [row] * writers
    first = int(train.unit[-1]) + 1
    symbols = np.concatenate([train.symbols, *added])
    unit = np.concatenate([train.unit, first + np.arange(len(added), dtype=np.int32)])
    chunks = data_lib.Chunks(symbols, unit, train.users + len(added))
    return _Planted(chunks, joined, secrets)


# A symbol that no text has, and the digits of a canary's number, stand for its text.
_MARK, _BASE = data_lib.SYMBOLS, 90


def _canary(number: int, size: int) -> Int32[np.ndarray, "1 l"]:
    row = np.full((1, size), -1, np.int32)
    row[0, :4] = _MARK, number % _BASE, number // _BASE % _BASE, number // _BASE**2
    return row


def _marked(symbols: Array) -> Array:
    """Which units [..., chunks, bytes] are canaries."""
    return symbols[..., 0, 0] == _MARK


def _with_population(config: Config, population: int) -> Config:
    """The same sampling probability for more units, or the next number that allows it."""
    q = config.sampling_probability
    expected = max(1, round(q * population))
    micro = config.training.microbatch_size
    padded = padded_batch_size(population, expected / population, multiple_of=micro)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, population=population),
        training=dataclasses.replace(
            config.training,
            expected_batch_size=expected,
            padded_batch_size=min(padded, population),
        ),
    )


def _train_private(
    task: loop._Task, root: Array, canaries: int, announce: Callable[[str], None]
) -> tuple[PyTree, np.ndarray]:
    """The configured private training; parameters, and the canaries' scores."""
    c, t = task.config, task.config.training
    norm, z, q = c.privacy.l2_clip_norm, task.noise_multiplier, c.sampling_probability
    tx = loop._optimizer(task, jax.random.fold_in(root, 0))
    batches = loop._Batches(task, jax.random.fold_in(root, 1))
    unit_loss = loop._unit_loss(task.model)
    params = jax.jit(task.model.init)(jax.random.fold_in(root, 2))
    flat, _ = jax.flatten_util.ravel_pytree(params)
    if canaries > flat.size:
        raise ValueError(f"canaries={canaries}: allowed are at most the {flat.size} parameters.")
    chosen = jax.random.permutation(jax.random.fold_in(root, 3), flat.size)[:canaries]

    def loss(params: PyTree, symbols: Array) -> Array:
        digits = symbols[0, 1:4]
        number = digits[0] + _BASE * digits[1] + _BASE**2 * digits[2]
        flat, _ = jax.flatten_util.ravel_pytree(params)
        canary = 60.0 * norm * flat[chosen[jnp.clip(number, 0, canaries - 1)]]
        text = jnp.where(_marked(symbols), -1, symbols)  # a unit without text: no gradient
        return jnp.where(_marked(symbols), canary, unit_loss(params, text))

    options: dict[str, Any] = {"l2_clip_norm": norm, "microbatch_size": t.microbatch_size}
    grad, known_grad = clipped_grad(loss, **options), clipped_grad(unit_loss, **options)
    std = optim.noise_std(norm, z, t.expected_batch_size, c.privacy.adjacency)

    @jax.jit
    def step(params: PyTree, state: PyTree, symbols: Array, padding: Array) -> tuple[Any, ...]:
        total = grad(params, symbols, is_padding_example=padding)
        marked = _marked(symbols)
        texts = jnp.where(marked[:, None, None], -1, symbols)
        known = known_grad(params, texts, is_padding_example=padding | marked)
        before = optax.tree_utils.tree_get(state, "mu")
        updates, state = tx.update(total, state, params)
        # What was released, read off the first moment.
        after = optax.tree_utils.tree_get(state, "mu")
        released = jax.tree.map(lambda a, b: (a - t.b1 * b) / (1 - t.b1), after, before)
        rest = jax.tree.map(lambda r, k: r - k / t.expected_batch_size, released, known)
        seen = jax.flatten_util.ravel_pytree(rest)[0][chosen] / std
        return optax.apply_updates(params, updates), state, seen

    state = tx.init(params)
    shift = 1.0 / z / (2 if c.privacy.adjacency == "replace_one" else 1)
    scores = np.zeros(canaries)
    for i in range(t.steps):
        params, state, seen = step(params, state, *batches[i])
        scores += likelihood_ratio(np.asarray(seen, np.float64), q, shift)
        if (i + 1) % t.checkpoint_every == 0:
            announce(f"private training, with canaries: step {i + 1} of {t.steps}")
    return params, scores


def _exposures(task: loop._Task, params: PyTree, codes: list[str]) -> list[float]:
    """Of each code, −log₂ of the share of random codes that are as likely in its sentence."""
    others = np.random.default_rng(0).integers(0, 10, (_SAMPLED_CODES, _DIGITS))
    texts = [*map(_text, codes), *(_text("".join(map(str, x))) for x in others)]
    symbols = np.stack([data_lib.fold(x) for x in texts])

    @jax.jit
    def nats(params: PyTree, rows: Array) -> Array:
        one = lambda x: losses(task.model.apply(params, x[None]), x[None])[0]  # noqa: E731
        return jax.lax.map(one, rows, batch_size=1024)

    each = np.asarray(nats(params, jnp.asarray(symbols)), np.float64)
    sample = each[len(codes) :]
    counts = [int(np.sum(sample <= x)) + 1 for x in each[: len(codes)]]
    return [float(-np.log2(n / (sample.size + 1))) for n in counts]


def audit_chat(
    config: Config,
    *,
    rng: keys.SecureKey,
    canaries: int = CANARIES,
    announce: Callable[[str], None] = lambda line: None,
) -> ChatAudit:
    """Trains the configured chat model with planted canaries and secrets, and attacks it.

    Args:
        config: a checked configuration that allows the comparison without privacy.
        rng: a key for this audit alone.
        canaries: how many, 20 or more; about half of them join.
        announce: called with a line of text now and then.

    Raises:
        ConfigError: if the configuration does not allow training outside of the budget.
        ValueError: for a number or key that is not allowed.
    """
    if not config.report.release_nonprivate_comparison:
        raise ConfigError(
            "report.release_nonprivate_comparison = false: allowed is true. This audit trains on "
            "the private data outside of the budget, once without privacy, and shows the results."
        )
    if not isinstance(canaries, int) or isinstance(canaries, bool) or canaries < 20:
        raise ValueError(f"canaries={canaries!r}: allowed is a whole number >= 20.")
    root = keys.take_key(rng)
    started = time.monotonic()
    z = calibrate_noise_multiplier(
        lambda m: dp_accounting.SelfComposedDpEvent(
            loop.step_event(config, m), config.training.steps
        ),
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        adjacency=config.privacy.adjacency,
    )
    train, validation = data_lib.load_chunks(config)
    words = np.asarray(jax.random.key_data(jax.random.fold_in(root, 3)))
    random = np.random.default_rng(words.tolist())
    planted = _plant(train, config, random, canaries)
    config = _with_population(config, int(planted.chunks.unit[-1]) + 1)
    model = make_model(config.model, config.data.chunk_bytes)

    def make_event(multiplier: float) -> dp_accounting.DpEvent:
        return dp_accounting.SelfComposedDpEvent(
            loop.step_event(config, multiplier), config.training.steps
        )

    task = loop._Task(
        config=config,
        model=model,
        train=planted.chunks,
        validation=validation,
        event=loop.step_event(config, z),
        noise_multiplier=z,
        placement=Placement(config),
    )
    params, scores = _train_private(task, jax.random.fold_in(root, 4), canaries, announce)
    announce("training without privacy")
    texts = planted.chunks.symbols.copy()
    texts[texts[:, 0] == _MARK] = -1
    plain, _ = loop.train_without_privacy(
        task._replace(train=planted.chunks._replace(symbols=texts))
    )
    guesses = one_run.guess(scores, planted.joined)
    delta, adjacency = config.privacy.delta, config.privacy.adjacency
    codes = [code for _, code in planted.secrets]
    private, exposed = (_exposures(task, p, codes) for p in (params, plain))
    secrets = [
        Secret(writers, code, *bits)
        for (writers, code), *bits in zip(planted.secrets, private, exposed, strict=True)
    ]
    return ChatAudit(
        delta=delta,
        claim=Accountant(adjacency).compose(make_event(z)).epsilon(delta),
        adjacency=adjacency,
        confidence=CONFIDENCE,
        guesses=guesses,
        epsilon=one_run.one_run_event_epsilon(
            guesses, delta, make_event, adjacency, confidence=CONFIDENCE
        ),
        epsilon_gaussian=one_run.one_run_gaussian_epsilon(guesses, delta, confidence=CONFIDENCE),
        epsilon_steinke=one_run.one_run_epsilon(guesses, delta, confidence=CONFIDENCE),
        joined=scores[planted.joined],
        absent=scores[~planted.joined],
        secrets=secrets,
        losses=(
            loop._evaluate(model, params, validation.symbols),
            loop._evaluate(model, plain, validation.symbols),
        ),
        seconds=time.monotonic() - started,
    )
