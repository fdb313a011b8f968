"""Steps that attend to a set: dense where they should be, the masked oracle's attention where they choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_head import head_selector, page_selector
from retrieving import (
    FROM_TOKENS,
    answer,
    open_dense,
    open_retrieving,
    random_tokens,
    share_sets,
)

from edgert.architectures.base import Hyperparameters
from edgert.engine.batch import Batch
from edgert.engine.fused import FusedGraphs
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.parted import PartedGraphs
from edgert.errors import ContextOverflow
from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Allocator, Backend, Cancelled
from edgert.ggml.graph import Graph, Rope, Tensor
from retrieval.cold import DenseTier
from retrieval.graph import SelectiveKVGraph
from retrieval.hot import HotKVCache
from retrieval.masked import MaskedKVCache
from retrieval.selection import Policy
from retrieval.selectors import HeadSelector

TinyModel = Callable[..., Path]
ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "gemma3", "smallthinker"])
SELECTORS = pytest.mark.parametrize("selector", [head_selector, page_selector])
N_PROMPT, N_DECODE = 420, 12


@ARCHITECTURES
def test_a_budget_that_holds_the_context_gives_the_logits_of_dense_attention(tiny_model: TinyModel,
                                                                              architecture: str) -> None:
    path, prompt = tiny_model(architecture), random_tokens(N_PROMPT)
    with open_dense(path, 512) as dense, open_retrieving(path, policy=Policy(512), context_length=512) as sparse:
        assert np.array_equal(answer(dense, prompt, N_DECODE), answer(sparse, prompt, N_DECODE))


@ARCHITECTURES
def test_up_to_its_threshold_the_cache_is_dense_on_disk_too(tiny_model: TinyModel, tmp_path: Path,
                                                            architecture: str) -> None:
    path, prompt = tiny_model(architecture), random_tokens(FROM_TOKENS - N_DECODE)
    with open_dense(path) as dense, open_retrieving(path, tmp_path) as sparse:
        assert np.array_equal(answer(dense, prompt, N_DECODE), answer(sparse, prompt, N_DECODE))
        assert sparse.selected_tokens is None


@ARCHITECTURES
def test_a_prompt_that_passes_layer_by_layer_gives_the_logits_of_dense_attention(tiny_model: TinyModel, tmp_path: Path,
                                                                                 architecture: str) -> None:
    path, prompt = tiny_model(architecture), random_tokens(700)
    with open_dense(path, batch_size=128) as dense, open_retrieving(path, tmp_path, batch_size=128) as sparse:
        dense.step(np.array(prompt[:-1], np.int32))
        assert np.array_equal(answer(dense, prompt[-1:], 0), answer(sparse, prompt, 0))
        assert sparse.kv.length == 700


def hyperparameters(window: int) -> Hyperparameters:
    return Hyperparameters("llama", n_layers=2, hidden_size=256, n_heads=4, n_kv_heads=2, head_dim=64, ffn_size=64,
                           vocab_size=64, head_rows=64, context_length=4096, rms_eps=1e-5, rope=Rope(64), window=window,
                           window_layers=frozenset({1}) if window else frozenset())


def rows(n_tokens: int, n_heads: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((n_tokens, n_heads, 64), dtype=np.float32)


def attended(kv: Any, backend: Backend, batch: Batch, layer: int, q: Any, k: Any, v: Any) -> Any:
    """One layer's attention of a batch, through the cache's own graph."""
    graph, allocator = Graph(64), Allocator(backend)
    view: SelectiveKVGraph = kv.open(graph, batch.n_tokens, kv.bucket(batch))
    inputs: list[Tensor] = [graph.input("qkv", TYPE_F32, array.shape[::-1]) for array in (q, k, v)]
    result = graph.output(view.attend(graph, layer, *inputs, 0.125))
    for tensor in view.inputs():
        graph.expand(tensor)
    allocator.alloc(graph)
    for tensor, array in zip(inputs, (q, k, v), strict=True):
        Backend.array(tensor).reshape(array.shape)[:] = array
    kv.write(view, batch)
    backend.compute(graph)
    out = Backend.array(result).reshape(batch.n_tokens, -1).copy()
    graph.close()
    allocator.close()
    return out


@pytest.mark.parametrize(("window", "layer"), [(0, 0), (0, 1), (48, 0), (48, 1)])
@pytest.mark.parametrize("n_new", [1, 5])
def test_attention_over_the_hot_buffer_is_that_over_the_masked_cache(window: int, layer: int, n_new: int) -> None:
    backend, hp, n = Backend(1), hyperparameters(window), 300
    dense = DenseKVCache(backend, hp, 512)
    hot, whole, near = HotKVCache(backend, hp, 512, 128), MaskedKVCache(dense, hp, frozenset()), DenseTier(dense)
    try:
        for one in range(hp.n_layers):
            for i, tensors in enumerate((dense.k, dense.v)):
                # Values of models' size: ggml adds them in half precision, in the order of the cells.
                size = (1.0, 0.25)[i]
                Backend.array(tensors[one])[:n] = size * rows(n, hp.n_kv_heads, 10 * one + i).reshape(n, -1)
        rng = np.random.default_rng(3)
        for step in range(4):  # the buffer's order becomes another with every step
            batch = Batch(np.zeros(n_new, np.int32), n - 8)
            chosen = np.sort(rng.choice(batch.start, 90, replace=False)).astype(np.int64)
            assignment = hot.prepare(chosen, batch)
            near.fetch(hot.records, assignment.missing_slots, assignment.missing)
            missing = hot.missing_in_ring(batch.start)
            if hot.ring is not None and len(missing):
                near.fetch(hot.ring, hot.fill_ring(missing), missing)
            whole.visible = chosen
            q, k, v = (rows(n_new, heads, 100 + step + heads) for heads in (hp.n_heads, hp.n_kv_heads, hp.n_kv_heads))
            qkv = q, k, v / 4
            got, expected = (attended(kv, backend, batch, layer, *qkv) for kv in (hot, whole))
            assert np.abs(got - expected).max() < 1e-3
            whole.visible = chosen[1:]
            assert np.abs(got - attended(whole, backend, batch, layer, *qkv)).max() > (-1 if layer and window else 2e-3)
    finally:
        hot.close()
        dense.close()
        backend.close()


@ARCHITECTURES
@SELECTORS
@pytest.mark.parametrize("fused", [True, False])
def test_on_disk_and_in_memory_the_same_sets_give_the_same_logits(tiny_model: TinyModel, tmp_path: Path,
                                                                  architecture: str, selector: Any,
                                                                  fused: bool) -> None:
    path, prompt = tiny_model(architecture), random_tokens(N_PROMPT)
    with open_retrieving(path, selector=selector, fused=fused) as near, \
            open_retrieving(path, tmp_path, selector=selector, fused=fused) as far:
        answer(near, prompt, 0)
        answer(far, prompt, 0)
        share_sets(near, far)
        assert np.array_equal(answer(near, [8], N_DECODE), answer(far, [8], N_DECODE))
        assert near._retrieved.counts.n_steps == N_DECODE + 1
        assert near._retrieved.counts.n_fetched == far._retrieved.counts.n_fetched > N_DECODE


@SELECTORS
@pytest.mark.parametrize("on_disk", [False, True])
def test_steps_attend_to_no_more_than_their_budget_and_fetch_only_what_differs(tiny_model: TinyModel, tmp_path: Path,
                                                                               selector: Any, on_disk: bool) -> None:
    store, policy = tmp_path if on_disk else None, Policy(96, n_recent=16, least_mass=0.0)
    with open_retrieving(tiny_model("llama"), store, policy=policy, selector=selector) as engine:
        answer(engine, random_tokens(N_PROMPT), 1)
        counts = engine._retrieved.counts
        first = counts.n_fetched
        answer(engine, [5], 20)
        assert engine.selected_tokens == 96
        assert 0 < counts.n_fetched - first < 21 * 96


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_followed_the_texts_end_when_it_stood_there_before_is_in_the_set(tiny_model: TinyModel, tmp_path: Path,
                                                                              on_disk: bool) -> None:
    prompt = [token % 290 for token in random_tokens(N_PROMPT)]
    prompt[100:103] = [295, 296, 297]
    policy = Policy(96, n_recent=16, least_mass=0.0)
    with open_retrieving(tiny_model("llama"), tmp_path if on_disk else None, policy=policy) as engine:
        kv = engine._retrieved
        inner, sets = kv.bring, list[set[int]]()

        def bring(chosen: Any, batch: Any) -> None:
            sets.append({*chosen.positions.tolist()})
            inner(chosen, batch)

        kv.bring = bring  # type: ignore[method-assign]
        answer(engine, prompt, 2)
        engine.kv.truncate(N_PROMPT)  # the two tokens were guesses
        for token in (295, 296):
            engine.step(np.array([token], np.int32))
        assert {102, 103, 104} <= sets[-1]
        assert list(kv.token_ids) == [*prompt, 295, 296]


def test_guessed_tokens_that_were_wrong_leave_nothing_behind(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, prompt = tiny_model("gemma3"), random_tokens(N_PROMPT)
    tails = []
    for guesses in ([], [9, 9, 9]):
        with open_retrieving(path, tmp_path, policy=Policy(96, n_recent=16, least_mass=0.0)) as engine:
            share_sets(engine, engine)
            answer(engine, prompt, 3)
            logits = engine.step(np.array([4, *guesses], np.int32), 1 + len(guesses))
            assert logits.shape[0] == 1 + len(guesses)
            engine.kv.truncate(N_PROMPT + 4)
            tails.append(answer(engine, [7], 20))
    assert np.abs(tails[0] - tails[1]).max() < 0.05 * np.abs(tails[0]).max()


def test_a_text_goes_back_under_the_threshold_and_beyond_it_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, prompt = tiny_model("llama"), random_tokens(N_PROMPT)
    with open_retrieving(path, tmp_path) as engine, open_dense(path) as dense:
        answer(engine, prompt, 4)
        assert engine._retrieved.dense.length == 0, "a long text leaves no dense memory"
        engine.kv.truncate(100)
        dense.step(np.array(prompt[:100], np.int32))
        assert np.abs(answer(engine, prompt[100:140], 2) - answer(dense, prompt[100:140], 2)).max() < 0.5
        answer(engine, prompt[142:], 2)
        assert engine.kv.length == N_PROMPT + 2
        assert engine.selected_tokens is not None


def test_a_later_prompt_is_attended_densely_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, prompt = tiny_model("llama"), random_tokens(600)
    with open_retrieving(path, tmp_path) as engine, open_dense(path) as dense:
        engine.step(np.array(prompt[:300], np.int32))
        for part in (prompt[:299], prompt[299:300], prompt[300:599]):  # a prompt's last token is a step of its own
            dense.step(np.array(part, np.int32))
        assert np.array_equal(answer(engine, prompt[300:], 0), answer(dense, prompt[599:], 0))


def test_a_context_that_overflows_is_refused_before_anything_is_computed(tiny_model: TinyModel, tmp_path: Path) -> None:
    with open_retrieving(tiny_model("llama"), tmp_path, context_length=512) as engine:
        answer(engine, random_tokens(N_PROMPT), 1)
        with pytest.raises(ContextOverflow):
            engine.step(np.array(random_tokens(200), np.int32))
        assert engine.kv.length == N_PROMPT + 1


def test_a_cancelled_step_can_be_taken_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    with open_retrieving(tiny_model("llama"), tmp_path) as engine:
        answer(engine, random_tokens(N_PROMPT), 2)
        engine.cancel()
        with pytest.raises(Cancelled):
            engine.step(np.array([4], np.int32))
        engine.resume()
        assert engine.kv.length == N_PROMPT + 2
        assert np.isfinite(engine.step(np.array([4], np.int32))).all()


def test_a_head_is_shown_every_token_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, prompt = tiny_model("llama", n_layers=3), random_tokens(N_PROMPT)
    keys = []
    for store in (None, tmp_path):
        with open_retrieving(path, store) as engine:
            answer(engine, prompt, 0)
            selector = engine._retrieved.selector
            assert isinstance(selector, HeadSelector)
            keys.append(selector._keys[0, :N_PROMPT - 1].copy())
    assert np.abs(keys[0] - keys[1]).max() < 0.02 * np.abs(keys[0]).max()
    assert (np.abs(keys[0]).max(1) > 0).all()


@pytest.mark.parametrize("fused", [True, False])
@SELECTORS
def test_the_same_text_is_answered_alike_wherever_it_lies(tiny_model: TinyModel, tmp_path: Path, selector: Any,
                                                          fused: bool) -> None:
    path, policy = tiny_model("llama", quantisation="F32"), Policy(96, n_recent=16, least_mass=0.0)
    answers = []
    for store in (None, tmp_path):
        with open_retrieving(path, store, policy=policy, selector=selector, fused=fused) as engine:
            answers.append(answer(engine, random_tokens(N_PROMPT), 6))
            assert engine._retrieved.counts.n_steps == 6
    assert np.abs(answers[0] - answers[1]).max() < 0.1


def test_what_is_observed_is_the_attention_that_was_computed(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, prompt = tiny_model("gemma3"), random_tokens(N_PROMPT)
    seen = []
    for store, fused in ((None, True), (None, False), (tmp_path, True)):
        with open_retrieving(path, store, selector=page_selector, fused=fused) as engine:
            answer(engine, prompt, 0)
            survivors = engine._retrieved.chooser.survivors
            assert survivors is not None
            seen.append(dict(zip(survivors.positions.tolist(), survivors.attention.tolist(), strict=True)))
    assert {*seen[0]} == {*seen[1]} == {*seen[2]}
    for position, attention in seen[0].items():
        assert seen[1][position] == pytest.approx(attention, abs=0.02)
        assert seen[2][position] == pytest.approx(attention, abs=0.02)
    assert max(seen[0].values()) > 0.05


@ARCHITECTURES
@SELECTORS
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_text_that_grows_to_its_threshold_is_attended_whole_to_the_last_token(
        tiny_model: TinyModel, tmp_path: Path, architecture: str, selector: Any, on_disk: bool) -> None:
    path, prompt, store = tiny_model(architecture), random_tokens(FROM_TOKENS - 150), tmp_path if on_disk else None
    with open_dense(path) as dense, open_retrieving(path, store, selector=selector) as sparse:
        assert np.array_equal(answer(dense, prompt, 150), answer(sparse, prompt, 150))
        kv = sparse._retrieved
        if on_disk:
            assert kv.cold.n_tokens == FROM_TOKENS, "the step beyond has nothing left to write"
        answer(sparse, [5], 2)
        assert sparse.selected_tokens is not None


def test_what_steps_over_a_set_compute_with_is_built_with_the_prompt(tiny_model: TinyModel) -> None:
    with open_retrieving(tiny_model("llama"), fused=True) as engine:
        hot, whole = engine._hot_graphs, engine._whole_graphs
        assert isinstance(hot, PartedGraphs) and isinstance(whole, FusedGraphs)
        answer(engine, random_tokens(FROM_TOKENS - 20), 0)
        built = [*hot._states], [*whole._states.values()]
        answer(engine, [5], 30)
        assert engine.selected_tokens is not None and all(built)
        assert built == ([*hot._states], [*whole._states.values()])
