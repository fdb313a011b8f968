"""How a streaming model adapts: to a neighbour that takes its memory, and to a context that grows. Needs root.

    python benchmarks/adapts.py neighbour MODEL.gguf --memory 420M     speed falls as predicted, and returns
    python benchmarks/adapts.py context MODEL.gguf                     from 1k to 8k tokens in one conversation

In a control group, from a cold page cache, on a device that is calibrated before. `neighbour`: a process in the same
group of 1.1 budgets grows by 30 % of the budget in steps, stays, and leaves; for each time the figures are medians of
tokens per second, beside what the model predicts for what was then in memory. `context`: keys and values stay whole in
memory, and the budget, unless it is given, is a quarter of the weights more than the full context needs at the least.
Each line is a stretch of the conversation, with what was pinned and what is predicted for it; the thresholds that were
passed come from the trace.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.bench.control_group import drop_page_cache, is_possible, run_limited

if TYPE_CHECKING:
    from edgert import Runtime

_TIMEOUT_S = 900.0
_GROUP_SHARE, _NEIGHBOUR_SHARE, _N_STEPS = 1.1, 0.3, 30
_STEP_S, _PHASE_S, _SETTLE_S = 0.15, 8.0, 3.0
_STRETCH = 1024
_ANSWER_TOKENS = 32  # at the end of each stretch
_SHARE_OF_WEIGHTS = 0.25  # pinned when the context is full
# Grows by as many bytes as each line says.
_GROW = """
import sys
held = []
for line in sys.stdin:
    held.append(b"x" * int(line))
    print(len(held), flush=True)
