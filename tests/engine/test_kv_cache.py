"""The contract of every KVCache: attention over what was appended, growth by commit, truncation, and its bounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from seams import DENSE_KV_CACHES, KV_CACHES, begin_pass

from edgert.architectures.base import Hyperparameters
from edgert.engine.batch import Batch
from edgert.engine.kv_cache import CELLS_PER_BUCKET, DenseKVCache, KVCache, fill_causal, kv_bytes_per_token
from edgert.errors import ContextOverflow, OutOfMemory, UsageError
from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Allocator, Backend
from edgert.ggml.graph import Graph, Rope

Floats = NDArray[np.float32]
EVERY_CACHE = pytest.mark.parametrize("kind", KV_CACHES)
EVERY_DENSE_CACHE = pytest.mark.parametrize("kind", DENSE_KV_CACHES)
N_HEADS, N_KV_HEADS, HEAD_DIM = 4, 2, 64
# Of the largest value: half precision, and 8 bits after a rotation.
TOLERANCE = {kind: 0.05 if kind == "dense q8_0" else 0.005 for kind in KV_CACHES}


def hyperparameters(*, window: int = 0, n_layers: int = 2, head_dim: int = HEAD_DIM) -> Hyperparameters:
    return Hyperparameters(
        architecture="llama", n_layers=n_layers, hidden_size=N_HEADS * head_dim, n_heads=N_HEADS,
        n_kv_heads=N_KV_HEADS, head_dim=head_dim, ffn_size=64, vocab_size=64, head_rows=64, context_length=4096,
        rms_eps=1e-5, rope=Rope(head_dim), window=window, window_layers=frozenset({1}) if window else frozenset())


@contextmanager
def opened(kind: str, *, context_length: int = 600, window: int = 0) -> Iterator[tuple[KVCache, Backend]]:
    backend = Backend(1)
    kv = KV_CACHES[kind](backend, hyperparameters(window=window), context_length)
    try:
        yield kv, backend
    finally:
        kv.close()
        backend.close()


def heads(n_tokens: int, n_heads: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal((n_tokens, n_heads, HEAD_DIM), dtype=np.float32)


class Sequence:
    """Appends random tokens to a cache, and to plain arrays beside it that say what attention should give."""

    def __init__(self, kv: KVCache, backend: Backend, *, window: int = 0) -> None:
        self.kv, self._backend, self._window = kv, backend, window
        self._k, self._v = ([np.zeros((0, N_KV_HEADS, HEAD_DIM), np.float32)] * 2 for _ in range(2))

    def append(self, n_tokens: int, layer: int, seed: int, *, commit: bool = True) -> tuple[Floats, Floats]:
        """One layer's attention of new tokens: what the cache gives, and what it should, (n_tokens, n_heads * dim)."""
        q, k, v = heads(n_tokens, N_HEADS, seed), *(heads(n_tokens, N_KV_HEADS, seed + i) for i in (1000, 2000))
        batch = Batch(np.zeros(n_tokens, np.int32), self.kv.length)
        computed = self._attend(batch, layer, q, k, v)
        all_k, all_v = np.concatenate([self._k[layer], k]), np.concatenate([self._v[layer], v])
        if commit:
            self._k[layer], self._v[layer] = all_k, all_v
            self.kv.commit(batch)
        window = self._window if layer == 1 else 0
        return computed, attended(q, all_k, all_v, window).reshape(n_tokens, -1)

    def truncate(self, n_tokens: int) -> None:
        self.kv.truncate(n_tokens)
        self._k, self._v = [k[:n_tokens] for k in self._k], [v[:n_tokens] for v in self._v]

    def _attend(self, batch: Batch, layer: int, *qkv: Floats) -> Floats:
        graph, allocator = Graph(64), Allocator(self._backend)
        view = self.kv.open(graph, batch.n_tokens, self.kv.bucket(batch))
        inputs = [graph.input("qkv", TYPE_F32, array.shape[::-1]) for array in qkv]
        for tensor in (*view.inputs(), *inputs):
            graph.expand(tensor)
        q, k, v = inputs
        output = graph.output(view.attend(graph, layer, q, k, v, HEAD_DIM**-0.5))
        allocator.alloc(graph)
        begin_pass(self.kv, batch)
        with self.kv.lease(layer):
            self.kv.write(view, batch)
            for tensor, array in zip(inputs, qkv, strict=True):
                Backend.array(tensor)[...] = array.reshape(Backend.array(tensor).shape)
            self._backend.compute(graph)
        computed = np.array(Backend.array(output)).reshape(batch.n_tokens, -1)
        graph.close()
        allocator.close()
        return computed


