"""How right the plan is: predicted and measured memory and speed, side by side over a grid. Needs root.

    python benchmarks/plan_accuracy.py MODELS_DIR [BIG.gguf ...] --plot accuracy.svg
    python benchmarks/plan_accuracy.py MODELS_DIR --choices       # the chosen plan beside 12 others of each budget

Each case runs in a control group of the budget's size, from a cold page cache, with a fresh calibration that no answer
corrects (of a model with experts, one answer shows how it chooses them); the grid is made before it starts. Cases that
the planner refuses are named and left out. Peak memory is the larger of the process's and the group's. Prints a table,
a JSON line for each case, and the errors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from apps.bench.control_group import drop_page_cache, is_possible, run_limited, slow_disk
from apps.bench.speed import steady_rate

_TIMEOUT_S = 1200.0
_REFUSED = 5  # edgert's exit status for a budget that is too small
_MIB = 2**20
_LEARN_FROM_TOKENS = 128
# (model to budget, context, tokens of the prompt, bound on the disk in MB/s); prompts fill a batch, and with it
# the compute buffers.
_SMALL: tuple[tuple[float, int, int, int], ...] = (
    (0.25, 512, 480, 0), (0.25, 4096, 2048, 0), (0.25, 8192, 4096, 0), (1.0, 1024, 512, 0), (1.2, 512, 480, 200))
_MEDIUM: tuple[tuple[float, int, int, int], ...] = (
    (0.6, 2048, 512, 0), (1.0, 1024, 512, 0), (1.5, 2048, 512, 0), (1.5, 8192, 1024, 0), (2.0, 1024, 512, 0),
    (2.0, 1024, 512, 400), (2.5, 512, 480, 0))
_LARGE: tuple[tuple[float, int, int, int], ...] = (
    (1.2, 1024, 512, 0), (1.5, 2048, 512, 0), (2.0, 1024, 512, 0), (2.0, 1024, 512, 600), (4.0, 1024, 512, 0),
    (6.0, 1024, 512, 0), (8.0, 512, 480, 0))
_SMALL_BELOW, _MEDIUM_BELOW = 400 * _MIB, 1400 * _MIB
# Other plans of a budget: windows beyond the least that works, in what is comfortable; and how much of what is left is
# pinned, in slots of experts where there are any.
_WINDOWS, _PINNED = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0), (1.0, 0.85)


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
        return f"{self.model.stem[:22]:<22} {self.budget_bytes >> 20:>5} MiB {self.context:>5}{disk}"


def grid(models: Sequence[Path]) -> Iterator[Case]:
    for model in models:
        size = model.stat().st_size
        rows = _SMALL if size < _SMALL_BELOW else _MEDIUM if size < _MEDIUM_BELOW else _LARGE
        for ratio, context, n_prompt, disk_mb_s in rows:
            yield Case(model, int(size / ratio), context, n_prompt, disk_mb_s)


def child(args: argparse.Namespace) -> dict[str, Any]:
    """In the limited process: open, a prompt, `--tokens` of an answer; what was predicted and what happened."""
    import numpy as np

    from edgert.ggml.library import load_libraries
    from edgert.gguf.model_file import ModelFile
    from edgert.memory.model import Sizes, comfortable_bytes, hit_rate, least_window, memory_bytes
    from edgert.memory.planner import plan_with, predict_pass
    from edgert.memory.probe import MemoryProbe
    from edgert.paths import Paths
    from edgert.planning import Planning
    from edgert.runtime import open_planned, peak_rss_bytes
    from edgert.text.tokenizer import Tokenizer
    from edgert.text.vocabulary_header import has_vocabulary

    load_libraries()
    file = ModelFile.open(args.models[0])
    vocabulary = Tokenizer.open(file.path) if has_vocabulary(file) else None  # in memory, as in a Runtime
    with Planning(file, Paths.of_user(), _options(args), MemoryProbe()) as planning:
        if args.child == "calibrate":
            planning.calibrate()
            if planning.demand.shape.n_experts:
                _learn_hits(planning)
            return {}
        plan = planning.plan() if args.sizes is None else \
            plan_with(planning.demand, planning.budget_bytes, Sizes(**json.loads(args.sizes)))
        engine, _ = open_planned(planning, plan)
    try:
        demand, device, n_prompt = planning.demand, planning.profile, args.prompt
        start = time.perf_counter()
        logits = engine.step(_prompt(n_prompt))
        times, token_ids, before = [time.perf_counter()], list[int](), engine.plan()
        for _ in range(args.tokens):
            token_ids.append(int(logits[-1].argmax()))
            logits = engine.step(np.array(token_ids[-1:], np.int32))
            times.append(time.perf_counter())
        n_tokens = n_prompt + args.tokens
        token, prompt = (predict_pass(demand, device, plan, n, cached)
                         for n, cached in ((1, n_prompt + args.tokens // 2), (n_prompt, 0)))
        used = max(stage.pinned_bytes for stage in plan.stages)
        predicted = memory_bytes(demand.shape, demand.overheads, replace(plan.sizes, pinned_bytes=used), n_tokens)
        sizes = {key: value for key, value in asdict(plan.sizes).items() if key != "repacked"}
        return {"weights": plan.sizes.weights, "sizes": sizes,
                "tok_s": steady_rate(times), "predicted_tok_s": 1 / token.total_s,
                "prefill_s": times[0] - start, "predicted_prefill_s": prompt.total_s, "limit": token.limit,
                "predicted_peak_bytes": min(predicted, plan.budget_bytes), "peak_rss_bytes": peak_rss_bytes(),
                "least_window_bytes": least_window(demand.shape), "comfortable_bytes": comfortable_bytes(demand.shape),
                "small_bytes": demand.shape.small_bytes,
                "waited_s": getattr(engine.weights, "waited_s", 0.0), "hit_rate": _hit_rate(before, engine.plan()),
                "predicted_hit_rate": hit_rate(demand.shape, plan.sizes, 1, demand.curve), "parts_s": asdict(token),
                "disk_bytes_s": device.disk.bytes_s, "streamed_bytes": plan.streamed_bytes}
    finally:
        engine.close()
        if vocabulary is not None:
            vocabulary.close()


def _prompt(n_tokens: int) -> Any:
    import numpy as np

    return np.array([(i * 7) % 5000 + 100 for i in range(n_tokens)], np.int32)


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
        logits = engine.step(_prompt(_LEARN_FROM_TOKENS))
        for _ in range(_LEARN_FROM_TOKENS):
            logits = engine.step(np.array([int(logits[-1].argmax())], np.int32))
        planning.learn_hits(engine.weights.experts.hit_curve())  # type: ignore[union-attr]
    finally:
        engine.close()


def _options(args: argparse.Namespace) -> Any:
    from edgert.cpu import usable_cores
    from edgert.planning import EngineOptions

    return EngineOptions(args.memory, args.context, usable_cores(), speculate="off")


def run(case: Case, homes: Mapping[int, Path], args: argparse.Namespace, kind: str = "run",
        sizes: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """One child; None where the planner refuses."""
    command = [sys.executable, __file__, str(case.model), "--child", kind, "--memory", str(case.budget_bytes),
               "--context", str(case.context), "--prompt", str(case.n_prompt), "--tokens", str(args.tokens)]
    if sizes is not None:
        command += ["--sizes", json.dumps(sizes)]
    limit = case.budget_bytes if kind == "run" else 8 * 2**30
    drop_page_cache()
    with slow_disk(case.model, case.disk_mb_s * 10**6) if case.disk_mb_s else nullcontext() as disk:
        outcome = run_limited(command, limit, _TIMEOUT_S, disk=disk,
                              environment={"EDGERT_HOME": str(homes[case.disk_mb_s])})
    if outcome.returncode == _REFUSED:
        return None
    if outcome.returncode:
        raise SystemExit(f"{case.name}: status {outcome.returncode}")
    found: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    return {**found, "peak_bytes": max(outcome.peak_bytes, found.get("peak_rss_bytes", 0)),
            "oom_kills": outcome.oom_kills}


def measure(cases: Sequence[Case], homes: Mapping[int, Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    print(f"{'case':<42} {'tok/s':>7} {'pred.':>7} {'err':>6}  {'peak':>6} {'pred.':>6} {'err':>6}  "
          f"{'prefill':>7} {'pred.':>7}  limit")
    for case in cases:
        found = run(case, homes, args)
        if found is None:
            print(f"{case.name:<42} refused: the budget is too small", flush=True)
            continue
        speed, memory = (found[f"predicted_{key}"] / found[key] - 1 for key in ("tok_s", "peak_bytes"))
        print(f"{case.name:<42} {found['tok_s']:7.2f} {found['predicted_tok_s']:7.2f} {speed:+6.0%}  "
              f"{found['peak_bytes'] >> 20:6} {found['predicted_peak_bytes'] >> 20:6} {memory:+6.1%}  "
              f"{found['prefill_s']:6.1f}s {found['predicted_prefill_s']:6.1f}s  {found['limit']}", flush=True)
        results.append({"case": case.name, "speed_error": speed, "memory_error": memory, **found})
        print(json.dumps(results[-1]), flush=True)
    return results


def summarise(results: Sequence[Mapping[str, Any]]) -> None:
    for what, bound in (("speed_error", 0.2), ("memory_error", 0.05)):
        errors = [abs(result[what]) for result in results]
        print(f"{what}: median {statistics.median(errors):.1%}, worst {max(errors):.1%}, "
              f"{sum(error <= bound for error in errors)} of {len(errors)} within {bound:.0%}")


def compare_choices(cases: Sequence[Case], homes: Mapping[int, Path], args: argparse.Namespace) -> None:
    """The chosen plan beside others of the same budget: how far from the best one that was measured."""
    for case in cases:
        chosen = run(case, homes, args)
        if chosen is None or chosen["weights"] != "streamed":
            continue
        speeds = {"chosen": chosen["tok_s"]}
        room = chosen["sizes"]["pinned_bytes"] + chosen["sizes"]["window_bytes"] - chosen["small_bytes"]
        for n_blocks in _WINDOWS:
            window = chosen["least_window_bytes"] + int(n_blocks * chosen["comfortable_bytes"])
            for share in _PINNED:
                if window > room:
                    continue
                pinned = chosen["small_bytes"] + int((room - window) * share)
                other = run(case, homes, args, sizes={**chosen["sizes"], "pinned_bytes": pinned,
                                                      "window_bytes": window})
                if other is not None:
                    speeds[f"window {n_blocks:g}, pinned {share:.0%}"] = other["tok_s"]
        again = run(case, homes, args)  # the disk of the first minute is not that of the last
        ours = statistics.mean([chosen["tok_s"], again["tok_s"] if again else chosen["tok_s"]])
        best = max(speeds, key=speeds.__getitem__)
        print(f"{case.name}: chosen {ours:.2f} tok/s, best of {len(speeds)}: {best} {speeds[best]:.2f} "
              f"({ours / speeds[best]:.0%})", flush=True)
        print(json.dumps({"case": case.name, "chosen": ours, "others": speeds}), flush=True)


def scatter(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Measured over predicted, on logarithmic axes, with the bound of 20 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    predicted, measured = ([result[key] for result in results] for key in ("predicted_tok_s", "tok_s"))
    axes.loglog(predicted, measured, "o")
    ends = [min(*predicted, *measured) / 1.3, max(*predicted, *measured) * 1.3]
    for factor, style in ((1.0, "-"), (0.8, ":"), (1.2, ":")):
        axes.plot(ends, [end * factor for end in ends], style, color="grey")
    axes.set_xlabel("predicted tokens/s")
    axes.set_ylabel("measured tokens/s")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="GGUF files, or directories of them")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--choices", action="store_true")
    parser.add_argument("--plot", type=Path)
    for name, kind in (("--memory", int), ("--context", int), ("--prompt", int), ("--sizes", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("run", "calibrate"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        from edgert.errors import BudgetTooSmall

        try:
            print(json.dumps(child(args)))
        except BudgetTooSmall:
            sys.exit(_REFUSED)
        return
    if not is_possible():
        raise SystemExit("this needs root and a writable memory control group")
    files = [file for one in args.models for file in (sorted(one.glob("*.gguf")) if one.is_dir() else [one])]
    cases = [case for case in grid(files) if args.only in case.name]
    with tempfile.TemporaryDirectory() as directory:
        homes = {mb_s: Path(directory) / str(mb_s) for mb_s in {case.disk_mb_s for case in cases}}
        for model, mb_s in dict.fromkeys((case.model, case.disk_mb_s) for case in cases):
            run(Case(model, 8 * 2**30, 512, 1, mb_s), homes, args, "calibrate")
        if args.choices:
            compare_choices(cases, homes, args)
            return
        results = measure(cases, homes, args)
    summarise(results)
    if args.plot:
        scatter(args.plot, results)


if __name__ == "__main__":
    main()
