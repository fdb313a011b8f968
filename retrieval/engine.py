"""The engine with a cache of which steps attend to a part.

Prompts are attended densely, and a short text is computed as by any engine. A step over a long one first chooses its
tokens, has them in the hot buffer, and computes over that; where the choice is not to be trusted, over everything. Of a
step over a set, the next one's is planned and fetched while it computes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture
from edgert.engine.batch import Batch
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.engine.engine import Engine
from edgert.engine.features import FeatureSink
from edgert.engine.fused import FusedGraphs
from edgert.engine.kv_cache import KVCache
from edgert.engine.parted import PartedGraphs
from edgert.engine.trace import OFF, Trace
from edgert.engine.weights import WeightSource
from edgert.errors import KVStoreError
from edgert.ggml.backend import Backend
from retrieval.cache import APPROACH_SETS, RetrievedKVCache
from retrieval.hot import MAX_STEP_TOKENS
from retrieval.selection import Selection
from retrieval.sizes import PASSING_TOKENS

Logits = NDArray[np.float32]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Foresight:
    """Takes the features of a step over the set `chosen`, and begins to fetch the next one's tokens."""

    kv: RetrievedKVCache
    chosen: Selection

    @property
    def feature_layers(self) -> frozenset[int]:
        return self.kv.foresight_layers or frozenset()

    def take(self, batch: Batch, streams: Sequence[Logits]) -> None:
        begin_s = perf_counter()
        some = streams[:1 + len(self.kv.feature_layers)]  # the last may only mark the place
        self.kv.planner.look_ahead(batch, self.chosen, [stream.copy() for stream in some])
        self.kv.counts.select_s += perf_counter() - begin_s


