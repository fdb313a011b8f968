"""A model within a budget, for plan_accuracy.py and plan_choices.py: what is predicted, and what happens.

Each kind of child runs in a process of its own, in a control group, and prints one line of JSON: `calibrate` measures
the device; `run` gives an answer of some tokens; `again` predicts the same from a calibration of this minute;
`choices` gives short answers with many plans in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from apps.bench.control_group import drop_page_cache, run_limited, slow_disk
from apps.bench.speed import steady_rate

REFUSED = 5  # edgert's exit status for a budget that is too small
_TIMEOUT_S = 1200.0
_MIB = 2**20
_UNLIMITED_BYTES = 8 * 2**30
_LEARN_FROM_TOKENS = 128
# An answer goes on until it has so many tokens, or has so few and took so long. The first, which builds graphs, is not
# timed: a plan is about the others.
_MOST_TOKENS, _LEAST_TOKENS, _ANSWER_S = 64, 6, 4.0
_CHOICE_PROMPT, _CHOICE_S = 16, 1.0  # short answers, whose plans are compared with each other
_DISK_AGAIN_S = 0.5
_CALIBRATIONS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One run: a model within a budget, on a disk of `disk_mb_s` (0: as it is)."""

    model: Path
    budget_bytes: int
    context: int
    n_prompt: int
    disk_mb_s: int

    @property
    def name(self) -> str:
        disk = f", {self.disk_mb_s} MB/s" if self.disk_mb_s else ""
        return f"{self.model.stem[:22]:<22} {self.budget_bytes / _MIB:>5.0f} MiB {self.context:>5}{disk}"


def run(case: Case, homes: Mapping[int, Path], kind: str = "run", **more: Any) -> dict[str, Any] | None:
    """One child, with `more` for it; None where the planner refuses. `run` is limited to the case's budget."""
    command = [sys.executable, __file__, str(case.model), "--kind", kind, "--memory", str(case.budget_bytes),
               "--context", str(case.context), "--prompt", str(case.n_prompt), "--more", json.dumps(more)]
    if kind == "run":
        drop_page_cache()
    with slow_disk(case.model, case.disk_mb_s * 10**6) if case.disk_mb_s else nullcontext() as disk:
        outcome = run_limited(command, case.budget_bytes if kind == "run" else _UNLIMITED_BYTES, _TIMEOUT_S, disk=disk,
                              environment={"EDGERT_HOME": str(homes[case.disk_mb_s])})
    if outcome.returncode == REFUSED:
        return None
    if outcome.returncode:
        raise SystemExit(f"{case.name}: status {outcome.returncode}")
    found: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    return {**found, "peak_bytes": max(outcome.peak_bytes, found.get("peak_rss_bytes", 0)),
            "oom_kills": outcome.oom_kills}


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """What the device can do, measured and kept, again where others computed meanwhile. Of a model with experts, an
    answer shows how it chooses them."""
    with planning_of(args) as planning:
        for _ in range(_CALIBRATIONS):
            start = time.perf_counter()
            planning.calibrate()
            took_s = time.perf_counter() - start
            if planning.is_settled and planning.is_rehearsed:
                break
        if planning.demand.shape.n_experts:
            _learn_hits(planning)
        return {"calibration_s": took_s}


