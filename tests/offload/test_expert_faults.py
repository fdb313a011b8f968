"""What goes wrong while experts come ends in a typed error, and the next step is right again."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from faults import BATCH, NEXT, PROMPT, step, stop_at
from faulty_disk import FaultyDisk
from numpy.typing import NDArray
from streaming import open_streaming, pool_of, window_of

from edgert.architectures.base import Weights
from edgert.engine.block_state import BlockState
from edgert.engine.engine import Engine
from edgert.errors import ComputeError, ModelFileError
from edgert.ggml.backend import Cancelled
from offload import guesses, readers

N_LAYERS, N_EXPERTS = 3, 8
FAMILIES = pytest.mark.parametrize("family", ["qwen3moe", "smallthinker"])


@pytest.fixture
def family() -> str:
    return "qwen3moe"


@pytest.fixture(autouse=True)
def guesses_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often they are wrong: reads that nobody waits for can fail, too."""
    monkeypatch.setattr(guesses, "_LEAST_SHARE", -1.0)


@pytest.fixture
def path(tiny_model: Callable[..., Path], tmp_path: Path, family: str) -> Path:
    """A copy of our own, for tests that write to it."""
    return Path(shutil.copy(tiny_model(family, n_layers=N_LAYERS, quantisation="MIXED"), tmp_path / "tiny.gguf"))


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with open_streaming(path, 1.0, batch_size=BATCH, n_slots=N_EXPERTS) as engine:
        yield engine


def fail_in_layer(engine: Engine, disk: FaultyDisk, layer: int) -> None:
    """Let the reads of every expert's up matrix in a layer fail."""
    matrix = next(m for m in pool_of(engine).shape.layers[layer] if "ffn_up" in m.piece.spec.key)
    disk.fails_with = errno.EIO
    disk.fails_from, disk.fails_before = matrix.piece.offset, matrix.piece.offset + matrix.piece.n_bytes


def recover(engine: Engine, disk: FaultyDisk) -> None:
    """The disk is whole again, and reads that were under way have ended: they may still fail."""
    disk.fails_with = None
    for reads in pool_of(engine)._reads.values():
        for read in reads:
            assert read.done.wait(5)


@FAMILIES
@pytest.mark.parametrize("n_graphs", [0, 2, 5, 9, 14, 22, 33])
@pytest.mark.parametrize("n_slots", [1, N_EXPERTS])
def test_a_step_after_a_stopped_one_is_right(path: Path, expected: list[NDArray[np.float32]], n_graphs: int,
                                             n_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_streaming(path, 1.0, batch_size=BATCH, n_slots=n_slots) as engine:
        for _ in range(2):
            with monkeypatch.context() as patched:
                stop_at(engine, patched, n_graphs)
                with pytest.raises(Cancelled):
                    step(engine, PROMPT)
            assert engine.kv.length == 0
            engine.resume()
        np.testing.assert_array_equal(step(engine, PROMPT), expected[0])
        with monkeypatch.context() as patched:
            stop_at(engine, patched, n_graphs % 3)  # a token takes three or more
            with pytest.raises(Cancelled):
                step(engine, NEXT)
        engine.resume()
        np.testing.assert_array_equal(step(engine, NEXT), expected[1])


@FAMILIES
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


@FAMILIES
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_nothing_is_computed_on_an_expert_that_could_not_be_read(
        engine: Engine, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch, expected: list[NDArray[np.float32]],
        layer: int) -> None:
    computed, compute_experts = set[int](), BlockState.compute_experts

    def recorded(state: BlockState, layer: int, w: Weights, slots: Mapping[int, int]) -> None:
        computed.add(layer)
        compute_experts(state, layer, w, slots)

    monkeypatch.setattr(BlockState, "compute_experts", recorded)
    fail_in_layer(engine, disk, layer)
    for _ in range(2):  # it still fails
        with pytest.raises(ModelFileError, match="Input/output error"):
            step(engine, PROMPT)
        assert engine.kv.length == 0
    assert computed == set(range(layer))
    recover(engine, disk)
    np.testing.assert_array_equal(step(engine, PROMPT), expected[0])
    np.testing.assert_array_equal(step(engine, NEXT), expected[1])


def test_a_failing_read_in_decode_stops_that_token_only(path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        expected: list[NDArray[np.float32]]) -> None:
    with open_streaming(path, 1.0, batch_size=BATCH, n_slots=3) as engine:  # fewer than a token needs
        disk = FaultyDisk(path).install(monkeypatch)
        np.testing.assert_array_equal(step(engine, PROMPT), expected[0])
        disk.fails_with, disk.fails_from = errno.EIO, pool_of(engine).shape.layers[0][0].piece.offset
        with pytest.raises(ModelFileError, match="Input/output error"):
            step(engine, NEXT)
        assert engine.kv.length == len(PROMPT)
        recover(engine, disk)
        np.testing.assert_array_equal(step(engine, NEXT), expected[1])
        np.testing.assert_array_equal(step(engine, NEXT), expected[2])


def test_a_disk_that_never_answers_ends_the_step(engine: Engine, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch,
                                                 expected: list[NDArray[np.float32]]) -> None:
    disk.stop_answering()
    with monkeypatch.context() as patched:
        patched.setattr(readers, "_DEADLINE_S", 0.05)
        for _ in range(2):
            with pytest.raises(ComputeError, match="has not answered"):
                step(engine, PROMPT)
    disk.answer()
    np.testing.assert_array_equal(step(engine, PROMPT), expected[0])
    np.testing.assert_array_equal(step(engine, NEXT), expected[1])


def test_short_reads_give_the_same_experts(path: Path, monkeypatch: pytest.MonkeyPatch,
                                           expected: list[NDArray[np.float32]]) -> None:
    disk = FaultyDisk(path).install(monkeypatch)
    disk.most_bytes = 4096
    with open_streaming(path, 1.0, batch_size=BATCH, n_slots=3) as engine:
        np.testing.assert_array_equal(step(engine, PROMPT), expected[0])


def test_a_file_that_is_written_to_gives_no_more_logits(path: Path, engine: Engine,
                                                        expected: list[NDArray[np.float32]]) -> None:
    np.testing.assert_array_equal(step(engine, PROMPT), expected[0])
    matrix = pool_of(engine).shape.layers[1][0]
    with path.open("r+b") as file:
        file.seek(matrix.piece.offset)
        file.write(bytes(100))
    for _ in range(2):
        with pytest.raises(ModelFileError, match="changed"):
            step(engine, NEXT)
        assert engine.kv.length == len(PROMPT)


def test_closing_on_a_dead_disk_ends_and_keeps_the_memory_that_it_may_write_to(
        path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(readers, "_CLOSE_DEADLINE_S", 0.05)
    with open_streaming(path, 1.0, n_slots=N_EXPERTS) as engine:
        weights = window_of(engine)
        disk = FaultyDisk(path).install(monkeypatch)
        disk.stop_answering()
        pool_of(engine).request(0, {0: 0})
        assert disk.is_stuck.wait(60)
    assert "does not answer" in caplog.text
    assert not weights._arena._map.closed
    disk.answer()
    monkeypatch.setattr(readers, "_CLOSE_DEADLINE_S", 60)
    weights.close()
    assert weights._arena._map.closed
