"""The governor: weights make room for a growing context and for others, and come back when there is plenty."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from shapes import MIB, OVERHEADS, moe_shape, profile, shape

from edgert.memory.governor import Governor
from edgert.memory.planner import Demand, Plan, make_plan

BUDGET = 800 * MIB
PLAN = make_plan(Demand(shape(), OVERHEADS, 8192), profile(), BUDGET)


@dataclass
class Weights:
    pinned_bytes: int = PLAN.stages[0].pinned_bytes
    moves: list[int] = field(default_factory=list)
    spare_bytes: int = 0
    experts_given: int = 0
    n_slots: int = 0

    def spare_expert_bytes(self, n_slots: int) -> int:
        return self.spare_bytes

    def keep_experts(self, n_slots: int, less_bytes: int) -> None:
        assert less_bytes <= self.spare_bytes
        self.n_slots, self.experts_given = n_slots, less_bytes

    def pin(self, n_bytes: int) -> None:
        if n_bytes != self.pinned_bytes:
            self.moves.append(n_bytes)
        self.pinned_bytes = n_bytes


@dataclass
class Cells:
    length: int = 0
    n_given_back: int = 0

    def give_back(self) -> None:
        self.n_given_back += 1


@dataclass
class Buffers:
    n_given_back: int = 0

    def give_back(self) -> None:
        self.n_given_back += 1


@dataclass
class Device:
    """A machine with a neighbour: what is free is what neither takes."""

    weights: Weights
    total_bytes: int = 1000 * MIB
    neighbour_bytes: int = 0
    stalled: float = 0.0
    now: float = 0.0

    def process_bytes(self) -> int:
        experts_bytes = self.weights.spare_bytes - self.weights.experts_given
        return PLAN.peak_bytes - PLAN.stages[0].pinned_bytes + self.weights.pinned_bytes + experts_bytes

    def available_bytes(self) -> int:
        return max(0, self.total_bytes - self.process_bytes() - self.neighbour_bytes)

    def stalled_percent(self) -> float:
        return self.stalled

    def clock(self) -> float:
        return self.now


def governed(plan: Plan = PLAN, total_bytes: int = 1000 * MIB) -> tuple[Governor, Weights, Cells, Device]:
    weights, cells = Weights(), Cells()
    device = Device(weights, total_bytes)
    return Governor(plan, weights, cells, Buffers(), device, device.clock), weights, cells, device


def run(governor: Governor, device: Device, seconds: float, n_tokens: int = 100) -> None:
    """Steps of a tenth of a second."""
    for _ in range(round(seconds * 10)):
        device.now += 0.1
        governor.before_step(n_tokens, False)


def test_weights_make_room_for_kv_at_each_threshold_and_nowhere_else() -> None:
    governor, weights, _, _ = governed()
    for n_tokens in range(1, 8193):
        governor.before_step(n_tokens, False)
    assert weights.moves == [stage.pinned_bytes for stage in PLAN.stages[1:]]


def test_another_text_gives_the_cells_back_before_weights_return() -> None:
    governor, weights, cells, _ = governed()
    governor.before_step(8000, False)
    governor.before_step(7990, False)  # a little of it was taken back: nothing moves
    assert (cells.n_given_back, weights.pinned_bytes) == (0, PLAN.stages[-1].pinned_bytes)
    governor.before_step(10, False)
    assert (cells.n_given_back, weights.pinned_bytes) == (1, PLAN.stages[0].pinned_bytes)


def test_a_growing_neighbour_is_given_memory_before_there_is_none_left() -> None:
    governor, weights, _, device = governed()
    least_free = 10**12
    for _ in range(240):
        device.neighbour_bytes += MIB
        run(governor, device, 0.2)
        least_free = min(least_free, device.available_bytes())
    assert device.neighbour_bytes == 0.3 * BUDGET
    assert least_free > 0
    assert governor.given_bytes > 0
    assert weights.pinned_bytes == PLAN.stages[0].pinned_bytes - governor.given_bytes


def test_it_comes_back_when_the_neighbour_has_left_for_a_while() -> None:
    governor, weights, _, device = governed()
    device.neighbour_bytes = 190 * MIB
    run(governor, device, 1)
    given = weights.pinned_bytes
    assert given < PLAN.stages[0].pinned_bytes
    device.neighbour_bytes = 0
    run(governor, device, 1.5)
    assert weights.pinned_bytes == given  # not yet: it may return
    run(governor, device, 5)
    assert weights.pinned_bytes == PLAN.stages[0].pinned_bytes
    assert governor.given_bytes == 0


def test_a_neighbour_at_the_edge_does_not_make_weights_go_to_and_fro() -> None:
    governor, weights, _, device = governed()
    for second in range(60):
        device.neighbour_bytes = (195 if second % 2 else 170) * MIB
        run(governor, device, 1)
    assert len(weights.moves) <= 2


def test_a_machine_that_stalls_is_given_memory_whatever_it_calls_free() -> None:
    governor, weights, _, device = governed()
    device.stalled = 40.0
    run(governor, device, 0.5)
    assert governor.given_bytes == governor.reserve_bytes > 0
    run(governor, device, 4)  # step by step: the kernel's average follows slowly
    assert governor.given_bytes == 3 * governor.reserve_bytes
    device.stalled = 5.0  # calmer, but not calm
    run(governor, device, 10)
    assert weights.pinned_bytes < PLAN.stages[0].pinned_bytes
    device.stalled = 0.0
    run(governor, device, 10)
    assert weights.pinned_bytes == PLAN.stages[0].pinned_bytes


def test_a_budget_that_takes_all_there_is_is_no_pressure() -> None:
    """In a control group of the budget's size nothing is free by plan."""
    governor, weights, _, device = governed(total_bytes=PLAN.peak_bytes)
    assert governor.reserve_bytes == 0
    run(governor, device, 10)
    assert weights.moves == []


