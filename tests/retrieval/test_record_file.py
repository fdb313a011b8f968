"""The records' file: what is read is what was written, or an error; and a step's damage is a pause, never an answer."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from retrieving import answer, open_retrieving, random_tokens

from edgert.errors import KVStoreError, NoSpace
from edgert.ggml.backend import Backend
from retrieval import record_file
from retrieval.batched_reads import BatchedReads
from retrieval.engine import RetrievalEngine
from retrieval.record_file import N_READERS, RecordFile
from retrieval.records import Records, RecordShape
from retrieval.selection import Policy

TinyModel = Callable[..., Path]
SHAPE = RecordShape((0, 1, 2), 100)
N = 60


@pytest.fixture
def records() -> Iterator[Records]:
    backend = Backend(1)
    held = Records(backend, SHAPE, N, "records")
    held.rows[:] = np.random.default_rng(0).integers(0, 256, held.rows.shape, dtype=np.uint8)
    yield held
    held.close()
    backend.close()


def memory(records: Records) -> list[memoryview]:
    return [row.data for row in records.rows]


@pytest.fixture(params=[("direct", "buffered"), ("buffered",)])
def file(request: pytest.FixtureRequest, tmp_path: Path, records: Records) -> Iterator[RecordFile]:
    opened = RecordFile(tmp_path / "records", SHAPE.stride_bytes, N, request.param)
    assert len(request.param) > 1 or opened.method == "buffered"
    opened.write(0, memory(records))
    yield opened
    opened.close()


def read(file: RecordFile, positions: list[int], into: Records) -> None:
    file.read(np.array(positions, np.int64), memory(into)[:len(positions)])


def test_records_come_back_in_any_order_of_rows_and_neighbours_in_one_read(file: RecordFile, records: Records) -> None:
    kept, positions = records.rows.copy(), [3, 4, 5, 20, 40, 41]
    records.rows[:] = 0
    read(file, positions, records)
    assert np.array_equal(records.rows[:6], kept[positions])
    assert file.n_reads == 3


def test_a_shape_keeps_rows_apart_by_whole_sectors_and_off_the_caches_stride() -> None:
    for kv_size in (64, 100, 192, 1024):
        for n_layers in (1, 24, 30):
            shape = RecordShape(tuple(range(n_layers)), kv_size)
            assert shape.stride_bytes % 512 == 0
            assert shape.stride_bytes % 2048
            assert 0 <= shape.stride_bytes - shape.used_bytes <= 1024


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_an_error(file: RecordFile, records: Records, bit: int) -> None:
    with file.path.open("r+b") as raw:
        raw.seek(20 * SHAPE.stride_bytes + 99)
        byte = raw.read(1)[0]
        raw.seek(-1, os.SEEK_CUR)
        raw.write(bytes([byte ^ (1 << bit)]))
        os.fsync(raw.fileno())
    is_there = np.zeros(2, bool)
    file.read(np.array([19, 21]), memory(records)[:2], is_there)
    assert is_there.all()
    is_there[:] = False
    with pytest.raises(KVStoreError, match="token 20"):
        file.read(np.array([19, 20]), memory(records)[:2], is_there)
    assert not is_there[1]


def test_after_a_batch_that_ends_early_the_next_ones_are_read(file: RecordFile, records: Records) -> None:
    kept = records.rows.copy()
    file.checksums[1] ^= 1
    for _ in range(N_READERS + 1):
        with pytest.raises(KVStoreError, match="token 1 "):
            read(file, [*range(N)], records)
    records.rows[:] = 0
    read(file, [*range(2, N)], records)
    assert np.array_equal(records.rows[:N - 2], kept[2:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asynchronous reads are Linux's")
def test_what_the_system_refuses_of_a_batch_is_said_of_that_read_alone(file: RecordFile, records: Records) -> None:
    batches = BatchedReads(file._file.fd, 1)
    addresses = np.array([records.base, 4096], np.uint64)  # nothing is mapped there
    ended = {*batches.read(addresses, SHAPE.stride_bytes, np.array([5, 6]) * SHAPE.stride_bytes)}
    assert ended == {(0, SHAPE.stride_bytes), (1, -errno.EFAULT)}
    batches.close()


def test_a_record_in_anothers_place_is_an_error(file: RecordFile, records: Records) -> None:
    file.checksums[8] = file.checksums[7]
    with pytest.raises(KVStoreError, match="token 8"):
        read(file, [8], records)


def test_a_file_that_was_cut_is_an_error(file: RecordFile, records: Records) -> None:
    os.truncate(file.path, 30 * SHAPE.stride_bytes)
    read(file, [29], records)
    with pytest.raises(KVStoreError, match="shorter"):
        read(file, [29, 30], records)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EIO, KVStoreError)])
def test_a_write_that_the_disk_refuses_says_why(file: RecordFile, records: Records, monkeypatch: pytest.MonkeyPatch,
                                                number: int, kind: type[Exception]) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(kind):
        file.write(0, memory(records))


def test_a_write_of_a_part_is_a_full_disk(file: RecordFile, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 512)
    with pytest.raises(NoSpace):
        file.write(0, memory(records))


def test_a_store_without_room_is_refused_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(NoSpace):
        RecordFile.temporary(tmp_path, 512, 100)
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_file_has_no_name(tmp_path: Path) -> None:
    with_no_name = RecordFile.temporary(tmp_path, 512, 100)
    assert list(tmp_path.iterdir()) == []
    with_no_name.close()


def damaged_while_running(engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch,
                          damage: Callable[[memoryview], int | None], n_times: int) -> None:
    """The next `n_times` reads of steps come back damaged."""
    left, real, real_batch = [n_times], os.preadv, BatchedReads.read

    def damaged(memory: memoryview, n: int) -> int:
        if left[0] <= 0:
            return n
        left[0] -= 1
        return damage(memory) or n

    def preadv(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        return damaged(buffers[0], real(fd, buffers, offset, *flags))

    def read(self: BatchedReads, addresses: Any, n_bytes: int, offsets: Any) -> Iterator[tuple[int, int]]:
        for index, n in real_batch(self, addresses, n_bytes, offsets):
            row = (ctypes.c_uint8 * n_bytes).from_address(int(addresses[index]))
            try:
                yield index, damaged(memoryview(row).cast("B"), n)
            except OSError as error:
                yield index, -(error.errno or 0)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(BatchedReads, "read", read)


def flip(memory: memoryview) -> None:
    memory[5] ^= 4


def cut(memory: memoryview) -> int:
    return len(memory) // 2


def refuse(memory: memoryview) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("damage", [flip, cut, refuse])
def test_damage_while_an_answer_is_made_is_a_pause_after_which_it_goes_on(
        tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        damage: Callable[[memoryview], int | None], is_batched: bool) -> None:
    path, policy, prompt = tiny_model("llama"), Policy(96, n_recent=16, least_mass=0.0), random_tokens(420)
    said, rest = [(7 * i + 3) % 250 for i in range(4)], [11, 12, 13, 14]
    if not is_batched:
        monkeypatch.setattr(BatchedReads, "__init__", lambda *_: refuse(memoryview(b"")))
    with open_retrieving(path, tmp_path, policy=policy) as engine:  # what is computed anew is a prompt
        engine.step(np.array([*prompt, *said], np.int32))
        expected = [engine.step(np.array([one], np.int32))[0].copy() for one in rest]
    with open_retrieving(path, tmp_path, policy=policy) as engine:
        answer(engine, prompt, len(said))
        engine._retrieved.planner.settle()
        damaged_while_running(engine, monkeypatch, damage, 1)
        after = [engine.step(np.array([one], np.int32))[0].copy() for one in rest]
        assert engine.kv.length == 428
    assert np.array_equal(after, expected)


def test_a_disk_that_stays_damaged_ends_the_answer_with_the_reason(tiny_model: TinyModel, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    with open_retrieving(tiny_model("llama"), tmp_path) as engine:
        answer(engine, random_tokens(420), 4)
        damaged_while_running(engine, monkeypatch, refuse, 10_000)
        with pytest.raises(KVStoreError):
            for _ in range(20):
                engine.step(np.array([5], np.int32))
        monkeypatch.undo()
        engine.kv.truncate(0)
        assert np.isfinite(answer(engine, random_tokens(420), 4)).all()


def test_a_disk_that_fills_up_ends_the_answer_with_the_reason(tiny_model: TinyModel, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_retrieving(tiny_model("llama"), tmp_path) as engine:
        answer(engine, random_tokens(420), 4)
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(NoSpace):
            for _ in range(60):
                engine.step(np.array([5], np.int32))
        monkeypatch.undo()
        engine.kv.truncate(0)
        assert np.isfinite(answer(engine, random_tokens(420), 4)).all()
