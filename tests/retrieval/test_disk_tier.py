"""The store on disk: what is on its way counts until it is there, and a disk that does not answer holds nobody up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from retrieving import answer, open_retrieving, random_tokens, share_sets

from edgert.errors import KVStoreError
from edgert.ggml.backend import Cancelled
from retrieval.cache import RetrievedKVCache
from retrieval.engine import RetrievalEngine
from retrieval.record_file import RecordFile
from retrieval.selection import Policy
from retrieval.workers import Workers

TinyModel = Callable[..., Path]
N_PROMPT = 420
POLICY = Policy(96, 128, n_recent=16, least_mass=0.0)
FICKLE = Policy(180, n_recent=16, least_mass=0.0, hold=1.0, late_hold_per_token=0.0,
                survivor_weight=0.0)  # wants to exchange more than it may


class StuckDisk:
    """Reads of records wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_asked, self.is_free, real = threading.Event(), threading.Event(), RecordFile.read

        def read(*given: Any) -> None:
            self.is_asked.set()
            assert self.is_free.wait(120)
            real(*given)

        monkeypatch.setattr(RecordFile, "read", read)


@pytest.fixture
def engine(tiny_model: TinyModel, tmp_path: Path) -> Iterator[RetrievalEngine]:
    with open_retrieving(tiny_model("llama", n_layers=4), tmp_path, policy=POLICY) as engine:
        answer(engine, random_tokens(N_PROMPT), 2)
        yield engine


def arrived(kv: RetrievedKVCache) -> int:
    """How many rows came beside the step, once they are there."""
    for _, fetch in kv._exchange._coming:
        fetch.wait()
    return sum(len(missing) for missing, _ in kv._exchange._coming)


def test_what_the_next_step_lacks_is_fetched_before_it_begins(engine: RetrievalEngine) -> None:
    kv = engine._retrieved
    share_sets(engine, engine)
    answer(engine, [3], 0)
    for token_id in range(5):
        assert arrived(kv) > 10
        late, fetched = kv.counts.n_late, kv.counts.n_fetched
        answer(engine, [token_id], 0)
        assert kv.counts.n_late == late, "all of it was there"
        assert kv.counts.n_fetched > fetched


