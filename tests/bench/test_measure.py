from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from apps.bench import measure as module
from apps.bench.contenders import Edgert, LlamaCppContender, Setup
from apps.bench.measure import run_once, synthetic_tokens, warm_up
from apps.bench.speed import Counters, SpeedTest

SETUP = Setup(None, 1, 64, "plain", "f16", 256)


class FakeContender:
    """Keeps its sequence and the sizes of its steps; a step takes 1 ms on the fake clock per token, and reads 10 bytes.

    Token 7 ends an answer, and is by far the likeliest.
    """

    vocab_size, end_ids = 50, [7]

    def __init__(self) -> None:
        self.held: list[int] = []
        self.steps: list[tuple[int, int]] = []  # depth, tokens
        self.now_ns = 5

    def truncate(self, n_tokens: int) -> None:
        assert n_tokens <= len(self.held), "there is nothing so deep"
        del self.held[n_tokens:]

    def step(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        assert token_ids.dtype == np.int32 and token_ids.size and token_ids.min() >= 0 and token_ids.max() < 50
        self.steps.append((len(self.held), len(token_ids)))
        self.held += token_ids.tolist()
        self.now_ns += 1_000_000 * len(token_ids)
        logits = np.zeros(50, np.float32)
        logits[7] = 100
        return logits

    def counters(self) -> Counters:
        return Counters(read_bytes=10 * len(self.steps))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = FakeContender()
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: fake.now_ns)
    return fake


def test_a_prompt_is_one_step_and_an_answer_one_step_per_token(fake: Any) -> None:
    test = SpeedTest(8, 3, 0)
    token_ids = warm_up(fake, test, None)
    assert fake.steps == [(0, 8), (8, 1), (9, 1), (10, 1)]
    run = run_once(fake, test, token_ids)
    assert fake.steps[4:] == [(0, 8), (8, 1), (9, 1), (10, 1)]
    ms = 1_000_000
    assert run.prompt_end_ns - run.start_ns == 8 * ms and run.total_ns == 11 * ms
    assert [at - run.prompt_end_ns for at in run.token_ns] == [ms, 2 * ms, 3 * ms]
    assert (run.prompt.read_bytes, run.answer.read_bytes) == (10, 30)


def test_a_depth_is_filled_once_and_not_timed(fake: Any) -> None:
    test = SpeedTest(0, 2, 20)
    token_ids = warm_up(fake, test, None)
    runs = [run_once(fake, test, token_ids) for _ in range(3)]
    assert fake.steps == [(0, 20)] + [(20, 1), (21, 1)] * 4
    assert {run.total_ns for run in runs} == {2_000_000}
    assert fake.held == token_ids


def test_an_answer_never_ends_early_and_is_the_same_in_every_run(fake: Any) -> None:
    test = SpeedTest(4, 30, 0)
    token_ids = warm_up(fake, test, None)
    assert len(token_ids) == 34 and 7 not in token_ids[4:]
    assert len(set(token_ids[4:])) > 5  # not one token again and again
    assert warm_up(FakeContender(), test, None) == token_ids
    assert warm_up(FakeContender(), test, token_ids) == token_ids  # a peer computes what was chosen for it
    assert len(run_once(fake, test, token_ids).token_ns) == 30


def test_prompts_are_the_same_tokens_for_every_test() -> None:
    assert synthetic_tokens(16, 1000) == synthetic_tokens(64, 1000)[:16]
    assert all(0 <= token_id < 20 for token_id in synthetic_tokens(200, 20))


@pytest.mark.parametrize("contender", [Edgert, LlamaCppContender])
def test_a_contender_computes_what_it_is_given(contender: Any, tiny_model: Callable[..., Path]) -> None:
    one = contender(tiny_model("llama"), SETUP)
    try:
        ids = np.arange(10, 30, dtype=np.int32)
        one.step(ids)
        whole = one.step(np.array([5], np.int32)).copy()
        one.truncate(20)
        again = one.step(np.array([5], np.int32)).copy()
        assert whole.shape == (one.vocab_size,) and np.array_equal(whole, again)
        assert not np.array_equal(one.step(np.array([6], np.int32)), whole)
        assert one.facts()["peak_rss_bytes"] > 2**20
    finally:
        one.close()


def test_the_first_token_of_a_text_counts_its_own_tokens(real_model: Callable[[str], Path]) -> None:
    one = Edgert(real_model("smollm2-135m"), Setup(None, 1, 64, "plain", "f16", 256))
    try:
        took_ns, n_prompt = one.first_token(64) or (0, 0)
        assert took_ns > 10**6 and 60 <= n_prompt <= 66
        again_ns, _ = one.first_token(64) or (0, 0)
        assert again_ns > 10**6
        assert one.counters().read_bytes == 0
    finally:
        one.close()