def attended(q: Floats, k: Floats, v: Floats, window: int) -> Floats:
    share, n_before = N_HEADS // N_KV_HEADS, len(k) - len(q)
    k, v = np.repeat(k, share, 1), np.repeat(v, share, 1)
    cell, token = np.arange(len(k)), np.arange(len(q))[:, None] + n_before
    visible = (cell <= token) & ((cell > token - window) if window else True)
    scores = np.where(visible, np.einsum("thd,chd->htc", q, k) * HEAD_DIM**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(np.einsum("htc,chd->thd", weights / weights.sum(-1, keepdims=True), v), np.float32)


def check_close(kind: str, computed: Floats, expected: Floats) -> None:
    np.testing.assert_allclose(computed, expected, atol=TOLERANCE[kind] * np.abs(expected).max())


@EVERY_CACHE
@pytest.mark.parametrize("window", [0, 5])
def test_every_token_attends_to_those_before_it(kind: str, window: int) -> None:
    with opened(kind, window=window) as (kv, backend):
        sequence = Sequence(kv, backend, window=window)
        for seed, n_tokens in enumerate((7, 1, 1, 300, 2, 1)):  # a prompt, steps, and across the border of a bucket
            computed, expected = sequence.append(n_tokens, 0, seed)
            check_close(kind, computed, expected)
        assert kv.length == 312


@EVERY_CACHE
def test_layers_do_not_see_each_other(kind: str) -> None:
    with opened(kind, window=4) as (kv, backend):
        sequence = Sequence(kv, backend, window=4)
        for step in range(4):
            sequence.append(3, 0, step, commit=False)
            check_close(kind, *sequence.append(3, 1, 100 + step))


@EVERY_CACHE
def test_what_was_truncated_is_never_seen_again(kind: str) -> None:
    with opened(kind) as (kv, backend):
        sequence = Sequence(kv, backend)
        sequence.append(290, 0, 0)
        sequence.truncate(10)
        assert kv.length == 10
        check_close(kind, *sequence.append(4, 0, 1))
        check_close(kind, *sequence.append(1, 0, 2))
        sequence.truncate(100)  # longer than it is: nothing happens
        assert kv.length == 15
        sequence.truncate(0)
        check_close(kind, *sequence.append(2, 0, 3))


@EVERY_CACHE
def test_a_step_that_was_not_committed_leaves_nothing_behind(kind: str) -> None:
    with opened(kind) as (kv, backend):
        sequence = Sequence(kv, backend)
        sequence.append(5, 0, 0)
        sequence.append(40, 0, 1, commit=False)
        assert kv.length == 5
        check_close(kind, *sequence.append(3, 0, 2))


@EVERY_DENSE_CACHE
def test_attention_reads_whole_buckets_and_never_beyond_the_cache(kind: str) -> None:
    with opened(kind, context_length=600) as (kv, _):
        def bucket(start: int, n_tokens: int) -> int:
            return kv.bucket(Batch(np.zeros(n_tokens, np.int32), start))

        assert [bucket(0, n) for n in (1, 255, 256, 257, 512, 513, 600)] == [256, 256, 256, 512, 512, 768, 768]
        assert bucket(255, 1) == CELLS_PER_BUCKET
        assert bucket(256, 1) == 2 * CELLS_PER_BUCKET
        assert bucket(599, 1) == kv.n_cells == 768


@EVERY_CACHE
def test_more_than_the_context_is_refused_with_the_numbers(kind: str) -> None:
    with opened(kind, context_length=600) as (kv, _):
        kv.check_room(600)
        with pytest.raises(ContextOverflow) as raised:
            kv.check_room(601, trained_length=4096)
        assert (raised.value.n_tokens, raised.value.context_length) == (601, 600)
        assert raised.value.trained_length == 4096


@EVERY_DENSE_CACHE
def test_a_context_beyond_all_memory_says_what_to_ask_for(kind: str) -> None:
    backend = Backend(1)
    n_descriptors = psutil.Process().num_fds()
    with pytest.raises(OutOfMemory, match="KV cache") as raised:
        KV_CACHES[kind](backend, hyperparameters(), 2**38)
    assert "--context" in raised.value.next_step
    assert raised.value.needed_bytes > 2**38
    assert psutil.Process().num_fds() == n_descriptors
    backend.close()


@EVERY_DENSE_CACHE
def test_a_long_context_costs_what_it_holds(kind: str) -> None:
    before = psutil.Process().memory_info().rss
    with opened(kind, context_length=500_000) as (kv, backend):
        assert kv.size_bytes > 200 * 2**20
        Sequence(kv, backend).append(10, 0, 0)
        assert psutil.Process().memory_info().rss - before < 40 * 2**20
    assert psutil.Process().memory_info().rss - before < 32 * 2**20


@EVERY_CACHE
def test_closing_twice_does_no_harm(kind: str) -> None:
    with opened(kind) as (kv, _):
        kv.close()


# -- the dense cache alone -------------------------------------------------------------------------------------------
def test_bytes_per_token_are_those_of_the_cache() -> None:
    backend, hp = Backend(1), hyperparameters()
    for kv_type in ("f16", "q8_0"):
        kv = DenseKVCache(backend, hp, 512, kv_type)
        assert kv_bytes_per_token(hp, kv_type) * kv.n_cells == kv.size_bytes
        kv.close()
    assert kv_bytes_per_token(hp, "f16") == 2 * 2 * N_KV_HEADS * HEAD_DIM * 2
    backend.close()


@pytest.mark.parametrize("head_dim", [16, 24, 80])
def test_heads_that_8_bit_blocks_do_not_divide_are_refused(head_dim: int) -> None:
    backend = Backend(1)
    with pytest.raises(UsageError, match="q8_0") as raised:
        DenseKVCache(backend, hyperparameters(head_dim=head_dim), 512, "q8_0")
    assert "f16" in raised.value.next_step
    backend.close()


def test_an_unknown_type_is_refused() -> None:
    backend = Backend(1)
    with pytest.raises(UsageError, match="f16"):
        DenseKVCache(backend, hyperparameters(), 512, "q5_0")  # type: ignore[arg-type]
    backend.close()


@pytest.mark.parametrize(("start", "window", "expected"), [
    (0, 0, ["0....", "00...", "000.."]), (2, 0, ["000..", "0000.", "00000"]), (0, 2, ["0....", "00...", ".00.."]),
    (2, 1, ["..0..", "...0.", "....0"]),
])
def test_a_mask_shows_each_token_the_cells_up_to_its_own(start: int, window: int, expected: list[str]) -> None:
    mask = np.full((3, 5), 7, np.float16)
    fill_causal(mask, start, window)
    assert ["".join("0" if value == 0 else "." for value in row) for row in mask] == expected
    assert set(np.unique(mask)) == {0, -np.inf}
    one = np.full(5, 7, np.float16)
    fill_causal(one, start, window)
    np.testing.assert_array_equal(one, mask[0])
