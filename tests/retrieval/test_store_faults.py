"""What happens in a home to keys and values on disk: full, damaged, or silent. Never an answer from what is not whole,
and the next request goes on."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_head import page_selector
from retrieving import answer, open_dense, open_retrieving, random_tokens

from edgert.errors import DiskSilent, KVStoreError, NoSpace
from retrieval import staged
from retrieval.arrays import Halves, Positions
from retrieval.cache import RetrievedKVCache
from retrieval.record_file import RecordFile
from retrieval.records import Records
from retrieval.selection import Policy
from retrieval.store import N_WAITING

TinyModel = Callable[..., Path]
PROMPT = random_tokens(420)
POLICY = Policy(96, n_recent=16, least_mass=0.0)


def damage(kv: RetrievedKVCache, position: int) -> None:
    assert kv.disk is not None
    part = kv.disk._parts[kv.hot.records.shape]
    fd = os.open(f"/proc/self/fd/{part.file._file.fd}", os.O_RDWR)
    offset = position * part.file.stride_bytes + 3
    os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 1]), offset)
    os.fsync(fd)
    os.close(fd)


def records_kept(kv: RetrievedKVCache, monkeypatch: pytest.MonkeyPatch) -> dict[int, Halves]:
    """Copies of what layers that see everything give to the store from now on, by position."""
    kept, real = dict[int, Halves](), kv.cold.keep

    def keep(records: Records, rows: Positions, positions: Positions) -> None:
        if records is kv.hot.records:
            kept.update(zip(positions.tolist(), records.values()[rows].copy(), strict=True))
        real(records, rows, positions)

    monkeypatch.setattr(kv.cold, "keep", keep)
    return kept


def record_at(kv: RetrievedKVCache, position: int) -> Halves:
    """What the files have of a token."""
    assert kv.disk is not None
    kv.disk.flush()
    seen = Records(kv._backend, kv.hot.records.shape, 1, "what was written")
    kv.disk.fetch(seen, np.array([0]), np.array([position]))
    record = seen.values()[0].copy()
    seen.close()
    return record


def test_a_read_that_comes_after_its_deadline_ends_the_store_and_changes_no_answer(
        tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.workers._DEADLINE_S", 0.1)
    is_free, real = threading.Event(), RecordFile.read
    with open_retrieving(tiny_model("llama"), tmp_path, policy=POLICY) as engine:
        answer(engine, PROMPT, 3)
        engine._retrieved.planner.settle()

        def silent(*given: Any) -> None:
            assert is_free.wait(60)
            real(*given)

        monkeypatch.setattr(RecordFile, "read", silent)
        with pytest.raises(DiskSilent, match="has not answered"):
            for token_id in range(40):
                answer(engine, [token_id], 0)
        monkeypatch.setattr(RecordFile, "read", real)
        length = engine.kv.length
        for _ in range(2):  # nor does anything compute over memory that the read may yet write to
            with pytest.raises(DiskSilent, match="start edgert again"):
                answer(engine, [1], 0)
            assert engine.kv.length == length
        kv, nothing = engine._retrieved, np.zeros(0, np.int64)
        with pytest.raises(DiskSilent):
            kv.cold.start_fetch(kv.hot.records, nothing, nothing)
        assert kv.disk is not None
        monkeypatch.setattr("retrieval.workers._DEADLINE_S", 1000.0)
        with pytest.raises(DiskSilent):  # nobody waits for it once more
            kv.disk._workers.wait([Future()])
        is_free.set()


def test_records_whose_write_failed_are_written_with_the_next(tiny_model: TinyModel, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files, of which one alone takes no more for a while; and an older text's records lie in it."""
    with open_retrieving(tiny_model("gemma3"), tmp_path, policy=POLICY) as engine:
        kv = engine._retrieved
        assert kv.disk is not None
        answer(engine, PROMPT, 0)
        kv.truncate(300)
        engine.refresh()
        answer(engine, random_tokens(20, 5), 0)
        part = kv.disk._parts[kv.hot.records.shape]

        def full(*_: Any) -> None:
            raise NoSpace("there", 1, 0)

        kept = records_kept(kv, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(part.file, "write", full)
            with pytest.raises(NoSpace):
                answer(engine, [1], 60)
        kept.pop(kv.length)  # of the step that was stopped
        engine.refresh()
        answer(engine, [1, 2, 3, 4, 5], 40)
        assert len(kept) > 60
        for position, record in kept.items():
            assert np.array_equal(record_at(kv, position), record), position


def test_a_step_that_reached_one_of_two_files_leaves_nothing_in_it(tiny_model: TinyModel, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    with open_retrieving(tiny_model("gemma3"), tmp_path, policy=POLICY) as engine:
        kv = engine._retrieved
        assert kv.disk is not None and kv.hot.ring is not None
        answer(engine, PROMPT, 2)
        full, window = (kv.disk._parts[records.shape] for records in (kv.hot.records, kv.hot.ring))
        while full.n_kept - full.n_started < N_WAITING // 2 - 1:
            answer(engine, [3], 0)
        keep = kv.disk.keep

        def one_file(records: Any, *given: Any) -> None:
            if records is kv.hot.ring:
                raise NoSpace("there", 1, 0)
            keep(records, *given)

        with monkeypatch.context() as patch:
            patch.setattr(kv.disk, "keep", one_file)
            with pytest.raises(NoSpace):
                answer(engine, [1], 0)
        assert full.n_kept == window.n_kept + 1 == kv.length + 1, "and is being written"
        kept = records_kept(kv, monkeypatch)
        answer(engine, [2], 0)
        assert full.n_kept == window.n_kept == kv.length
        assert np.array_equal(record_at(kv, kv.length - 1), kept[kv.length - 1])


def test_a_text_that_goes_on_from_a_damaged_page_is_computed_anew(tiny_model: TinyModel, tmp_path: Path) -> None:
    with open_retrieving(tiny_model("llama"), tmp_path, policy=POLICY, selector=page_selector) as engine:
        answer(engine, PROMPT, 0)
        damage(engine._retrieved, 401)
        engine.refresh()
        with pytest.raises(KVStoreError, match="damaged"):
            engine.kv.truncate(405)
        engine.kv.truncate(0)  # as a runtime does then
        assert np.isfinite(answer(engine, PROMPT[:405], 2)).all()


@pytest.mark.parametrize("batch_size", [4, 512])
def test_a_short_prompt_stays_one_while_a_damaged_text_is_computed_anew(tiny_model: TinyModel, tmp_path: Path,
                                                                        batch_size: int) -> None:
    path, prompt = tiny_model("llama"), list(range(1, 11))
    with open_retrieving(path, tmp_path, policy=POLICY, batch_size=batch_size) as engine:
        answer(engine, PROMPT, 0)
        damage(engine._retrieved, 100)
        engine.refresh()
        logits = answer(engine, prompt, 0)
        assert engine.kv.length == 430
        assert engine.selected_tokens is None, "a prompt is attended whole"
    with open_dense(path, batch_size=batch_size) as dense:
        assert np.abs(answer(dense, [*PROMPT, *prompt], 0) - logits).max() < 0.5


def test_a_prompt_for_whose_records_there_is_no_room_is_refused_before_it_is_computed(
        tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_retrieving(tiny_model("llama"), tmp_path, policy=POLICY) as engine:
        kv, real = engine._retrieved, staged.shutil.disk_usage(tmp_path)
        assert kv.disk is not None
        layers = 4 * engine.arch.hp.n_layers * engine.arch.hp.kv_size * 420
        monkeypatch.setattr(staged.shutil, "disk_usage",
                            lambda _: real._replace(free=layers + kv.disk.lacking_bytes(420) - 1))  # type: ignore
        monkeypatch.setattr(engine, "_pass", lambda *_: pytest.fail("the prompt was computed"))
        with pytest.raises(NoSpace, match="--kv-store"):
            answer(engine, PROMPT, 0)
        monkeypatch.undo()
        assert np.isfinite(answer(engine, PROMPT, 1)).all()
        assert kv.disk.lacking_bytes(420) == 0


def test_a_disk_that_fills_while_a_prompt_passes_is_told_as_such(tiny_model: TinyModel, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_retrieving(tiny_model("llama"), tmp_path, policy=POLICY) as engine:
        monkeypatch.setattr(staged, "_write", full)
        with pytest.raises(NoSpace):
            answer(engine, PROMPT, 0)
        monkeypatch.undo()
        assert engine.kv.length == 0
        assert np.isfinite(answer(engine, PROMPT, 1)).all()


@pytest.mark.parametrize("begins_with", [150, 195], ids=["growing", "a prompt just below"])
def test_a_text_that_grows_beyond_its_threshold_leaves_no_dense_memory(tiny_model: TinyModel, tmp_path: Path,
                                                                       begins_with: int) -> None:
    with open_retrieving(tiny_model("llama"), tmp_path, policy=POLICY) as engine:
        kv, given = engine._retrieved, list[slice]()
        real = kv.dense.give_back_layers
        kv.dense.give_back_layers = lambda layers: (given.append(layers), real(layers))[1]  # type: ignore
        answer(engine, PROMPT[:begins_with], 215 - begins_with)
        assert kv.length == 215 and kv.dense.length == 0
        n_layers = engine.arch.hp.n_layers
        assert [*range(n_layers)] == [i for one in given for i in range(n_layers)[one]]


def test_a_text_that_was_forgotten_leaves_no_dense_memory_beside_a_long_prompt(tiny_model: TinyModel,
                                                                               tmp_path: Path) -> None:
    with open_retrieving(tiny_model("llama"), tmp_path, policy=POLICY) as engine:
        kv, given = engine._retrieved, list[slice]()
        answer(engine, PROMPT[:150], 0)
        kv.truncate(0)
        engine.refresh()
        kv.dense.give_back_layers = given.append  # type: ignore[method-assign]
        answer(engine, random_tokens(420, 9), 0)
        assert given[0] == slice(0, engine.arch.hp.n_layers)
