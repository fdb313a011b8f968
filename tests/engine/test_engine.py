"""The loop: every way of running it gives the same bits, and whatever stops a step leaves the sequence whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from seams import DENSE_KV_CACHES, ENGINES, open_engine, token_ids

from edgert.architectures.base import EMBEDDING
from edgert.engine.engine import Engine
from edgert.errors import ContextOverflow, OutOfMemory
from edgert.ggml.backend import Allocator, Cancelled
from edgert.ggml.functions import ggml
from edgert.ggml.graph import Tensor

TinyModel = Callable[..., Path]
EVERY_ENGINE = pytest.mark.parametrize("name", ENGINES)
# A prompt, steps, a longer text across the border of a bucket, a few tokens at once, more of them.
STEPS = (7, 1, 1, 300, 1, 4, 5, 90, 1)
N_LAYERS = 2


def walk(engine: Engine, sizes: tuple[int, ...] = STEPS, seed: int = 0) -> list[NDArray[np.float32]]:
    return [engine.step(token_ids(n, seed + i)).copy() for i, n in enumerate(sizes)]


def check_same(one: list[NDArray[np.float32]], other: list[NDArray[np.float32]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


# -- the same bits ---------------------------------------------------------------------------------------------------
@EVERY_ENGINE
@pytest.mark.parametrize("kv_cache", DENSE_KV_CACHES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "smallthinker"])
def test_every_way_of_running_a_model_gives_the_same_logits(name: str, kv_cache: str, architecture: str,
                                                            tiny_model: TinyModel) -> None:
    path = tiny_model(architecture, head_dim=64)
    with open_engine("fused", path, kv_cache=kv_cache) as engine:
        expected = walk(engine)
    with open_engine(name, path, kv_cache=kv_cache) as engine:
        check_same(walk(engine), expected)
        assert engine.kv.length == sum(STEPS)
    assert all(np.isfinite(one).all() for one in expected)


@EVERY_ENGINE
def test_what_was_computed_before_does_not_show(name: str, tiny_model: TinyModel) -> None:
    """Graphs, their memory and the cache's cells are used again and again, for shapes in any order."""
    path, rng = tiny_model("llama"), np.random.default_rng(1)
    sizes = [1, 2, 3, 4, 5, 6, 17, 31, 64, 65, 130, 200, 256, 257]
    with open_engine(name, path) as used:
        for seed in range(12):
            used.kv.truncate(0)
            chosen = (*(int(n) for n in rng.choice(sizes, 4) if n < 120), int(rng.choice(sizes)))
            with open_engine(name, path) as fresh:
                expected = walk(fresh, chosen, seed)
            check_same(walk(used, chosen, seed), expected)


