"""Policies: read from TOML, checked, copied into the ledger when a scope takes one.

No law sets ε or δ. The presets in ``configs/policies`` are editable starting points and no legal
advice; each file says so and gives its reasons.
"""

import dataclasses
import functools
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from dpfa_jax.mechanisms.gradient import ADJACENCIES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """One policy.

    Attributes:
        name: how refusals call it.
        epsilon: ceiling on ε of a scope.
        delta: ceiling on δ of a scope.
        adjacency: allowed adjacencies.
        unit: allowed units.
        audit_log_retention_days: how long the record is kept, at least.
        regions: where the data may be.
        breach_notice_hours: how soon a breach is reported.
    """

    name: str
    epsilon: float
    delta: float
    adjacency: tuple[str, ...]
    unit: tuple[str, ...]
    audit_log_retention_days: int
    regions: tuple[str, ...]
    breach_notice_hours: int

    def __post_init__(self) -> None:
        def need(name: str, fits: bool, allowed: str) -> None:
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed is {allowed}.")

        def is_number(x: Any) -> bool:
            return isinstance(x, int | float) and not isinstance(x, bool)

        need("name", isinstance(self.name, str) and bool(self.name), "a text that is not empty")
        need("epsilon", is_number(self.epsilon) and 0 < self.epsilon < 1e6, "0 < epsilon < 1e6")
        need("delta", is_number(self.delta) and 0 < self.delta < 1, "0 < delta < 1")
        for name in ("adjacency", "unit", "regions"):
            values = getattr(self, name)
            good = isinstance(values, tuple) and bool(values)
            need(
                name,
                good and all(isinstance(v, str) and v for v in values),
                "a list of texts, not empty",
            )
        need("adjacency", set(self.adjacency) <= set(ADJACENCIES), f"from {ADJACENCIES}")
        for name in ("audit_log_retention_days", "breach_notice_hours"):
            value = getattr(self, name)
            need(name, isinstance(value, int) and not isinstance(value, bool) and value > 0,
                 "a whole number > 0")  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """For an entry's body: the rules themselves, so that a later edit changes nothing."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Policy":
        """The policy with these values.

        Raises:
            ValueError: for an unknown, missing or impossible one.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict) or set(values) != set(names):
            given = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"policy: the keys {names} are needed; there are {given}.")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)

    def broken_rule(
        self, *, epsilon: float | None, delta: float, adjacency: str, unit: str, region: str | None
    ) -> tuple[str, Any, Any] | None:
        """The first rule that a budget breaks: its name, what was asked, what is allowed.

        Example:
            >>> load_policy("gdpr").broken_rule(epsilon=8.0, delta=1e-6, adjacency="add_remove",
            ...                                 unit="user", region="eu-west-1")
            ('epsilon', 8.0, 1.0)
        """
        if epsilon is not None and epsilon > self.epsilon:
            return "epsilon", epsilon, self.epsilon
        if delta > self.delta:
            return "delta", delta, self.delta
        for rule, value, allowed in (
            ("adjacency", adjacency, self.adjacency),
            ("unit", unit, self.unit),
            ("regions", region, self.regions),
        ):
            if value not in allowed:
                return rule, value, ", ".join(allowed)
        return None


def _folder() -> Any:
    """The presets: in an installed package beside this file, in a checkout in ``configs``."""
    packaged = resources.files("dpfa_jax.policy") / "presets"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs" / "policies"


def policies() -> tuple[str, ...]:
    """The names of the presets."""
    names = (p.name for p in _folder().iterdir())
    return tuple(sorted(n[:-5] for n in names if n.endswith(".toml") and n != "regions.toml"))


@functools.cache
def regions() -> dict[str, str]:
    """For each region the preset that a scope there starts with.

    Example:
        >>> regions()["sa-east-1"]
        'lgpd'
    """
    return dict(tomllib.loads((_folder() / "regions.toml").read_text())["policy"])


def load_policy(name: str | Path) -> Policy:
    """A preset by its name, or a TOML file by its path.

    Raises:
        ValueError: for a name that is not there, or a file that is no policy.

    Example:
        >>> load_policy("ccpa").epsilon
        2.0
    """
    path: Any = Path(name)
    if path.suffix != ".toml":
        if str(name) not in policies():
            raise ValueError(
                f"policy={str(name)!r}: allowed are {', '.join(policies())}, or a .toml file."
            )
        path = _folder() / f"{name}.toml"
    try:
        return Policy.from_json(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"policy={str(name)!r}: cannot be read ({error.strerror}).") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"policy={str(name)!r}: not valid TOML ({error}).") from None
