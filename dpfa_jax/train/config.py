"""The configuration of a training run, checked before anything private is read."""

import dataclasses
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

from dpfa_jax.parallel.mesh import parse_mesh
from dpfa_jax.train.schema import (
    ConfigError,
    build,
    flag,
    number,
    one_of,
    option,
    optional,
    text,
    whole,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read. ``population`` is a public constant that the data must match."""

    source: str = option(one_of("chitchat"))
    population: int = option(whole(2))
    chunk_bytes: int = option(whole(8, 4096))
    max_chunks_per_user: int | None = option(optional(whole(1, 100_000)), default=None)
    validation_fraction: float = option(number(0.0, 0.9))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """What is promised. ``reproducible_seed`` breaks the promise and is for tests."""

    unit: str = option(one_of("user", "message"))
    adjacency: str = option(one_of("add_remove", "replace_one"))
    epsilon: float = option(number(0.0))
    delta: float = option(number(0.0, 0.5))
    l2_clip_norm: float = option(number(1e-9, 1e9))
    reproducible_seed: int | None = option(optional(whole(0)), default=None)


def _windows(value: Any) -> str | None:
    allowed = "a list of pairs [nearest, farthest] of whole numbers, 0 <= nearest <= farthest"
    if not isinstance(value, list) or not value:
        return allowed
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            return allowed
        if any(not isinstance(x, int) or isinstance(x, bool) for x in pair):
            return allowed
        if not 0 <= pair[0] <= pair[1]:
            return allowed
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A byte-level decoder; one attention head for each window."""

    flax_api: str = option(one_of("linen", "nnx"))
    width: int = option(whole(4, 8192))
    layers: int = option(whole(1, 100))
    head_windows: list[list[int]] = option(_windows)
    mlp_ratio: int = option(whole(1, 16))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How it is optimised. Batches count units: users or messages."""

    steps: int = option(whole(1, 10_000_000))
    expected_batch_size: int = option(whole(1))
    padded_batch_size: int = option(whole(1))
    microbatch_size: int = option(whole(1))
    checkpoint_every: int = option(whole(1))
    learning_rate: float = option(number(0.0))
    warmup_steps: int = option(whole(0))
    final_learning_rate_share: float = option(number(0.0, 1.0, include_low=True))
    b1: float = option(number(0.0, 0.999999, include_low=True))
    b2: float = option(number(0.0, 0.999999, include_low=True))
    adam_floor_share: float = option(number(0.0))
    weight_decay: float = option(number(0.0, include_low=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What else is reported. The comparison trains on the private data WITHOUT privacy."""

    release_nonprivate_comparison: bool = option(flag)
    nonprivate_learning_rate: float | None = option(optional(number(0.0)), default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """On how many devices. It is no part of what a run is: another mesh may continue it.

    ``data`` devices share a batch, ``model`` devices each matrix; with ``fsdp`` the parameters
    are split over ``data`` too.
    """

    data: int = option(whole(1), default=1)
    model: int = option(whole(1), default=1)
    fsdp: bool = option(flag, default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    name: str = option(text)
    data: DataConfig
    privacy: PrivacyConfig
    model: ModelConfig
    training: TrainingConfig
    report: ReportConfig
    mesh: MeshConfig = MeshConfig()

    @property
    def sampling_probability(self) -> float:
        """q: expected batch over population, both public."""
        return self.training.expected_batch_size / self.data.population

    @property
    def fingerprint(self) -> str:
        """A hash of every option but the mesh: a run is never continued under another one."""
        options = dataclasses.asdict(self)
        del options["mesh"]
        plain = json.dumps(options, sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()[:16]


def load_config(path: str | Path) -> Config:
    """Reads and checks a TOML file.

    Raises:
        ConfigError: one line that names the key, its value and what is allowed.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        table = tomllib.loads(raw.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error}).") from None
    return parse_config(table)


def parse_config(table: dict[str, Any]) -> Config:
    """Checks a parsed table, each key and the keys together.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    config = build(Config, table)
    _check_together(config)
    return config


def with_mesh(config: Config, mesh: str | None, fsdp: bool = False) -> Config:
    """The configuration on another mesh: ``'data=4,model=2'``; axes left out are 1.

    Raises:
        ConfigError: for text that names no mesh.
    """
    chosen = config.mesh
    if mesh is not None:
        try:
            sizes = parse_mesh(mesh)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
        chosen = MeshConfig(data=sizes.get("data", 1), model=sizes.get("model", 1))
    split = config.mesh.fsdp or fsdp
    return dataclasses.replace(config, mesh=dataclasses.replace(chosen, fsdp=split))


def _check_together(config: Config) -> None:
    data, privacy, train, model = config.data, config.privacy, config.training, config.model
    n = data.population
    if privacy.delta >= 1 / n:
        raise ConfigError(
            f"privacy.delta = {privacy.delta!r}: allowed is less than 1/data.population = "
            f"{1 / n:.3g}; at more, publishing one whole record would count as private."
        )
    for name in ("expected_batch_size", "padded_batch_size"):
        value = getattr(train, name)
        if value > n:
            raise ConfigError(
                f"training.{name} = {value}: allowed is at most data.population = {n}."
            )
    if train.padded_batch_size < train.expected_batch_size:
        raise ConfigError(
            f"training.padded_batch_size = {train.padded_batch_size}: allowed is at least "
            f"training.expected_batch_size = {train.expected_batch_size}."
        )
    if train.microbatch_size > train.padded_batch_size:
        raise ConfigError(
            f"training.microbatch_size = {train.microbatch_size}: allowed is at most "
            f"training.padded_batch_size = {train.padded_batch_size}."
        )
    if train.warmup_steps >= train.steps:
        raise ConfigError(
            f"training.warmup_steps = {train.warmup_steps}: allowed is less than "
            f"training.steps = {train.steps}."
        )
    if (privacy.unit == "user") != (data.max_chunks_per_user is not None):
        raise ConfigError(
            f"data.max_chunks_per_user = {data.max_chunks_per_user}: allowed is a whole number "
            "with privacy.unit = 'user', whose examples are capped before sampling, and nothing "
            "with 'message': a cap would let one message push out another."
        )
    heads = len(model.head_windows)
    if model.width % heads:
        raise ConfigError(
            f"model.width = {model.width}: allowed is a multiple of the {heads} heads "
            "of model.head_windows."
        )
    asked = config.report.release_nonprivate_comparison
    if asked and config.report.nonprivate_learning_rate is None:
        raise ConfigError(
            "report.nonprivate_learning_rate: the key is missing; "
            "report.release_nonprivate_comparison = true needs it."
        )
