"""The teacher: edgert's own graphs over the model's own quantised weights, tapped for what attention reads.

Knows how to run tokens through a model once and keep every layer's queries, keys and some residual streams. What is
learned from them is targets.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture, AttentionCache, StepInputs, Weights
from edgert.architectures.registry import open_architecture
from edgert.engine.batch import Batch, split
from edgert.engine.collective import Solo
from edgert.engine.engine import forward
from edgert.engine.fused import FusedState
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.retrieval_head import features_of
from edgert.ggml.backend import Allocator, Backend
from edgert.ggml.graph import Graph, Tensor
from edgert.gguf.model_file import ModelFile
from retrieval.distillation.teacher_weights import TeacherWeights

_BATCH_TOKENS = 512  # as the engine's own: other batches round otherwise


def feature_layers_of(n_layers: int) -> tuple[int, ...]:
    """The layers whose residual stream a head sees: early, a third and two thirds on the way. Behind the last of them
    the next step's set is chosen, and its rows are read while the layers after it compute."""
    last = n_layers - 2  # after the last layer, only tokens whose logits are wanted are left
    return tuple(sorted({min(layer, last) for layer in (2, 3 * n_layers // 8, 2 * n_layers // 3) if last >= 0}))


@dataclass(frozen=True, slots=True)
class Pass:
    """One sequence's way through the model. Queries are after RoPE, as attention takes them."""

    features: NDArray[np.float32]  # (n_tokens, n_features)
    queries: dict[int, NDArray[np.float32]]  # per layer that sees everything: (n_positions, n_heads, head_dim)
    keys: dict[int, NDArray[np.float32]]  # (n_tokens, n_kv_heads, head_dim)
    scale: float


class Teacher:
    """A model opened to be watched, with a context of its own. Holds the weights and the KV of `max_tokens`."""

    def __init__(self, model: ModelFile, max_tokens: int, n_threads: int, layers: Sequence[int] = ()) -> None:
        """`layers`, rising, are those whose residual streams are features; without any, feature_layers_of the model."""
        self.arch = open_architecture(model)
        self.layers = tuple(layers) or feature_layers_of(self.arch.hp.n_layers)
        self.backend = Backend(n_threads)
        self._kv = DenseKVCache(self.backend, self.arch.hp, max_tokens)
        self.weights = TeacherWeights(self.backend, model, self.arch)
        self._allocator = Allocator(self.backend)

    @property
    def watched_layers(self) -> list[int]:
        """The layers that see every token: a layer with a window keeps its window."""
        return [i for i in range(self.arch.hp.n_layers) if i not in self.arch.hp.window_layers]

    def watch(self, token_ids: NDArray[np.int32], positions: NDArray[np.int32]) -> Pass:
        """Run the tokens from the start; keep the queries of the tokens at `positions`, ascending."""
        hp, features = self.arch.hp, list[NDArray[np.float32]]()
        queries: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in self.watched_layers}
        scale = 1.0
        self._kv.truncate(0)
        for batch in split(token_ids, 0, _BATCH_TOKENS):
            state = TappedState(self.arch, self._kv, batch, self.layers)
            try:
                forward([state], self.arch, self.weights, self._kv, Solo())
                self._allocator.alloc(state.graph)
                state.inputs.write(self._kv, batch)
                self.backend.compute(state.graph)
                features.append(features_of([Backend.array(t).reshape(batch.n_tokens, -1) for t in state.residuals]))
                inside = positions[(positions >= batch.start) & (positions < batch.end)] - batch.start
                for layer, kept in queries.items():
                    q = Backend.array(state.tap.queries[layer]).reshape(batch.n_tokens, hp.n_heads, hp.head_dim)
                    kept.append(q[inside])
                scale = state.tap.scale
            finally:
                state.graph.close()
            self._kv.commit(batch)
        keys = {layer: self._rows(self._kv.k[layer], len(token_ids)) for layer in queries}
        return Pass(np.concatenate(features), {i: np.concatenate(kept) for i, kept in queries.items()}, keys, scale)

    def values(self, n_tokens: int) -> list[NDArray[np.float32]]:
        """Each layer's values (n_tokens, n_kv_heads, head_dim) of the tokens that were watched last."""
        return [self._rows(tensor, n_tokens) for tensor in self._kv.v]

    def _rows(self, cache: Tensor, n_tokens: int) -> NDArray[np.float32]:
        rows = Backend.array(cache)[:n_tokens].astype(np.float32)
        return rows.reshape(n_tokens, self.arch.hp.n_kv_heads, self.arch.hp.head_dim)

    def close(self) -> None:
        self._allocator.close()
        self._kv.close()
        self.weights.close()
        self.backend.close()


class _Tap:
    """Stands before the cache and keeps what attention is asked."""

    def __init__(self, kv: AttentionCache) -> None:
        self._kv = kv
        self.queries: dict[int, Tensor] = {}
        self.scale = 1.0

    def attend(self, g: Graph, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.queries[layer], self.scale = g.output(g.contiguous(q)), scale
        return self._kv.attend(g, layer, q, k, v, scale)


class TappedState(FusedState):
    """One graph for the whole model that also gives residual streams and queries."""

    def __init__(self, arch: Architecture, kv: DenseKVCache, batch: Batch, layers: Sequence[int]) -> None:
        super().__init__(arch, kv, batch)
        self._layers = layers
        self.residuals: list[Tensor] = []
        self.tap = _Tap(self.inputs.kv)
        self.inputs.step = StepInputs(self.inputs.step.positions, self.tap)

    def embed(self, w: Weights, rows: NDArray[np.int32]) -> None:
        super().embed(w, rows)
        self.residuals.append(self.graph.output(self._x))

    def add_ffn(self, layer: int, w: Weights, summed: Tensor) -> None:
        super().add_ffn(layer, w, summed)
        if layer in self._layers:
            self.residuals.append(self.graph.output(self._x))
