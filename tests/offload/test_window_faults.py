"""What goes wrong while weights stream ends in a typed error, and the next step is right again."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from faults import BATCH, NEXT, PROMPT, step, stop_at
from faulty_disk import FaultyDisk
from numpy.typing import NDArray
from streaming import open_streaming, small_pieces, window_of

from edgert.architectures.base import Block
from edgert.engine.engine import Engine
from edgert.errors import ComputeError, ModelFileError
from edgert.ggml.backend import Cancelled
from offload import readers
from offload.residency import Piece

N_LAYERS = 4


@pytest.fixture(autouse=True)
def pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)


@pytest.fixture
def path(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of our own, for tests that write to it."""
    return Path(shutil.copy(tiny_model("llama", n_layers=N_LAYERS, quantisation="MIXED"), tmp_path / "tiny.gguf"))


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with open_streaming(path, batch_size=BATCH) as engine:
        yield engine


def fail_in(disk: FaultyDisk, piece: Piece) -> None:
    """Let reads fail that touch the middle of a piece: at its ends it shares blocks of the disk with its neighbours."""
    middle = piece.offset + piece.n_bytes // 2
    disk.fails_with, disk.fails_from, disk.fails_before = errno.EIO, middle, middle + 1


def piece_in(engine: Engine, block: Block) -> Piece:
    return next(p for p in window_of(engine).residency.streamed if p.block == block)


# ------------------------------------------------------------------------------------------------------------ stopped


@pytest.mark.parametrize("n_graphs", [0, 1, 2, 3, 5, 8, 13, 18])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_step_after_a_stopped_one_is_right(path: Path, expected: list[NDArray[np.float32]], n_graphs: int,
                                             share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_streaming(path, share, batch_size=BATCH) as engine:
        for _ in range(2):
            stop_at(engine, monkeypatch, n_graphs)
            with pytest.raises(Cancelled):
                step(engine, PROMPT)
            monkeypatch.undo()
            small_pieces(monkeypatch)
            assert engine.kv.length == 0
            engine.resume()
        np.testing.assert_array_equal(step(engine, PROMPT), expected[0])
        stop_at(engine, monkeypatch, n_graphs % 10)
        with pytest.raises(Cancelled):
            step(engine, NEXT)
        engine.resume()
        np.testing.assert_array_equal(step(engine, NEXT), expected[1])


def test_stopping_does_not_wait_for_the_disk(engine: Engine, disk: FaultyDisk,
                                             expected: list[NDArray[np.float32]]) -> None:
    disk.stop_answering()
    for _ in range(2):  # the second time, what the first had asked for is still being read
        threading.Timer(0.03, engine.cancel).start()
        with pytest.raises(Cancelled):
            step(engine, PROMPT)
        assert disk.is_stuck.is_set()
        engine.resume()
    disk.answer()
    np.testing.assert_array_equal(step(engine, PROMPT), expected[0])
    np.testing.assert_array_equal(step(engine, NEXT), expected[1])


# ------------------------------------------------------------------------------------------------------- failing disk


@pytest.mark.parametrize("block", [Block("attention", 0), Block("ffn", 2), Block("output"), Block("output", part=1)],
                         ids=str)
def test_nothing_is_computed_on_a_block_that_could_not_be_read(
        engine: Engine, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch, expected: list[NDArray[np.float32]],
        block: Block) -> None:
    leased, wait = list[Block](), window_of(engine)._wait_for
    np.testing.assert_array_equal(step(engine, PROMPT), expected[0])

    def recorded(wanted: Block) -> int:
        n = wait(wanted)
        leased.append(wanted)
        return n

    monkeypatch.setattr(window_of(engine), "_wait_for", recorded)
    fail_in(disk, piece_in(engine, block))
    # What is in the ring already was read before the disk failed: the second step at the latest meets the failure.
    with pytest.raises(ModelFileError, match="Input/output error"):
        for n_kept in range(len(PROMPT), len(PROMPT) + 2):
            leased.clear()
            assert engine.kv.length == n_kept
            np.testing.assert_array_equal(step(engine, NEXT), expected[1 + n_kept - len(PROMPT)])
    assert block not in leased
    assert leased[-1:] == ([] if block == Block("attention", 0) else [_before(block)])


def _before(block: Block) -> Block:
    if block.kind == "output":
        return Block("ffn", N_LAYERS - 1) if block.part == 0 else Block("output", part=block.part - 1)
    return Block("attention", block.layer) if block.kind == "ffn" else Block("ffn", block.layer - 1)


@pytest.mark.parametrize("block", [Block("attention", 0), Block("ffn", 0), Block("ffn", 3), Block("output", part=1)],
                         ids=str)
def test_a_disk_that_recovers_is_read_again(engine: Engine, disk: FaultyDisk, expected: list[NDArray[np.float32]],
                                            block: Block) -> None:
    """Also where the block that failed is the first that the next step needs."""
    fail_in(disk, piece_in(engine, block))
    steps = iter([PROMPT, NEXT, NEXT])
    done = 0
    with pytest.raises(ModelFileError):
        for token_ids in steps:
            np.testing.assert_array_equal(step(engine, token_ids), expected[done])
            done += 1
    with pytest.raises(ModelFileError):  # it still fails
        step(engine, [PROMPT, NEXT, NEXT][done])
    disk.fails_with = None
    for token_ids, logits in zip([PROMPT, NEXT, NEXT][done:], expected[done:], strict=True):
        np.testing.assert_array_equal(step(engine, token_ids), logits)


def test_a_failure_while_reading_ahead_that_has_passed_is_not_noticed(
        engine: Engine, disk: FaultyDisk, expected: list[NDArray[np.float32]]) -> None:
    """Bytes that were read ahead in vain are read again before anybody is told."""
    disk.fails_with = errno.EIO
    window_of(engine)._restart_at(Block("attention", 0))
    window_of(engine)._ring_pieces[0].read.done.wait(5)
    disk.fails_with = None
    np.testing.assert_array_equal(step(engine, PROMPT), expected[0])


def test_a_row_of_the_embedding_that_cannot_be_read(engine: Engine, disk: FaultyDisk,
                                                    expected: list[NDArray[np.float32]]) -> None:
    table = window_of(engine).embedding
    disk.fails_with, disk.fails_from = errno.EIO, table._offset
    disk.fails_before = table._offset + table._row_bytes * 300
    with pytest.raises(ModelFileError, match="Input/output error"):
        step(engine, PROMPT)
    disk.fails_with = None
    np.testing.assert_array_equal(step(engine, PROMPT), expected[0])


def test_a_disk_that_never_answers_ends_the_step(engine: Engine, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch,
                                                 expected: list[NDArray[np.float32]]) -> None:
    monkeypatch.setattr(readers, "_DEADLINE_S", 0.05)
    np.testing.assert_array_equal(step(engine, PROMPT), expected[0])
    disk.stop_answering()
    for _ in range(2):
        with pytest.raises(ComputeError, match="has not answered"):
            for _ in range(2):
                step(engine, NEXT)
    monkeypatch.undo()
    small_pieces(monkeypatch)
    disk.answer()
    engine.kv.truncate(len(PROMPT))
    np.testing.assert_array_equal(step(engine, NEXT), expected[1])


def test_short_reads_give_the_same_weights(path: Path, monkeypatch: pytest.MonkeyPatch,
                                           expected: list[NDArray[np.float32]]) -> None:
    disk = FaultyDisk(path).install(monkeypatch)
    disk.most_bytes = 4096
    with open_streaming(path, 0.3, batch_size=BATCH) as engine:
        np.testing.assert_array_equal(step(engine, PROMPT), expected[0])


@pytest.mark.parametrize("fails_from_share", [0.0, 0.7])
def test_a_model_that_cannot_be_read_is_not_loaded_and_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                      fails_from_share: float) -> None:
    disk = FaultyDisk(path).install(monkeypatch)
    disk.fails_with, disk.fails_from = errno.EIO, int(path.stat().st_size * fails_from_share)
    process = psutil.Process()
    before = process.num_fds(), threading.active_count()
    with pytest.raises(ModelFileError), open_streaming(path, 0.9):
        pass
    assert (process.num_fds(), threading.active_count()) == before


