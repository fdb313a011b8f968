"""Pinned weights that are given back and taken again between two steps: the answer is the same, the memory is not."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from engine.engines import open_engine, random_tokens
from faulty_disk import FaultyDisk
from streaming import logits_of, open_streaming, small_pieces, window_of

from edgert.engine.engine import Engine
from edgert.errors import ModelFileError
from edgert.ggml.backend import Cancelled
from offload.window import WindowWeights

TinyModel = Callable[..., Path]
STEPS = [random_tokens(40), *([t] for t in random_tokens(12, seed=1))]


@pytest.fixture(autouse=True)
def pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)


@pytest.fixture
def path(tiny_model: TinyModel) -> Path:
    return tiny_model("llama", quantisation="MIXED", n_layers=6, hidden_size=512, ffn_size=1024)


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with open_streaming(path, 0.8) as engine:
        yield engine


def shares_pinned(weights: WindowWeights) -> Iterator[int]:
    """All, half, nothing, a part, all: bytes to be pinned before each step."""
    most = weights.residency.pinned_bytes
    while True:
        yield from (most, most // 2, 0, most // 3, 2 * most)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3moe"])
def test_an_answer_is_the_same_when_memory_is_taken_away_and_given_back(tiny_model: TinyModel,
                                                                        architecture: str) -> None:
    path = tiny_model(architecture, quantisation="MIXED", n_layers=4)
    with open_engine(path) as resident:
        expected = logits_of(resident, STEPS)
    with open_streaming(path, 0.8) as engine:
        shares = shares_pinned(window_of(engine))
        engine.between_steps = lambda n_tokens, leaves_buffers: window_of(engine).pin(next(shares))
        for a, b in zip(expected, logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_was_all_pinned_gives_memory_back_too(tiny_model: TinyModel, architecture: str) -> None:
    path = tiny_model(architecture, quantisation="MIXED", n_layers=4)
    with open_engine(path) as resident:
        expected = logits_of(resident, STEPS)
    with open_streaming(path, 1.0) as engine:
        weights = window_of(engine)
        most, shares = weights.residency.pinned_bytes, shares_pinned(weights)
        assert weights.pinned_bytes == most and not weights.bytes_per_pass

        def move(n_tokens: int, leaves_buffers: bool) -> None:
            n_bytes = next(shares)
            weights.pin(n_bytes)
            window_bytes = weights.window_bytes if weights.bytes_per_pass else 0
            assert (weights.bytes_per_pass == 0) == (n_bytes >= most)
            assert weights.pinned_bytes + window_bytes <= max(n_bytes, small_bytes(weights) + window_bytes)

        engine.between_steps = move
        for a, b in zip(expected, logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(a, b)


def small_bytes(weights: WindowWeights) -> int:
    """What never streams: vectors, since `small_pieces` lets everything else stream."""
    return sum(piece.slot_bytes for piece in weights.residency.pieces if piece.spec.use == "vector")


def test_the_window_of_what_was_all_pinned_is_given_back_with_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_streaming(path, 1.0) as engine:
        weights, given = window_of(engine), list[tuple[int, int]]()
        monkeypatch.setattr(weights._arena, "give_back", lambda *span: given.append(span))
        weights.pin(0)
        engine.step(np.array([1], np.int32))
        window = weights.window_address, weights.window_bytes
        assert window not in given
        weights.pin(weights.residency.pinned_bytes)
        assert given[-1] == window


def test_what_is_given_back_streams_and_what_is_taken_again_does_not(engine: Engine) -> None:
    weights = window_of(engine)
    most, total = weights.pinned_bytes, weights.pinned_bytes + weights.bytes_per_pass
    for n_bytes in (most // 2, 0, most):
        weights.pin(n_bytes)
        assert weights.pinned_bytes + weights.bytes_per_pass == total
        assert weights.pinned_bytes <= max(n_bytes, total - sum(p.slot_bytes for p in weights.residency.pieces
                                                                if p.spec.use != "vector"))
        engine.step(np.array([1], np.int32))
        before = weights.streamed_bytes
        for _ in range(3):
            engine.step(np.array([1], np.int32))
        assert abs(weights.streamed_bytes - before - 3 * weights.bytes_per_pass) <= weights.residency.window_bytes
    assert weights.pinned_bytes == most


def test_memory_that_is_given_back_is_the_systems(engine: Engine) -> None:
    weights = window_of(engine)
    held = resident_bytes(weights)
    weights.pin(0)
    assert held - resident_bytes(weights) >= 0.9 * (weights.residency.pinned_bytes - weights.pinned_bytes)
    weights.pin(weights.residency.pinned_bytes)
    assert resident_bytes(weights) >= 0.99 * held


def resident_bytes(weights: WindowWeights) -> int:
    """Memory that the arena's mapping takes, as the kernel counts it."""
    lines, base = Path("/proc/self/smaps").read_text().splitlines(), weights._arena.base
    inside, found = False, 0
    for line in lines:
        head = line.split(maxsplit=1)[0]
        if "-" in head and ":" not in head:
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= base < end
        elif inside and head == "Rss:":
            found = int(line.split()[1]) * 1024
    return found


def test_the_same_size_again_moves_nothing(engine: Engine) -> None:
    weights = window_of(engine)
    engine.step(np.array([1], np.int32))
    entries = [*weights._ring_pieces]
    weights.pin(weights.pinned_bytes)
    weights.pin(10**12)
    assert [*weights._ring_pieces] == entries


def test_a_disk_that_fails_while_weights_come_back_leaves_them_streaming(
        path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(path) as resident:
        expected = logits_of(resident, STEPS[:2])
    weights = window_of(engine)
    np.testing.assert_array_equal(logits_of(engine, STEPS[:1])[0], expected[0])
    weights.pin(0)
    with monkeypatch.context() as broken:
        disk = FaultyDisk(path).install(broken)
        disk.fails_with = errno.EIO
        with pytest.raises(ModelFileError):
            weights.pin(10**12)
    small = weights.pinned_bytes
    assert small < weights.residency.pinned_bytes
    np.testing.assert_array_equal(logits_of(engine, STEPS[1:2])[0], expected[1])
    weights.pin(10**12)
    assert weights.pinned_bytes == weights.residency.pinned_bytes


def test_a_cancel_while_weights_come_back_ends_it_at_once(path: Path, engine: Engine,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    weights = window_of(engine)
    weights.pin(0)
    engine.cancel()
    with monkeypatch.context() as slow:
        disk = FaultyDisk(path).install(slow)
        disk.stop_answering()
        slow.setattr("offload.window._SETTLE_S", 0.01)
        with pytest.raises(Cancelled):
            weights.pin(10**12)
        disk.answer()
    engine.resume()
    with open_engine(path) as resident:
        expected = logits_of(resident, STEPS[:1])
    np.testing.assert_array_equal(logits_of(engine, STEPS[:1])[0], expected[0])
