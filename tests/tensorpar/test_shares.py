"""Shares of a model: everything is computed once, in whole units, by weight."""

from __future__ import annotations

from dataclasses import replace
from typing import cast, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edgert.errors import ClusterError
from tensorpar.division import Yields, divide, shard
from tensorpar.shares import Cut, Range, Shard, covers, length, merge, splits_head

LLAMA_8B = Cut(n_heads=32, n_kv_heads=8, head_unit=2, ffn_size=14336, ffn_unit=256, n_head_rows=128_256,
               attention={12: 750_000_000}, ffn={12: 3_200_000_000}, head={14: 430_000_000},
               replicated_bytes=300_000_000, stored_ffn_bytes=3_200_000_000)
QWEN_1_5B = Cut(12, 2, 2, 8960, 256, 151_936, {12: 90_000_000}, {12: 660_000_000}, {14: 191_000_000}, 130_000_000,
                660_000_000)


@pytest.mark.parametrize(("n_units", "weights", "expected"), [
    (8, [1, 1], [4, 4]), (8, [3, 1], [6, 2]), (9, [1, 1], [5, 4]), (3, [100, 1, 1], [1, 1, 1]),
    (7, [5, 3, 2], [4, 2, 1]),
    (4, [0, 0], [2, 2]), (5, [1, 0], [4, 1]),
])
def test_units_are_divided_by_weight_and_nobody_gets_none(n_units: int, weights: list[float],
                                                          expected: list[int]) -> None:
    assert divide(n_units, weights) == expected


@pytest.mark.parametrize(("cut", "weights", "heads", "ffn"), [
    (LLAMA_8B, [1], [(0, 32)], [(0, 14336)]),
    (LLAMA_8B, [1, 1], [(0, 16), (16, 32)], [(0, 7168), (7168, 14336)]),
    (LLAMA_8B, [5, 3, 2], [(0, 16), (16, 24), (24, 32)], [(0, 7168), (7168, 11520), (11520, 14336)]),
    (QWEN_1_5B, [1, 1, 1], [(0, 4), (4, 6), (6, 12)], [(0, 3072), (3072, 6144), (6144, 8960)]),
])
def test_ranks_that_meet_after_each_block_have_their_part_of_each(cut: Cut, weights: list[float], heads: list[Range],
                                                                  ffn: list[Range]) -> None:
    shards = shard(cut, weights)
    assert [one.heads for one in shards] == [(one,) for one in heads]
    assert [one.ffn for one in shards] == [(one,) for one in ffn]


@pytest.mark.parametrize(("most", "expected"), [
    ((), [4, 3]), ((9, 9), [4, 3]), ((3.9, 9), [3, 4]), ((4, 5), [3, 4]), ((0, 9), [1, 6]), ((float("inf"), 2), [5, 2]),
    ((2, 2), [4, 3]), ((1, 4), [2, 5]),  # where there is no room for all, everybody has somewhat more
])
def test_who_has_room_takes_what_others_have_none_for(most: tuple[float, ...], expected: list[int]) -> None:
    assert divide(7, [1, 1], most) == expected


@pytest.mark.parametrize(("rooms", "yields", "heads", "ffn", "rows"), [
    ((500e6, 500e6), "rows", 6, 4608, 75_968),
    ((490e6, 600e6), "rows", 6, 4352, 75_968),  # 17 of the FFN's 35 units
    ((440e6, 600e6), "rows", 6, 4352, 47_232), ((440e6, 600e6), "ffn", 6, 3840, 75_968),
    ((300e6, 800e6), "rows", 6, 3072, 10_880), ((300e6, 800e6), "ffn", 6, 1792, 75_968),
])
def test_who_has_no_room_for_its_part_has_less_of_some(rooms: tuple[float, ...], yields: Yields, heads: int, ffn: int,
                                                       rows: int) -> None:
    cut = replace(QWEN_1_5B, kv_bytes=30_000_000)
    shards = shard(cut, [1, 1], rooms, splits_head=True, yields=yields)
    assert covers(cut, shards)
    first = shards[0]
    assert (length(first.heads), length(first.ffn), length(first.head_rows)) == (heads, ffn, rows)
    assert all(cut.kept_bytes(one) <= room for one, room in zip(shards, rooms, strict=True))


