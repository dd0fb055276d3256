"""Noise and clipped sums on eight virtual devices: what ``eight_devices.py`` found there."""

import json
from pathlib import Path

import pytest
from once import output_of

SCRIPT = Path(__file__).with_name("eight_devices.py")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return json.loads(output_of(SCRIPT, tmp_path_factory))


def of(found, name):
    result = found[name]
    if isinstance(result, dict) and set(result) == {"error"}:
        raise AssertionError(result["error"])
    return result


def test_the_noise_is_that_of_one_device_bit_for_bit(found):
    same = of(found, "same_noise")
    assert [name for name, equal in same.items() if not equal] == []
    for way in ("jit, fsdp", "shard_map, check_vma=True, fsdp", "pmap"):
        assert {n for n in (1, 2, 4, 8) if f"{way}, {n}" in same} == {1, 2, 4, 8}


def test_however_an_array_is_split_its_noise_is_the_same(found):
    assert of(found, "any_split") == []


def test_every_engine_gives_the_sum_of_one_device(found):
    distances = of(found, "same_sum")
    assert len(distances) >= 16
    # Float32 sums in another order.
    assert [name for name, far in distances.items() if not far < 2e-6] == []


def test_training_gives_the_parameters_of_one_device(found):
    distances = of(found, "same_training")
    assert len(distances) == 4
    # A sum that differs in its last digit is rarely rounded to the next point of the grid; Adam
    # then moves one parameter a little differently.
    assert [name for name, far in distances.items() if not far < 1e-4] == []


def test_adaptive_clipping_counts_the_examples_of_all_devices(found):
    assert of(found, "adaptive") < 1e-5


def test_one_reduction_of_gradients_a_step_and_no_exchange_of_norms(found):
    result = of(found, "programs")
    parameters, examples = sum(result["leaves"]), 16
    for layout in ("dp", "fsdp"):
        step = result["programs"][f"step, {layout}"]["collectives"]
        reduced = [size for kind, size in step if kind in ("all-reduce", "reduce-scatter")]
        # Two programs hold the reduction, of which one runs: all examples finite, or not. Beside
        # it one flag says which.
        assert sorted(reduced) == [1, parameters, parameters]
        others = [[kind, size] for kind, size in step if kind != "all-reduce"]
        if layout == "dp":
            assert others == []
        # Parameters are gathered; the noise of a leaf split by columns is exchanged.
        assert {kind for kind, _ in others} <= {"all-gather", "all-to-all"}
        assert examples not in [size for _, size in step]


def test_no_device_makes_more_than_its_part_of_the_noise(found):
    result = of(found, "programs")
    noise = {name: result["programs"][f"noise, {name}"] for name in ("dp", "fsdp")}
    assert noise["dp"]["collectives"] == []
    (exchange,) = noise["fsdp"]["collectives"]
    largest = max(result["leaves"])
    assert exchange[0] == "all-to-all"
    assert exchange[1] <= largest // 8
    # An eighth, and up to two tiles of 1280 that a part begins or ends in.
    assert noise["fsdp"]["largest"] <= largest // 8 + 2 * 1280
    assert noise["dp"]["largest"] >= largest
    assert noise["fsdp"]["argument_bytes"] < noise["dp"]["argument_bytes"] / 7


REFUSALS = {
    "one device's sum": "it is one device's part",
    "one device's sum, dp_aggregate": "it is one device's part",
    "types off": "types do not tell here",
    "pmap": "types do not tell here",
    "added up twice": "was added up before",
    "a key a device": "All devices need the same key",
    "no such axis": "no such axis here",
    "specs under jit": "specs: allowed inside shard_map only",
    "specs of another tree": "a tree of PartitionSpec like the updates",
    "specs of a whole sum": "specs: a sum is the same along",
    "specs and a sum along one axis": "specs: a sum is split along",
    "one device's sum, privatizer": "it is one device's part",
    "one device's sum, privatizer, types off": "types do not tell here",
    "mixed axes": "all Auto or all Explicit",
}


@pytest.mark.parametrize("use", REFUSALS)
def test_wrong_uses_are_refused(found, use):
    said = of(found, "refused")[use]
    assert said is not None, "no error"
    assert REFUSALS[use] in said


def test_the_variance_is_that_of_one_release(found):
    scores = of(found, "variances")
    # Within 5 standard deviations: a false alarm has probability 6e-7 a score. Eight devices'
    # noises are far outside.
    assert abs(scores["jit"]) < 5
    assert abs(scores["shard_map"]) < 5
    assert scores["planted: every device"] > 1000
    assert scores["planted: every device, keys of their own"] > 1000


def test_kernels_take_slices_of_what_is_split(found):
    distances = of(found, "slices")
    assert len(distances) == 5
    assert [name for name, far in distances.items() if not far < 1e-5] == []


def test_weighted_sums_add_what_each_device_has(found):
    sums = of(found, "weighted_sums")
    assert len(sums) == 8
    for how, (distance, sent) in sums.items():
        assert distance < 3e-6, how
        # One sum over the devices that have other examples, of the entries they share.
        examples_are_split = "(None" not in how
        assert [kind for kind, _ in sent] == ["all-reduce"] * examples_are_split, how
