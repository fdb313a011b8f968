"""What a plan takes, and how long a pass takes with it, term by term, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from shapes import KEY, MIB, OVERHEADS, moe_shape, profile, shape

from edgert.memory.hits import HIT_CURVE, asked_share, expected_hit_rate
from edgert.memory.model import hit_rate, kv_bytes, memory_bytes, missed_expert_bytes, predict, streamed_bytes
from edgert.memory.profile import DeviceProfile, DiskSpeed, Rehearsal
from edgert.memory.sizes import Sizes, overlap

STREAMED = Sizes("streamed", 401 * MIB, 94 * MIB)


@pytest.mark.parametrize(("residency", "rate"), [(0, 0), (0.05, 0.34), (0.185, 0.69), (0.25, 0.80), (1, 1), (1.5, 1)])
def test_hit_rates_are_those_of_the_trace_and_between_them(residency: float, rate: float) -> None:
    assert expected_hit_rate(residency) == pytest.approx(rate)


def test_measured_hit_rates_take_the_place_of_the_trace() -> None:
    assert expected_hit_rate(0.5, [(0, 0), (1, 1)]) == 0.5
    assert expected_hit_rate(0.5, HIT_CURVE) > 0.9


def test_a_text_asks_for_more_experts_the_less_its_tokens_repeat_them() -> None:
    assert asked_share(1 / 16, 1) == 1 / 16
    never, always = ((0.0, 0.0), (1.0, 0.0)), ((0.0, 0.0), (1 / 16, 1.0), (1.0, 1.0))
    assert asked_share(1 / 16, 9, never) == pytest.approx(9 / 16, rel=0.01)
    assert asked_share(1 / 16, 17, never) == 1.0 > asked_share(0.5, 100) > 0.99
    assert asked_share(1 / 16, 500, always) == 1 / 16
    shares = [asked_share(1 / 16, n) for n in (1, 2, 16, 128, 1024)]
    assert shares == sorted(set(shares))
    # Chosen at random, tokens miss what a pool does not hold: 1 - exp(-uses).
    assert asked_share(1 / 64, 65, ((0.0, 0.0), (1.0, 1.0))) == pytest.approx(1 - 0.368, abs=0.02)


def test_experts_of_a_prompt_compute_as_they_are_read_with_kernels_of_their_own() -> None:
    sizes, table = Sizes("streamed", 225 * MIB, 0, pool_slots=512 // 4), {1: 1e-10, 8: 6e-10, 128: 8e-9}
    device = replace(profile(), multiply_s={**profile().multiply_s, "2/experts": table})
    slow, fast = (predict(moe_shape(expert_bytes={2: n_bytes}, hidden_size=2048), device, sizes, 512)
                  for n_bytes in (736 * MIB, 0))
    asked, layers = asked_share(4 / 32, 512), 15 / 16  # of the last layer, a prompt needs the last token's alone
    each_s = 6e-10 + (8e-9 - 6e-10) * (512 * 4 / 32 / asked - 8) / 120
    products_s, read_s = layers * asked * 736 * MIB * each_s, layers * asked * 736 * MIB / 1e9
    moved_s = layers * 512 * 4 * 16 * 2048 * 12e-9
    assert slow.multiply_s - fast.multiply_s == pytest.approx(products_s)
    assert slow.total_s - fast.total_s == pytest.approx(products_s + moved_s - max(read_s, moved_s))


def test_memory_is_the_sum_of_its_terms() -> None:
    n_tokens = 300  # two buckets of 256 cells
    assert kv_bytes(shape(), n_tokens) == 512 * 32 * 2**10
    beside = (100 + 5 + 40 + 2) * MIB + 512 * 32 * 2**10 + 300 * 8192
    assert memory_bytes(shape(), OVERHEADS, STREAMED, n_tokens) == beside + (401 + 94) * MIB
    resident = Sizes("resident", repacked={"decode": frozenset({2})})
    assert memory_bytes(shape(), OVERHEADS, resident, n_tokens) == \
        (100 + 5 + 60) * MIB + 512 * 32 * 2**10 + (1024 + 900) * MIB


def test_a_pass_reads_what_is_not_pinned_once_whatever_its_length() -> None:
    assert streamed_bytes(shape(), STREAMED) == 560 * MIB
    assert streamed_bytes(shape(), Sizes("resident")) == 0
    one, many = (predict(shape(), profile(), STREAMED, n) for n in (1, 500))
    rows_s = 1e-4  # of the embedding, eight at a time
    assert one.read_s - rows_s == many.read_s - 63 * rows_s == pytest.approx(560 * MIB / 1e9)


def test_experts_cost_what_is_missed() -> None:
    sizes = Sizes("streamed", 225 * MIB, 0, pool_slots=512 // 4)
    assert missed_expert_bytes(moe_shape(), sizes, 1) == pytest.approx(0.2 * 4 / 32 * 736 * MIB)
    # A prompt reads each expert that it asks for once, and begins with none.
    asked = asked_share(4 / 32, 512)
    assert asked > 0.9
    assert missed_expert_bytes(moe_shape(), sizes, 512) == pytest.approx(15 / 16 * asked * 736 * MIB)
    assert missed_expert_bytes(moe_shape(), Sizes("resident"), 1) == 0
    assert missed_expert_bytes(shape(), STREAMED, 1) == 0


def test_experts_that_are_here_compute_while_the_others_are_read() -> None:
    sizes = Sizes("streamed", 225 * MIB, 0, pool_slots=512 // 4)
    expert_s, read_s = 4 / 32 * 736 * MIB * 1e-10, 0.2 * 4 / 32 * 736 * MIB / 1e9
    found, resident = (predict(moe_shape(), profile(), one, 1) for one in (sizes, Sizes("resident")))
    assert found.multiply_s == pytest.approx(220 * MIB * 1e-10 + expert_s)
    waits_s = 16 * (1 - 0.8**4) * 1e-4
    beside_s = 1e-4 + 33 * 6e-5  # a row of the embedding, and Python between blocks
    assert found.total_s == pytest.approx(resident.total_s + beside_s + max(read_s + waits_s - 0.8 * expert_s, 0))


def test_experts_that_are_known_before_attention_are_read_while_it_computes() -> None:
    sizes = Sizes("streamed", 225 * MIB, 0, pool_slots=512 // 4)
    late, early = (predict(moe_shape(foresees=known), profile(1e8), sizes, 1) for known in (False, True))
    before_s = 220 * MIB * 1e-10 + late.attend_s + late.overhead_s
    assert early.total_s == pytest.approx(late.total_s - before_s)


@pytest.mark.parametrize("pinned_mib", [25, 125, 205])
def test_experts_are_not_read_while_the_disk_reads_blocks(pinned_mib: int) -> None:
    sizes = Sizes("streamed", pinned_mib * MIB, 94 * MIB, pool_slots=512 // 8)
    found = predict(moe_shape(foresees=True), profile(1e9), sizes, 1)
    assert found.total_s >= found.read_s > 0


def test_misses_cost_what_as_many_cost_when_they_were_rehearsed() -> None:
    misses_s = {0: 0.0, 4: 0.001, 16: 0.01, 64: 0.08}
    device = replace(profile(), rehearsals={KEY: Rehearsal(0.12, 0.15, {0: 0.0, 255: 0.0}, misses_s)})
    beside_s = 0.15 + 1e-4  # a pass, and a row of the embedding
    for n_slots, added_s in ((512, 0), (480, 0.001), (496, 0.0005), (256, 0.01 + 0.07 / 3), (0, 0.08)):
        found = predict(moe_shape(), device, Sizes("streamed", 225 * MIB, 0, pool_slots=n_slots), 1,
                        curve=[(0, 0), (1, 1)])
        assert found.total_s == pytest.approx(beside_s + added_s)


def test_less_than_a_layer_of_experts_keeps_their_outputs() -> None:
    few, layer = (memory_bytes(moe_shape(), OVERHEADS, Sizes("streamed", 0, 0, n), 2000) for n in (31, 32))
    assert few == layer - moe_shape().slot_bytes + (2000 - 512) * 40_000


@pytest.mark.parametrize(("window_mib", "share"), [(54, 0), (74, 0.5), (94, 1), (200, 1)])
def test_another_block_in_the_window_hides_reading_behind_computing(window_mib: int, share: float) -> None:
    sizes = replace(STREAMED, window_bytes=window_mib * MIB)
    assert overlap(shape(), sizes.window_bytes) == share
    found = predict(shape(), profile(), sizes, 1)
    compute_s = found.multiply_s + found.attend_s + found.overhead_s
    hidden = share * (1 - 2 * 1e9 / 2e10)
    read_s = found.read_s - 1e-4  # a row of the embedding
    assert found.total_s == pytest.approx(1e-4 + max(read_s, compute_s) + (1 - hidden) * min(read_s, compute_s))


@pytest.mark.parametrize("n_tokens", [1, 500])
def test_what_streams_takes_memory_from_computing_and_no_more_than_all_of_it(n_tokens: int) -> None:
    """However fast the disk: a byte that it brings takes memory as long as copying it does."""
    def added_s(n_bytes: int, disk_bytes_s: float) -> float:
        device = replace(profile(), disk=DiskSpeed(disk_bytes_s, 0.0))
        some, none = (predict(shape(), device, Sizes("streamed", 961 * MIB - n, 94 * MIB), n_tokens)
                      for n in (n_bytes, 0))
        return some.total_s - none.total_s

    for disk_bytes_s in (2e9, 4e9):
        assert added_s(100 * MIB, disk_bytes_s) == pytest.approx(100 * MIB * 2 / 2e10)
    assert added_s(100 * MIB, 1e12) == pytest.approx(100 * MIB / 1e12)  # one after the other


def test_a_pool_that_holds_less_than_a_token_keeps_what_a_layer_does_not_use() -> None:
    def hits(n_slots: int) -> float:
        return hit_rate(moe_shape(), Sizes("streamed", pool_slots=n_slots), 1)

    whole = expected_hit_rate(64 / 512)  # 16 layers of 4
    assert [hits(n) for n in (3, 4, 34, 64)] == [0, 0, pytest.approx(whole / 2), whole]
    assert hits(128) == expected_hit_rate(0.25)


def test_nothing_is_quicker_than_its_reads() -> None:
    sizes = Sizes("streamed", 125 * MIB, 60 * MIB, pool_slots=32)
    found = predict(moe_shape(foresees=True), profile(3e8), sizes, 1)
    assert found.limit == "disk" and found.total_s >= found.read_s


@pytest.mark.parametrize(("disk_bytes_s", "speed", "limit"), [
    (1e8, 1.0, "disk"), (1e11, 0.1, "compute"), (1e11, 1.9, "memory bandwidth")])
def test_what_limits_is_named(disk_bytes_s: float, speed: float, limit: str) -> None:
    assert predict(shape(), profile(disk_bytes_s, speed), STREAMED, 1).limit == limit


def test_what_was_learnt_changes_what_is_predicted() -> None:
    before = predict(shape(), profile(1e8), STREAMED, 1)
    device = profile(1e8)
    for _ in range(40):
        device = device.learn("disk", 2 / device.corrected("disk"))
    after = predict(shape(), device, STREAMED, 1)
    assert after.read_s == pytest.approx(2 * before.read_s, rel=0.01)
    assert after.multiply_s == before.multiply_s
    assert device.learn("disk", 1e9).corrected("disk") == 4


def test_the_first_answer_corrects_nominal_figures_whole_and_later_ones_a_share() -> None:
    nominal = DeviceProfile().learn("compute", 10.0)
    assert nominal.corrected("compute") == 10
    assert nominal.learn("compute", 2.0).corrected("compute") == pytest.approx(10 * 2**0.3)
    assert profile().learn("compute", 2.0).corrected("compute") == pytest.approx(2**0.3)
