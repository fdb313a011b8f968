"""Results and rows as a measurement makes them, with known figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from apps.bench.contenders import EngineName, Setup
from apps.bench.results import FirstTokens, Result, Row, Subject, row
from apps.bench.sampler import Observed
from apps.bench.speed import Counters, Run, SpeedTest

S = 10**9
ENVIRONMENT: dict[str, Any] = {
    "edgert_version": "0.1.0", "edgert_commit": None, "ggml_version": "0.25.3", "llama_cpp_python_version": "0.3.36",
    "python": "3.11.7", "kernel": "6.1", "machine": "aarch64", "device": "Board <5>", "cpu": 'a "fast" CPU',
    "n_cpus": 4, "memory_bytes": 4 * 2**30, "governor": "schedutil", "power_mode": None, "huge_pages": "madvise",
    "model_name": "tiny & small.gguf", "model_sha256": "0" * 64,
    "disk": {"bytes_s": 1.5e9, "samples_bytes_s": [1.4e9, 1.5e9], "read_ahead_kib": 128}}
SUBJECT = Subject("edgert-0.1.0+ggml-0.25.3", 'a "fast" CPU', "/home/someone/tiny & small.gguf", "llama 135M Q4_1",
                  96_576_768, 134_515_008, ENVIRONMENT)
SETUP = Setup(None, 2, 512, "auto", "f16", 640)
UNSEEN = Observed(None, None, None, None, None, None, None, None,
                  {"energy": "no battery", "temperature_c": "no sensor", "clock_mhz": "no clocks",
                   "throttled": "no clocks"})
SEEN = Observed("INA3221", "VDD_IN", 5.25, None, 0.125, 61.5, 1510.0, True, {})


def prompt(seconds: Sequence[float] = (1.0, 2.0), n_prompt: int = 512, engine: EngineName = "edgert",
           memory_bytes: int | None = None, **more: Any) -> Result:
    """`pp512` with runs of so many seconds."""
    runs = tuple(Run(7, 7 + round(took * S)) for took in seconds)
    return _result(SpeedTest(n_prompt, 0, 0), runs, engine, memory_bytes, **more)


def answer(gap_s: Sequence[float] = (0.1, 0.2), n_gen: int = 5, engine: EngineName = "edgert",
           memory_bytes: int | None = None, **more: Any) -> Result:
    """`tg5 @ d64`: the first token takes a second in every run, each other one `gap_s`."""
    runs = tuple(Run(0, 0, tuple(round(S + gap * S * number) for number in range(n_gen)),
                     answer=Counters(n_gen * 1000, n_gen * 2_000_000, 30, 10)) for gap in gap_s)
    return _result(SpeedTest(0, n_gen, 64), runs, engine, memory_bytes, **more)


def _result(test: SpeedTest, runs: tuple[Run, ...], engine: EngineName, memory_bytes: int | None,
            **more: Any) -> Result:
    ours = engine == "edgert"
    result = Result(
        engine, replace(SETUP, memory_bytes=memory_bytes), test, "2026-01-01T00:00:00Z", runs,
        FirstTokens(test.n_prompt + 1, (S, 3 * S)) if ours and test.n_prompt else FirstTokens(None, ()),
        {"plan": {"weights": "streamed" if memory_bytes else "resident", "window_bytes": 2**20} if ours else {},
         "peak_rss_bytes": 200 * 2**20, "pinned_bytes": 100 * 2**20 if ours else None},
        UNSEEN, 3 * S, 1.0, None, None, 2.0 * S if ours and test.n_prompt else None,
        0.125 * S if ours and test.n_gen else None, 0.002)
    return replace(result, **more)


def rows() -> list[Row]:
    """Two tests, and llama.cpp beside the second."""
    ours, theirs = answer(observed=SEEN), answer((0.2, 0.4), engine="llama.cpp")
    return [row(SUBJECT, one) for one in (prompt(), ours.beside("llama.cpp", 2.0), theirs)]


def sweep() -> list[Row]:
    """A prompt and an answer within two budgets, slower in the smaller one."""
    return [row(SUBJECT, result) for mib in (128, 256)
            for result in (prompt((256 / mib, 260 / mib), memory_bytes=mib * 2**20),
                           answer((25.6 / mib, 26 / mib), memory_bytes=mib * 2**20))]