class RetrievalEngine(Engine):
    def __init__(self, arch: Architecture, weights: WeightSource, kv: RetrievedKVCache, backend: Backend, *,
                 store: Path = Path(), batch_size: int = 512, fused: bool | None = None,
                 graphs: BlockwiseGraphs | None = None, trace: Trace = OFF) -> None:
        features = kv if kv.selector.feature_layers is not None else None
        super().__init__(arch, weights, kv, backend, batch_size=batch_size, fused=fused, graphs=graphs, trace=trace,
                         features=features)
        self._retrieved, self._store = kv, store  # the directory of files that prompts need
        is_fused = isinstance(self._graphs, FusedGraphs)
        self._hot_graphs = (PartedGraphs if is_fused else BlockwiseGraphs)(backend, arch, kv.hot)
        self._whole_graphs = (FusedGraphs if is_fused else BlockwiseGraphs)(backend, arch, kv.whole or kv.hot)
        self._begins = True  # a request's first tokens are its prompt, however few

    @property
    def compute_bytes(self) -> int:
        return super().compute_bytes + self._hot_graphs.compute_bytes + self._whole_graphs.compute_bytes

    @property
    def selected_tokens(self) -> int | None:
        return self._retrieved.n_attended

    def plan(self) -> dict[str, Any]:
        kv = self._retrieved
        return {**super().plan(), "kv": {
            "tier": "memory" if kv.disk is None else "disk", "budget": kv.policy.budget, "from_tokens": kv.from_tokens,
            "selector": kv.selector.name, "steps": kv.counts.n_steps, "steps_over_everything": kv.counts.n_whole,
            "selected": kv.counts.n_selected, "fetched": kv.counts.n_fetched, "late": kv.counts.n_late,
            "read_bytes": kv.counts.read_bytes, "reads": kv.counts.n_reads,
            "select_ms": round(kv.counts.select_s * 1000, 3), "fetch_ms": round(kv.counts.fetch_s * 1000, 3)}}

    def step(self, token_ids: NDArray[np.int32], n_outputs: int = 1) -> Logits:
        """As any engine's. Where what the disk holds of the text turns out damaged, the text is computed anew."""
        known, begins = self._retrieved.token_ids, self._begins
        del known[self.kv.length:]
        try:
            logits = super().step(token_ids, n_outputs)
        except KVStoreError as error:
            before = np.array(known, np.int32)
            _log.warning("%s; %d tokens are computed anew", error.message, len(before))
            self.kv.truncate(0)
            if len(before):
                self._begins = True
                super().step(before)
            self._begins = begins
            logits = super().step(token_ids, n_outputs)
        finally:
            known.extend(token_ids[:max(0, self.kv.length - len(known))].tolist())  # a step that was stopped has some
        return logits

    def _run(self, batches: list[Batch]) -> Logits | None:
        kv, start, end = self._retrieved, batches[0].start, batches[-1].end
        is_prompt, self._begins = self._begins or end - start > MAX_STEP_TOKENS, False
        if end <= kv.from_tokens:
            kv.gather(start)
            grows = kv.context_length > kv.from_tokens and not is_prompt
            is_seen = grows and kv.whole is not None and end > kv.from_tokens - APPROACH_SETS
            logits = self._look_at_everything(batches[0]) if is_seen else super()._run(batches)
            self._approach(end, is_prompt)
            return logits
        if not is_prompt:
            return self._attend_to_a_set(batches[0])
        *before, last = _last_token_apart(batches)
        if kv.disk is not None:
            return self._prefill_by_layer([*before, last])
        if before:
            super()._run(before)
        return self._look_at_everything(last)

    def refresh(self) -> None:
        self._begins = True
        self._retrieved.begin()

    def _approach(self, end: int, is_prompt: bool) -> None:
        """Do now what the first steps over a set would have to do all at once: with a prompt, which takes long anyhow,
        build their graphs (20 ms for SmolLM2-135M); with each step of the last ones before, some of the rest."""
        kv = self._retrieved
        kv.approach(end, at_once=is_prompt)
        if not is_prompt or kv.context_length <= kv.from_tokens:
            return
        if isinstance(self._hot_graphs, PartedGraphs):
            sink = self._sink(Selection(np.zeros(0, np.int64), 1.0, True))
            step = Batch(np.zeros(1, np.int32), kv.from_tokens, 1)
            self._hot_graphs.reserve(step, self._through(kv.hot, sink), sink)
        if isinstance(self._whole_graphs, FusedGraphs) and kv.whole is not None:
            step = Batch(np.zeros(1, np.int32), kv.from_tokens - 1, 1)
            self._whole_graphs.reserve([step], self._through(kv.whole, self._features))

    def _sink(self, chosen: Selection) -> FeatureSink | None:
        kv = self._retrieved
        return self._features if kv.foresight_layers is None else Foresight(kv, chosen)

    def _prefill_by_layer(self, batches: list[Batch]) -> Logits | None:
        """A prompt, some thousand tokens after the other, with one layer's keys and values in memory."""
        kv, start, end = self._retrieved, batches[0].start, batches[-1].end
        logits: Logits | None = None
        with kv.staging(self._store, start, end) as staged:
            graphs = BlockwiseGraphs(self.backend, self.arch, staged)
            try:
                for some in _at_once(batches, PASSING_TOKENS["resident" if self.weights.resident else "streamed"]):
                    staged.start, staged.end = some[0].start, some[-1].end
                    with self._trace.span(f"prefill {staged.end - staged.start} layer by layer", "compute"):
                        logits = self._pass(some, graphs, staged, self._features)
                if logits is not None:
                    logits = logits.copy()  # the graphs go
            finally:
                graphs.close()
        return logits

    def _attend_to_a_set(self, batch: Batch) -> Logits | None:
        kv = self._retrieved
        begin_s = perf_counter()
        with self._trace.span("select", "compute"):
            chosen = kv.planner.select(batch)
        kv.counts.select_s += perf_counter() - begin_s
        if chosen is None:
            return self._look_at_everything(batch)
        begin_s = perf_counter()
        with self._trace.span("fetch", "wait"):
            kv.bring(chosen, batch)
        kv.counts.fetch_s += perf_counter() - begin_s
        with self._trace.span(f"step over {len(chosen.positions)}", "compute"):
            logits = self._pass([batch], self._hot_graphs, kv.hot, self._sink(chosen))
        begin_s = perf_counter()
        kv.commit_step(batch, chosen)
        kv.counts.select_s += perf_counter() - begin_s
        self._trace.count("retrieval", selected=len(chosen.positions), fetched=kv.counts.n_fetched)
        return logits

    def _look_at_everything(self, batch: Batch) -> Logits | None:
        kv = self._retrieved
        assert kv.whole is not None  # `select` gives no set only then
        with self._trace.span(f"step over everything {batch.n_tokens}", "compute"):
            logits = self._pass([batch], self._whole_graphs, kv.whole, self._features)
        kv.commit_step(batch, None)
        return logits

    def _pass(self, batches: list[Batch], graphs: FusedGraphs | PartedGraphs | BlockwiseGraphs, kv: KVCache,
              features: FeatureSink | None) -> Logits | None:
        through = self._through(kv, features)
        if isinstance(graphs, BlockwiseGraphs):
            return graphs.run(graphs.in_parts(batches), through, features)
        return graphs.run(batches[0], through, features)

    def close(self) -> None:
        self._hot_graphs.close()
        self._whole_graphs.close()
        super().close()


def _at_once(batches: list[Batch], n_tokens: int) -> Iterator[list[Batch]]:
    """Whole batches, so many tokens or one batch at a time."""
    some: list[Batch] = []
    for batch in batches:
        if some and batch.end - some[0].start > n_tokens:
            yield some
            some = []
        some.append(batch)
    yield some


def _last_token_apart(batches: list[Batch]) -> list[Batch]:
    """A prompt's last token is a step of its own, whose attention is observed: it says where the answer begins to
    look. Wanted logits stay together."""
    *before, last = batches
    n_last = max(1, last.n_outputs)
    if n_last == last.n_tokens:
        return batches
    cut = last.n_tokens - n_last
    return [*before, Batch(last.token_ids[:cut], last.start, 0), Batch(last.token_ids[cut:], last.start + cut, n_last)]
