"""Streamed weights compute what resident weights compute, bit for bit, whatever the budget; and read no more than they
must. Faults are in test_window_faults.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.engines import assert_same_answer, open_engine, open_oracle, random_tokens
from numpy.typing import NDArray
from streaming import logits_of, open_streaming, small_pieces, window_of
from tiny_architectures import ARCHITECTURES

from edgert.architectures.base import Block
from offload import residency
from offload.readers import Readers

TinyModel = Callable[..., Path]
# Two batches, then single tokens, then a batch that is a prompt's next part.
STEPS = [random_tokens(600), *([t] for t in random_tokens(5, seed=1)), random_tokens(40, seed=2), [7]]
SHAPES: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {"quantisation": "MIXED"}) for name in ARCHITECTURES),
    *((name, {"split_parts": 3, "n_layers": 3}) for name in ("llama", "gemma3", "smallthinker")),
    ("llama", {"n_experts": 4, "quantisation": "Q4_0"}),
    ("qwen2", {"tied": True, "n_layers": 5, "quantisation": "Q4_K"}),
    ("llama", {"hidden_size": 160, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 96, "vocab_size": 1111,
               "vocabulary": False}),  # rows and tensors that begin anywhere
    ("gemma3", {"sliding_window": 100, "n_layers": 4, "sliding_window_pattern": 3}),
)


@cache
def resident_logits(path: Path) -> list[NDArray[np.float32]]:
    with open_engine(path) as engine:
        return logits_of(engine, STEPS)


@pytest.fixture(autouse=True)
def pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("architecture", "options"), SHAPES, ids=str)
def test_logits_are_those_of_resident_weights(tiny_model: TinyModel, architecture: str, options: dict[str, Any],
                                              share: float) -> None:
    path = tiny_model(architecture, **options)
    with open_streaming(path, share) as engine:
        assert bool(window_of(engine).residency.streamed) == (share < 1)
        for expected, logits in zip(resident_logits(path), logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(expected, logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_llama_cpps(tiny_model: TinyModel, architecture: str) -> None:
    path = tiny_model(architecture, quantisation="MIXED")
    with open_oracle(path) as oracle, open_streaming(path, 0.2) as engine:
        assert_same_answer(oracle, engine, random_tokens(600), 12)


def test_two_threads_and_small_batches_change_nothing(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3", quantisation="MIXED")
    with open_engine(path, n_threads=2, batch_size=96) as resident:
        expected = logits_of(resident, STEPS)
    with open_streaming(path, n_threads=2, batch_size=96) as engine:
        for a, b in zip(expected, logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n_readers", [1, 8])
def test_any_number_of_readers_reads_the_same(tiny_model: TinyModel, n_readers: int) -> None:
    path = tiny_model("llama", quantisation="MIXED")
    with open_streaming(path, n_readers=n_readers) as engine:
        for expected, logits in zip(resident_logits(path), logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(expected, logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_many_parts_gives_every_row(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch,
                                              tied: bool) -> None:
    small_pieces(monkeypatch, max_piece_bytes=1)
    path = tiny_model("llama", vocab_size=1300, tied=tied, vocabulary=False)
    with open_engine(path) as resident, open_streaming(path, 0.1) as engine:
        assert window_of(engine).n_output_parts == 6  # 256 rows each
        for n_tokens, n_outputs in ((100, 7), (3, 3), (1, 1)):
            token_ids = np.array(random_tokens(n_tokens, seed=n_outputs, vocab_size=1300), np.int32)
            np.testing.assert_array_equal(resident.step(token_ids, n_outputs), engine.step(token_ids, n_outputs))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_ffn_in_parts_gives_the_same_bits(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, architecture: str,
                                             share: float) -> None:
    small_pieces(monkeypatch)
    monkeypatch.setattr(residency, "MAX_BLOCK_BYTES", 1)
    path = tiny_model(architecture, quantisation="MIXED", hidden_size=512, ffn_size=768, head_dim=64)
    with open_engine(path) as resident, open_streaming(path, share) as engine:
        assert window_of(engine).n_ffn_parts == 3 + 2  # gate and up, then down, 256 rows each
        for n_kept, n_tokens, n_outputs in ((0, 1000, 1), (1000, 1, 1), (700, 70, 5), (770, 3, 3)):
            token_ids = np.array(random_tokens(n_tokens, seed=n_kept), np.int32)
            for one in (resident, engine):
                one.kv.truncate(n_kept)
            np.testing.assert_array_equal(resident.step(token_ids, n_outputs), engine.step(token_ids, n_outputs))


def test_another_text_after_a_common_beginning(tiny_model: TinyModel) -> None:
    path = tiny_model("gemma3", quantisation="MIXED")
    with open_engine(path) as resident, open_streaming(path, 0.5) as engine:
        for n_kept, n_tokens in ((0, 600), (270, 300), (500, 1), (0, 40)):
            token_ids = np.array(random_tokens(n_tokens, seed=n_kept), np.int32)
            for one in (resident, engine):
                one.kv.truncate(n_kept)
            np.testing.assert_array_equal(resident.step(token_ids), engine.step(token_ids))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_step_reads_every_streamed_byte_once_whatever_its_length(tiny_model: TinyModel, share: float) -> None:
    with open_streaming(tiny_model("llama", quantisation="MIXED", n_layers=4), share) as engine:
        weights = window_of(engine)
        engine.step(np.array([1], np.int32))
        for n_tokens in (1, 1, 700, 1):  # 700 tokens are two batches, and pass each layer together
            before, rows = weights.streamed_bytes, weights.embedding.bytes_read
            engine.step(np.array(random_tokens(n_tokens), np.int32))
            read_bytes = weights.streamed_bytes - before - (weights.embedding.bytes_read - rows)
            # What was read ahead before the step, and is now for the next one, is never more than the window.
            assert abs(read_bytes - weights.residency.streamed_bytes) <= weights.residency.window_bytes


def test_rows_of_recent_tokens_are_not_read_again(tiny_model: TinyModel) -> None:
    with open_streaming(tiny_model("llama")) as engine:
        weights = window_of(engine)
        engine.step(np.array([5, 6, 7, 5], np.int32))
        n_bytes = weights.embedding.bytes_read
        assert 0 < n_bytes <= 3 * 2 * 4096
        engine.step(np.array([7, 6], np.int32))
        assert weights.embedding.bytes_read == n_bytes
        engine.step(np.array([8], np.int32))
        assert weights.embedding.bytes_read > n_bytes


def test_blocks_are_held_back_for_the_rows_of_a_prompt(tiny_model: TinyModel,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    n_held, held_back = list[int](), Readers.held_back

    def counted(readers: Readers) -> AbstractContextManager[None]:
        n_held.append(1)
        return held_back(readers)

    monkeypatch.setattr(Readers, "held_back", counted)
    with open_streaming(tiny_model("llama")) as engine:
        engine.step(np.array(random_tokens(40), np.int32))
        assert len(n_held) == 1
        engine.step(np.array([1], np.int32))  # a token's row may wait: blocks are what it waits for
        assert len(n_held) == 1


def test_rows_that_are_forgotten_are_read_again(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.embedding._MAX_CACHED_ROWS", 3)
    path = tiny_model("llama")
    with open_streaming(path) as engine:
        for expected, logits in zip(resident_logits(path), logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(expected, logits)


def test_no_more_rows_are_kept_than_a_text_has_tokens(tiny_model: TinyModel) -> None:
    with open_streaming(tiny_model("llama"), context_length=8) as engine:
        for start in (0, 8):
            engine.kv.truncate(0)
            engine.step(np.arange(start, start + 8, dtype=np.int32))
        assert len(window_of(engine).embedding._cache) == 8


def test_layers_with_different_pieces_pinned_share_their_graphs(tiny_model: TinyModel) -> None:
    """Or a model of many layers would build, and keep in memory, a graph for each."""
    path = tiny_model("llama", n_layers=12)
    with open_streaming(path, 0.5) as engine:
        streamed = window_of(engine).residency.streamed
        patterns = {frozenset(p.spec.key for p in streamed if p.block == Block("ffn", layer)) for layer in range(12)}
        assert len(patterns) > 2
        engine.step(np.array([1], np.int32))
        # embed, attention, add, ffn, add, and the head: whole and its last part
        assert len(engine._graphs._graphs) <= 7


def test_closing_in_the_middle_of_reading_ahead_gives_everything_back(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", quantisation="MIXED", n_layers=4)
    with open_streaming(path, 0.2) as engine:
        engine.step(np.array([1, 2, 3], np.int32))
    engine.close()  # and twice is safe
