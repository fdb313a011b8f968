"""Measures an engine as llama-bench measures: prompt processing (pp), text generation (tg), both (pg), at a depth.

Knows token ids, the engine's `step` and the clock. No text, no sampling, no reuse of a prefix; the ids are random but
the same in every run, since a model of experts takes its time by what it reads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgert.engine.engine import Engine

_SEED = 20250101


@dataclass(frozen=True, slots=True)
class SpeedTest:
    """`n_prompt` tokens at once and then `n_gen` one by one, after `n_depth` tokens that nobody times."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        """`pp512`, `tg128`, `pp512+tg128`, `pp512 @ d512`."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_timed(self) -> int:
        return self.n_prompt + self.n_gen

    @property
    def n_tokens(self) -> int:
        """What the context must hold."""
        return self.n_depth + self.n_timed


@dataclass(frozen=True, slots=True)
class Result:
    """The times of a test's repetitions, in nanoseconds, and speeds in tokens per second."""

    test: SpeedTest
    test_time: str  # when it began: ISO 8601, UTC
    samples_ns: tuple[int, ...]

    @property
    def samples_ts(self) -> tuple[float, ...]:
        return tuple(self.test.n_timed * 1e9 / max(1, sample_ns) for sample_ns in self.samples_ns)

    @property
    def avg_ns(self) -> int:
        return round(statistics.fmean(self.samples_ns))

    @property
    def stddev_ns(self) -> int:
        return round(_deviation(self.samples_ns))

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return _deviation(self.samples_ts)


def combinations(prompts: list[int], gens: list[int], pairs: list[tuple[int, int]],
                 depths: list[int]) -> list[SpeedTest]:
    """Every combination, in llama-bench's order; a size of 0 is no test."""
    return [SpeedTest(n_prompt, n_gen, depth) for depth in depths
            for n_prompt, n_gen in [*((p, 0) for p in prompts), *((0, n) for n in gens), *pairs] if n_prompt or n_gen]


def measure(engine: Engine, test: SpeedTest, repetitions: int, on_repetition: Callable[[int], None]) -> Result:
    """Time `test`, after a warm-up of its prompt and one token. The KV cache is empty afterwards.

    `on_repetition` is called with the number of repetitions done. Raises what Engine.step raises.
    """
    token_ids = np.random.default_rng(_SEED).integers(  # (n_tokens,) int32
        0, engine.arch.hp.vocab_size, test.n_tokens, dtype=np.int32)
    test_time = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    try:
        engine.kv.truncate(0)
        if test.n_depth:
            engine.step(token_ids[:test.n_depth])
        timed = token_ids[test.n_depth:]
        _pass(engine, SpeedTest(test.n_prompt, min(1, test.n_gen), test.n_depth), timed)
        samples_ns = []
        for repetition in range(repetitions):
            on_repetition(repetition)
            samples_ns.append(_pass(engine, test, timed))
    finally:
        engine.kv.truncate(0)
    return Result(test, test_time, tuple(samples_ns))


def _pass(engine: Engine, test: SpeedTest, token_ids: NDArray[np.int32]) -> int:
    """One repetition, from the test's depth on; nanoseconds."""
    engine.kv.truncate(test.n_depth)
    start_ns = time.perf_counter_ns()
    if test.n_prompt:
        engine.step(token_ids[:test.n_prompt])
    for i in range(test.n_prompt, test.n_timed):
        engine.step(token_ids[i:i + 1])
    return time.perf_counter_ns() - start_ns


def _deviation(samples: tuple[float, ...]) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0
