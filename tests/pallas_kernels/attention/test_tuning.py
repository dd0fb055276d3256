import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import AttentionSpec, tuning

SIZES = {"rows": 32, "keys": 64, "warps": 4, "stages": 2}
ENTRY = tuning.Entry("triton", "forward", "H100", 128, True, "long", 16, SIZES)
CALL = {
    "device_kind": "NVIDIA H100 80GB HBM3",
    "head_dim": 128,
    "is_causal": True,
    "num_keys": 4096,
    "dtype": jnp.bfloat16,
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "blocks.json"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(path))
    monkeypatch.setattr(tuning, "TABLE", ())
    return path


def write(path, *entries):
    path.write_text(json.dumps(tuning.cache_contents(entries)))


def test_nothing_known(cache):
    assert tuning.lookup("triton", "forward", **CALL) is None
    assert not cache.exists()


def test_committed_table(cache, monkeypatch):
    monkeypatch.setattr(tuning, "TABLE", (ENTRY,))
    found = tuning.lookup("triton", "forward", **CALL)
    assert found == SIZES
    found["rows"] = 1
    assert tuning.lookup("triton", "forward", **CALL) == SIZES, "a copy is handed out"


@pytest.mark.parametrize(
    "change",
    [
        {"device_kind": "NVIDIA A100-SXM4-80GB"},
        {"head_dim": 64},
        {"is_causal": False},
        {"num_keys": tuning.LONG - 1},
        {"dtype": "float32"},
    ],
)
def test_another_class_is_not_served(cache, monkeypatch, change):
    monkeypatch.setattr(tuning, "TABLE", (ENTRY,))
    assert tuning.lookup("triton", "forward", **(CALL | change)) is None
    assert tuning.lookup("triton", "backward", **CALL) is None
    assert tuning.lookup("mosaic_tpu", "forward", **CALL) is None
    same = CALL | {"num_keys": tuning.LONG, "dtype": "float16"}
    assert tuning.lookup("triton", "forward", **same) == SIZES


def test_the_users_file_goes_first(cache, monkeypatch):
    monkeypatch.setattr(tuning, "TABLE", (ENTRY,))
    own = dict(SIZES, rows=64)
    write(cache, dataclasses.replace(ENTRY, blocks=own, card=CALL["device_kind"]))
    assert tuning.lookup("triton", "forward", **CALL) == own
    assert tuning.lookup("triton", "forward", **CALL, with_cache=False) == SIZES


def test_a_changed_file_is_read_anew(cache):
    write(cache, ENTRY)
    assert tuning.lookup("triton", "forward", **CALL) == SIZES
    write(cache, dataclasses.replace(ENTRY, blocks=dict(SIZES, rows=128)))
    assert tuning.lookup("triton", "forward", **CALL)["rows"] == 128
    cache.unlink()
    assert tuning.lookup("triton", "forward", **CALL) is None


def test_later_entries_replace_earlier_ones():
    newer = dataclasses.replace(ENTRY, blocks={"rows": 16})
    other = dataclasses.replace(ENTRY, is_causal=False)
    entries = tuning.cache_contents((ENTRY, other, newer))["entries"]
    assert [e["blocks"] for e in entries] == [{"rows": 16}, SIZES]


def changed(**change):
    return {"format": 1, "entries": [dataclasses.asdict(ENTRY) | change]}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "has format=None, 1 is known"),
        ('{"format": 2, "entries": []}', "has format=2, 1 is known"),
        ('{"format": 1}', "has no list 'entries'"),
        ('{"format": 1, "entries": [{}]}', r"entries\[0\] needs the keys backend"),
        (changed(head_dim="128"), r"entries\[0\].head_dim='128' is no int"),
        (changed(is_causal=1), "is_causal=1 is no bool"),
        (changed(direction="sideways"), "direction='sideways', allowed"),
        (changed(length=["long"]), "length=.*allowed"),
        (changed(card=""), "card is empty"),
        (changed(backend="os"), "backend='os', known are"),
        (changed(backend=["os"]), "backend=.*known are"),
        (changed(blocks=[]), r"blocks=\[\]: allowed are the names rows, keys"),
        (changed(blocks={"row": 64}), "allowed are the names rows, keys"),
        (changed(blocks={"rows": 0}), "rows must be"),
        (changed(blocks={"rows": True}), "rows must be"),
        (changed(blocks={"rows": 64.0}), "rows must be"),
        (changed(backend="mosaic_tpu", blocks={"query": 100}), "query=100"),
    ],
)
def test_bad_files_are_one_clear_error(cache, contents, message):
    cache.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    with pytest.raises(tuning.CacheError, match=message) as caught:
        tuning.lookup("triton", "forward", **CALL)
    text = str(caught.value)
    assert text.startswith(str(cache))
    assert "dpfa bench tune" in text
    assert "\n" not in text


def test_a_folder_in_its_place(cache):
    cache.mkdir()
    with pytest.raises(tuning.CacheError, match="cannot be read"):
        tuning.lookup("triton", "forward", **CALL)


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv(tuning.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_path() == tmp_path / "dpfa_jax" / "attention_blocks.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.cache_path().parent == tmp_path / "home" / ".cache" / "dpfa_jax"


def test_tuned_blocks_are_the_back_ends_own(cache):
    write(cache, ENTRY, dataclasses.replace(ENTRY, direction="backward", blocks={"rows": 16}))
    query = jax.ShapeDtypeStruct((1, 8, 4, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 4096, 4, 128), jnp.bfloat16)
    spec = AttentionSpec(mode="exact", scale=1.0, is_causal=True)
    kind = CALL["device_kind"]
    forward, backward = tuning.tuned_blocks("triton", query, key, spec, device_kind=kind)
    assert forward == tuning.make_blocks("triton", "forward", SIZES)
    assert backward == tuning.make_blocks("triton", "backward", {"rows": 16})
    assert tuning.tuned_blocks("triton", query, key, spec, device_kind="cpu") == (None, None)


@pytest.mark.parametrize("backend", sorted(tuning.CANDIDATES))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_candidates_are_blocks_of_their_back_end(backend, direction):
    for group in tuning.CANDIDATES[backend][direction]:
        assert len({tuple(sizes.items()) for sizes in group}) == len(group) > 1
        for sizes in group:
            made = dataclasses.asdict(tuning.make_blocks(backend, direction, sizes))
            assert made.items() >= sizes.items()


def test_committed_entries_are_sound():
    for entry in tuning.TABLE:
        tuning.make_blocks(entry.backend, entry.direction, entry.blocks)
        assert entry.card
        assert entry.head_dim in (64, 128, 256)
    classes = [entry.shape_class() for entry in tuning.TABLE]
    assert len(set(classes)) == len(classes)


def test_import_reads_no_file_and_loads_no_kernels(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    code = (
        "import sys, pallas_kernels.attention.tuning\n"
        "print([m for m in sys.modules if m.startswith('pallas_kernels.attention.') "
        "and m.split('.')[2] in ('triton', 'mosaic_gpu', 'mosaic_tpu')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {tuning.CACHE_VARIABLE: str(bad)},
    )
    assert done.stdout.strip() == "[]"
