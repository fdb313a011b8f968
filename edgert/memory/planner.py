"""The plan with the least predicted time per token within a budget. Pure: the same inputs give the same plan.

The candidates for a budget are among those for every larger one, so more memory never predicts a slower answer. Batch
size, layout and threads are given: they decide the last bits of an answer, which no budget may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from edgert.errors import BudgetTooSmall
from edgert.memory.hits import HIT_CURVE
from edgert.memory.kv import CELLS_PER_BUCKET
from edgert.memory.model import (
    Prediction,
    kv_bytes,
    memory_bytes,
    missed_expert_bytes,
    predict,
    streamed_bytes,
)
from edgert.memory.profile import DeviceProfile, HitCurve
from edgert.memory.shape import ModelShape, Overheads, Phase
from edgert.memory.sizes import Sizes, comfortable_bytes, least_window

# Windows that are tried: so many eighths of what is comfortable, beyond the least that works.
_N_WINDOWS = 8
_N_POOLS = 32  # sizes of the expert pool that are tried
# KV memory is handed out in so many stages, so that what a short text does not need holds weights.
_N_STAGES = 8
# Without a context: KV gets at most this share of the budget, but never fewer tokens.
_KV_SHARE, _MIN_DEFAULT_CONTEXT, _MAX_DEFAULT_CONTEXT = 0.125, 1024, 8192
# A process holds some pages more at one start than at another; 0.2 MiB were seen.
_BETWEEN_STARTS_BYTES = 2**20
# Budgets are searched to this precision.
_PRECISION_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for: the model, how it is to run, and what it takes beside weights."""

    shape: ModelShape
    overheads: Overheads
    context_length: int
    batch_size: int = 512
    repacked: Mapping[Phase, frozenset[int]] = field(default_factory=dict)  # where everything is resident
    curve: HitCurve = HIT_CURVE


