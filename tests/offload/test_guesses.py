"""Guesses of the next layer's experts are read ahead where most were right, and change no answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine.engines import open_engine, random_tokens
from streaming import logits_of, open_streaming, pool_of, small_pieces

from offload import guesses
from offload.experts import ExpertPool
from offload.guesses import Guesses

TinyModel = Callable[..., Path]
N_EXPERTS, N_SLOTS = 16, 8
_DEADLINE_S = 60.0


def guess_rightly(pool: ExpertPool, n_tokens: int, first: int = 0) -> None:
    """Tokens whose experts come round in turn, of which the next layer's are guessed."""
    for token in range(first, first + n_tokens):
        pass_layers(pool, token, [2 * token % N_EXPERTS, (2 * token + 1) % N_EXPERTS])


def pass_layers(pool: ExpertPool, token: int, guessed: list[int]) -> None:
    """Two layers want the same experts; what the second wants is `guessed` in the first."""
    wanted = {expert % N_EXPERTS: token for expert in (2 * token, 2 * token + 1)}
    for layer in (0, 1):
        pool.request(layer, wanted)
        if layer == 0:
            pool.expect(1, guessed)
        for _ in pool.waves(layer, wanted):
            pass
        pool.release()


def n_guesses(pool: ExpertPool) -> tuple[float, float]:
    plan = pool.plan()
    return plan["expert_guesses"], plan["expert_wrong_guesses"]


def test_what_was_guessed_rightly_is_here_when_it_is_asked_for(tiny_model: TinyModel) -> None:
    with open_streaming(tiny_model("qwen3moe", n_experts=N_EXPERTS), 1.0, n_slots=N_SLOTS) as engine:
        pool = pool_of(engine)
        guess_rightly(pool, 40)
        assert n_guesses(pool)[0] > 0
        wanted = {0: 40, 1: 40}
        pool.request(0, wanted)
        for _ in pool.waves(0, wanted):
            pass
        before, misses, deadline = pool.bytes_read, pool.counters.misses, time.monotonic() + _DEADLINE_S
        n_bytes = 2 * sum(matrix.expert_bytes for matrix in pool.shape.layers[1])
        pool.expect(1, [0, 1])
        while pool.bytes_read - before < n_bytes and time.monotonic() < deadline:
            time.sleep(0.001)
        pool.release()
        slots = pool.request(1, wanted)
        while slots is None and time.monotonic() < deadline:  # a reader has counted bytes that it says are there now
            slots = pool.request(1, wanted)
        assert slots is not None
        assert sorted(slots) == [0, 1]
        assert pool.counters.misses - misses == 2  # they had to be read all the same


def test_guesses_that_are_wrong_are_read_no_more(tiny_model: TinyModel) -> None:
    with open_streaming(tiny_model("qwen3moe", n_experts=N_EXPERTS), 1.0, n_slots=N_SLOTS) as engine:
        pool = pool_of(engine)
        guess_rightly(pool, 60)
        assert n_guesses(pool)[1] == 0
        for token in range(60, 120):
            pass_layers(pool, token, [(2 * token + 5) % N_EXPERTS, (2 * token + 6) % N_EXPERTS])
        after = n_guesses(pool)
        assert 0 < after[1] < 40
        for token in range(120, 140):
            pass_layers(pool, token, [(2 * token + 5) % N_EXPERTS, (2 * token + 6) % N_EXPERTS])
        assert n_guesses(pool) == after
        guess_rightly(pool, 40, first=140)
        assert n_guesses(pool)[0] > after[0]  # they have become right


def test_what_is_guessed_takes_no_slot_of_what_is_guessed_too(tiny_model: TinyModel,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pool is smaller than what a token uses, the experts that come next are those that would give way."""
    monkeypatch.setattr(guesses, "_LEAST_SHARE", -1.0)
    with open_streaming(tiny_model("qwen3moe", n_experts=N_EXPERTS), 1.0, n_slots=N_SLOTS) as engine:
        pool = pool_of(engine)
        for layer, token, wanted in ((0, 0, [0, 1]), (1, 0, [0, 1]), (0, 1, [2, 3, 4, 5])):  # all slots are taken
            last_use = dict.fromkeys(wanted, token)
            pool.request(layer, last_use)
            for _ in pool.waves(layer, last_use):
                pass
            if token:
                pool.expect(1, [0, 6, 1, 7])
            pool.release()
        before = pool.counters.misses
        pool.request(1, {0: 1, 1: 1})
        assert pool.counters.misses == before


def test_a_pool_for_hardly_a_layer_reads_no_guesses(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesses, "_LEAST_SHARE", -1.0)
    with open_streaming(tiny_model("qwen3moe", n_experts=N_EXPERTS), 1.0, n_slots=7) as engine:
        guess_rightly(pool_of(engine), 10)
        assert n_guesses(pool_of(engine)) == (0, 0)


@pytest.mark.parametrize("n_slots", [8, 12, 20])
@pytest.mark.parametrize("family", ["qwen3moe", "smallthinker"])
def test_answers_with_guesses_are_those_of_resident_weights(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch,
                                                            family: str, n_slots: int) -> None:
    small_pieces(monkeypatch)
    monkeypatch.setattr(guesses, "_LEAST_SHARE", -1.0)
    path, steps = tiny_model(family, n_experts=N_EXPERTS, n_layers=3), [[t] for t in random_tokens(24)]
    with open_engine(path) as resident, open_streaming(path, 1.0, n_slots=n_slots) as engine:
        for expected, logits in zip(logits_of(resident, steps), logits_of(engine, steps), strict=True):
            np.testing.assert_array_equal(expected, logits)
        assert n_guesses(pool_of(engine))[0] > 0


def test_the_share_of_right_guesses_decides() -> None:
    made = Guesses()
    assert not made.make(1, [3, 4])  # none was right before
    for _ in range(20):
        made.make(1, [3, 4])
        made.learn(1, [3, 4])
    assert made.make(1, [3])
    made.learn(2, [5])  # another layer tells nothing of it
    assert made.make(1, [3])
    for _ in range(20):
        made.make(1, [3, 4])
        made.learn(1, [5])
    assert not made.make(1, [3])
