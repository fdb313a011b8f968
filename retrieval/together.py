"""Steps over a set of tokens on several devices, each of which has some heads' keys and values of the whole text.

The device that leads chooses, and says with each pass which tokens it is over (edgert/engine/collective.py); every rank
masks the others, whose keys and values are then not read. The stream behind a layer is the same on all ranks, so the
head sees what it would on one device; what was attended to before is observed on the leader's own heads.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from edgert.architectures.base import Architecture
from edgert.engine.batch import Batch
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.engine.collective import Collective
from edgert.engine.engine import Engine
from edgert.engine.features import FeatureSink
from edgert.engine.kv_cache import DenseKVCache, KVCache
from edgert.engine.trace import OFF, Trace
from edgert.engine.weights import WeightSource
from edgert.ggml.backend import Backend
from retrieval.arrays import Floats
from retrieval.choosing import Chooser, observed_layers
from retrieval.cold import DenseTier
from retrieval.hot import MAX_STEP_TOKENS
from retrieval.masked import MaskedKVCache
from retrieval.repeats import repeats
from retrieval.selection import Policy
from retrieval.selectors import PAGE_TOKENS, Selector


class FollowingEngine(Engine):
    """A rank that computes over whatever set the leader names."""

    def __init__(self, arch: Architecture, weights: WeightSource, kv: DenseKVCache, backend: Backend,
                 collective: Collective, *, observed: frozenset[int] = frozenset(), batch_size: int = 512,
                 graphs: BlockwiseGraphs | None = None, trace: Trace = OFF,
                 features: FeatureSink | None = None) -> None:
        super().__init__(arch, weights, kv, backend, collective=collective, batch_size=batch_size, fused=False,
                         graphs=graphs, trace=trace, features=features)
        self._masked = MaskedKVCache(kv, arch.hp, observed)
        self._masked_graphs = BlockwiseGraphs(backend, arch, self._masked)

    @property
    def compute_bytes(self) -> int:
        return super().compute_bytes + self._masked_graphs.compute_bytes

    def _run(self, batches: list[Batch]) -> Floats | None:
        if self.collective.selected is None or len(batches) > 1:
            return super()._run(batches)
        return self._over(batches[0])

    def _over(self, batch: Batch) -> Floats | None:
        """The batch over the set that this pass is over, or over everything."""
        self._masked.visible = self.collective.selected
        logits = self._pass([batch], self._masked_graphs, self._masked)
        self.kv.commit(batch)
        return logits

    def _pass(self, batches: list[Batch], graphs: BlockwiseGraphs, kv: KVCache) -> Floats | None:
        graphs.is_alone = False
        with self._trace.span(f"{batches[0].phase} {sum(one.n_tokens for one in batches)}", "compute"):
            return graphs.run(graphs.in_parts(batches), self._through(kv, self._features), self._features)

    def close(self) -> None:
        self._masked_graphs.close()
        super().close()


class LeadingEngine(FollowingEngine):
    """Rank 0, which chooses. A prompt, and a text of up to `from_tokens`, are attended whole; and so is, at most once
    in some steps, whatever nothing sure is known of."""

    def __init__(self, arch: Architecture, weights: WeightSource, kv: DenseKVCache, backend: Backend,
                 collective: Collective, selector: Selector, policy: Policy, from_tokens: int, *,
                 batch_size: int = 512, graphs: BlockwiseGraphs | None = None, trace: Trace = OFF) -> None:
        self._selector, self._from_tokens = selector, max(from_tokens, policy.budget)
        self._chooser = Chooser(selector, policy, can_look_around=True)
        self._near = DenseTier(kv)
        super().__init__(arch, weights, kv, backend, collective,
                         observed=selector.key_layers or observed_layers(arch.hp),
                         batch_size=batch_size, graphs=graphs, trace=trace,
                         features=None if selector.feature_layers is None else self)
        self._token_ids = array("i")
        self._n_attended: int | None = None
        self._begins = True  # a request's first tokens are its prompt, however few

    # -- features ------------------------------------------------------------------------------------------------
    @property
    def feature_layers(self) -> frozenset[int]:
        return self._selector.feature_layers or frozenset()

    def take(self, batch: Batch, streams: Sequence[Floats]) -> None:
        self._selector.add_features(batch.start, streams)

    # -- the engine ----------------------------------------------------------------------------------------------
    @property
    def selected_tokens(self) -> int | None:
        return self._n_attended

    def refresh(self) -> None:
        self._begins = True
        self._chooser.forget()

    def _run(self, batches: list[Batch]) -> Floats | None:
        start, end = batches[0].start, batches[-1].end
        self._chooser.truncate(start)
        del self._token_ids[start:]
        is_prompt, self._begins = self._begins or end - start > MAX_STEP_TOKENS, False
        if is_prompt or end <= self._from_tokens:
            assert isinstance(self._graphs, BlockwiseGraphs)  # what is neither fused nor one rank alone has
            logits, self._n_attended = self._pass(batches, self._graphs, self.kv), None
            self.kv.commit(batches[-1])
        else:
            logits = self._attend_to_a_set(batches[0])
        for batch in batches:
            self._token_ids.extend(batch.token_ids.tolist())
        if self._selector.key_layers:
            self._show_keys(start, end)
        return logits

    def _show_keys(self, start: int, end: int) -> None:
        """Of this rank's heads, for bounds on pages; from a page's first token on."""
        start = start // PAGE_TOKENS * PAGE_TOKENS
        shape = end - start, -1, self.arch.hp.head_dim
        self._selector.add_keys(start, {layer: self._near.keys(layer, start, end).reshape(shape)
                                        for layer in self._selector.key_layers})

    def _attend_to_a_set(self, batch: Batch) -> Floats | None:
        ids = np.array(self._token_ids, np.int32)
        known = self._chooser.known(batch.start, self._chooser.survivors)
        chosen = self._chooser.trusted(self._chooser.choose(known, repeats(ids, int(batch.token_ids[0])), None))
        if chosen is None:
            logits, self._n_attended = self._over(batch), None
            self._chooser.saw_everything(batch.end, self._masked.observations())
            self._chooser.looked_around()
            return logits
        self.collective.selected, self._n_attended = chosen.positions, len(chosen.positions)
        try:
            logits = self._over(batch)
        finally:
            self.collective.selected = None
        positions = np.concatenate([chosen.positions, np.arange(batch.start, batch.end, dtype=np.int64)])
        self._chooser.survivors = self._chooser.surviving(positions, positions, self._masked.observations())
        self._chooser.held = chosen.positions
        return logits