@dataclass(frozen=True, slots=True)
class Stage:
    """Up to `n_tokens` in the cache, `pinned_bytes` of weights stay, and experts have `prompt_slots` while a prompt
    passes and `token_slots` while single tokens do: these need none of a prompt's buffers."""

    n_tokens: int
    pinned_bytes: int
    prompt_slots: int = 0
    token_slots: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What lies where. `sizes` hold when the context is full and a prompt passes; `stages` say what there is room for
    until then."""

    budget_bytes: int
    context_length: int
    batch_size: int
    sizes: Sizes
    stages: tuple[Stage, ...]
    kv_bytes: int
    streamed_bytes: int  # of every pass, when the context is full
    peak_bytes: int

    def stage(self, n_tokens: int) -> Stage:
        """The stage that holds `n_tokens`: a look-up, for it happens before every token."""
        return next((stage for stage in self.stages if n_tokens <= stage.n_tokens), self.stages[-1])

    def sizes_at(self, n_tokens: int, *, is_token: bool = False) -> Sizes:
        """What there is room for with `n_tokens` in the cache, while a prompt passes or one token does."""
        stage = self.stage(n_tokens)
        slots = stage.token_slots if is_token else stage.prompt_slots
        return replace(self.sizes, pinned_bytes=stage.pinned_bytes, pool_slots=slots)


def make_plan(demand: Demand, profile: DeviceProfile, budget_bytes: int) -> Plan:
    """The best plan within `budget_bytes` for the whole process. Raises BudgetTooSmall with the smallest that works."""
    candidates = [*_candidates(demand, budget_bytes)]
    if not candidates:
        smallest = advised_budget(demand)
        raise BudgetTooSmall("this model", smallest, budget_bytes, smallest)
    best = min(candidates, key=lambda sizes: (_to_9_digits(_decode_s(demand, profile, sizes)), -sizes.part_tokens,
                                              read_bytes(demand, sizes)))
    return _plan(demand, best, budget_bytes)


def plan_with(demand: Demand, budget_bytes: int, sizes: Sizes) -> Plan:
    """A plan of these very sizes, for comparisons. Raises BudgetTooSmall where they do not fit."""
    needed = memory_bytes(demand.shape, demand.overheads, sizes, demand.context_length)
    if needed > budget_bytes:
        raise BudgetTooSmall("this plan", needed, budget_bytes, needed)
    return _plan(demand, sizes, budget_bytes)


def smallest_budget(demand: Demand) -> int:
    """The least memory that works, in bytes: everything but weights, small tensors, and the least window; or the
    whole file, where that is less."""
    shape = demand.shape
    resident = memory_bytes(shape, demand.overheads, Sizes("resident"), demand.context_length)
    part = _least_part(demand.overheads)
    streamed = (Sizes("streamed", pinned, window, slots, part)
                for pinned, window in ((shape.small_bytes, least_window(shape)),
                                       (shape.small_bytes + shape.large_bytes, 0)) for slots in _pools(shape)[:2])
    return min(resident, *(memory_bytes(shape, demand.overheads, sizes, demand.context_length) for sizes in streamed))


def advised_budget(demand: Demand) -> int:
    """The smallest that works, for whoever starts again with it."""
    return smallest_budget(demand) + _BETWEEN_STARTS_BYTES


def budget_for(demand: Demand, profile: DeviceProfile, target_tok_s: float, most_bytes: int) -> int | None:
    """The smallest budget up to `most_bytes` whose plan is predicted to reach the target; None where none does."""
    low, high = smallest_budget(demand), most_bytes
    if low > high or tok_s(demand, profile, make_plan(demand, profile, high)) < target_tok_s:
        return None
    while high - low > _PRECISION_BYTES:
        middle = (low + high) // 2
        if tok_s(demand, profile, make_plan(demand, profile, middle)) >= target_tok_s:
            high = middle
        else:
            low = middle
    return low if tok_s(demand, profile, make_plan(demand, profile, low)) >= target_tok_s else high


def expected_peak_bytes(demand: Demand, plan: Plan, n_prompt: int, n_tokens: int) -> int:
    """Peak memory of a text of `n_tokens` that begins with a prompt of `n_prompt`: the most of the stages that it
    passes. A prompt that is shorter than what is computed at once fills no more than its share of compute buffers;
    experts fill all of what is free between prompts."""
    overheads, sizes = demand.overheads, plan.sizes
    in_parts = sizes.weights == "streamed" and not demand.shape.n_experts
    at_once = min(sizes.part_tokens if in_parts else plan.batch_size, demand.context_length)
    filled = overheads.filled(min(1.0, n_prompt / at_once))
    ends = [min(stage.n_tokens, n_tokens) for stage in plan.stages if stage.n_tokens >= n_prompt] or [n_tokens]
    return max(memory_bytes(demand.shape, filled.between_prompts() if is_token else filled,
                            plan.sizes_at(end, is_token=is_token), end) for end in ends for is_token in (True, False))


def predict_pass(demand: Demand, profile: DeviceProfile, plan: Plan, n_tokens: int, n_cached: int = 0) -> Prediction:
    """A pass of `n_tokens` over a cache of `n_cached`: one token of an answer, or a prompt."""
    return predict(demand.shape, profile, plan.sizes_at(n_cached + n_tokens, is_token=n_tokens == 1), n_tokens,
                   n_cached, batch_size=plan.batch_size, curve=demand.curve)


def tok_s(demand: Demand, profile: DeviceProfile, plan: Plan) -> float:
    """Predicted tokens per second when half of the context is used: the figure by which plans are compared."""
    return 1 / _decode_s(demand, profile, plan.sizes)


def default_context(trained: int, kv_bytes_per_token: int, budget_bytes: int | None) -> int:
    """Tokens of context where the user names none: as many as the model was trained for, at most 8192, and within a
    budget no more than an eighth of it holds, but 1024."""
    length = min(trained, _MAX_DEFAULT_CONTEXT)
    if budget_bytes is None:
        return length
    affordable = int(budget_bytes * _KV_SHARE) // kv_bytes_per_token
    return min(length, max(_MIN_DEFAULT_CONTEXT, affordable // CELLS_PER_BUCKET * CELLS_PER_BUCKET))


def _decode_s(demand: Demand, profile: DeviceProfile, sizes: Sizes) -> float:
    return predict(demand.shape, profile, _of_token(demand, sizes), 1, demand.context_length // 2,
                   curve=demand.curve).total_s


def _to_9_digits(seconds: float) -> float:
    """Rounding of sums must not choose between plans of equal speed."""
    return float(f"{seconds:.8e}")


def read_bytes(demand: Demand, sizes: Sizes) -> float:
    """What a token is expected to read: of two plans of equal speed, the one that leaves the disk alone."""
    sizes = _of_token(demand, sizes)
    return streamed_bytes(demand.shape, sizes) + missed_expert_bytes(demand.shape, sizes, 1, demand.curve)


def _candidates(demand: Demand, budget_bytes: int) -> Iterator[Sizes]:
    """Every kind of plan, filled up to the budget with pinned weights."""
    shape, context = demand.shape, demand.context_length
    for resident in (Sizes("resident", repacked=demand.repacked), Sizes("resident")):
        if memory_bytes(shape, demand.overheads, resident, context) <= budget_bytes:
            yield resident
    most = shape.small_bytes + shape.large_bytes
    windows = [least_window(shape) + comfortable_bytes(shape) * step // _N_WINDOWS for step in range(_N_WINDOWS + 1)]
    for slots, part in product(_pools(shape), demand.overheads.compute_bytes):
        empty = Sizes("streamed", pool_slots=slots, part_tokens=part)
        free = budget_bytes - memory_bytes(shape, demand.overheads, empty, context)
        if free >= most:  # what is left is for experts
            yield _with_experts(shape, replace(empty, pinned_bytes=most), free - most)
        for window in windows:
            if shape.small_bytes + window <= free and shape.large_bytes:
                yield replace(empty, pinned_bytes=min(most, free - window), window_bytes=window)


def _pools(shape: ModelShape) -> list[int]:
    """Slots for experts: the least that works, a layer's, and on to all experts. The same for every budget."""
    if not shape.n_experts:
        return [0]
    layer, most = shape.n_experts, shape.n_slots
    return sorted({min(most, shape.least_slots), *(layer + (most - layer) * step // _N_POOLS
                                                   for step in range(_N_POOLS + 1))})


