"""What `edgert plan` says of one model: the plan and its predictions as plain figures, for a table and for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from edgert.memory.kv import KVSizes
from edgert.memory.model import repacked_bytes, staging_bytes, token_bytes
from edgert.memory.planner import Plan, advised_budget, budget_for, make_plan, predict_pass, read_bytes, smallest_budget
from edgert.memory.profile import DeviceProfile, Limit

if TYPE_CHECKING:
    from edgert.planning import Planning

_GIB = 2**30
# No target is looked for beyond this much more memory than the whole model takes.
_MOST_EXTRA_BYTES = 4 * _GIB


@dataclass(frozen=True, slots=True)
class Target:
    """Whether a speed is reached, and the smallest budget that reaches it; None where none does."""

    tok_s: float
    is_reached: bool
    smallest_budget_bytes: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """One model's plan. `tok_s` is for a context that is half full."""

    name: str
    file_bytes: int
    architecture: str
    budget_bytes: int
    budget_is_given: bool
    prompt_tokens: int
    plan: Plan
    memory: Mapping[str, int]  # bytes of each part; together the peak
    tok_s: float
    tok_s_empty: float
    tok_s_full: float
    time_to_first_token_s: float
    limit: Limit
    prefill_limit: Limit
    read_bytes: float  # expected for every token of an answer
    spent_s: Mapping[str, float]  # of one token: reading, products, attention, overhead
    tok_s_with_another_gib: float
    smallest_budget_bytes: int
    target: Target | None
    device: DeviceProfile
    kv: KVSizes | None  # where steps attend to a set of tokens

    @classmethod
    def of(cls, planning: Planning, prompt_tokens: int, target_tok_s: float | None = None,
           name: str | None = None) -> Self:
        """Raises BudgetTooSmall."""
        demand, device, budget = planning.demand, planning.profile, planning.budget_bytes
        plan, context = planning.plan(), planning.demand.context_length
        n_prompt = min(prompt_tokens, context - 1)
        tokens = [predict_pass(demand, device, plan, 1, n) for n in (0, context // 2, context - 1)]
        first, half, full = (1 / one.total_s for one in tokens)
        middle, prompt = tokens[1], predict_pass(demand, device, plan, n_prompt)
        more = make_plan(demand, device, budget + _GIB)
        target = None
        if target_tok_s is not None:
            most = max(budget, demand.shape.file_bytes + smallest_budget(demand) + _MOST_EXTRA_BYTES)
            target = Target(target_tok_s, half >= target_tok_s, budget_for(demand, device, target_tok_s, most))
        return cls(name or planning.file.name, planning.file.file_bytes, planning.arch.hp.architecture, budget,
                   planning.options.memory_bytes is not None, n_prompt, plan, _memory(planning, plan), half, first,
                   full, prompt.total_s, middle.limit, prompt.limit,
                   read_bytes(demand, plan.sizes),
                   {"read": middle.read_s, "multiply": middle.multiply_s, "attend": middle.attend_s,
                    "overhead": middle.overhead_s}, 1 / predict_pass(demand, device, more, 1, context // 2).total_s,
                   min(advised_budget(demand), budget), target, device, demand.shape.kv)

    def to_dict(self) -> dict[str, Any]:
        """One object for `--json`, bytes and seconds."""
        plan, sizes = self.plan, self.plan.sizes
        return {
            "model": self.name, "file_bytes": self.file_bytes, "architecture": self.architecture, "fits": True,
            "budget_bytes": self.budget_bytes, "context_length": plan.context_length, "batch": plan.batch_size,
            "weights": sizes.weights, "pinned_bytes": sizes.pinned_bytes, "window_bytes": sizes.window_bytes,
            "expert_slots": sizes.pool_slots, "part_tokens": sizes.part_tokens,
            "streamed_bytes_per_pass": plan.streamed_bytes,
            "expected_read_bytes_per_token": round(self.read_bytes),
            "kv_bytes": plan.kv_bytes, "kv": None if self.kv is None else asdict(self.kv),
            "peak_bytes": plan.peak_bytes, "memory": dict(self.memory),
            "stages": [asdict(stage) for stage in plan.stages],
            "predicted_tok_s": self.tok_s, "predicted_tok_s_empty": self.tok_s_empty,
            "predicted_tok_s_full": self.tok_s_full, "prompt_tokens": self.prompt_tokens,
            "predicted_time_to_first_token_s": self.time_to_first_token_s, "limit": self.limit,
            "prefill_limit": self.prefill_limit, "token_s": dict(self.spent_s),
            "tok_s_with_another_gib": self.tok_s_with_another_gib,
            "smallest_budget_bytes": self.smallest_budget_bytes,
            "target": None if self.target is None else asdict(self.target),
            "device": {"disk_bytes_s": self.device.disk.bytes_s, "disk_latency_s": self.device.disk.latency_s,
                       "memory_bytes_s": self.device.memory_bytes_s, "threads": self.device.n_threads}}


def _memory(planning: Planning, plan: Plan) -> dict[str, int]:
    demand, sizes = planning.demand, plan.sizes
    overheads, shape = demand.overheads, demand.shape
    process = overheads.process_bytes + overheads.growth_bytes
    if sizes.weights == "resident":
        parts = {"weights, mapped": shape.file_bytes, "weights, repacked": repacked_bytes(shape, sizes),
                 "KV cache": plan.kv_bytes, "compute buffers": overheads.fused_compute_bytes
                 + staging_bytes(shape, overheads, sizes), "process": process}
    else:
        parts = {"weights, pinned": sizes.pinned_bytes, "window": sizes.window_bytes,
                 "experts": sizes.pool_slots * shape.slot_bytes, "KV cache": plan.kv_bytes,
                 "hidden states": token_bytes(shape, plan.context_length) - plan.kv_bytes,
                 "compute buffers": overheads.compute_bytes[sizes.part_tokens]
                 + staging_bytes(shape, overheads, sizes),
                 "embedding rows": overheads.embedding_bytes, "process": process}
    return {name: n_bytes for name, n_bytes in parts.items() if n_bytes}
