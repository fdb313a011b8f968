"""The loop: one step takes batches of tokens through every block and gives logits.

Reads top to bottom as the model computes: where weights are in memory, and where ranks talk. Knows no text, no
sampling and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture, Block
from edgert.engine.batch import split
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.engine.collective import Collective, Solo
from edgert.engine.fused import FusedGraphs, State
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.trace import OFF, Trace
from edgert.engine.weights import Leases, WeightSource
from edgert.ggml.backend import Backend


class Engine:
    """One sequence over one model. Not safe for two steps at once; `cancel` may come from any thread."""

    def __init__(self, arch: Architecture, weights: WeightSource, kv: DenseKVCache, backend: Backend, *,
                 collective: Collective | None = None, batch_size: int = 512, fused: bool | None = None,
                 graphs: BlockwiseGraphs | None = None, trace: Trace = OFF,
                 between_steps: Callable[[int], None] = lambda n_tokens: None) -> None:
        self.arch, self.weights, self.kv, self.backend = arch, weights, kv, backend
        self.collective: Collective = collective or Solo()
        self.batch_size, self._trace = batch_size, trace
        self.between_steps = between_steps  # what stays in memory may change there; given the tokens to come
        alone = weights.resident and self.collective.world_size == 1
        whole = graphs is None and (alone if fused is None else fused)
        self._graphs = FusedGraphs(backend, arch, kv) if whole else graphs or BlockwiseGraphs(backend, arch, kv)

    @property
    def compute_bytes(self) -> int:
        """Memory of the graphs' intermediate results."""
        return self._graphs.compute_bytes

    def step(self, token_ids: NDArray[np.int32], n_outputs: int = 1) -> NDArray[np.float32]:
        """Append tokens to the sequence. Logits (n_outputs, vocab_size) of the last ones, valid until the next step.

        Raises ContextOverflow before anything is computed. After Cancelled or any error, the sequence is as long as
        before, or longer by whole batches.
        """
        self.kv.check_room(self.kv.length + len(token_ids), self.arch.hp.context_length)
        self.between_steps(self.kv.length + len(token_ids))
        batches = split(token_ids, self.kv.length, self.batch_size, n_outputs)
        if isinstance(self._graphs, BlockwiseGraphs):
            with self._trace.span(f"{batches[0].phase} {len(token_ids)}", "compute"):
                logits = self._graphs.run(self._graphs.in_parts(batches), self._forward)
            self.kv.commit(batches[-1])
        else:
            for batch in batches:
                with self._trace.span(f"{batch.phase} {batch.n_tokens}", "compute"):
                    logits = self._graphs.run(batch, self._forward)
                self.kv.commit(batch)
        assert logits is not None  # split() asks for at least one row of the last batch
        return logits

    def _forward(self, states: Sequence[State]) -> None:
        forward(states, self.arch, self.weights, self.collective)

    def cancel(self) -> None:
        """Stop the running step between two operations. Later steps fail until `resume`."""
        self.backend.cancel.set()

    def resume(self) -> None:
        self.backend.cancel.clear()

    def close(self) -> None:
        self._graphs.close()
        self.kv.close()
        self.weights.close()
        self.backend.close()


def forward(states: Sequence[State], arch: Architecture, weights: Leases, collective: Collective) -> None:
    """Every block in order. Each state holds one batch: all of them pass a block while its weights are here."""
    phase = states[0].batch.phase if len(states) == 1 else "prefill"
    reduce, n_layers = collective.all_reduce, arch.hp.n_layers

    for state in states:
        with weights.lease_embedding(state.batch.token_ids, phase) as (w, rows):
            state.embed(w, rows)

    for layer in range(n_layers):
        with weights.lease(Block("attention", layer), phase) as w:
            for state in states:
                partial = state.attention(layer, w)
                state.add_attention(layer, w, reduce(partial))
        if layer == n_layers - 1:  # beyond the last attention, only wanted tokens count
            for state in states:
                state.keep_outputs()
            states = [state for state in states if state.batch.n_outputs]
        with weights.lease(Block("ffn", layer), phase) as w:
            for state in states:
                partial = state.ffn(layer, w)
                state.add_ffn(layer, w, reduce(partial))

    for part in range(weights.n_output_parts):
        with weights.lease(Block("output", part), phase) as w:
            for state in states:
                state.output(w, part)