# ------------------------------------------------------------------------------------------------------ changing file


def test_a_file_that_is_written_to_gives_no_more_logits(path: Path, engine: Engine,
                                                        expected: list[NDArray[np.float32]]) -> None:
    np.testing.assert_array_equal(step(engine, PROMPT), expected[0])
    piece = piece_in(engine, Block("ffn", 1))
    with path.open("r+b") as file:
        file.seek(piece.offset)
        file.write(bytes(100))
    for _ in range(2):  # the file is still another one, so no later step may compute with it either
        with pytest.raises(ModelFileError, match="changed"):
            step(engine, NEXT)
        assert engine.kv.length == len(PROMPT)


def test_a_file_that_is_written_to_in_the_middle_of_a_step_gives_no_logits(
        path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = window_of(engine)._wait_for

    def writes(block: Block) -> int:
        if block == Block("ffn", N_LAYERS - 1):
            os.utime(path, ns=(1, 1))
        return wait(block)

    monkeypatch.setattr(window_of(engine), "_wait_for", writes)
    with pytest.raises(ModelFileError, match="changed"):
        step(engine, PROMPT)


def test_a_file_that_is_cut_is_a_typed_error(path: Path, engine: Engine) -> None:
    step(engine, PROMPT)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ModelFileError, match=r"shorter|changed"):
        step(engine, NEXT)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_removed_or_replaced_is_read_as_it_was(path: Path, engine: Engine, replaced: bool,
                                                              expected: list[NDArray[np.float32]]) -> None:
    np.testing.assert_array_equal(step(engine, PROMPT), expected[0])
    size_bytes = path.stat().st_size
    path.unlink()
    if replaced:
        path.write_bytes(bytes(size_bytes))
    np.testing.assert_array_equal(step(engine, NEXT), expected[1])


def test_a_file_that_changes_between_its_header_and_its_weights_is_refused(path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming import residency_of  # where the plan is made, the header has been read

    def cut_meanwhile(*arguments: object) -> object:
        os.truncate(path, path.stat().st_size - 1)
        return residency_of(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("streaming.residency_of", cut_meanwhile)
    with pytest.raises(ModelFileError, match="changed"), open_streaming(path):
        pass


# --------------------------------------------------------------------------------------------------------------- close


def test_closing_on_a_dead_disk_ends_and_keeps_the_memory_that_it_may_write_to(
        path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(readers, "_CLOSE_DEADLINE_S", 0.05)
    with open_streaming(path, 0.1) as engine:
        weights = window_of(engine)
        disk = FaultyDisk(path).install(monkeypatch)
        disk.stop_answering()
        weights._restart_at(Block("attention", 0))
        assert disk.is_stuck.wait(5)
    assert "does not answer" in caplog.text
    assert weights._arena.free_bytes >= 0 and not weights._arena._map.closed
    disk.answer()
    weights.close()
    assert weights._arena._map.closed
