"""A model whose attention in decode is computed in Python, over whatever set of cached tokens a selector names.

Prefill and everything but attention are edgert's own graphs over the model's own weights; attention is a callback in
the middle of the graph. So one prefill serves every method: its keys and values are kept as arrays, and each method
runs its steps from them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture
from edgert.engine.batch import Batch
from edgert.engine.collective import Solo
from edgert.engine.engine import forward
from edgert.engine.retrieval_head import features_of
from edgert.ggml.backend import Allocator, Backend
from edgert.ggml.functions import ggml
from edgert.ggml.graph import Context, Graph, Tensor
from edgert.gguf.model_file import ModelFile
from retrieval.arrays import Floats, Positions
from retrieval.distillation.teacher import TappedState, Teacher


@dataclass(slots=True)
class Snapshot:
    """What a prefill leaves: `n_tokens` valid, room for more. Queries are those of the last tokens before them."""

    n_tokens: int
    keys: list[Floats]  # per layer (n_kv_heads, room, head_dim), float16 values
    values: list[Floats]
    features: Floats  # (room, n_features)
    last_queries: list[Floats]  # per layer (n_queries, n_heads, head_dim)
    scale: float


class Selector(Protocol):
    """A method: names the cached tokens that a step attends to. Its own token comes on top."""

    def start(self, snapshot: Snapshot) -> None: ...

    def before(self, n_cached: int, token_features: Floats) -> None:
        """A step is about to read the token after `n_cached` others, whose features (n_cached, n_features) are
        known."""
        ...

    def choose(self, layer: int, queries: Floats, n_cached: int) -> Positions | None:
        """The set for one layer: (n,) for all KV heads, (n_kv_heads, n) for each, None for everything. `queries`
        (n_heads, head_dim) are the step's own."""
        ...

    def observe(self, layer: int, chosen: Positions | None, attention: Floats) -> None:
        """What the step paid: (n_heads, n or n_cached) without its own token, in the order of the set."""
        ...


class SparseModel:
    """A model file opened for comparisons. Memory: weights, and K and V of `max_tokens` twice as float32."""

    def __init__(self, file: ModelFile, max_tokens: int, n_threads: int, feature_layers: Sequence[int] = ()) -> None:
        self._teacher = Teacher(file, max_tokens, n_threads, feature_layers)
        self.arch, self._max_tokens = self._teacher.arch, max_tokens
        if self.arch.hp.window_layers:
            raise SystemExit("models with sliding windows are not compared here")
        self.feature_layers: tuple[int, ...] = self._teacher.layers
        self._backend = self._teacher.backend
        self._attention = _PythonAttention(self.arch, self._backend)
        self._allocator = Allocator(self._backend)
        batch = Batch(np.zeros(1, np.int32), 0)
        self._state = TappedState(self.arch, self._attention, batch, self.feature_layers)  # type: ignore[arg-type]
        forward([self._state], self.arch, self._teacher.weights, self._attention, Solo())  # type: ignore[arg-type]
        self._allocator.alloc(self._state.graph)

    def prefill(self, token_ids: NDArray[np.int32], n_queries: int = 64) -> Snapshot:
        """Run the tokens as the engine does, with attention to everything."""
        hp, n = self.arch.hp, len(token_ids)
        seen = self._teacher.watch(token_ids, np.arange(max(0, n - n_queries), n, dtype=np.int32))
        values = self._teacher.values(n)

        def roomy(rows: Floats) -> Floats:
            room = np.zeros((hp.n_kv_heads, self._max_tokens, hp.head_dim), np.float32)
            room[:, :n] = rows.transpose(1, 0, 2)
            return room

        features = np.zeros((self._max_tokens, seen.features.shape[1]), np.float32)
        features[:n] = seen.features
        layers = range(hp.n_layers)
        return Snapshot(n, [roomy(seen.keys[i]) for i in layers], [roomy(values[i]) for i in layers], features,
                        [seen.queries[i] for i in layers], seen.scale)

    def run(self, snapshot: Snapshot, token_ids: Sequence[int], selector: Selector) -> Floats:
        """Feed the tokens one by one after the snapshot; logits (n_steps, vocab_size). The snapshot stays as it was."""
        logits = np.empty((len(token_ids), self.arch.hp.vocab_size), np.float32)
        selector.start(snapshot)
        for step, token_id in enumerate(token_ids):
            n_cached = snapshot.n_tokens + step
            selector.before(n_cached, snapshot.features[:n_cached])
            logits[step] = self._step(snapshot, token_id, n_cached, selector)
        return logits

    def _step(self, snapshot: Snapshot, token_id: int, n_cached: int, selector: Selector) -> Floats:
        state = self._state
        state.inputs.write(self._attention, Batch(np.array([token_id], np.int32), n_cached))  # type: ignore[arg-type]
        self._attention.begin(snapshot, n_cached, selector)
        self._backend.compute(state.graph)
        self._attention.end()
        snapshot.features[n_cached] = features_of([Backend.array(t).reshape(1, -1) for t in state.residuals])[0]
        assert state.logits is not None
        return Backend.array(state.logits)

    def close(self) -> None:
        self._state.graph.close()
        self._allocator.close()
        self._teacher.close()


