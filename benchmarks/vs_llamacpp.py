"""edgert beside llama.cpp, everything in memory: decode at two depths and prefill, in turn in one run.

    python benchmarks/vs_llamacpp.py MODEL.gguf [...] [--rounds 7] [--threads 2] [--only PHASE]

llama.cpp's better setting (with or without repacking) is the peer in each phase. Prints a table and a JSON line per
model: medians in tokens/s, and the ratio as the median over rounds of edgert / peer, which a noisy machine moves least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgert.cpu import usable_cores
from edgert.ggml.library import load_libraries
from edgert.gguf.model_file import ModelFile
from edgert.paths import Paths
from edgert.planning import EngineOptions
from edgert.runtime import open_engine

load_libraries()  # before the peer: both then compute with the same OpenMP settings

from llamacpp import LlamaCpp  # noqa: E402

_PROMPT, _DECODE, _DEPTHS = 512, 128, (0, 512)


class Edgert:
    """edgert's engine with the peer's interface."""

    def __init__(self, path: Path, n_threads: int) -> None:
        options = EngineOptions(context=2048, n_threads=n_threads)
        self.engine = open_engine(ModelFile.open(path), Paths.of_user(), options)

    def step(self, token_ids: list[int]) -> None:
        self.engine.step(np.array(token_ids, np.int32))

    def reset(self) -> None:
        self.engine.kv.truncate(0)


Runner = Edgert | LlamaCpp


def _prefill(runner: Runner) -> float:
    runner.reset()
    return _rate(_PROMPT, lambda: runner.step(list(range(100, 100 + _PROMPT))))


def _decode(runner: Runner, depth: int) -> float:
    runner.reset()
    if depth:
        runner.step(list(range(100, 100 + depth)))
    return _rate(_DECODE, lambda: [runner.step([100 + i]) for i in range(_DECODE)])


def _rate(n_tokens: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return n_tokens / (time.perf_counter() - start)


def compare(path: Path, n_rounds: int, n_threads: int, only: str | None = None) -> dict[str, dict[str, float]]:
    """Median tokens/s and ratios for each phase, or for the one whose name is given."""
    runners: dict[str, Runner] = {"edgert": Edgert(path, n_threads), "plain": LlamaCpp(path, n_threads=n_threads),
                                  "repack": LlamaCpp(path, n_threads=n_threads, repack=True)}
    phases: dict[str, Callable[[Runner], float]] = {f"pp{_PROMPT}": _prefill}
    for depth in _DEPTHS:
        phases[f"tg{_DECODE}@d{depth}"] = lambda runner, depth=depth: _decode(runner, depth)  # type: ignore[misc]
    result = {}
    for phase, measure in phases.items():
        if only not in (None, phase):
            continue
        for runner in runners.values():
            measure(runner)  # warm
        samples: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(n_rounds):
            for name, runner in runners.items():
                samples[name].append(measure(runner))
        medians = {name: statistics.median(values) for name, values in samples.items()}
        peer = max(("plain", "repack"), key=lambda name: medians[name])
        ratio = statistics.median(a / b for a, b in zip(samples["edgert"], samples[peer], strict=True))
        result[phase] = {**medians, "ratio": ratio}
        print(f"{path.stem:45} {phase:11} edgert {medians['edgert']:7.2f}  llama.cpp plain {medians['plain']:7.2f}  "
              f"repack {medians['repack']:7.2f}  ratio to the better {ratio:.3f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", metavar="PHASE", help="one phase, such as tg128@d512")
    args = parser.parse_args()
    for path in args.models:
        print(json.dumps({"model": path.name, **compare(path, args.rounds, args.threads, args.only)}), flush=True)


if __name__ == "__main__":
    main()