@EVERY_ENGINE
def test_a_sequence_that_was_cut_goes_on_as_if_it_had_ended_there(name: str, tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    with open_engine(name, path) as engine:
        first = walk(engine, (64, 5, 1))
        engine.step(token_ids(300, 9))
        engine.kv.truncate(64)
        check_same([engine.step(token_ids(5, 1)).copy(), engine.step(token_ids(1, 2)).copy()], first[1:])


# -- outputs ---------------------------------------------------------------------------------------------------------
@EVERY_ENGINE
@pytest.mark.parametrize(("n_tokens", "batch_size", "n_outputs"), [
    (10, 64, 1), (10, 64, 3), (10, 64, 10), (10, 4, 3), (10, 4, 4), (9, 4, 2), (1, 1, 1), (130, 64, 64)])
def test_logits_are_those_of_the_last_tokens(name: str, n_tokens: int, batch_size: int, n_outputs: int,
                                             tiny_model: TinyModel) -> None:
    path, ids = tiny_model("llama"), token_ids(n_tokens)
    with open_engine(name, path, batch_size=batch_size) as engine:
        logits = engine.step(ids, n_outputs).copy()
        assert logits.shape == (n_outputs, 320)
        assert engine.kv.length == n_tokens
        for row in range(n_outputs):
            engine.kv.truncate(0)
            alone = engine.step(ids[:n_tokens - n_outputs + 1 + row])[-1]
            # Batches of other sizes take other kernels: within what 8-bit activations round.
            assert np.abs(logits[row] - alone).max() < 0.1 * np.abs(alone).max()


@EVERY_ENGINE
def test_logits_do_not_depend_on_how_many_are_wanted(name: str, tiny_model: TinyModel) -> None:
    with open_engine(name, tiny_model("llama", quantisation="F32")) as engine:
        wanted = {}
        for n_outputs in (1, 2, 20):
            engine.kv.truncate(0)
            wanted[n_outputs] = engine.step(token_ids(20), n_outputs).copy()
        for n_outputs in (1, 2):
            np.testing.assert_allclose(wanted[n_outputs], wanted[20][-n_outputs:], atol=1e-3)


@EVERY_ENGINE
def test_a_step_without_tokens_is_a_mistake(name: str, tiny_model: TinyModel) -> None:
    with open_engine(name, tiny_model("llama")) as engine:
        with pytest.raises(AssertionError):
            engine.step(token_ids(0))
        with pytest.raises(AssertionError):
            engine.step(token_ids(3), n_outputs=4)
        assert engine.kv.length == 0


# -- the end of the context --------------------------------------------------------------------------------------------
@EVERY_ENGINE
def test_a_step_beyond_the_context_changes_nothing(name: str, tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    with open_engine(name, path, context_length=100) as engine:
        expected = walk(engine, (90, 5, 5))
    with open_engine(name, path, context_length=100) as engine:
        logits = walk(engine, (90, 5))
        with pytest.raises(ContextOverflow) as raised:
            engine.step(token_ids(6))
        assert (raised.value.n_tokens, raised.value.context_length) == (101, 100)
        assert raised.value.trained_length == 2048
        assert engine.kv.length == 95
        check_same([*logits, engine.step(token_ids(5, 2)).copy()], expected)
        with pytest.raises(ContextOverflow):
            engine.step(token_ids(1))
        assert engine.kv.length == 100


# -- cancelling --------------------------------------------------------------------------------------------------------
class CancelsInAThread:
    """A Collective of one that wakes another thread at its n-th sum; that thread cancels, and only then it goes on."""

    world_size, rank, splits_head = 1, 0, False

    def __init__(self, at: int) -> None:
        self.engine: Engine | None = None
        self._left = at
        self._go, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._wait_and_cancel, daemon=True)
        self._thread.start()

    def _wait_and_cancel(self) -> None:
        self._go.wait(20)
        if self.engine is not None:
            self.engine.cancel()
        self._done.set()

    def broadcast(self, hidden: Tensor) -> None:
        """Nobody else is there."""

    def reduce(self, partial: Tensor) -> Tensor:
        return self.all_reduce(partial)

    def all_reduce(self, partial: Tensor) -> Tensor:
        self._left -= 1
        if self._left == 0:
            self._go.set()
            assert self._done.wait(20)
        return partial

    def gather(self, logits: np.ndarray) -> np.ndarray:
        return logits


@EVERY_ENGINE
@pytest.mark.parametrize("at", [1, 2, 2 * N_LAYERS, 5 * N_LAYERS])
def test_a_cancelled_prefill_leaves_the_sequence_whole(name: str, at: int, tiny_model: TinyModel) -> None:
    path, ids, batch_size = tiny_model("llama", n_layers=N_LAYERS), token_ids(400), 32
    with open_engine(name, path, batch_size=batch_size) as engine:
        start = engine.step(token_ids(32, 7)).copy()
        expected = [start, engine.step(ids).copy(), engine.step(token_ids(1)).copy()]

    collective = CancelsInAThread(2 * N_LAYERS + at)  # the first step sums twice a layer, or its graph does
    with open_engine(name, path, batch_size=batch_size, collective=collective) as engine:
        collective.engine = engine
        logits = [engine.step(token_ids(32, 7)).copy()]
        with pytest.raises(Cancelled):
            engine.step(ids)
        n_done = engine.kv.length - 32
        assert n_done % batch_size == 0
        assert n_done < len(ids)
        with pytest.raises(Cancelled):  # until it is told to go on
            engine.step(ids[n_done:])
        assert engine.kv.length == 32 + n_done
        engine.resume()
        logits.append(engine.step(ids[n_done:]).copy())
        check_same([*logits, engine.step(token_ids(1)).copy()], expected)


def test_a_fused_prefill_stops_between_batches_and_keeps_those_that_are_done(tiny_model: TinyModel) -> None:
    path, ids, batch_size = tiny_model("llama"), token_ids(1000), 4
    with open_engine("fused", path, context_length=1024, batch_size=batch_size) as engine:
        expected = engine.step(ids).copy()
    with open_engine("fused", path, context_length=1024, batch_size=batch_size) as engine:
        def cancel_on_the_way() -> None:
            while engine.kv.length < 5 * batch_size:
                time.sleep(0.001)
            engine.cancel()

        thread = threading.Thread(target=cancel_on_the_way)
        thread.start()
        with pytest.raises(Cancelled):
            engine.step(ids)
        thread.join()
        n_done = engine.kv.length
        assert 5 * batch_size <= n_done < len(ids)
        assert n_done % batch_size == 0
        engine.resume()
        np.testing.assert_array_equal(engine.step(ids[n_done:]), expected)


# -- memory ------------------------------------------------------------------------------------------------------------
class RefusesOnce:
    """ggml's allocation of a graph, which fails when it is told to."""

    def __init__(self) -> None:
        self._real, self.refuses, self.n_placed = ggml().base.ggml_gallocr_alloc_graph, False, 0
        self.argtypes, self.restype = self._real.argtypes, self._real.restype

    def __call__(self, allocator: int, graph: int) -> bool:
        if self.refuses:
            self.refuses = False
            return False
        self.n_placed += 1
        return bool(self._real(allocator, graph))


@EVERY_ENGINE
def test_a_step_that_finds_no_memory_leaves_the_engine_usable(name: str, tiny_model: TinyModel,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    path, sizes = tiny_model("llama"), (5, 5, 5, 1, 64, 6, 1, 5)
    with open_engine(name, path) as engine:
        expected = walk(engine, sizes)
    allocation = RefusesOnce()
    monkeypatch.setattr(ggml().base, "ggml_gallocr_alloc_graph", allocation)
    with open_engine(name, path) as engine:
        logits = walk(engine, sizes[:2])  # twice, so that all graphs of 5 tokens are placed in the buffer
        allocation.refuses = True
        with pytest.raises(OutOfMemory, match="compute buffer"):
            engine.step(token_ids(64, 1))  # ggml gives that buffer back
        assert not allocation.refuses
        assert engine.kv.length == 10
        n_placed = allocation.n_placed
        logits.append(engine.step(token_ids(5, 2)).copy())
        assert allocation.n_placed > n_placed  # no graph that lay there is used again
        logits += [engine.step(token_ids(n, i)).copy() for i, n in enumerate(sizes[3:], 3)]
        check_same(logits, expected)


@EVERY_ENGINE
def test_compute_bytes_are_those_of_the_graphs(name: str, tiny_model: TinyModel) -> None:
    with open_engine(name, tiny_model("llama")) as engine:
        engine.step(token_ids(1))
        small = engine.compute_bytes
        engine.step(token_ids(64))
        assert 0 < small < engine.compute_bytes < 16 * 2**20
    assert engine.compute_bytes == 0


@EVERY_ENGINE
def test_closing_twice_does_no_harm(name: str, tiny_model: TinyModel) -> None:
    with open_engine(name, tiny_model("llama")) as engine:
        engine.step(token_ids(3))
        engine.close()


# -- the order of things -----------------------------------------------------------------------------------------------
class Recorder:
    """A weight source that notes which blocks are leased, and that no two leases overlap."""

    def __init__(self, source: object) -> None:
        self._source, self.leased, self.open = source, list[str](), 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def _noted(self, what: str, lease: object) -> object:
        recorder = self

        class Noted:
            def __enter__(self) -> object:
                assert recorder.open == 0
                recorder.open += 1
                recorder.leased.append(what)
                return lease.__enter__()  # type: ignore[attr-defined]

            def __exit__(self, *error: object) -> None:
                recorder.open -= 1
                lease.__exit__(*error)  # type: ignore[attr-defined]

        return Noted()

    def lease_embedding(self, ids: NDArray[np.int32], phase: str) -> object:
        return self._noted(EMBEDDING.kind, self._source.lease_embedding(ids, phase))  # type: ignore[attr-defined]

    def lease(self, block: object, phase: str) -> object:
        return self._noted(f"{block.kind} {block.layer}", self._source.lease(block, phase))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name, (_, fused) in ENGINES.items() if not fused])
def test_a_whole_prompt_passes_a_layer_before_the_next_is_leased(name: str, tiny_model: TinyModel) -> None:
    """So every streamed byte is read once for a prompt, and no lease is held while another is taken."""
    with open_engine(name, tiny_model("llama", n_layers=2), batch_size=16) as engine:
        engine.weights = recorder = Recorder(engine.weights)  # type: ignore[assignment]
        engine.step(token_ids(100))
        layers = ["attention 0", "ffn 0", "attention 1", "ffn 1", "output 0"]
        assert recorder.leased == ["embedding"] * 7 + layers
        recorder.leased.clear()
        engine.step(token_ids(1))
        assert recorder.leased == ["embedding", *layers]
        assert recorder.open == 0


def test_a_fused_graph_is_built_once_for_each_shape(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    n_placed, alloc = [0], Allocator.alloc

    def counted(self: Allocator, graph: object) -> bool:
        n_placed[0] += 1
        return alloc(self, graph)  # type: ignore[arg-type]

    monkeypatch.setattr(Allocator, "alloc", counted)
    with open_engine("fused", tiny_model("llama")) as engine:
        engine.step(token_ids(20))
        for i in range(200):
            engine.step(token_ids(1, i))
    assert n_placed[0] == 2
