"""Messages as byte chunks, grouped by their sender.

The bytes are folded to 97 symbols: 0 stands for "any other" (and for the start of a
chunk), 1 for a newline, 2 to 96 for printable ASCII. The data set is ASCII, so nats per
symbol are nats per byte.

Users are split into training and validation by a hash of their name, each user by
itself: adding or removing a user moves nobody else. The cap on a user's chunks applies
before anything is sampled.
"""

import collections
import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dpfa_jax.train.config import Config
from dpfa_jax.train.schema import ConfigError

SYMBOLS = 97
# Messages of one validation user that are evaluated, with the message as the unit.
_VALIDATION_MESSAGES = 40
_NEWLINE = 1


class Chunks(NamedTuple):
    """Chunks of text of one split.

    Attributes:
        symbols: int32[chunks, chunk_bytes], 0 to 96; -1 after the end of the text.
        unit: int32[chunks], the number of the user (or message) that each belongs to.
        users: how many users wrote them.
    """

    symbols: Int32[np.ndarray, "n l"]
    unit: Int32[np.ndarray, "n"]
    users: int


def fold(text: str) -> Int32[np.ndarray, "n"]:
    r"""Symbols of a text.

    Example:
        >>> fold("A~\n").tolist()
        [35, 96, 1]
    """
    raw = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    printable = (raw >= 32) & (raw < 127)
    return np.where(printable, raw - 30, np.where(raw == 10, _NEWLINE, 0)).astype(np.int32)


def read_chitchat() -> dict[str, list[str]]:
    """Messages of the chitchat data set by sender, in conversation order.

    Raises:
        ConfigError: if the package is not installed.
    """
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "data.source = 'chitchat': the package chitchat-dataset is not installed; "
            "install dpfa_jax[examples]."
        )
    path = Path(spec.origin).with_name("dataset.json")
    conversations = json.loads(path.read_text(encoding="utf-8"))
    by_sender: dict[str, list[str]] = collections.defaultdict(list)
    for conversation in conversations.values():
        for turn in conversation["messages"]:
            for message in turn:
                by_sender[message["sender"]].append(message["text"])
    return dict(by_sender)


def source_description(source: str) -> str:
    """Package and version, for the report."""
    assert source == "chitchat"
    return f"chitchat-dataset {importlib.metadata.version('chitchat-dataset')}"


def is_validation(sender: str, fraction: float) -> bool:
    """Whether a user is held out: a hash of the name decides, whoever else there is."""
    digest = hashlib.sha256(b"dpfa_jax split 1 " + sender.encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def _chunk(symbols: Int32[np.ndarray, "n"], size: int, most: int) -> Int32[np.ndarray, "c l"]:
    symbols = symbols[: size * most]
    count = max(1, -(-symbols.size // size))
    out = np.full(count * size, -1, np.int32)
    out[: symbols.size] = symbols
    return out.reshape(count, size)


def split_users(
    by_sender: dict[str, list[str]], config: Config
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and validation users."""
    fraction = config.data.validation_fraction
    validation = {s: m for s, m in by_sender.items() if is_validation(s, fraction)}
    training = {s: m for s, m in by_sender.items() if s not in validation}
    return training, validation


def user_chunks(users: dict[str, list[str]], config: Config) -> Chunks:
    """The first ``max_chunks_per_user`` chunks of each user's joined messages."""
    size, most = config.data.chunk_bytes, config.data.max_chunks_per_user
    assert most is not None
    parts = [_chunk(fold("\n".join(m) + "\n"), size, most) for m in users.values()]
    owner = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts])
    return Chunks(np.concatenate(parts), owner, len(users))


def message_chunks(users: dict[str, list[str]], config: Config) -> Chunks:
    """The first ``chunk_bytes`` bytes of every message, one unit each.

    No cap: a user's cap would let one message more push another out, so that two
    records change where the guarantee counts one.
    """
    size = config.data.chunk_bytes
    parts = [_chunk(fold(m + "\n"), size, 1) for ms in users.values() for m in ms]
    return Chunks(np.concatenate(parts), np.arange(len(parts), dtype=np.int32), len(users))


def load_chunks(config: Config) -> tuple[Chunks, Chunks]:
    """Training chunks, one unit each as the config says, and validation chunks by user.

    Raises:
        ConfigError: if the number of units is not the configured ``population``.
    """
    training, validation = split_users(read_chitchat(), config)
    if config.privacy.unit == "user":
        train, held_out = user_chunks(training, config), user_chunks(validation, config)
    else:
        few = {sender: m[:_VALIDATION_MESSAGES] for sender, m in validation.items()}
        train, held_out = message_chunks(training, config), message_chunks(few, config)
    units = int(train.unit[-1]) + 1
    if units != config.data.population:
        raise ConfigError(
            f"data.population = {config.data.population}: the data holds {units} training "
            f"{config.privacy.unit}s under these options. The number is public; set it."
        )
    return train, held_out


def unigram_loss(chunks: Chunks) -> float:
    """Nats per byte of the best unigram model of these very chunks.

    It is fitted on what it is tested on, so it is a bound that no unigram model beats,
    and it needs no statistic of the training users.
    """
    seen = chunks.symbols[chunks.symbols >= 0]
    share = np.bincount(seen, minlength=SYMBOLS) / seen.size
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())