"""


def neighbour(args: argparse.Namespace) -> dict[str, Any]:
    """In the group: an answer without end, and a process that grows beside it."""
    with _opened(args, 1024) as runtime, subprocess.Popen([sys.executable, "-c", _GROW], stdin=subprocess.PIPE,
                                                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        tokens = _tokens(runtime, 64)
        found = {"alone": _phase(runtime, tokens)}
        for _ in range(_N_STEPS):
            other.stdin.write(f"{int(args.memory * _NEIGHBOUR_SHARE / _N_STEPS)}\n")
            other.stdin.flush()
            other.stdout.readline()
            _answer(tokens, _STEP_S)
        _answer(tokens, _SETTLE_S)
        found["beside a neighbour"] = _phase(runtime, tokens)
        other.kill()
        _answer(tokens, 2 * _SETTLE_S)
        found["alone again"] = _phase(runtime, tokens)
        return found


def _phase(runtime: Runtime, tokens: Iterator[float]) -> dict[str, float]:
    """Speed for some seconds, and what is predicted for what is in memory meanwhile."""
    times, forecast = _answer(tokens, _PHASE_S), runtime.forecast
    assert forecast is not None and forecast.governor is not None
    return {"tok_s": 1 / statistics.median(times), "predicted_tok_s": 1 / _expected_s(runtime),
            "given_mib": forecast.governor.given_bytes >> 20, "pinned_mib": runtime.engine.weights.pinned_bytes >> 20}


def _expected_s(runtime: Runtime) -> float:
    """Predicted seconds of a token with what is in memory now."""
    from edgert.memory.model import predict

    forecast, n_tokens, weights = runtime.forecast, runtime.engine.kv.length, runtime.engine.weights
    assert forecast is not None
    planning, sizes = forecast.planning, forecast.plan.sizes_at(n_tokens)
    sizes = replace(sizes, pinned_bytes=weights.pinned_bytes, window_bytes=getattr(weights, "window_bytes", 0),
                    pool_slots=weights.plan().get("expert_slots", sizes.pool_slots))
    return predict(planning.demand.shape, planning.profile, sizes, 1, n_tokens, curve=planning.demand.curve).total_s


def _answer(tokens: Iterator[float], seconds: float) -> list[float]:
    """Seconds of each token of the answer, for so long."""
    end, times = time.monotonic() + seconds, list[float]()
    while time.monotonic() < end:
        times.append(next(tokens))
    return times


def _tokens(runtime: Runtime, n_prompt: int) -> Iterator[float]:
    """An answer, a second thought of the same length whenever the context is full: seconds of each token."""
    import numpy as np

    engine = runtime.engine
    logits = engine.step(_prompt(0, n_prompt))
    while True:
        if engine.kv.length == engine.kv.context_length:
            engine.kv.truncate(n_prompt)
        start = time.perf_counter()
        logits = engine.step(np.array([int(logits[-1].argmax())], np.int32))
        yield time.perf_counter() - start


def context(args: argparse.Namespace) -> dict[str, Any]:
    """In the group: a conversation that grows to the end of its context."""
    import numpy as np

    stretches = []
    with _opened(args, args.context, args.trace) as runtime:
        engine = runtime.engine
        while (length := engine.kv.length) < args.context:
            n_prompt = min(_STRETCH, args.context - length) - _ANSWER_TOKENS
            start = time.perf_counter()
            logits, times = engine.step(_prompt(length, n_prompt)), [time.perf_counter()]
            for _ in range(_ANSWER_TOKENS):
                logits = engine.step(np.array([int(logits[-1].argmax())], np.int32))
                times.append(time.perf_counter())
            stretches.append({"tokens": engine.kv.length, "pinned_mib": engine.weights.pinned_bytes >> 20,
                              "tok_s": 1 / statistics.median(b - a for a, b in pairwise(times)),
                              "predicted_tok_s": 1 / _expected_s(runtime), "prompt_s": times[0] - start})
    events = json.loads(args.trace.read_text())["traceEvents"]
    return {"stretches": stretches, "thresholds": [event["name"] for event in events
                                                   if event["name"].startswith("pin ")]}


def _prompt(start: int, n_tokens: int) -> Any:
    import numpy as np

    return np.array([(i * 7) % 5000 + 100 for i in range(start, start + n_tokens)], np.int32)


def _opened(args: argparse.Namespace, context_length: int, trace: Path | None = None) -> Runtime:
    from edgert import Runtime

    return Runtime.load(args.model, memory=args.memory, context=context_length, speculate="off", learn=False,
                        kv_budget="full", trace=trace)


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    from edgert.cpu import usable_cores
    from edgert.memory.planner import smallest_budget
    from edgert.paths import Paths
    from edgert.planning import EngineOptions, Planning

    options = EngineOptions(None, args.context, usable_cores(), speculate="off", kv_budget="full")
    with Planning.open(args.model, Paths.of_user(), options) as planning:
        planning.calibrate()
        shape = planning.demand.shape
        weights_bytes = shape.small_bytes + shape.large_bytes
        return {"budget_bytes": smallest_budget(planning.demand) + int(weights_bytes * _SHARE_OF_WEIGHTS)}


def _run(args: argparse.Namespace, kind: str, limit_bytes: int, home: Path) -> tuple[dict[str, Any], int, int]:
    """What the child found, the group's peak and its kills."""
    command = [sys.executable, __file__, kind, str(args.model), "--child", "--trace", str(home / "trace.json"),
               "--context", str(args.context),
               *(["--memory", str(args.memory)] if args.memory else [])]
    drop_page_cache()
    outcome = run_limited(command, limit_bytes, _TIMEOUT_S, environment={"EDGERT_HOME": str(home)})
    if outcome.returncode:
        raise SystemExit(f"{kind}: status {outcome.returncode}, killed for memory {outcome.oom_kills} times")
    return json.loads(outcome.stdout.splitlines()[-1]), outcome.peak_bytes, outcome.oom_kills


def main() -> None:
    from edgert.units import parse_bytes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("neighbour", "context", "calibrate"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", type=parse_bytes)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps({"neighbour": neighbour, "context": context, "calibrate": calibrate}[args.what](args)))
        return
    if not is_possible():
        raise SystemExit("this needs root and a writable memory control group")
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        told, *_ = _run(args, "calibrate", 8 * 2**30, home)
        args.memory = args.memory or told["budget_bytes"]
        limit_bytes = int(args.memory * (_GROUP_SHARE if args.what == "neighbour" else 1.0))
        found, peak_bytes, n_kills = _run(args, args.what, limit_bytes, home)
    rows = found.items() if args.what == "neighbour" else [(row.pop("tokens"), row) for row in found["stretches"]]
    for name, row in rows:
        print(f"{name!s:<20} " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(f"thresholds: {found.get('thresholds', [])}; peak {peak_bytes >> 20} MiB of {limit_bytes >> 20}, "
          f"{n_kills} killed for memory")


if __name__ == "__main__":
    main()