def _least_part(overheads: Overheads) -> int:
    """The part whose compute buffers take least."""
    return min(overheads.compute_bytes, key=overheads.compute_bytes.__getitem__)


def _plan(demand: Demand, sizes: Sizes, budget_bytes: int) -> Plan:
    shape, context = demand.shape, demand.context_length
    streamed = streamed_bytes(shape, sizes)
    return Plan(budget_bytes, context, demand.batch_size, sizes, _stages(demand, sizes), kv_bytes(shape, context),
                streamed, memory_bytes(shape, demand.overheads, sizes, context))


def _stages(demand: Demand, sizes: Sizes) -> tuple[Stage, ...]:
    """What can stay while the cache is not full: KV that is not there yet, and all that a long prompt would keep, leave
    their memory to weights, and beyond those that every token needs to experts.

    Source: the thresholds of SpeContext, arXiv 2512.00722, algorithm 2; there KV moves out, here weights do.
    """
    shape, context = demand.shape, demand.context_length
    full_bytes = memory_bytes(shape, demand.overheads, sizes, context)
    stages: list[Stage] = []
    for number in range(1, _N_STAGES + 1):
        cells = -(-context * number // _N_STAGES // CELLS_PER_BUCKET) * CELLS_PER_BUCKET
        n_tokens = min(context, cells)
        unused = full_bytes - memory_bytes(shape, demand.overheads, sizes, n_tokens)
        there = sizes if sizes.weights == "resident" else _with_more(shape, sizes, unused)
        stage = Stage(n_tokens, there.pinned_bytes, there.pool_slots, _of_token(demand, there).pool_slots)
        if stages and replace(stages[-1], n_tokens=n_tokens) == stage:
            stages.pop()
        if not stages or stages[-1].n_tokens < n_tokens:
            stages.append(stage)
    return tuple(stages)


def _with_more(shape: ModelShape, sizes: Sizes, n_bytes: int) -> Sizes:
    """With `n_bytes` more for weights: for what is pinned, then for experts."""
    pinned = max(sizes.pinned_bytes, min(shape.small_bytes + shape.large_bytes, sizes.pinned_bytes + n_bytes))
    return _with_experts(shape, replace(sizes, pinned_bytes=pinned), n_bytes - (pinned - sizes.pinned_bytes))


def _of_token(demand: Demand, sizes: Sizes) -> Sizes:
    """While single tokens pass: where all but experts is pinned, these have what only a prompt's buffers need. A set of
    cached tokens is attended to in those."""
    shape, pinned = demand.shape, sizes.pinned_bytes
    if sizes.weights == "resident" or shape.kv is not None or pinned < shape.small_bytes + shape.large_bytes:
        return sizes
    return _with_experts(shape, sizes, demand.overheads.prompt_bytes)


def _with_experts(shape: ModelShape, sizes: Sizes, n_bytes: int) -> Sizes:
    """With slots for `n_bytes` more of experts, as long as there are experts without."""
    more = n_bytes // shape.slot_bytes if shape.n_experts else 0
    return replace(sizes, pool_slots=min(shape.n_slots, sizes.pool_slots + more))
