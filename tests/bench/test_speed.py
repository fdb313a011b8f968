from __future__ import annotations

import itertools

import pytest

from apps.bench.speed import (
    Counters,
    Run,
    SpeedTest,
    answer_rate,
    combinations,
    deviation,
    paired_ratio,
    percentile,
    prompt_rate,
    rate,
)

S = 10**9


def test_known_timestamps_give_known_rates() -> None:
    run = Run(1 * S, 3 * S, (5 * S, 6 * S, 7 * S, 9 * S))  # 2 s of prompt; the first token 2 s after it
    assert prompt_rate(SpeedTest(100, 4, 0), run) == 50.0
    assert answer_rate(run) == 0.75  # (4 - 1) tokens / (9 - 5) s: the first one's wait is not the answer's speed
    assert rate(SpeedTest(100, 4, 0), run) == 104 / 8
    assert (run.total_ns, run.end_ns, run.gaps_ns) == (8 * S, 9 * S, [S, S, 2 * S])


def test_a_prompt_alone_and_an_answer_alone() -> None:
    assert rate(SpeedTest(512, 0, 0), Run(0, 2 * S)) == 256.0
    assert answer_rate(Run(0, 2 * S)) is None and prompt_rate(SpeedTest(0, 2, 0), Run(0, 0, (S, 2 * S))) is None
    assert rate(SpeedTest(0, 3, 64), Run(0, 0, (10 * S, 11 * S, 12 * S))) == 1.0
    assert rate(SpeedTest(0, 1, 0), Run(0, 0, (4 * S,))) == 0.25  # a single token has no gap


def test_a_clock_that_did_not_move_divides_by_no_zero() -> None:
    assert rate(SpeedTest(1, 1, 0), Run(5, 5, (5,))) > 0 and answer_rate(Run(5, 5, (5, 5))) == S


def test_a_run_passes_between_processes_unchanged() -> None:
    run = Run(1, 2, (3, 5), Counters(10, 20, 30, 40), Counters(1, 2, 3, 4))
    assert Run.from_dict(run.to_dict()) == run
    assert Counters(10, 20, 30, 40).since(Counters(1, 2, 3, 4)) == Counters(9, 18, 27, 36)


def test_statistics_are_those_of_a_sample() -> None:
    assert deviation([10.0, 5.0, 2.5]) == pytest.approx(3.8188, abs=1e-4)  # n - 1
    assert deviation([7.0]) == 0.0
    assert percentile([5, 1, 4, 2, 3], 50) == 3 and percentile([*range(1, 101)], 99) == 99
    assert percentile([1, 2], 99) == 2 and percentile([1], 1) == 1


def test_a_slow_minute_that_hits_both_leaves_the_ratio() -> None:
    assert paired_ratio([10.0, 1.0, 12.0], [5.0, 0.5, 6.0]) == 2.0
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


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
