"""Collectives of compiled programs, and what they cost on given links."""

from mambamim_jax.bench.collectives import Collective, Links, Program, by_kind

HLO = """HloModule jit_f, is_scheduled=true, num_partitions=16

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %one = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups=[4,4]<=[16], to_apply=%add
  %two = bf16[8]{0} all-reduce(%one), channel_id=2, replica_groups={{0,8},{1,9}}, to_apply=%add
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%i, %two)
}

ENTRY %main (a: f32[4]) -> f32[64] {
  %gathered = f32[64]{0} all-gather(%a), channel_id=3, replica_groups=mesh['x'=2,'y'=8], device_ids=([8,2]T(1,0)) {'y'}
  %pair = (f32[4]{0}, /*index=1*/f32[4]{0}) all-reduce-start(%a, %a), replica_groups=mesh['x'=16] {'x':(2)4}
  %done = (f32[4]{0}, f32[4]{0}) all-reduce-done(%pair)
  %loop = (s32[], f32[8]{0}) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %last = f32[8]{0} get-tuple-element(%loop), index=1
  %moved = f32[8]{0} collective-permute(%last), source_target_pairs={{0,1},{1,2}}
  ROOT %spread = f32[2]{0} reduce-scatter(%moved), replica_groups={}, to_apply=%add
}
"""


def test_collectives_are_read_from_a_program():
    found = {c.kind + str(n): c for n, c in enumerate(Program(HLO).collectives)}
    assert list(found) == [
        "all-gather0", "all-reduce1", "all-reduce2", "all-reduce3", "collective-permute4", "reduce-scatter5"
    ]  # fmt: skip
    gathered, pair, one, two, moved, spread = found.values()
    assert gathered == Collective("all-gather", 256, ((64,),), (0, 2, 4, 6, 8, 10, 12, 14), 1)
    assert (pair.bytes, pair.group, pair.calls) == (32, (0, 2, 4, 6), 1)
    assert (one.bytes, one.group, one.calls) == (32, (0, 1, 2, 3), 5)
    assert (two.bytes, two.group) == (16, (0, 8))
    assert (moved.group, spread.group) == ((0, 1), tuple(range(16)))
    assert Program(HLO).in_sequence == 5 * 2 + 2


def test_bytes_sent_in_a_ring():
    sent = by_kind(Program(HLO).collectives)
    assert sent["all-gather"] == 256 * 7 / 8
    assert sent["all-reduce"] == 32 * 2 * 3 / 4 + 5 * (32 * 2 * 3 / 4 + 16)
    assert sent["collective-permute"] == 32
    assert sent["reduce-scatter"] == 8 * 15


def test_a_ring_is_as_fast_as_its_slowest_link():
    links = Links(host=4, inside=100.0, between=10.0, reached=0.5, latency=1.0)
    seconds = lambda *group: links.seconds(Collective("collective-permute", 100, (), group, 1))  # noqa: E731
    assert seconds(0, 1, 2, 3) == 2.0
    assert seconds(0, 4) == 20.0
    assert seconds(*range(8)) == 5.0  # four cards a host
    assert [links.wait(devices) for devices in (2, 4, 16)] == [1.0, 1.0, 3.0]
