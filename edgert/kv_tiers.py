"""Where a text's keys and values lie, and how many of them a step attends to: the choice that a plan begins with.

Retrieved KV is exact up to a length and close beyond it, so nothing but `--kv-budget` or a memory budget that the whole
context's KV would fill brings it about. What its tiers take, retrieval/sizes.py says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from edgert.architectures.base import Architecture
from edgert.engine.retrieval_head import RetrievalHead
from edgert.errors import UsageError
from edgert.gguf.model_file import ModelFile
from edgert.memory.kv import KVSizes
from edgert.memory.model import kv_bytes
from edgert.memory.planner import Demand, smallest_budget
from edgert.paths import Paths

if TYPE_CHECKING:
    from edgert.planning import EngineOptions

# KV of the whole context may take this share of a memory budget before steps attend to a set of tokens.
_MOST_KV_SHARE = 1 / 3
# Sets that are tried where the memory manager decides, and the smallest that a user may ask for.
_KV_BUDGETS, _LEAST_KV_BUDGET = (512, 256, 128), 64


def with_kv(demand: Demand, options: EngineOptions, arch: Architecture, head: RetrievalHead | None,
            budget_bytes: int) -> Demand:
    """The demand with the cache that is asked for, or that fits: dense wherever it leaves the weights their room.
    Raises UsageError."""
    asked = options.kv_budget
    if asked == "full" or (asked is None and not _is_crowded(demand, options, budget_bytes)):
        return demand
    check_kv(options, arch)
    tries = [replace(demand, shape=replace(demand.shape, kv=sizes))
             for sizes in _kv_sizes(demand, options, arch, head, budget_bytes)]
    is_sought = smallest_budget(demand) > budget_bytes or asked is not None
    return next((one for one in tries if smallest_budget(one) <= budget_bytes
                 and (is_sought or _takes_little(one, budget_bytes))), tries[-1] if asked else demand)


def head_of(file: ModelFile, arch: Architecture, paths: Paths) -> RetrievalHead | None:
    """The retrieval head that was distilled from this file, if there is one."""
    from retrieval.head import find_head

    return find_head(file, arch.hp, [paths.heads])


def with_selector(demand: Demand, options: EngineOptions, arch: Architecture, head: RetrievalHead | None) -> Demand:
    """The same, and what chooses a step's tokens, on the device that leads a cluster in which that is to be done."""
    from retrieval.sizes import selector_bytes_per_token

    if not isinstance(options.kv_budget, int):
        return demand
    kept_bytes = int(selector_bytes_per_token(arch.hp, head) * demand.context_length)
    return replace(demand, overheads=replace(demand.overheads,
                                             growth_bytes=demand.overheads.growth_bytes + kept_bytes))


def check_kv(options: EngineOptions, arch: Architecture) -> None:
    """Raises UsageError where steps cannot attend to a set of tokens."""
    if options.kv_type != "f16":
        raise UsageError(f"--kv-budget needs keys and values in f16, not {options.kv_type}", "Leave out --kv-type.")
    if len(arch.hp.window_layers) == arch.hp.n_layers:
        raise UsageError("every layer of this model sees a window only", "Leave out --kv-budget.")
    if isinstance(options.kv_budget, int) and options.kv_budget < _LEAST_KV_BUDGET:
        raise UsageError(f"--kv-budget {options.kv_budget} is too few tokens", f"At least {_LEAST_KV_BUDGET}, or full.")


def _is_crowded(demand: Demand, options: EngineOptions, budget_bytes: int) -> bool:
    """Whether a dense cache would leave the weights too little of a memory budget."""
    if options.memory_bytes is None or options.kv_type != "f16":
        return False
    return not _takes_little(demand, budget_bytes) or smallest_budget(demand) > budget_bytes


def _takes_little(demand: Demand, budget_bytes: int) -> bool:
    """Of a budget. A set of a short text is kept in buffers that take more than the text's own keys and values."""
    return kv_bytes(demand.shape, demand.context_length) <= _MOST_KV_SHARE * budget_bytes


def _kv_sizes(demand: Demand, options: EngineOptions, arch: Architecture, head: RetrievalHead | None,
              budget_bytes: int) -> Iterator[KVSizes]:
    """Caches from the largest to the smallest; in memory only where the whole context has room."""
    from retrieval.sizes import FROM_TOKENS, kv_sizes

    asked, context = options.kv_budget if isinstance(options.kv_budget, int) else None, demand.context_length
    weights: Literal["resident", "streamed"] = "resident" if options.memory_bytes is None else "streamed"
    if asked and not _is_crowded(demand, options, budget_bytes) and smallest_budget(demand) <= budget_bytes:
        yield kv_sizes(arch.hp, context, asked, FROM_TOKENS, "memory", head, weights)
    for budget in (asked,) if asked else _KV_BUDGETS:
        for from_tokens in (FROM_TOKENS, FROM_TOKENS // 2, budget):
            yield kv_sizes(arch.hp, context, budget, from_tokens, "disk", head, weights)
