"""Every attack on what one configuration claims: ``dpfa audit CONFIG``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import dp_accounting

from dpfa_jax import keys
from dpfa_jax.accounting import calibrate_noise_multiplier
from dpfa_jax.audit import chat
from dpfa_jax.audit.sampled import SampledCase, audit_sampled
from dpfa_jax.audit.suite import Audit, Finding, find
from dpfa_jax.train import loop
from dpfa_jax.train.config import Config


class ConfigAudit(NamedTuple):
    """What :func:`audit_config` found.

    Attributes:
        finding: the attack on the chain with the configuration's sampling, noise and steps.
        chat: the attack on the trained model, or None.
        noise_multiplier: z of one step.
    """

    finding: Finding
    chat: chat.ChatAudit | None
    noise_multiplier: float

    def to_json(self) -> dict[str, Any]:
        """Everything but the scores of the first attack."""
        found = self.chat
        if found is None:
            return {"noise_multiplier": self.noise_multiplier, "one_run": None, "secrets": None}
        return {
            "noise_multiplier": self.noise_multiplier,
            "one_run": {
                "passed": found.passed,
                "epsilon_claimed": found.claim,
                "delta": found.delta,
                "adjacency": found.adjacency,
                "confidence": found.confidence,
                "guesses": found.guesses._asdict(),
                "epsilon_lower_bound": found.epsilon,
                "epsilon_lower_bound_gaussian": found.epsilon_gaussian,
                "epsilon_lower_bound_steinke": found.epsilon_steinke,
                "scores_joined": [round(float(x), 4) for x in found.joined],
                "scores_absent": [round(float(x), 4) for x in found.absent],
                "seconds": round(found.seconds, 1),
            },
            "validation_loss": found.losses[0],
            "nonprivate_validation_loss": found.losses[1],
            "secrets": [s._asdict() for s in found.secrets],
        }


def audit_config(
    config: Config,
    *,
    samples: int = 20_000,
    confidence: float = 0.99,
    canaries: int | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> ConfigAudit:
    """Attacks the claim of one configuration.

    First the real sampler, clipping, noise and optimiser, with the configuration's sampling
    probability, noise multiplier and steps, on examples of the attack's own: this reads no
    private data. Then, where the configuration releases a comparison without privacy, the model
    trained on the data (:func:`dpfa_jax.audit.chat.audit_chat`).

    Args:
        config: a checked configuration.
        samples: runs of each neighbour in the first attack, 20 or more.
        confidence: of its lower bound.
        canaries: of the second; None: :data:`dpfa_jax.audit.chat.CANARIES`.
        announce: called with a line of text now and then.

    Raises:
        ValueError: for a number that is not allowed.
    """
    steps = config.training.steps

    def make_event(z: float) -> dp_accounting.DpEvent:
        return dp_accounting.SelfComposedDpEvent(loop.step_event(config, z), steps)

    privacy = config.privacy
    z = calibrate_noise_multiplier(
        make_event, epsilon=privacy.epsilon, delta=privacy.delta, adjacency=privacy.adjacency
    )
    case = SampledCase(
        name=f"{config.name}: q = {config.sampling_probability:.4g}, z = {z:.4g}, {steps} steps",
        adjacency=privacy.adjacency,  # type: ignore[arg-type]
        sampling_probability=config.sampling_probability,
        noise_multiplier=z,
        steps=steps,
    )
    finding = find(
        Audit(
            case.name,
            lambda: audit_sampled(
                case,
                rng=keys.SecureKey.generate(),
                samples=samples,
                make_event=make_event,
                delta=privacy.delta,
                confidence=confidence,
            ),
        )
    )
    found = None
    if config.report.release_nonprivate_comparison:
        key = keys.SecureKey.generate()
        count = chat.CANARIES if canaries is None else canaries
        found = chat.audit_chat(config, rng=key, canaries=count, announce=announce)
    return ConfigAudit(finding, found, z)
