"""The threads that read: in order, errors to whoever waits, nothing without an end."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from faulty_disk import FaultyDisk

from edgert.errors import ComputeError, ModelFileError
from edgert.ggml.backend import Cancelled
from offload import readers as readers_module
from offload.arena import Arena
from offload.direct_file import DirectFile
from offload.readers import CHUNK_BYTES, Latch, Read, Readers

PIECE_BYTES = 64 * 2**10
N_PIECES = 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(max(N_PIECES * PIECE_BYTES, 3 * CHUNK_BYTES + 4096)))
    return path


@pytest.fixture
def file(path: Path) -> Iterator[DirectFile]:
    file = DirectFile(path)
    yield file
    file.close()


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(4 * CHUNK_BYTES)
    yield arena
    arena.close()


@pytest.fixture
def open_readers() -> Iterator[Callable[[int], Readers]]:
    opened: list[Readers] = []

    def start(n_threads: int) -> Readers:
        opened.append(Readers(n_threads))
        return opened[-1]

    yield start
    for readers in opened:
        readers.close()


@pytest.fixture
def disk(path: Path, open_readers: Callable[[int], Readers],
         monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyDisk]:
    disk = FaultyDisk(path).install(monkeypatch)
    yield disk
    disk.answer()


def never() -> bool:
    return False


def pieces(file: DirectFile, arena: Arena, n_pieces: int = N_PIECES) -> list[Read]:
    return [Read(file, i * PIECE_BYTES, PIECE_BYTES, arena.base + i * PIECE_BYTES) for i in range(n_pieces)]


@pytest.mark.parametrize("n_threads", [1, 4])
def test_every_byte_arrives(path: Path, file: DirectFile, arena: Arena, open_readers: Callable[[int], Readers],
                            n_threads: int) -> None:
    readers, reads = open_readers(n_threads), pieces(file, arena)
    for read in reads:
        readers.submit(read)
    assert all(read.wait(never) >= 0 for read in reads)
    assert ctypes.string_at(arena.base, N_PIECES * PIECE_BYTES) == path.read_bytes()[:N_PIECES * PIECE_BYTES]
    assert readers.bytes_read == N_PIECES * PIECE_BYTES


def test_a_large_read_is_shared_between_threads(path: Path, file: DirectFile, arena: Arena, disk: FaultyDisk,
                                                open_readers: Callable[[int], Readers],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_module, "_SLOW_REQUEST_S", 1e9)
    readers, n_bytes = open_readers(2), 3 * CHUNK_BYTES + 4096
    read = Read(file, 0, n_bytes, arena.base)
    readers.submit(read)
    read.wait(never)
    assert sorted(disk.offsets) == [0, CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES]
    assert ctypes.string_at(arena.base, n_bytes) == path.read_bytes()[:n_bytes]


def test_a_slow_disk_gets_small_requests_and_a_fast_one_large_ones_again(
        path: Path, file: DirectFile, arena: Arena, disk: FaultyDisk, open_readers: Callable[[int], Readers],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whoever stops the readers waits for little."""
    readers, n_bytes = open_readers(1), 3 * CHUNK_BYTES

    def request_sizes(slow_s: float) -> list[int]:
        monkeypatch.setattr(readers_module, "_SLOW_REQUEST_S", slow_s)
        disk.offsets.clear()
        read = Read(file, 0, n_bytes, arena.base)
        readers.submit(read)
        read.wait(never)
        assert ctypes.string_at(arena.base, n_bytes) == path.read_bytes()[:n_bytes]
        return [b - a for a, b in pairwise([*disk.offsets, n_bytes])]

    slow, fast = request_sizes(0.0), request_sizes(1e9)
    least = 2**18
    assert slow == sorted(slow, reverse=True)
    assert (slow[0], slow[-1]) == (CHUNK_BYTES, least)
    assert (fast[0], fast[-1]) == (least, CHUNK_BYTES)


def test_stopping_the_readers_stops_them_within_a_chunk(file: DirectFile, arena: Arena, disk: FaultyDisk,
                                                        open_readers: Callable[[int], Readers],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_module, "_SLOW_REQUEST_S", 0.0)
    readers, read = open_readers(1), Read(file, 0, 2 * CHUNK_BYTES, arena.base)
    disk.stop_answering()
    readers.submit(read)
    assert disk.is_stuck.wait(60)
    closer = threading.Thread(target=readers.close)
    closer.start()
    while not readers._is_closing:
        closer.join(0.001)
    disk.answer()
    closer.join(60)
    assert not closer.is_alive()
    assert disk.offsets == [0]
    assert read.abandoned


def test_reads_are_carried_out_in_the_order_in_which_they_came(
        file: DirectFile, arena: Arena, disk: FaultyDisk, open_readers: Callable[[int], Readers]) -> None:
    readers, reads = open_readers(1), pieces(file, arena)
    for read in reads:
        readers.submit(read)
    reads[-1].wait(never)
    assert disk.offsets == [read.offset for read in reads]


def test_an_error_reaches_the_one_who_waits_and_nobody_else(
        file: DirectFile, arena: Arena, disk: FaultyDisk, open_readers: Callable[[int], Readers]) -> None:
    readers, reads = open_readers(2), pieces(file, arena, 4)
    disk.fails_with, disk.fails_from = errno.EIO, reads[3].offset
    for read in reads:
        readers.submit(read)
    for read in reads[:3]:
        read.wait(never)
    with pytest.raises(ModelFileError, match="Input/output error"):
        reads[3].wait(never)
    assert readers.bytes_read == 3 * PIECE_BYTES
    disk.fails_with = None
    again = pieces(file, arena, 4)[3]
    readers.submit(again)
    again.wait(never)