# void f(struct ggml_tensor * dst, a, b, c, int thread, int n_threads, void * userdata)
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int,
                             ctypes.c_int, ctypes.c_void_p)


class _PythonAttention:
    """A cache whose graph calls back for every layer's attention."""

    context_length = 1 << 26

    def __init__(self, arch: Architecture, backend: Backend) -> None:
        self._hp = arch.hp
        self._callbacks: list[Any] = []  # ggml keeps their addresses alone
        self._error: BaseException | None = None
        base = ggml().base
        base.ggml_map_custom3.restype = ctypes.c_void_p
        base.ggml_map_custom3.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int, ctypes.c_void_p]
        self._snapshot: Snapshot
        self._selector: Selector
        self._n_cached, self.length = 0, 0

    # -- the cache as edgert/engine/kv_cache.py states it ---------------------------------------------------------
    def bucket(self, batch: Batch) -> int:
        return 0

    def open(self, g: Context, n_tokens: int, n_cells: int) -> _PythonAttention:
        return self

    def inputs(self) -> list[Tensor]:
        return []

    def lease(self, layer: int) -> AbstractContextManager[None]:
        return nullcontext()

    def write(self, inputs: _PythonAttention, batch: Batch) -> None:
        """Nothing is an input."""

    def attend(self, g: Graph, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        def call(target: int, q_at: int, k_at: int, v_at: int, _thread: int, _n: int, _data: int) -> None:
            try:
                q, k, v = (Backend.array(Tensor(at)).reshape(-1, self._hp.head_dim) for at in (q_at, k_at, v_at))
                Backend.array(Tensor(target)).reshape(-1, self._hp.head_dim)[:] = self._compute(layer, q, k, v, scale)
            except BaseException as error:  # an exception cannot pass through C; `end` raises it
                self._error = error

        callback = _CALLBACK(call)
        self._callbacks.append(callback)
        q, k, v = (g.contiguous(t) for t in (q, k, v))
        out = g.custom("ggml_map_custom3", q, k, v, callback, 1, None)
        return g.reshape(out, self._hp.n_heads * self._hp.head_dim, 1)

    # -- one step -------------------------------------------------------------------------------------------------
    def begin(self, snapshot: Snapshot, n_cached: int, selector: Selector) -> None:
        self._snapshot, self._n_cached, self._selector = snapshot, n_cached, selector

    def end(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _compute(self, layer: int, q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
        keys, values, n = self._snapshot.keys[layer], self._snapshot.values[layer], self._n_cached
        keys[:, n], values[:, n] = k.astype(np.float16), v.astype(np.float16)
        chosen = self._selector.choose(layer, q, n)
        if chosen is None:
            keys, values = keys[:, :n + 1], values[:, :n + 1]
        elif chosen.ndim == 1:
            rows = np.append(chosen, n)
            keys, values = keys[:, rows], values[:, rows]
        else:
            rows = np.concatenate([chosen, np.full((len(chosen), 1), n)], 1)
            heads = np.arange(len(chosen))[:, None]
            keys, values = keys[heads, rows], values[heads, rows]
        scores = q.reshape(len(keys), -1, q.shape[1]) @ keys.transpose(0, 2, 1) * np.float32(scale)
        weights = np.exp(scores - scores.max(-1, keepdims=True))  # (n_kv_heads, n_heads per KV head, n)
        weights /= weights.sum(-1, keepdims=True)
        self._selector.observe(layer, chosen, weights.reshape(len(q), -1)[:, :-1])
        return np.asarray((weights @ values).reshape(q.shape), np.float32)
