"""Sensitivity of a sum of clipped gradients."""

import re

import numpy as np
import pytest

from dpfa_jax.mechanisms import adjacency_factor, gradient_sensitivity


@pytest.mark.parametrize(("adjacency", "factor"), [("add_remove", 1), ("replace_one", 2)])
def test_the_worst_neighbours_attain_it(adjacency, factor):
    clip = 0.7
    random = np.random.default_rng(0)
    assert adjacency_factor(adjacency) == factor
    stated = gradient_sensitivity(clip, adjacency)
    assert stated == pytest.approx(factor * clip)
    worst = 0.0
    for _ in range(500):
        g = random.normal(size=(2, 4)) * random.choice([0.01, 1, 100])
        g *= np.minimum(1.0, clip / np.linalg.norm(g, axis=-1, keepdims=True))
        change = np.linalg.norm(g[0] - (g[1] if adjacency == "replace_one" else 0))
        assert change <= stated * (1 + 1e-12)
        worst = max(worst, change, np.linalg.norm(g[0]) * factor)  # g[1] = -g[0]
    assert worst == pytest.approx(stated)


@pytest.mark.parametrize("word", ["", "add", "zero_out", None, "ADD_REMOVE"])
def test_other_words_raise(word):
    message = f"adjacency={word!r}: allowed are ('add_remove', 'replace_one')"
    with pytest.raises(ValueError, match=re.escape(message)):
        adjacency_factor(word)
    with pytest.raises(ValueError, match=re.escape(message)):
        gradient_sensitivity(1.0, word)
