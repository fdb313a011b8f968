"""The planner: never beyond the budget, never slower with more memory or a faster disk, honest refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import GIB, MIB, OVERHEADS, demands, moe_shape, profile, profiles, shape

from edgert.errors import BudgetTooSmall
from edgert.memory.model import kv_bytes, memory_bytes, streamed_bytes
from edgert.memory.planner import (
    Demand,
    advised_budget,
    budget_for,
    default_context,
    expected_peak_bytes,
    make_plan,
    plan_with,
    predict_pass,
    smallest_budget,
    tok_s,
)
from edgert.memory.profile import DeviceProfile, DiskSpeed
from edgert.memory.sizes import Sizes, least_window

fuzzed = settings(max_examples=80)
DENSE = Demand(shape(), OVERHEADS, 2048)


@fuzzed
@given(demands(), profiles(), st.integers(0, 16 * GIB))
def test_the_plan_never_exceeds_the_budget_at_any_length(demand: Demand, device: DeviceProfile, more: int) -> None:
    budget = smallest_budget(demand) + more
    plan = make_plan(demand, device, budget)
    assert plan.peak_bytes <= budget
    for n_tokens in (stage.n_tokens for stage in plan.stages):
        assert memory_bytes(demand.shape, demand.overheads, plan.sizes_at(n_tokens), n_tokens) <= budget
        assert memory_bytes(demand.shape, demand.overheads.between_prompts(), plan.sizes_at(n_tokens, is_token=True),
                            n_tokens) <= budget
    assert plan.stages[-1].n_tokens == demand.context_length
    pinned, slots = [stage.pinned_bytes for stage in plan.stages], [stage.prompt_slots for stage in plan.stages]
    assert (pinned, slots) == (sorted(pinned, reverse=True), sorted(slots, reverse=True))
    assert (pinned[-1], slots[-1]) == (plan.sizes.pinned_bytes, plan.sizes.pool_slots)
    assert all(stage.prompt_slots <= stage.token_slots <= demand.shape.n_slots for stage in plan.stages)


@fuzzed
@given(demands(), profiles(), st.lists(st.integers(0, 16 * GIB), min_size=2, max_size=6))
def test_more_memory_never_predicts_slower(demand: Demand, device: DeviceProfile, more: list[int]) -> None:
    least = smallest_budget(demand)
    speeds = [tok_s(demand, device, make_plan(demand, device, least + n)) for n in sorted(more)]
    assert all(b >= a * (1 - 1e-7) for a, b in pairwise(speeds))


@fuzzed
@given(demands(), profiles(), st.integers(0, 4 * GIB), st.floats(1, 100))
def test_a_faster_disk_never_predicts_slower(demand: Demand, device: DeviceProfile, more: int, times: float) -> None:
    faster = replace(device, disk=DiskSpeed(device.disk.bytes_s * times, device.disk.latency_s))
    budget = smallest_budget(demand) + more
    slow, fast = (tok_s(demand, one, make_plan(demand, one, budget)) for one in (device, faster))
    assert fast >= slow * (1 - 1e-7)


@fuzzed
@given(demands(), profiles(), st.integers(1, 2**40))
def test_an_impossible_budget_is_refused_with_the_smallest_that_works(demand: Demand, device: DeviceProfile,
                                                                      missing: int) -> None:
    smallest = smallest_budget(demand)
    make_plan(demand, device, smallest)
    with pytest.raises(BudgetTooSmall) as refusal:
        make_plan(demand, device, smallest - missing)
    assert (refusal.value.smallest_bytes, refusal.value.budget_bytes) == (advised_budget(demand), smallest - missing)
    assert smallest < advised_budget(demand) <= smallest + MIB, "another start takes a little more"


@fuzzed
@given(demands(), profiles(), st.floats(0.01, 1000))
def test_the_smallest_budget_for_a_target_reaches_it(demand: Demand, device: DeviceProfile, target: float) -> None:
    found = budget_for(demand, device, target, 32 * GIB)
    fastest = tok_s(demand, device, make_plan(demand, device, max(32 * GIB, smallest_budget(demand))))
    if found is None:
        assert fastest < target or smallest_budget(demand) > 32 * GIB
        return
    assert tok_s(demand, device, make_plan(demand, device, found)) >= target
    if found - MIB >= smallest_budget(demand):
        assert tok_s(demand, device, make_plan(demand, device, found - MIB)) < target


def test_all_memory_is_used_where_weights_stream() -> None:
    plan = make_plan(DENSE, profile(), 700 * MIB)
    assert plan.sizes.weights == "streamed"
    assert plan.peak_bytes == 700 * MIB
    assert plan.streamed_bytes == 961 * MIB - plan.sizes.pinned_bytes


def test_a_model_that_fits_is_resident_and_repacked_only_where_the_copy_fits() -> None:
    demand = replace(DENSE, repacked={"decode": frozenset({2})})
    roomy, tight = (make_plan(demand, profile(), budget).sizes for budget in (3 * GIB, 1300 * MIB))
    assert (roomy.weights, roomy.layout(2, "decode"), roomy.layout(2, "prefill")) == ("resident", "repack", "plain")
    assert (tight.weights, tight.layout(2, "decode")) == ("resident", "plain")


@pytest.mark.parametrize(("disk_bytes_s", "speed", "n_blocks"), [(1e8, 1.0, 0), (1e9, 0.1, 1)])
def test_the_window_is_as_wide_as_it_pays(disk_bytes_s: float, speed: float, n_blocks: int) -> None:
    """Where the disk is everything, memory is better pinned; where computing is slow, another block in the window
    hides all reading."""
    window = make_plan(DENSE, profile(disk_bytes_s, speed), 600 * MIB).sizes.window_bytes
    assert window == least_window(DENSE.shape) + n_blocks * 40 * MIB


def test_kv_that_is_not_there_yet_leaves_its_memory_to_weights() -> None:
    demand = replace(DENSE, context_length=8192)
    plan = make_plan(demand, profile(), 800 * MIB)
    first, last = plan.stages[0], plan.stages[-1]
    assert (len(plan.stages), first.n_tokens, last.n_tokens) == (8, 1024, 8192)
    assert first.pinned_bytes - last.pinned_bytes == 7 * (kv_bytes(demand.shape, 1024) + 1024 * 8192)
    assert [plan.stage(n) for n in (1, 1024, 1025, 8192)] == [first, first, plan.stages[1], last]
    early, late = (predict_pass(demand, profile(), plan, 1, n).total_s for n in (100, 8000))
    assert early < late


def test_kv_and_buffers_that_are_not_there_leave_their_memory_to_experts() -> None:
    one = moe_shape()
    demand = Demand(one, replace(OVERHEADS, prompt_bytes=15 * MIB), 8192)
    plan = make_plan(demand, profile(), 1000 * MIB)
    first, last = plan.stages[0], plan.stages[-1]
    assert (len(plan.stages), first.n_tokens, last.n_tokens) == (8, 1024, 8192)
    assert first.pinned_bytes == last.pinned_bytes == one.small_bytes + one.large_bytes
    more = 7 * (kv_bytes(one, 1024) + 1024 * 8192) // one.slot_bytes
    assert (first.prompt_slots, last.prompt_slots) == (plan.sizes.pool_slots + more, plan.sizes.pool_slots)
    assert {stage.token_slots - stage.prompt_slots for stage in plan.stages} == {15 * MIB // one.slot_bytes}
    early, late = (predict_pass(demand, profile(), plan, 1, n).total_s for n in (100, 8000))
    assert early < late


def test_outputs_that_only_a_long_prompt_keeps_leave_their_memory_to_experts() -> None:
    """Where a pool holds less than a layer, those of all batches but one."""
    one = moe_shape()
    plan = plan_with(Demand(one, OVERHEADS, 2048), 4 * GIB,
                     Sizes("streamed", one.small_bytes + one.large_bytes, 0, pool_slots=10, part_tokens=128))
    more = 1536 * (one.kv_bytes_per_token + one.hidden_bytes_per_token + one.kept_bytes_per_token)
    assert [plan.stage(n).prompt_slots for n in (512, 2048)] == [10 + more // one.slot_bytes, 10]


def test_where_other_weights_stream_experts_have_no_buffers_of_prompts() -> None:
    """Single tokens compute in these too, then."""
    demand = Demand(moe_shape(), replace(OVERHEADS, prompt_bytes=15 * MIB), 2048)
    plan = make_plan(demand, profile(), smallest_budget(demand) + MIB)
    assert streamed_bytes(demand.shape, plan.sizes) > 0
    assert [stage.token_slots for stage in plan.stages] == [stage.prompt_slots for stage in plan.stages]


@fuzzed
@given(demands(), profiles(), st.integers(0, 4 * GIB), st.integers(1, 2**17), st.integers(1, 2**17))
def test_no_text_is_expected_to_take_more_than_the_plan(demand: Demand, device: DeviceProfile, more: int, n_prompt: int,
                                                        n_tokens: int) -> None:
    plan = make_plan(demand, device, smallest_budget(demand) + more)
    n_tokens = min(n_tokens, demand.context_length)
    assert expected_peak_bytes(demand, plan, min(n_prompt, n_tokens), n_tokens) <= plan.peak_bytes


def test_a_short_prompt_is_expected_to_fill_its_share_of_the_buffers() -> None:
    def expected(demand: Demand, n_prompt: int) -> int:
        plan = plan_with(demand, 4 * GIB, Sizes("streamed", 225 * MIB, 100 * MIB, demand.shape.n_experts))
        return expected_peak_bytes(demand, plan, n_prompt, 2048)

    dense, moe = (Demand(one, OVERHEADS, 2048) for one in (shape(), moe_shape()))
    assert expected(dense, 512) == expected(dense, 256) == expected(dense, 64) + 30 * MIB  # in parts of 256
    assert expected(moe, 512) == expected(moe, 256) + 20 * MIB


def test_what_gave_way_before_a_prompt_came_does_not_count_with_it() -> None:
    demand = Demand(shape(), OVERHEADS, 8192)
    plan = make_plan(demand, profile(), 768 * MIB)
    long = memory_bytes(demand.shape, demand.overheads, plan.sizes_at(4096), 4096)
    assert expected_peak_bytes(demand, plan, 4096, 4096) == long
    assert plan.sizes_at(4096).pinned_bytes < plan.sizes_at(1).pinned_bytes


def test_experts_are_expected_to_fill_what_a_short_prompt_left_of_the_buffers() -> None:
    demand = Demand(moe_shape(), replace(OVERHEADS, prompt_bytes=15 * MIB), 2048)
    plan = make_plan(demand, profile(), 600 * MIB)
    without = make_plan(Demand(moe_shape(), OVERHEADS, 2048), profile(), 600 * MIB)
    assert plan.stages[0].token_slots == without.stages[0].token_slots + 10
    more = expected_peak_bytes(demand, plan, 8, 2048) - expected_peak_bytes(
        replace(demand, overheads=OVERHEADS), without, 8, 2048)
    assert more == 10 * moe_shape().slot_bytes - 15 * MIB * 8 // 512


def test_experts_get_a_pool_and_dense_weights_are_pinned_first() -> None:
    plan = make_plan(Demand(moe_shape(), OVERHEADS, 2048), profile(), 800 * MIB)
    assert plan.sizes.pool_slots > 200
    assert streamed_bytes(moe_shape(), plan.sizes) == 0
    assert 0 <= plan.budget_bytes - plan.peak_bytes < moe_shape().slot_bytes


def test_a_plan_of_given_sizes_is_checked_too() -> None:
    sizes = Sizes("streamed", 300 * MIB, 100 * MIB)
    assert plan_with(DENSE, 800 * MIB, sizes).sizes == sizes
    with pytest.raises(BudgetTooSmall):
        plan_with(DENSE, 500 * MIB, sizes)


@pytest.mark.parametrize(("trained", "per_token", "budget", "expected"), [
    (32768, 2**15, None, 8192), (2048, 2**15, None, 2048), (32768, 2**15, 2**30, 4096), (32768, 2**15, 2**26, 1024),
    (512, 2**15, 2**26, 512), (32768, 24000, 600 * 2**20, 3072)])
def test_the_context_that_nobody_named(trained: int, per_token: int, budget: int | None, expected: int) -> None:
    assert default_context(trained, per_token, budget) == expected