def test_heads_with_a_long_cache_go_where_it_has_room() -> None:
    cut = replace(LLAMA_8B, kv_bytes=8_000_000_000)
    rooms = 3e9, 15e9
    for yields, heads in (("rows", 8), ("heads", 4)):
        shards = shard(cut, [1, 1], rooms, splits_head=True, yields=cast(Yields, yields))
        assert covers(cut, shards) and length(shards[0].heads) == heads
        assert all(cut.kept_bytes(one) <= room for one, room in zip(shards, rooms, strict=True))


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    per_kv, n_kv_heads, head_unit = draw(st.integers(1, 8)), draw(st.integers(1, 16)), draw(st.sampled_from([1, 2, 4]))
    n_heads = per_kv * n_kv_heads
    if n_heads % head_unit:
        head_unit = 1
    ffn_unit = draw(st.sampled_from([1, 32, 256]))
    sizes = st.integers(1, 10**9)
    return Cut(n_heads, n_kv_heads, head_unit, ffn_unit * draw(st.integers(1, 64)), ffn_unit,
               draw(st.integers(64, 300_000)), {12: draw(sizes)}, {12: draw(sizes)}, {14: draw(sizes)}, draw(sizes),
               draw(sizes))


@given(cuts(), st.data())
def test_every_head_and_column_is_computed_once(cut: Cut, data: st.DataObject) -> None:
    n_ranks = data.draw(st.integers(1, cut.max_ranks))
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=n_ranks, max_size=n_ranks))
    splits = n_ranks <= cut.max_head_ranks and data.draw(st.booleans())
    rooms = data.draw(st.lists(st.floats(-1e9, 4e9), min_size=n_ranks, max_size=n_ranks) | st.just([]))
    shards = shard(cut, weights, rooms, splits_head=splits, yields=data.draw(st.sampled_from(get_args(Yields))))
    assert covers(cut, shards)
    assert all(length(one.heads) and length(one.ffn) for one in shards)
    assert splits_head(shards) == (splits and n_ranks > 1)
    assert sum(cut.read_bytes(one) for one in shards) <= cut.total_bytes
    assert sum(cut.read_bytes(one) for one in shards) > cut.total_bytes - 3 * n_ranks


@given(cuts(), st.data())
def test_a_merged_shard_computes_what_both_did(cut: Cut, data: st.DataObject) -> None:
    assume(cut.max_ranks > 1)
    n_ranks = data.draw(st.integers(2, cut.max_ranks))
    shards = shard(cut, [1.0] * n_ranks, splits_head=n_ranks <= cut.max_head_ranks and data.draw(st.booleans()))
    lost = data.draw(st.integers(1, n_ranks - 1))
    merged = merge([shards[0], shards[lost]])
    if merged is not None:
        others = [one for rank, one in enumerate(shards) if rank not in (0, lost)]
        assert covers(cut, (merged, *others)) and merged.leads
    else:
        assert n_ranks * cut.group_unit > cut.n_heads  # only where a KV head is on several ranks


def test_a_merge_that_would_give_a_kv_head_more_heads_than_another_is_refused() -> None:
    first, second = Shard(((0, 2),), ((0, 1),), ((0, 1),), leads=True), Shard(((4, 5),), ((1, 2),), ((1, 2),))
    assert merge([first, second]) is None
    assert merge([first, replace(second, heads=((4, 6),))]) == Shard(((0, 2), (4, 6)), ((0, 2),), ((0, 2),),
                                                                             leads=True)


def test_too_many_devices_are_refused_with_the_number_that_works() -> None:
    assert QWEN_1_5B.max_ranks == 6
    with pytest.raises(ClusterError, match="at most 6 devices, not 7"):
        shard(QWEN_1_5B, [1.0] * 7)


def test_plans_that_miss_a_part_do_not_cover() -> None:
    first, second = shard(LLAMA_8B, [1, 1])
    assert covers(LLAMA_8B, (first, second))
    assert not covers(LLAMA_8B, (first,)) and not covers(LLAMA_8B, (first, first, second))
    assert not covers(LLAMA_8B, (replace(first, kv_heads=((0, 2),)), second))
    for rows in ((), ((0, 64),), ((0, 200_000),)):
        assert not covers(LLAMA_8B, (replace(first, head_rows=rows), second))
    head = shard(LLAMA_8B, [1, 1], splits_head=True)
    assert covers(LLAMA_8B, head) and [one.head_rows for one in head] == [((0, 64_128),), ((64_128, 128_256),)]
    assert not covers(LLAMA_8B, (head[0], second)) and not covers(LLAMA_8B, (first, head[1]))
