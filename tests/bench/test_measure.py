from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from apps.bench import measure as module
from apps.bench.measure import Result, SpeedTest, combinations, measure


class FakeEngine:
    """Keeps the tokens of its sequence and the sizes of its steps; a step takes 1 ms on the fake clock per token."""

    def __init__(self) -> None:
        self.arch = SimpleNamespace(hp=SimpleNamespace(vocab_size=50))
        self.kv = self
        self.held: list[int] = []
        self.steps: list[tuple[int, int]] = []  # depth, tokens
        self.now_ns = 0

    def truncate(self, n_tokens: int) -> None:
        assert n_tokens <= len(self.held), "there is nothing so deep"
        del self.held[n_tokens:]

    def step(self, token_ids: NDArray[np.int32]) -> None:
        assert token_ids.dtype == np.int32 and token_ids.size and token_ids.min() >= 0 and token_ids.max() < 50
        self.steps.append((len(self.held), len(token_ids)))
        self.held += token_ids.tolist()
        self.now_ns += 1_000_000 * len(token_ids)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: engine.now_ns)
    return engine


def _measure(engine: Any, test: SpeedTest, repetitions: int) -> Result:
    return measure(engine, test, repetitions, lambda _: None)


def test_a_prompt_is_one_step_and_an_answer_one_step_per_token(engine: FakeEngine) -> None:
    result = _measure(engine, SpeedTest(8, 3, 0), 2)
    warm_up, timed = [(0, 8), (8, 1)], [(0, 8), (8, 1), (9, 1), (10, 1)]
    assert engine.steps == warm_up + timed * 2
    assert result.samples_ns == (11_000_000, 11_000_000)
    assert (result.avg_ts, result.stddev_ts, result.stddev_ns) == (1000.0, 0.0, 0)


def test_a_depth_is_filled_once_and_not_timed(engine: FakeEngine) -> None:
    result = _measure(engine, SpeedTest(0, 2, 100), 3)
    assert engine.steps == [(0, 100), (100, 1)] + [(100, 1), (101, 1)] * 3
    assert result.samples_ns == (2_000_000,) * 3
    assert engine.held == []


def test_the_tokens_are_the_same_in_every_run(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda ids: (seen.append(ids.tolist()), step(ids)))
    _measure(engine, SpeedTest(16, 0, 0), 1)
    _measure(engine, SpeedTest(16, 0, 0), 1)
    assert all(ids == seen[0] for ids in seen) and len(set(seen[0])) > 3


def test_a_stopped_measurement_leaves_the_cache_empty(engine: FakeEngine) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(engine, SpeedTest(8, 0, 4), 1, stop)  # type: ignore[arg-type]
    assert engine.held == []


def test_averages_are_of_the_repetitions() -> None:
    result = Result(SpeedTest(10, 0, 0), "now", (10**9, 2 * 10**9, 4 * 10**9))
    assert result.samples_ts == (10.0, 5.0, 2.5)
    assert result.avg_ts == pytest.approx(35 / 6)
    assert result.stddev_ts == pytest.approx(3.8188, abs=1e-4)  # of a sample: n - 1
    assert result.avg_ns == round(7e9 / 3)
    assert Result(SpeedTest(1, 0, 0), "now", (7,)).stddev_ns == 0


@pytest.mark.parametrize(("test", "name"), [
    (SpeedTest(512, 0, 0), "pp512"), (SpeedTest(0, 128, 0), "tg128"), (SpeedTest(512, 128, 0), "pp512+tg128"),
    (SpeedTest(512, 0, 512), "pp512 @ d512"),
])
def test_names_are_llama_benchs(test: SpeedTest, name: str) -> None:
    assert test.name == name


def test_tests_are_every_combination_depth_by_depth() -> None:
    tests = combinations([64, 0], [8], [(64, 8)], [0, 32])
    assert [test.name for test in tests] == list(itertools.chain(
        ["pp64", "tg8", "pp64+tg8"], ["pp64 @ d32", "tg8 @ d32", "pp64+tg8 @ d32"]))
    assert combinations([0], [0], [], [0, 512]) == []
