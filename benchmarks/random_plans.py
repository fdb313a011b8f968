"""Random configurations: each planned within its budget, and some run in a control group of that size. Needs root.

    python benchmarks/random_plans.py MODEL.gguf ... [--plans 1000] [--runs 50] [--seed 0]

A configuration is a model, a budget (from half of the smallest that works, to three times it), a context, a batch and
a set's size (the plan's choice, a number, or everything). Planned: nothing beyond the budget at any length, or refused
with the smallest budget that works, which then does. Run: a prompt of random length and a few tokens, and what was
resident beside what was predicted. Prints a JSON line per run, and what was found.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from apps.bench.control_group import is_possible, run_limited
from edgert.errors import BudgetTooSmall
from edgert.gguf.model_file import ModelFile
from edgert.memory.model import memory_bytes, resident_set_bytes
from edgert.memory.planner import smallest_budget
from edgert.memory.probe import MemoryProbe
from edgert.paths import Paths
from edgert.planning import EngineOptions, Planning

_TIMEOUT_S = 300.0
_PAGES_BYTES = 40 * 2**20  # a cold process under a limit is charged for pages of libraries
_N_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Configuration:
    model: str
    context: int
    batch: int
    budget_share: float  # of the smallest budget that works
    kv_budget: int | Literal["full"] | None
    prompt_tokens: int

    @classmethod
    def random(cls, rng: np.random.Generator, models: list[str]) -> Configuration:
        context = int(2 ** rng.uniform(8, 14))
        kv_budgets: list[int | Literal["full"] | None] = [None, None, "full", int(2 ** rng.uniform(6, 10))]
        kv_budget = kv_budgets[rng.integers(4)]
        return cls(models[rng.integers(len(models))], context, int(2 ** rng.integers(5, 10)),
                   float(2 ** rng.uniform(-1, 1.6)), kv_budget, int(rng.integers(1, min(context - _N_TOKENS, 1500))))

    def options(self, memory_bytes: int) -> EngineOptions:
        return EngineOptions(memory_bytes, self.context, 1, self.batch, layout="plain", kv_budget=self.kv_budget)


@dataclass(frozen=True, slots=True)
class Planned:
    budget_bytes: int
    smallest_bytes: int
    peak_bytes: int | None  # None where it was refused
    is_right: bool


def planned(one: Configuration, paths: Paths) -> Planned:
    """Plan it. What is right: see above."""
    file = ModelFile.open(Path(one.model))
    with Planning(file, paths, one.options(2**40), MemoryProbe()) as planning:
        smallest = smallest_budget(planning.demand)
    budget = int(smallest * one.budget_share)
    with Planning(ModelFile.open(Path(one.model)), paths, one.options(budget), MemoryProbe()) as planning:
        try:
            plan = planning.plan()
        except BudgetTooSmall as refusal:
            again = planning.plan(refusal.smallest_bytes)
            return Planned(budget, refusal.smallest_bytes, None,
                           again.peak_bytes <= refusal.smallest_bytes and refusal.smallest_bytes > budget)
        demand = planning.demand
        held = [memory_bytes(demand.shape, demand.overheads, plan.sizes_at(stage.n_tokens), stage.n_tokens)
                for stage in plan.stages]
        return Planned(budget, smallest_budget(demand), plan.peak_bytes, max(held) <= budget >= plan.peak_bytes)


def child(one: Configuration, budget_bytes: int) -> dict[str, Any]:
    """In the group."""
    from edgert import Runtime, SamplingParams

    with Runtime.load(one.model, memory=budget_bytes, context=one.context, threads=1, batch=one.batch, layout="plain",
                      kv_budget=one.kv_budget, speculate="off", learn=False) as runtime:
        prompt = [(i * 7) % (runtime.engine.arch.hp.vocab_size - 1) + 1 for i in range(one.prompt_tokens)]
        runtime.generate(prompt, max_tokens=_N_TOKENS, sampling=SamplingParams(temperature=0)).result()
        forecast, expected = runtime.forecast, None
        if forecast is not None:
            demand, n_tokens = forecast.planning.demand, runtime.engine.kv.length
            expected = resident_set_bytes(demand.shape, demand.overheads, forecast.plan.sizes_at(n_tokens), n_tokens)
        return {**runtime.memory(), "planned_bytes": expected, "kv": runtime.plan().get("kv", {}).get("tier", "dense")}


def run(one: Configuration, budget_bytes: int, home: Path) -> dict[str, Any]:
    """In a group of that size; and where a fresh process is larger than this one was and refuses, in one of the size
    that it then names, which must do."""
    found = _run(one, budget_bytes, home)
    smallest_bytes = found.get("smallest_bytes")
    return {"is_second": True, **_run(one, smallest_bytes, home)} if smallest_bytes else found


def _run(one: Configuration, budget_bytes: int, home: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps([asdict(one), budget_bytes])]
    outcome = run_limited(command, budget_bytes + _PAGES_BYTES, _TIMEOUT_S, environment={"EDGERT_HOME": str(home)})
    found: dict[str, Any] = {} if outcome.returncode else json.loads(outcome.stdout.splitlines()[-1])
    return {**found, "status": outcome.returncode, "oom_kills": outcome.oom_kills, "limit_hits": outcome.limit_hits,
            "group_peak_bytes": outcome.peak_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--plans", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        fields, budget_bytes = json.loads(args.child)
        try:
            print(json.dumps(child(Configuration(**fields), budget_bytes)))
        except BudgetTooSmall as refusal:
            print(json.dumps({"smallest_bytes": refusal.smallest_bytes}))
        return
    if args.runs and not is_possible():
        raise SystemExit("--runs needs root and a writable memory control group")
    rng, rows = np.random.default_rng(args.seed), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        configurations = [Configuration.random(rng, args.models) for _ in range(args.plans)]
        results = [planned(one, Paths(home, home, home)) for one in configurations]
        wrong = [one for one, result in zip(configurations, results, strict=True) if not result.is_right]
        print(f"{args.plans} planned, {sum(result.peak_bytes is None for result in results)} refused, wrong: {wrong}",
              flush=True)
        for one, result in list(zip(configurations, results, strict=True))[:args.runs]:
            budget = max(result.budget_bytes, result.smallest_bytes) + _PAGES_BYTES // 2
            rows.append({**asdict(replace(one, model=Path(one.model).name)), **run(one, budget, home)})
            print(json.dumps(rows[-1]), flush=True)
    over = [row["peak_rss_bytes"] / row["planned_bytes"] for row in rows if row.get("planned_bytes")]
    near = sum(0.95 <= share <= 1.05 for share in over)
    print(f"{len(rows)} run: {sum(row['oom_kills'] for row in rows)} killed for memory, "
          f"{sum(row['status'] != 0 or 'peak_rss_bytes' not in row for row in rows)} failed, "
          f"{sum('is_second' in row for row in rows)} run with the size that a refusal named"
          + (f"; resident over planned: median {median(over):.3f}, {min(over):.3f} to {max(over):.3f}, "
             f"{near} of {len(over)} within 5 %" if over else ""))


if __name__ == "__main__":
    main()
