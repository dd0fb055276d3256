import json
import math
import shutil

import minilm
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

TEXTS = [
    "the good film",
    "a",
    "",
    "bad plot, dull film and bright bad good words that go on for rather long",
    "good good good bad",
]


def oracle(folder, text, max_tokens=64):
    """The encoder once more, in float64 NumPy: one text, one head at a time, no padding."""
    w = safetensors.numpy.load_file(folder / "model.safetensors")
    w = {name: x.astype(np.float64) for name, x in w.items()}
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    ids = tokenizer.encode(text).ids

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(x.var(-1, keepdims=True) + config["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):
        return np.einsum("ti,oi->to", x, w[f"{name}.weight"]) + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][range(len(ids))]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        p = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{p}.attention.self.{n}") for n in ("query", "key", "value"))
        size = q.shape[1] // heads
        mixed = []
        for h in range(heads):
            columns = slice(h * size, (h + 1) * size)
            logits = q[:, columns] @ k[:, columns].T / math.sqrt(size)
            weights = np.exp(logits)
            mixed.append(weights / weights.sum(1, keepdims=True) @ v[:, columns])
        attended = dense(np.concatenate(mixed, 1), f"{p}.attention.output.dense")
        x = norm(x + attended, f"{p}.attention.output.LayerNorm")
        hidden = dense(x, f"{p}.intermediate.dense")
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = norm(x + dense(hidden, f"{p}.output.dense"), f"{p}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_embed_agrees_with_an_independent_forward_pass(tiny_encoder, batch_size):
    vectors = minilm.load(tiny_encoder).embed(TEXTS, batch_size=batch_size)
    assert vectors.dtype == np.float32
    expected = [oracle(tiny_encoder, text) for text in TEXTS]
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_a_text_is_cut_at_max_tokens(tiny_encoder):
    encoder = minilm.load(tiny_encoder)
    text = "good bad " * 30
    np.testing.assert_allclose(
        encoder.embed([text], max_tokens=9)[0], oracle(tiny_encoder, text, 9), atol=2e-6
    )
    longer = encoder.embed([text + "dull", text[:90]], max_tokens=9)
    np.testing.assert_array_equal(longer[0], longer[1])


def test_one_text_changes_one_row(tiny_encoder):
    encoder = minilm.load(tiny_encoder)
    before = encoder.embed(TEXTS)
    after = encoder.embed([*TEXTS[:3], "a film of another length altogether", TEXTS[4]])
    others = [0, 1, 2, 4]
    np.testing.assert_allclose(before[others], after[others], atol=1e-6)
    assert np.abs(before[3] - after[3]).max() > 1e-2


def test_progress_ends_at_the_number_of_texts(tiny_encoder):
    seen = []
    minilm.load(tiny_encoder).embed(TEXTS, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(TEXTS), len(TEXTS))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_fingerprint_depends_on_every_file(tiny_encoder, tmp_path):
    prints = {minilm.fingerprint(tiny_encoder)}
    for name in minilm.FILES:
        folder = tmp_path / name
        shutil.copytree(tiny_encoder, folder)
        with (folder / name).open("ab") as file:
            file.write(b" ")
        prints.add(minilm.fingerprint(folder))
    assert len(prints) == 4


def test_a_missing_file_is_named(tiny_encoder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_encoder, folder)
    (folder / "tokenizer.json").unlink()
    for use in (minilm.load, minilm.fingerprint):
        with pytest.raises(ValueError, match=r"lacks tokenizer\.json"):
            use(folder)


def test_another_activation_is_refused(tiny_encoder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        minilm.load(folder)
