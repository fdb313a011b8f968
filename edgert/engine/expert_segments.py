"""Single tokens of a model whose experts come one by one, in graphs that stay (edgert/engine/expert_state.py).

A token passes one graph for each layer whose experts are all here, and three for others. Binding the graphs of blocks
anew took 7 of a token's 35 ms (SmallThinker-4B's shape, 121 graphs a token; now 54).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture, Block
from edgert.engine.batch import Batch
from edgert.engine.expert_state import ExpertState
from edgert.engine.kv_cache import KVCache
from edgert.engine.parted import PartedStates
from edgert.engine.weights import Leases
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Graph

Build = Callable[[ExpertState], None]


class ExpertSegments:
    """The segments of the shape that the last token had: another is due every 256 tokens, and made in some 30 ms."""

    def __init__(self, backend: Backend, arch: Architecture, kv: KVCache) -> None:
        self._backend, self._arch, self._kv = backend, arch, kv
        self._states = PartedStates[ExpertState](backend, max_shapes=1)

    @property
    def compute_bytes(self) -> int:
        """Memory of intermediate results, of inputs and logits."""
        return self._states.compute_bytes + sum(state.size_bytes for state in self._states)

    @staticmethod
    def serve(batches: list[Batch], weights: Leases) -> bool:
        """Whether these batches pass in segments: one token, of weights that are all here but for experts."""
        return weights.experts is not None and weights.stay and [one.n_tokens for one in batches] == [1]

    def prepare(self, batch: Batch, weights: Leases, build: Build) -> None:
        """Make the graphs of such a token, without computing."""
        self._state_of(batch, weights, build)

    def run(self, batch: Batch, weights: Leases, build: Build) -> NDArray[np.float32]:
        """Compute one token. Logits (1, vocab_size), valid until the next run."""
        state, compute, experts = self._state_of(batch, weights, build), self._backend.compute, weights.experts
        assert experts is not None and state.first is not None  # `serve` says so, and `build` has made it
        experts.release()  # what a step that was stopped has left
        with weights.lease_embedding(batch.token_ids, batch.phase) as (_, rows):
            state.write(self._kv, batch, rows)
            compute(state.first)
        for layer, graphs in enumerate(state.layers):
            chosen = state.chosen()
            last_use = dict.fromkeys(chosen, batch.start)
            here = experts.request(layer, last_use)
            if here is None and graphs.attention is not None:
                compute(graphs.attention)
            if layer + 1 < len(state.layers) and (here is None or graphs.attention is None):
                experts.expect(layer + 1, state.guessed())
            if here is not None:
                compute(state.everything(layer, chosen, here))
            else:
                for slots in experts.waves(layer, last_use):
                    compute(state.experts_in(layer, chosen, slots))
                compute(cast(Graph, graphs.rest))
            experts.release()
        with weights.lease(Block("output", part=weights.n_output_parts - 1), batch.phase):
            return state.all_logits

    def _state_of(self, batch: Batch, weights: Leases, build: Build) -> ExpertState:
        def build_both(state: ExpertState) -> None:
            for state.waits in (True, False):
                state.begin()
                build(state)

        return self._states.get((self._kv.bucket(batch),),
                                lambda: ExpertState(self._backend, self._arch, self._kv, batch, weights), build_both)

    def close(self) -> None:
        self._states.close()
