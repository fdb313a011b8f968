"""The terms of a cache whose steps attend to a set, by hand; and that a longer text never takes less."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import OVERHEADS, profile, shape

from edgert.memory.kv import KVSizes
from edgert.memory.model import kv_bytes, memory_bytes, predict, resident_set_bytes, token_bytes
from edgert.memory.profile import DiskSpeed
from edgert.memory.sizes import Sizes as WeightSizes

DISK = KVSizes("disk", budget=512, n_beside=60, n_late=24, from_tokens=2048, fixed_bytes=10_000_000,
               selector_bytes_per_token=256, layer_bytes_per_token=2048, passing_bytes_per_token=40_960,
               passing_tokens=1024, block_bytes=500_000)
DENSE = 32 * 2**10


def test_on_disk_a_text_takes_a_dense_cache_up_to_its_threshold_or_what_a_prompt_needs_beyond() -> None:
    assert DISK.bytes(DENSE, 300) == 512 * DENSE + 500_000 + 10_000_000 + 300 * 256
    long = DISK.bytes(DENSE, 100_000)
    staged = 100_096 * 2048 + 1024 * 40_960 + 500_000
    assert long == max(2048 * DENSE + 500_000, staged) + 10_000_000 + 100_000 * 256
    assert DISK.bytes(DENSE, 4000) == 2048 * DENSE + 500_000 + 10_000_000 + 4000 * 256


def test_what_a_prompts_tokens_keep_between_layers_is_counted_where_they_are_attended_in_memory() -> None:
    waiting = replace(DISK, waiting_bytes_per_token=9000)
    assert waiting.bytes(DENSE, 300) - DISK.bytes(DENSE, 300) == 300 * 9000
    assert waiting.touched_bytes(DENSE, 300) - DISK.touched_bytes(DENSE, 300) == 300 * 9000
    assert waiting.bytes(DENSE, 4000) - DISK.bytes(DENSE, 4000) == 2048 * 9000, "beyond, it passes in another way"
    near = replace(waiting, tier="memory")
    assert near.bytes(DENSE, 5000) == 5120 * DENSE + 10_000_000 + 5000 * (256 + 9000)


def test_in_memory_a_set_comes_on_top_of_the_dense_cache() -> None:
    near = replace(DISK, tier="memory")
    assert near.bytes(DENSE, 5000) == 5120 * DENSE + 10_000_000 + 5000 * 256


@given(tier=st.sampled_from(["memory", "disk"]), from_tokens=st.integers(64, 9000), dense=st.integers(64, 2**18),
       fixed=st.integers(0, 2**28), passing=st.integers(0, 2**17), tokens=st.lists(st.integers(1, 40_000), min_size=2))
def test_a_longer_text_never_takes_less(tier: Literal["memory", "disk"], from_tokens: int, dense: int, fixed: int,
                                        passing: int, tokens: list[int]) -> None:
    sizes = replace(DISK, tier=tier, from_tokens=from_tokens, fixed_bytes=fixed, passing_bytes_per_token=passing)
    taken = [sizes.bytes(dense, n) for n in sorted(tokens)]
    assert taken == sorted(taken)


def test_what_is_reserved_for_a_longer_text_is_not_resident() -> None:
    disk, dense = shape(kv=DISK), shape()
    streamed, per_token = WeightSizes("streamed", part_tokens=256), dense.kv_bytes_per_token
    assert memory_bytes(dense, OVERHEADS, streamed, 300) - resident_set_bytes(dense, OVERHEADS, streamed, 300) \
        == (512 - 300) * per_token, "cells come by the bucket"
    reserved = memory_bytes(disk, OVERHEADS, streamed, 2048) - resident_set_bytes(disk, OVERHEADS, streamed, 2048)
    assert reserved == DISK.fixed_bytes + DISK.block_bytes + OVERHEADS.compute_bytes[256]
    assert memory_bytes(disk, OVERHEADS, streamed, 2049) == resident_set_bytes(disk, OVERHEADS, streamed, 2049)


def test_the_models_terms_are_those_of_the_cache() -> None:
    long, dense = shape(kv=DISK), shape()
    assert kv_bytes(long, 30_000) == DISK.bytes(DENSE, 30_000) < kv_bytes(dense, 30_000) / 5
    assert token_bytes(long, 30_000) == kv_bytes(long, 30_000)
    resident = WeightSizes("resident")
    short, far = (predict(long, profile(), resident, 1, n).attend_s for n in (2000, 30_000))
    assert far < short, "a step attends to a set"
    assert predict(long, profile(), resident, 1, 2000).attend_s == predict(dense, profile(), resident, 1, 2000).attend_s


def test_choosing_a_set_takes_longer_the_longer_the_text_and_the_larger_the_set() -> None:
    assert DISK.choose_s(2048) == 0
    assert DISK.choose_s(10_000) == pytest.approx(2.2e-3 + 10_000 * 1.1e-7 + 512 * 1.4e-6)
    assert replace(DISK, budget=128).choose_s(10_000) < DISK.choose_s(10_000) < DISK.choose_s(20_000)


def test_a_set_is_fetched_beside_half_of_a_step_and_what_lasts_longer_is_waited_for() -> None:
    quick, slow, thin = DiskSpeed(1e9, 1e-4), DiskSpeed(1e9, 4e-3), DiskSpeed(1e6, 1e-4)
    assert replace(DISK, tier="memory").wait_s(10_000, 20_000, slow, 0.01) == DISK.wait_s(2048, 20_000, slow, 0.01) == 0
    late_s = 1e-4 + 24 / 3 * 4e-5
    assert DISK.wait_s(10_000, 20_000, quick, 0.01) == pytest.approx(late_s)
    assert DISK.wait_s(10_000, 20_000, quick, 0.002) == pytest.approx(1e-4 + 60 * 4e-5 - 0.001 + late_s)
    assert DISK.wait_s(10_000, 20_000, slow, 0.01) == pytest.approx(2 * 4e-3 + (60 + 24 / 3) * 1.6e-3 - 0.005)
    assert DISK.wait_s(10_000, 20_000, thin, 0.01) == pytest.approx(2 * 1e-4 + (60 + 24 / 3) * 0.02 - 0.005)
    assert replace(DISK, n_late=16).wait_s(10_000, 20_000, quick, 0.01) < late_s


def test_a_step_over_a_set_is_predicted_with_what_choosing_and_fetching_it_take() -> None:
    with_set, sizes = replace(DISK, tier="disk"), WeightSizes("resident")
    dense, sparse = (predict(shape(kv=kv), profile(), sizes, 1, 512 if kv is None else 10_000)
                     for kv in (None, with_set))
    added_s = with_set.choose_s(10_000) + with_set.wait_s(10_000, DENSE, profile().disk, 1.0)
    assert sparse.total_s == pytest.approx(dense.total_s + added_s)
    prompt = predict(shape(kv=with_set), profile(), sizes, 600, 10_000)
    assert prompt == predict(shape(kv=replace(with_set, from_tokens=20_000)), profile(), sizes, 600, 10_000)