def test_an_error_that_nobody_expected_reaches_the_waiter_too(
        file: DirectFile, arena: Arena, monkeypatch: pytest.MonkeyPatch,
        open_readers: Callable[[int], Readers]) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no memory for a view")

    readers, (read, next_read) = open_readers(1), pieces(file, arena, 2)
    monkeypatch.setattr(DirectFile, "read_into", broken)
    readers.submit(read)
    with pytest.raises(MemoryError):
        read.wait(never)
    monkeypatch.undo()
    readers.submit(next_read)  # the thread lives
    next_read.wait(never)


def test_an_error_is_told_only_when_no_thread_writes_any_more(
        file: DirectFile, arena: Arena, disk: FaultyDisk, open_readers: Callable[[int], Readers]) -> None:
    """One chunk has failed while another is still being read: its memory is not free yet."""
    readers, read = open_readers(2), Read(file, 0, 2 * CHUNK_BYTES, arena.base)
    disk.fails_with, disk.fails_from = errno.EIO, CHUNK_BYTES
    disk.stop_answering()
    readers.submit(read)
    assert disk.is_stuck.wait(5)
    assert not read.done.is_set()
    disk.answer()
    with pytest.raises(ModelFileError):
        read.wait(never)
    assert read.n_chunks_left == 0


def test_abandoned_reads_are_skipped(file: DirectFile, arena: Arena, disk: FaultyDisk,
                                     open_readers: Callable[[int], Readers]) -> None:
    readers, reads = open_readers(1), pieces(file, arena, 6)
    disk.stop_answering()
    for read in reads:
        readers.submit(read)
    assert disk.is_stuck.wait(5)
    for read in reads[1:5]:
        read.abandoned = True
    disk.answer()
    for read in reads:
        read.settle(never)
    assert disk.offsets == [reads[0].offset, reads[5].offset]
    assert readers.bytes_read == 2 * PIECE_BYTES
    with pytest.raises(AssertionError):  # its bytes are not there
        reads[1].wait(never)


def test_cancelling_ends_a_wait_at_once(file: DirectFile, arena: Arena, disk: FaultyDisk,
                                        open_readers: Callable[[int], Readers]) -> None:
    readers, (read,) = open_readers(1), pieces(file, arena, 1)
    cancelled = threading.Event()
    disk.stop_answering()
    readers.submit(read)
    assert disk.is_stuck.wait(5)
    threading.Timer(0.02, cancelled.set).start()
    with pytest.raises(Cancelled):
        read.wait(cancelled.is_set)  # it would wait for ever
    assert readers_module._CANCEL_POLL_S <= 0.05  # a quarter of what a person who presses Ctrl-C is promised
    with pytest.raises(Cancelled):
        read.settle(cancelled.is_set)


def test_a_disk_that_never_answers_is_a_typed_error(file: DirectFile, arena: Arena, disk: FaultyDisk,
                                                    monkeypatch: pytest.MonkeyPatch,
                                                    open_readers: Callable[[int], Readers]) -> None:
    monkeypatch.setattr(readers_module, "_DEADLINE_S", 0.05)
    readers, (read,) = open_readers(1), pieces(file, arena, 1)
    disk.stop_answering()
    readers.submit(read)
    with pytest.raises(ComputeError, match="has not answered") as caught:
        read.wait(never)
    assert str(file.path) in str(caught.value)


def test_closing_ends_the_threads_without_doing_what_is_queued(
        file: DirectFile, arena: Arena, disk: FaultyDisk, open_readers: Callable[[int], Readers]) -> None:
    before = threading.active_count()
    readers, reads = open_readers(2), pieces(file, arena)
    disk.stop_answering()
    for read in reads:
        readers.submit(read)
    assert disk.is_stuck.wait(5)
    threading.Timer(0.02, disk.answer).start()
    assert readers.close()
    assert threading.active_count() <= before + 1  # the timer's
    assert len(disk.offsets) <= 2  # what each thread was at
    assert all(read.done.is_set() for read in reads)
    with pytest.raises(AssertionError, match="closed"):
        readers.submit(reads[0])


def test_closing_does_not_wait_for_a_dead_disk(file: DirectFile, arena: Arena, disk: FaultyDisk,
                                               monkeypatch: pytest.MonkeyPatch,
                                               open_readers: Callable[[int], Readers]) -> None:
    monkeypatch.setattr(readers_module, "_CLOSE_DEADLINE_S", 0.05)
    readers, (read,) = open_readers(2), pieces(file, arena, 1)
    disk.stop_answering()
    readers.submit(read)
    assert disk.is_stuck.wait(5)
    assert not readers.close(arena)
    disk.answer()
    read.settle(never)
    assert readers.close()


def test_closing_twice_is_safe(open_readers: Callable[[int], Readers]) -> None:
    readers = open_readers(3)
    assert readers.close() and readers.close()


def test_everybody_who_waits_for_a_latch_goes_on_when_it_is_set() -> None:
    latch, went_on = Latch(), list[bool]()
    assert not latch.wait(0.001)
    threads = [threading.Thread(target=lambda: went_on.append(latch.wait(60.0))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert not latch.is_set()
    latch.set()
    for thread in threads:
        thread.join(60.0)
    assert went_on == [True, True, True]
    assert latch.wait(0.0)


def test_reads_that_are_held_back_begin_afterwards(file: DirectFile, arena: Arena,
                                                   open_readers: Callable[[int], Readers]) -> None:
    readers, others = open_readers(2), open_readers(1)
    held, first = (Read(file, 0, PIECE_BYTES, arena.base + n * PIECE_BYTES) for n in range(2))
    with readers.held_back():
        readers.submit(held)
        others.submit(first)
        first.wait(lambda: False)
        assert not held.done.wait(0.03)
    held.wait(lambda: False)
