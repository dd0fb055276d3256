"""The examples are scripts beside each other, not a package; the tests import them by name."""

import json
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

WIDTH, HEADS, LAYERS, INNER, POSITIONS = 16, 4, 3, 24, 40
WORDS = ["good", "bad", "film", "the", "a", "plot", "dull", "bright"]


def _tokenizer() -> tokenizers.Tokenizer:
    letters = list(string.ascii_lowercase)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *letters, *(f"##{c}" for c in letters)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    # As in the real file, so that the loader has to undo both.
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(128)
    return tokenizer


def _weights(vocabulary: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.word_embeddings.weight": (vocabulary, WIDTH),
        "embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
        "pooler.dense.weight": (WIDTH, WIDTH),
    }
    dense = {
        "attention.self.query": (WIDTH, WIDTH),
        "attention.self.key": (WIDTH, WIDTH),
        "attention.self.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "intermediate.dense": (INNER, WIDTH),
        "output.dense": (WIDTH, INNER),
    }
    for i in range(LAYERS):
        for name, shape in dense.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (WIDTH,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (WIDTH,)
    # Small layers on large embeddings, so that texts of other words keep other vectors.
    weights = {}
    for name, shape in shapes.items():
        mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        spread = 1.0 if "word_embeddings" in name else 0.2
        weights[name] = (mean + spread * rng.normal(size=shape)).astype(np.float32)
    return weights


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """A folder with an encoder of the real format and random weights."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    safetensors.numpy.save_file(_weights(tokenizer.get_vocab_size()), folder / "model.safetensors")
    config = {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "layer_norm_eps": 0.1,  # large, so that a test sees whether it is read
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