@pytest.mark.parametrize("seconds", [0.0, 0.04])
def test_the_surroundings_are_not_looked_at_for_every_token(seconds: float) -> None:
    governor, _, _, device = governed()
    device.neighbour_bytes = 10**12
    device.now += seconds
    governor.before_step(10, False)
    assert governor.given_bytes == 0


def test_no_more_is_given_than_there_is() -> None:
    governor, weights, _, device = governed()
    device.neighbour_bytes = 10**12
    run(governor, device, 30)
    assert weights.pinned_bytes == 0
    assert governor.given_bytes == PLAN.stages[0].pinned_bytes


def test_experts_go_before_what_every_token_needs_and_come_back_after_it() -> None:
    weights = Weights(spare_bytes=100 * MIB)
    device = Device(weights, 1100 * MIB)
    governor = Governor(PLAN, weights, Cells(), Buffers(), device, device.clock)
    device.neighbour_bytes = 230 * MIB
    run(governor, device, 1)
    assert 0 < weights.experts_given < 100 * MIB
    assert weights.moves == []
    device.neighbour_bytes = 400 * MIB
    run(governor, device, 1)
    assert weights.experts_given == 100 * MIB
    assert weights.pinned_bytes == PLAN.stages[0].pinned_bytes - (governor.given_bytes - 100 * MIB)
    device.neighbour_bytes = 0
    run(governor, device, 10)
    assert (weights.experts_given, weights.pinned_bytes) == (0, PLAN.stages[0].pinned_bytes)


def test_a_prompts_buffers_and_experts_are_not_there_at_once() -> None:
    plan = make_plan(Demand(moe_shape(), replace(OVERHEADS, prompt_bytes=15 * MIB), 8192), profile(), 700 * MIB)
    weights, buffers = Weights(), Buffers()
    device = Device(weights)
    governor = Governor(plan, weights, Cells(), buffers, device, device.clock)
    first, second, *_ = plan.stages
    moves = []
    for n_tokens, leaves_buffers in ((100, False), (101, True), (102, True), (140, False), (second.n_tokens, True)):
        governor.before_step(n_tokens, leaves_buffers)
        moves.append((weights.n_slots, buffers.n_given_back))
    assert moves == [(first.prompt_slots, 0), (first.token_slots, 1), (first.token_slots, 2), (first.prompt_slots, 2),
                     (second.token_slots, 3)]
    assert second.token_slots < first.prompt_slots < first.token_slots


def test_buffers_stay_where_experts_have_no_use_for_them() -> None:
    plan = make_plan(Demand(moe_shape(), OVERHEADS, 2048), profile(), 700 * MIB)
    weights, buffers = Weights(), Buffers()
    device = Device(weights)
    governor = Governor(plan, weights, Cells(), buffers, device, device.clock)
    governor.before_step(100, True)
    assert (weights.n_slots, buffers.n_given_back) == (plan.stages[0].prompt_slots, 0)