def test_a_step_computes_while_the_disk_works_for_the_next(engine: RetrievalEngine,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    kv = engine._retrieved
    share_sets(engine, engine)
    answer(engine, [3], 0)
    assert arrived(kv)
    disk, late = StuckDisk(monkeypatch), kv.counts.n_late
    answer(engine, [4], 0)  # ends, though what its follower lacks does not come
    n_to_come = sum(fetch.n_to_come for _, fetch in kv._exchange._coming)
    assert n_to_come == sum(len(missing) for missing, _ in kv._exchange._coming) > 10
    threading.Timer(0.02, disk.is_free.set).start()
    answer(engine, [5], 0)
    assert kv.counts.n_late == late + n_to_come


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_the_same_whether_its_set_was_planned(tiny_model: TinyModel, tmp_path: Path, fused: bool,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for foresees in (True, False):
        if not foresees:
            monkeypatch.setattr("retrieval.cache.RetrievedKVCache.foresight_layers", None)
        path = tiny_model("llama", n_layers=4, quantisation="F32")
        with open_retrieving(path, tmp_path, policy=POLICY, fused=fused) as engine:
            share_sets(engine, engine)
            answers.append(answer(engine, random_tokens(N_PROMPT), 12))
            assert bool(engine._retrieved._exchange._coming) == foresees
            assert engine._retrieved.counts.n_steps == 12
    assert np.abs(answers[0] - answers[1]).max() < 0.05, "but for the order of slots"


def sets_of(engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The sets that steps attend to from now on."""
    seen, bring = list[list[int]](), engine._retrieved.bring
    monkeypatch.setattr(engine._retrieved, "bring",
                        lambda chosen, batch: (seen.append(chosen.positions.tolist()), bring(chosen, batch))[1])
    return seen


def test_sets_do_not_depend_on_how_fast_the_disk_is_nor_on_who_plans_them(tiny_model: TinyModel, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    path, answers, sets = tiny_model("llama", n_layers=4, quantisation="F32"), [], []
    for case in ("fast", "slow", "no spare core"):
        with monkeypatch.context() as patch:
            if case == "slow":
                patch.setattr(RecordFile, "read", lambda *given, then=RecordFile.read: (time.sleep(0.01),
                                                                                        then(*given))[1])
            patch.setattr("retrieval.cache.usable_cores", lambda n=1 if case == "no spare core" else 2: n)
            with open_retrieving(path, tmp_path, policy=FICKLE) as engine:
                seen = sets_of(engine, patch)
                answers.append(answer(engine, random_tokens(N_PROMPT), 8))
                sets.append(seen)
    assert sets[0] == sets[1] == sets[2] and len(sets[0]) == 8
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(answers[0], answers[2])


def test_between_two_steps_only_so_many_tokens_are_exchanged(tiny_model: TinyModel, tmp_path: Path) -> None:
    with open_retrieving(tiny_model("llama", n_layers=4), tmp_path, policy=FICKLE) as engine:
        kv = engine._retrieved
        answer(engine, random_tokens(N_PROMPT), 2)
        for token_id in range(6):
            fetched, late = kv.counts.n_fetched, kv.counts.n_late
            assert arrived(kv)
            answer(engine, [token_id], 0)
            assert 0 < kv.counts.n_late - late <= FICKLE.n_late
            assert kv.counts.n_fetched - fetched <= FICKLE.n_late + FICKLE.n_beside


def test_what_was_planned_for_a_step_that_does_not_come_leaves_nothing_behind(engine: RetrievalEngine) -> None:
    kv = engine._retrieved
    answer(engine, [3], 0)
    assert kv._exchange._coming and kv.planner._plans
    engine.kv.truncate(N_PROMPT)
    assert not kv._exchange._coming and not kv.planner._plans
    answer(engine, [3, 4, 5], 3)
    engine.refresh()
    assert not kv._exchange._coming and not kv.planner._plans


def test_rows_that_are_damaged_on_their_way_ahead_are_noticed_by_the_step_that_needs_them(
        engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    share_sets(engine, engine)
    real = RecordFile.read

    def damaged(*given: Any) -> None:
        monkeypatch.setattr(RecordFile, "read", real)
        raise KVStoreError("records", "damaged")

    monkeypatch.setattr(RecordFile, "read", damaged)
    n_whole = engine._retrieved.length
    logits = answer(engine, [3], 3)  # the text is computed anew
    assert np.isfinite(logits).all()
    assert engine.kv.length == n_whole + 4


def test_a_step_that_was_stopped_after_it_looked_ahead_can_be_taken_again(tiny_model: TinyModel, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    answers, sets = [], []
    for is_stopped in (True, False):
        with open_retrieving(tiny_model("llama", n_layers=4, quantisation="F32"), tmp_path, policy=FICKLE) as engine:
            answer(engine, random_tokens(N_PROMPT), 2)
            kv = engine._retrieved
            if is_stopped:
                monkeypatch.setattr(kv.planner, "look_ahead", lambda *given, then=kv.planner.look_ahead,
                                    switch=kv._backend.cancel: (then(*given), switch.set()))
                with pytest.raises(Cancelled):
                    answer(engine, [3], 0)
                assert engine.kv.length == N_PROMPT + 2
                monkeypatch.undo()
                engine.resume()
            seen = sets_of(engine, monkeypatch)
            answers.append(answer(engine, [3], 3))
            sets.append(seen)
    assert sets[0] == sets[1]
    assert np.abs(answers[0] - answers[1]).max() < 0.02


def test_a_disk_that_does_not_answer_does_not_keep_the_store_from_closing(tiny_model: TinyModel, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.workers._CLOSE_DEADLINE_S", 0.05)
    with open_retrieving(tiny_model("llama", n_layers=4), tmp_path, policy=POLICY) as engine:
        answer(engine, random_tokens(N_PROMPT), 2)
        share_sets(engine, engine)
        answer(engine, [1], 0)
        engine._retrieved.planner.settle()
        disk = StuckDisk(monkeypatch)
        answer(engine, [3], 0)
        assert disk.is_asked.wait(60)
        hot = engine._retrieved.hot
    assert len(hot.records.rows), "what the disk still reads into stays"
    disk.is_free.set()


def test_workers_end_after_what_they_are_at_and_forget_the_rest() -> None:
    workers, begun, end = Workers(1, "test"), threading.Event(), threading.Event()
    done: list[int] = []

    def first() -> None:
        begun.set()
        assert end.wait(60)
        done.append(1)

    running, waiting = workers.submit(first), workers.submit(lambda: done.append(2))
    assert begun.wait(60)
    assert not workers.close(deadline_s=0.02)
    end.set()
    running.result(60)
    assert workers.close(deadline_s=60)
    assert done == [1] and waiting.cancelled()
    with pytest.raises(AssertionError):
        workers.submit(lambda: None)
