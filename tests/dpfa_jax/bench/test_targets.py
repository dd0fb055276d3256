import dataclasses

import pytest

from dpfa_jax.bench import ours, peers
from dpfa_jax.bench.cases import ALL, DIRECTIONS, Shape
from dpfa_jax.bench.targets import STATISTICS, TARGETS, judge

FIRST = Shape(4, 4096, 16, 128, False)


def cell(shape, ratio, direction="forward", *, samples=24, extra=0):
    """A cell in which each of our versions is ``ratio`` times as fast as every other."""
    others = (peers.CUDNN, peers.TORCH_CUDNN, peers.SEPARATE)
    entries = [{"name": name, "samples_ms": [ratio] * samples} for name in others]
    for name in (ours.EXACT, ours.CHACHA8, ours.CHACHA20, ours.CHACHA8_NORMS):
        ratios = {other: {"ratio": ratio, "interval": [ratio, ratio]} for other in others}
        entries.append(
            {"name": name, "samples_ms": [1.0] * samples, "ratios": ratios, "extra_bytes": extra}
        )
    return {
        "shape": dataclasses.asdict(shape),
        "direction": direction,
        "baseline": peers.CUDNN,
        "versions": entries,
    }


def everything(ratio, **more):
    return [cell(shape, ratio, direction, **more) for shape in ALL for direction in DIRECTIONS]


def test_the_figures_to_reach():
    # A lower bar is a decision, not an edit: it must be made in two places.
    bars = [(t.version, t.direction, t.must, t.aim) for t in TARGETS]
    assert bars == [
        (ours.CHACHA8, "forward", 0.93, 1.06),
        (ours.CHACHA8, "forward", 1.00, 1.08),
        (ours.CHACHA20, "forward", 0.87, 1.00),
        (ours.CHACHA20, "forward", 0.98, 1.06),
        (ours.CHACHA8_NORMS, "forward", 1.00, 1.12),
        (ours.CHACHA8, "forward", 0.93, 1.06),
        (ours.CHACHA8, "forward", 0.75, 0.95),
        (ours.CHACHA8, "forward+backward", 0.90, 1.03),
        (ours.EXACT, "forward", 0.95, 1.00),
        (ours.EXACT, "forward+backward", 0.90, 1.00),
        (ours.CHACHA8, "forward", 1.55, 2.0),
        (ours.CHACHA8, "forward", 1.2, 1.5),
        (ours.CHACHA8, "forward", None, 1.00),
        (ours.CHACHA8, "forward+backward", None, 1.00),
    ]


def test_which_shapes_each_target_covers():
    lengths = [sorted({(s.length, s.head_dim) for s in ALL if t.covers(s)}) for t in TARGETS]
    long = [(16384, 128), (65536, 128)]
    both = [(4096, 64), (4096, 128)]
    assert lengths == [
        [(4096, 128)], long, [(4096, 128)], long, [(4096, 128), *long], [(4096, 64)],
        [(1024, 128)], [*both, *long], [*both, *long], [*both, *long], [(1024, 128)], both,
        [(4096, 128)], [(4096, 128)],
    ]  # fmt: skip
    for target in TARGETS:
        assert {s.is_causal for s in ALL if target.covers(s)} == {False, True}


@pytest.mark.parametrize(("ratio", "must", "aim"), [(2.0, "met", "met"), (0.1, "missed", "missed")])
def test_all_fast_or_all_slow(ratio, must, aim):
    verdicts = judge(everything(ratio))
    for verdict in verdicts[:-1]:
        assert verdict["figure"] == ratio
        assert verdict["interval"] == [ratio, ratio]
        assert verdict["must_reached"] in (None, must)
        assert verdict["aim_reached"] == aim


def test_the_worst_shape_decides():
    causal = dataclasses.replace(FIRST, is_causal=True)
    verdict = judge([cell(FIRST, 1.2), cell(causal, 0.95)])[0]
    assert verdict["figure"] == 0.95
    assert (verdict["must_reached"], verdict["aim_reached"]) == ("met", "missed")
    assert [s["ratio"] for s in verdict["shapes"]] == [1.2, 0.95]


def test_too_few_samples_prove_nothing():
    verdict = judge([cell(FIRST, 2.0, samples=19)])[0]
    assert (verdict["figure"], verdict["must_reached"]) == (None, "not measured")


def test_a_covered_shape_that_failed_leaves_the_target_open():
    failed = cell(dataclasses.replace(FIRST, is_causal=True), 2.0)
    entry = next(e for e in failed["versions"] if e["name"] == ours.CHACHA8)
    entry.clear()
    entry.update(name=ours.CHACHA8, error="RuntimeError: no")
    verdict = judge([cell(FIRST, 2.0), failed])[0]
    assert (verdict["figure"], verdict["must_reached"]) == (None, "not measured")


def test_no_cells():
    assert {v["aim_reached"] for v in judge([])} == {"not measured"}


def test_extra_memory():
    rows = FIRST.batch * FIRST.heads * FIRST.length
    fits, over = 4 * rows * int(STATISTICS), 4 * rows * (int(STATISTICS) + 1)
    assert judge([cell(FIRST, 1.0, extra=fits)])[-1]["must_reached"] == "met"
    verdict = judge([cell(FIRST, 1.0, extra=over)])[-1]
    assert (verdict["figure"], verdict["must_reached"]) == (STATISTICS + 1, "missed")
