"""Sharded is single: each block's output, every rank's bits, and answers; every architecture, even and uneven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import Recorder, open_engine, open_ranks, random_tokens, shards_of, step
from tiny_architectures import ARCHITECTURES

from edgert.engine.collective import Solo

TinyModel = Callable[..., Path]
PROMPT, N_TAUGHT = 24, 160
SPLITS = ([1.0, 1.0], [0.5, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0])
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)
EVERY_SPLIT = pytest.mark.parametrize("weights", SPLITS, ids=lambda weights: f"{len(weights)} ranks")


def make(tiny_model: TinyModel, architecture: str, **options: Any) -> Path:
    """Eight heads on two KV heads (so three ranks share one), and four blocks of 256 in a row of the FFN."""
    sizes = {"n_heads": 8, "n_kv_heads": 8 if architecture == "olmoe" else 2, "head_dim": 256,
             "hidden_size": 256, "ffn_size": 1024}
    return tiny_model(architecture, **{"quantisation": "MIXED", **sizes, **options})


@EVERY_SPLIT
@EVERY_ARCHITECTURE
def test_each_blocks_output_and_every_ranks_bits(tiny_model: TinyModel, tmp_path: Path, architecture: str,
                                                 weights: list[float]) -> None:
    path, prompt = make(tiny_model, architecture), random_tokens(PROMPT)
    with open_engine(path, fused=False) as single:
        reference = single.collective = Recorder(Solo())
        single.step(np.array(prompt, np.int32), 3)
    with open_ranks(path, tmp_path, shards_of(path, weights), taught=reference.sums) as engines:
        step(engines, prompt, 3)
        ranks = [engine.collective for engine in engines]
        assert len(ranks[0].sums) == len(reference.sums) == 4
        for expected, got in zip(reference.sums, ranks[0].sums, strict=True):
            assert np.abs(got - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max()))
        for other in ranks[1:]:
            for mine, theirs in zip(ranks[0].hidden, other.hidden, strict=True):
                np.testing.assert_array_equal(mine, theirs)


@EVERY_ARCHITECTURE
def test_graphs_from_sum_to_sum_compute_what_blocks_do(tiny_model: TinyModel, tmp_path: Path,
                                                       architecture: str) -> None:
    path, runs = make(tiny_model, architecture), []
    for in_segments in (True, False):
        with open_ranks(path, tmp_path, shards_of(path, [0.6, 0.4])) as engines:
            for engine in engines:
                engine.weights.resident = in_segments  # type: ignore[misc]
            step(engines, random_tokens(PROMPT))
            runs.append([step(engines, random_tokens(n, seed=n), n_outputs)
                         for n, n_outputs in ((1, 1), (1, 1), (4, 2), (1, 1), (4, 4))])
            assert [len(engine._segments._states._states) for engine in engines] == [2 * in_segments] * 2
    for mine, theirs in zip(*runs, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@EVERY_ARCHITECTURE
def test_a_head_by_rows_gives_the_same_logits(tiny_model: TinyModel, tmp_path: Path, architecture: str) -> None:
    path, runs = make(tiny_model, architecture, tied=architecture in ("llama", "gemma3")), []
    for splits in (False, True):
        shards = shards_of(path, [0.5, 0.3, 0.2], splits_head=splits)
        with open_ranks(path, tmp_path / str(splits), shards) as engines:
            steps = ((PROMPT, 3), (1, 1), (4, 2))
            runs.append([step(engines, random_tokens(n, seed=n), n_outputs).copy() for n, n_outputs in steps])
            leader = engines[0].collective._inner
            assert (leader.n_all_reduces, leader.n_reduces) == ((3 * 4, 0) if splits else (3 * 3, 3))
            assert engines[0].arch.hp.head_rows == (192 if splits else 320) and engines[0].arch.hp.vocab_size == 320
            assert [engine.arch.hp.vocab_size for engine in engines[1:]] == ([64, 64] if splits else [1, 1])
    for mine, theirs in zip(*runs, strict=True):
        assert mine.shape[1] == 320
        np.testing.assert_array_equal(mine, theirs)


@EVERY_ARCHITECTURE
def test_answers_stay_within_a_tenth_of_a_deviation(tiny_model: TinyModel, tmp_path: Path, architecture: str) -> None:
    path = make(tiny_model, architecture, quantisation="F16")
    tokens = random_tokens(N_TAUGHT)
    with open_engine(path) as single:
        expected = single.step(np.array(tokens, np.int32), N_TAUGHT).copy()
    with open_ranks(path, tmp_path, shards_of(path, [0.5, 0.3, 0.2])) as engines:
        got = step(engines, tokens, N_TAUGHT)
    chosen = expected[np.arange(N_TAUGHT), got.argmax(axis=1)]
    assert ((expected.max(axis=1) - chosen) / expected.std(axis=1)).max() <= 0.1


def test_two_runs_of_one_plan_are_alike_to_the_byte(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = make(tiny_model, "qwen2")
    runs = []
    for _ in range(2):
        with open_ranks(path, tmp_path, shards_of(path, [2.0, 1.0, 1.0])) as engines:
            runs.append([step(engines, random_tokens(40)), *(step(engines, [token]) for token in random_tokens(3))])
    np.testing.assert_array_equal(np.concatenate(runs[0]), np.concatenate(runs[1]))


@pytest.mark.parametrize(("wire", "tolerance"), [("f16", 0.01), ("q8", 0.1)])
def test_a_shorter_wire_keeps_ranks_alike_and_answers_near(tiny_model: TinyModel, tmp_path: Path, wire: Any,
                                                          tolerance: float) -> None:
    path = make(tiny_model, "llama", quantisation="F32")
    tokens = random_tokens(40)
    with open_engine(path) as single:
        expected = single.step(np.array(tokens, np.int32), 40).copy()
    for weights in ([1.0, 1.0], [1.0, 1.0, 1.0]):
        with open_ranks(path, tmp_path, shards_of(path, weights), wire=wire) as engines:
            got = step(engines, tokens, 40)
            assert 0 < np.abs(got - expected).mean() / expected.std() < tolerance
            for other in engines[1:]:
                for mine, theirs in zip(engines[0].collective.hidden, other.collective.hidden, strict=True):
                    np.testing.assert_array_equal(mine, theirs)


def test_a_prompt_of_several_batches_and_a_shorter_second_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = make(tiny_model, "gemma3", quantisation="F32")
    with open_engine(path) as single, open_ranks(path, tmp_path, shards_of(path, [1.0, 1.0])) as engines:
        for kept, n_tokens in ((0, 600), (600, 1), (300, 20)):
            for engine in (single, *engines):
                engine.kv.truncate(kept)
            tokens = random_tokens(n_tokens, seed=kept)
            expected = single.step(np.array(tokens, np.int32))
            np.testing.assert_allclose(step(engines, tokens), expected, atol=2e-3)
