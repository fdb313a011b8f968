"""The engine with a cache of which steps attend to a part.

Prompts are attended densely, and a short text is computed as by any engine. A step over a long one first chooses its
tokens, has them in the hot buffer, and computes over that; where the choice is not to be trusted, over everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture
from edgert.engine.batch import Batch
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.engine.engine import Engine, forward
from edgert.engine.fused import FusedGraphs, State
from edgert.engine.kv_cache import KVCache
from edgert.engine.trace import OFF, Trace
from edgert.engine.weights import WeightSource
from edgert.ggml.backend import Backend
from retrieval.cache import RetrievedKVCache
from retrieval.hot import MAX_STEP_TOKENS

Logits = NDArray[np.float32]


class RetrievalEngine(Engine):
    def __init__(self, arch: Architecture, weights: WeightSource, kv: RetrievedKVCache, backend: Backend, *,
                 batch_size: int = 512, fused: bool | None = None, graphs: BlockwiseGraphs | None = None,
                 trace: Trace = OFF, between_steps: Callable[[int], None] = lambda n_tokens: None) -> None:
        features = kv if kv.selector.feature_layers is not None else None
        super().__init__(arch, weights, kv, backend, batch_size=batch_size, fused=fused, graphs=graphs, trace=trace,
                         features=features, between_steps=between_steps)
        self._retrieved = kv
        kind = FusedGraphs if isinstance(self._graphs, FusedGraphs) else BlockwiseGraphs
        self._hot_graphs = kind(backend, arch, kv.hot)
        self._whole_graphs = kind(backend, arch, kv.whole)

    @property
    def compute_bytes(self) -> int:
        return super().compute_bytes + self._hot_graphs.compute_bytes + self._whole_graphs.compute_bytes

    def _run(self, batches: list[Batch]) -> Logits | None:
        if batches[-1].end <= self._retrieved.from_tokens:
            return super()._run(batches)
        if len(batches) > 1 or batches[0].n_tokens > MAX_STEP_TOKENS:
            *before, last = _last_token_apart(batches)
            super()._run(before)
            return self._compute(last, self._whole_graphs, self._retrieved.whole)
        return self._attend_to_a_set(batches[0])

    def _attend_to_a_set(self, batch: Batch) -> Logits:
        kv = self._retrieved
        with self._trace.span("select", "compute"):
            chosen = kv.select(batch)
        if chosen is None:
            return self._compute(batch, self._whole_graphs, kv.whole)
        with self._trace.span("fetch", "wait"):
            kv.bring(chosen, batch)
        with self._trace.span(f"step over {len(chosen.positions)}", "compute"):
            logits = self._pass(batch, self._hot_graphs, kv.hot)
        kv.commit_step(batch, chosen)
        self._trace.count("retrieval", selected=len(chosen.positions), fetched=kv.counts.n_fetched)
        return logits

    def _compute(self, batch: Batch, graphs: FusedGraphs | BlockwiseGraphs, kv: KVCache) -> Logits:
        with self._trace.span(f"step over everything {batch.n_tokens}", "compute"):
            logits = self._pass(batch, graphs, kv)
        self._retrieved.commit_step(batch, None)
        return logits

    def _pass(self, batch: Batch, graphs: FusedGraphs | BlockwiseGraphs, kv: KVCache) -> Logits:
        def through(states: Sequence[State]) -> None:
            forward(states, self.arch, self.weights, kv, self.collective, self._features)

        logits = graphs.run([batch], through, self._features) if isinstance(graphs, BlockwiseGraphs) \
            else graphs.run(batch, through, self._features)
        assert logits is not None  # a step's last token is always wanted
        return logits

    def close(self) -> None:
        self._hot_graphs.close()
        self._whole_graphs.close()
        super().close()


def _last_token_apart(batches: list[Batch]) -> list[Batch]:
    """A prompt's last token is a step of its own, whose attention is observed: it says where the answer begins to
    look. Wanted logits stay together."""
    *before, last = batches
    n_last = max(1, last.n_outputs)
    if n_last == last.n_tokens:
        return batches
    cut = last.n_tokens - n_last
    return [*before, Batch(last.token_ids[:cut], last.start, 0), Batch(last.token_ids[cut:], last.start + cut, n_last)]