def answer(args: argparse.Namespace) -> dict[str, Any]:
    """A prompt and an answer; what was predicted of them and what happened."""
    from edgert.memory.model import hit_rate
    from edgert.memory.planner import expected_peak_bytes, predict_pass
    from edgert.neighbours import Neighbours
    from edgert.runtime import open_planned, peak_rss_bytes

    with planning_of(args) as planning:
        plan = planning.plan()
        engine, _ = open_planned(planning, plan)
    try:
        demand, device, n_prompt = planning.demand, planning.profile, args.prompt
        others, start = Neighbours(), time.perf_counter()
        logits = engine.step(prompt_of(n_prompt))
        prefill_s, before = time.perf_counter() - start, engine.plan()
        times = token_times(engine, logits, min(_MOST_TOKENS, args.context - n_prompt), _ANSWER_S)
        n_tokens, others_share = engine.kv.length, others.share
        token, prompt = (predict_pass(demand, device, plan, n, cached)
                         for n, cached in ((1, (n_prompt + n_tokens) // 2), (n_prompt, 0)))
        return {"weights": plan.sizes.weights, "sizes": _plain(plan.sizes), "n_tokens": n_tokens,
                "tok_s": steady_rate(times), "predicted_tok_s": 1 / token.total_s,
                "prefill_s": prefill_s, "predicted_prefill_s": prompt.total_s, "limit": token.limit,
                "predicted_peak_bytes": expected_peak_bytes(demand, plan, n_prompt, n_tokens),
                "peak_rss_bytes": peak_rss_bytes(),
                "waited_s": getattr(engine.weights, "waited_s", 0.0), "hit_rate": _hit_rate(before, engine.plan()),
                "predicted_hit_rate": hit_rate(demand.shape, plan.sizes, 1, demand.curve), "parts_s": asdict(token),
                "disk_bytes_s": device.disk.bytes_s, "streamed_bytes": plan.streamed_bytes,
                "others_share": others_share}
    finally:
        engine.close()


def again(args: argparse.Namespace) -> dict[str, Any]:
    """What is predicted for the same answer from figures that are measured now."""
    from edgert.memory.model import predict
    from edgert.memory.sizes import Sizes
    from offload.disk_speed import measure_disk

    told = json.loads(args.more)
    with planning_of(args) as planning:
        disk = measure_disk(planning.file.path, _DISK_AGAIN_S)
        device = planning.rehearsed(replace(planning.profile, rehearsals={}, disk=disk))
        sizes = Sizes(**told["sizes"], repacked=planning.demand.repacked if told["sizes"]["weights"] == "resident"
                      else {})
        token = predict(planning.demand.shape, device, sizes, 1, (args.prompt + told["n_tokens"]) // 2,
                        curve=planning.demand.curve)
        return {"predicted_tok_s": 1 / token.total_s, "disk_bytes_s": disk.bytes_s}


def choices(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s with each of the plans that are named, one after the other."""
    from edgert.memory.model import memory_bytes
    from edgert.memory.planner import plan_with
    from edgert.memory.sizes import Sizes, comfortable_bytes, least_window
    from edgert.runtime import open_planned

    told = json.loads(args.more)
    if "plans" not in told:
        with planning_of(args) as planning:
            demand, chosen = planning.demand, planning.plan().sizes
            empty = Sizes("streamed", part_tokens=chosen.part_tokens)
            free = args.memory - memory_bytes(demand.shape, demand.overheads, empty, args.context)
            return {"chosen": _plain(chosen), "free_bytes": free, "small_bytes": demand.shape.small_bytes,
                    "large_bytes": demand.shape.large_bytes, "slot_bytes": demand.shape.slot_bytes,
                    "layer_slots": demand.shape.n_experts, "least_window_bytes": least_window(demand.shape),
                    "comfortable_bytes": comfortable_bytes(demand.shape)}
    speeds = []
    for sizes in told["plans"]:
        with planning_of(args) as planning:
            plan = plan_with(planning.demand, 2 * args.memory, Sizes(**sizes))
            engine, _ = open_planned(planning, plan)
        try:
            logits = engine.step(prompt_of(_CHOICE_PROMPT))
            speeds.append(steady_rate(token_times(engine, logits, args.context - _CHOICE_PROMPT, _CHOICE_S)))
        finally:
            engine.close()
    return {"tok_s": speeds}


def prompt_of(n_tokens: int) -> Any:
    import numpy as np

    return np.array([(i * 7) % 5000 + 100 for i in range(n_tokens)], np.int32)


def token_times(engine: Any, logits: Any, most: int, seconds: float) -> list[float]:
    """When each token of an answer was there, from the second on."""
    import numpy as np

    times, start = list[float](), time.perf_counter()
    for number in range(most):
        logits = engine.step(np.array([int(logits[-1].argmax())], np.int32))
        times.append(time.perf_counter())
        if number + 1 >= _LEAST_TOKENS and times[-1] - start > seconds:
            break
    return times


def _hit_rate(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Of the experts that were used between two accounts."""
    hits, misses = (after.get(f"expert_{key}", 0) - before.get(f"expert_{key}", 0) for key in ("hits", "misses"))
    return float(hits / max(1, hits + misses))


def _learn_hits(planning: Any) -> None:
    """An answer before the grid, for nobody knows how a model chooses experts until it has."""
    import numpy as np

    from edgert.runtime import open_planned

    engine, _ = open_planned(planning, planning.plan(int(planning.file.file_bytes / 1.5)))
    try:
        logits = engine.step(prompt_of(_LEARN_FROM_TOKENS))
        for _ in range(_LEARN_FROM_TOKENS):
            logits = engine.step(np.array([int(logits[-1].argmax())], np.int32))
        planning.learn_hits(engine.weights.experts.hit_curve())  # type: ignore[union-attr]
    finally:
        engine.close()


def _plain(sizes: Any) -> dict[str, Any]:
    """What can be told to another process; which types are repacked is no matter of choice."""
    return {key: value for key, value in asdict(sizes).items() if key != "repacked"}


@contextmanager
def planning_of(args: argparse.Namespace) -> Iterator[Any]:
    """A plan as a Runtime would make it: with libraries and vocabulary in memory."""
    from edgert.cpu import usable_cores
    from edgert.ggml.library import load_libraries
    from edgert.gguf.model_file import ModelFile
    from edgert.memory.probe import MemoryProbe
    from edgert.paths import Paths
    from edgert.planning import EngineOptions, Planning
    from edgert.text.tokenizer import Tokenizer
    from edgert.text.vocabulary_header import has_vocabulary

    load_libraries()
    file = ModelFile.open(args.model)
    if args.vocabulary is None and has_vocabulary(file):
        args.vocabulary = Tokenizer.open(file.path)
    options = EngineOptions(args.memory, args.context, usable_cores(), speculate="off", kv_budget="full")
    with Planning(file, Paths.of_user(), options, MemoryProbe()) as planning:
        yield planning


_KINDS = {"calibrate": calibrate, "run": answer, "again": again, "choices": choices}


def main(words: Sequence[str] | None = None) -> None:
    from edgert.errors import BudgetTooSmall

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kind", choices=[*_KINDS], required=True)
    for name in ("--memory", "--context", "--prompt"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--more", default="{}")
    parser.set_defaults(vocabulary=None)
    args = parser.parse_args(words)
    try:
        print(json.dumps(_KINDS[args.kind](args)))
    except BudgetTooSmall:
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
