"""Collectives are read from a compiled program's text."""

from dpfa_jax.bench.hlo import Collective, collectives


def test_kinds_elements_and_bytes():
    text = """
  %a = (f32[4,2]{1,0}, /*index=1*/bf16[3]{0}) all-reduce(%x, %y), channel_id=1
  ROOT %b = s32[1,64,2]{2,1,0} reduce-scatter(%z), channel_id=2
  %c = f32[8]{0} fusion(%all-reduce.3), kind=kLoop
  %d = f32[] add(%all-reduce, %z)
  %e = (f32[], pred[3]{0}) all-to-all(%u, %v), channel_id=3
"""
    assert collectives(text) == [
        Collective("all-reduce", 11, 38),
        Collective("reduce-scatter", 128, 512),
        Collective("all-to-all", 4, 7),
    ]


def test_what_a_start_gives_is_counted_without_its_operands():
    text = """
  %a = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%y), channel_id=2
  %b = ((f32[2]{0}, f32[3]{0}), (f32[4]{0}, f32[6]{0})) all-gather-start(%y, %z), channel_id=2
  %c = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=3
  %d = f32[8]{0} collective-permute-done(%c)
  %e = f32[5]{0} all-reduce-start(%q), channel_id=4
"""
    assert collectives(text) == [
        Collective("all-gather", 64, 128),
        Collective("all-gather", 10, 40),
        Collective("collective-permute", 8, 32),
        Collective("all-reduce", 5, 20),
    ]
