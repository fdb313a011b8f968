"""The loop: one step takes batches of tokens through every block and gives logits.

Reads top to bottom as the model computes: where weights are in memory, and where ranks talk. Knows no text, no
sampling and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture, Block, Weights
from edgert.engine.account import Account, Laps
from edgert.engine.batch import Batch, split
from edgert.engine.blockwise import PART_TOKENS, BlockwiseGraphs
from edgert.engine.collective import Collective, Solo
from edgert.engine.expert_segments import ExpertSegments
from edgert.engine.expert_state import ExpertState
from edgert.engine.features import FeatureSink
from edgert.engine.fused import FusedGraphs, State
from edgert.engine.kv_cache import KVCache
from edgert.engine.segments import SegmentGraphs, SegmentState
from edgert.engine.trace import OFF, Trace
from edgert.engine.weights import Experts, Leases, WeightSource
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Tensor

# What stays in memory may change there. Given the tokens to come, and whether the step does without the buffers that a
# prompt computes in.
BetweenSteps = Callable[[int, bool], None]
_EMBEDDING = -1  # among the layers with features: what comes before the first


class Engine:
    """One sequence over one model. Not safe for two steps at once; `cancel` may come from any thread."""

    def __init__(self, arch: Architecture, weights: WeightSource, kv: KVCache, backend: Backend, *,
                 collective: Collective | None = None, batch_size: int = 512, fused: bool | None = None,
                 graphs: BlockwiseGraphs | None = None, trace: Trace = OFF,
                 features: FeatureSink | None = None) -> None:
        self.arch, self.weights, self.kv, self.backend = arch, weights, kv, backend
        self.collective: Collective = collective or Solo()
        self.batch_size, self._trace, self._laps = batch_size, trace, Laps(weights)
        self._features = features
        self.between_steps: BetweenSteps = lambda n_tokens, leaves_buffers: None
        alone = weights.resident and self.collective.world_size == 1
        whole = graphs is None and (alone if fused is None else fused)
        self._graphs = FusedGraphs(backend, arch, kv) if whole else graphs or BlockwiseGraphs(backend, arch, kv)
        self._segments, self._expert_segments = SegmentGraphs(backend, arch, kv), ExpertSegments(backend, arch, kv)
        if self.collective.world_size > 1 and isinstance(self._graphs, BlockwiseGraphs):
            self._graphs.part_tokens = PART_TOKENS[-1]  # every rank cuts alike, whatever memory it has

    @property
    def compute_bytes(self) -> int:
        """Memory of the graphs' intermediate results."""
        return self._graphs.compute_bytes + self._segments.compute_bytes + self._expert_segments.compute_bytes

    @property
    def passes_are_costly(self) -> bool:
        """Whether most of what a pass takes is the same for one token and for several."""
        return not self.weights.resident

    def step(self, token_ids: NDArray[np.int32], n_outputs: int = 1) -> NDArray[np.float32]:
        """Append tokens to the sequence. Logits (n_outputs, vocab_size) of the last ones, valid until the next step.

        Raises ContextOverflow before anything is computed. After Cancelled or any error, the sequence is as long as
        before, or longer by whole batches.
        """
        self.kv.check_room(self.kv.length + len(token_ids), self.arch.hp.context_length)
        batches = split(token_ids, self.kv.length, self.batch_size, n_outputs)
        self.between_steps(self.kv.length + len(token_ids), self._waits_for_experts_alone(batches))
        account = Account()
        self._laps.rest(account)
        logits = self._run(batches)
        assert logits is not None  # split() asks for at least one row of the last batch
        logits = self.collective.gather(logits)
        self._laps.step(account)
        self._trace.count("step, ms", compute=account.compute_ms, wait=account.wait_ms, rest=account.rest_ms)
        self._trace.count("step, bytes read", read=account.read_bytes)
        return logits

    def _run(self, batches: list[Batch]) -> NDArray[np.float32] | None:
        """Logits of the last batch, or None when none are wanted."""
        logits: NDArray[np.float32] | None = None
        if self.collective.world_size > 1 and self.weights.resident and [one.phase for one in batches] == ["decode"]:
            with self._trace.span(f"decode {batches[0].n_tokens}", "compute"):
                logits = self._segments.run(batches[0], self._in_segments, self.collective)
            self.kv.commit(batches[-1])
        elif self._waits_for_experts_alone(batches):
            with self._trace.span("decode 1", "compute"):
                logits = self._expert_segments.run(batches[0], self.weights, self._in_expert_segments)
            self.kv.commit(batches[-1])
        elif isinstance(self._graphs, BlockwiseGraphs):
            n_tokens = sum(batch.n_tokens for batch in batches)
            self._graphs.is_alone = isinstance(self.collective, Solo)
            with self._trace.span(f"{batches[0].phase} {n_tokens}", "compute"):
                logits = self._graphs.run(self._graphs.in_parts(batches), self._forward, self._features)
            self.kv.commit(batches[-1])
            self._prepare_token()
        else:
            for batch in batches:
                with self._trace.span(f"{batch.phase} {batch.n_tokens}", "compute"):
                    logits = self._graphs.run(batch, self._forward, self._features)
                self.kv.commit(batch)
        return logits

    def _forward(self, states: Sequence[State]) -> None:
        self._through(self.kv, self._features)(states)

    def _through(self, kv: KVCache, features: FeatureSink | None) -> Callable[[Sequence[State]], None]:
        """Every block, over that cache."""
        return lambda states: forward(states, self.arch, self.weights, kv, self.collective, features)

    @property
    def selected_tokens(self) -> int | None:
        """How many cached tokens the last step attended to; None where steps attend to all of them."""
        return None

    def _in_segments(self, state: SegmentState) -> None:
        forward([state], self.arch, self.weights, self.kv, state)

    def _waits_for_experts_alone(self, batches: list[Batch]) -> bool:
        """Whether nothing but experts comes between the operations of a token."""
        return (isinstance(self.collective, Solo) and self._features is None
                and self._expert_segments.serve(batches, self.weights))

    def _prepare_token(self) -> None:
        """After a prompt, make the graphs of its answer's first token: they take as long as a token."""
        token = Batch(np.zeros(1, np.int32), self.kv.length)
        if self.kv.length < self.kv.context_length and self._waits_for_experts_alone([token]):
            with self._trace.span("graphs of a token", "compute"):
                self._expert_segments.prepare(token, self.weights, self._in_expert_segments)

    def _in_expert_segments(self, state: ExpertState) -> None:
        forward([state], self.arch, state, self.kv, self.collective)

    def plan(self) -> dict[str, Any]:
        """How this model runs here, for people and for `--json`."""
        return self.weights.plan()

    def refresh(self) -> None:
        """Called between two requests: what can change then, may. Tokens that were held may be gone after it."""

    def become(self, other: Engine) -> None:
        """Take over everything that `other` has opened. What this engine had is not closed."""
        self.arch, self.weights, self.kv, self.backend = other.arch, other.weights, other.kv, other.backend
        self.collective, self.batch_size, self._features = other.collective, other.batch_size, other._features
        self._trace, self._laps = other._trace, other._laps
        self._graphs, self._segments, self._expert_segments = other._graphs, other._segments, other._expert_segments
        self.between_steps = other.between_steps

    def cancel(self) -> None:
        """Stop the running step between two operations. Later steps fail until `resume`."""
        self.backend.cancel.set()

    def resume(self) -> None:
        self.backend.cancel.clear()

    def close(self) -> None:
        self._segments.close()
        self._expert_segments.close()
        self._graphs.close()
        self.kv.close()
        self.weights.close()
        self.backend.close()


def forward(states: Sequence[State], arch: Architecture, weights: Leases, kv: KVCache, collective: Collective,
            features: FeatureSink | None = None) -> None:
    """Every block in order. Each state holds one batch: all of them pass a block while its weights are here.

    Rank 0 alone holds the embedding, and mostly the output head: the last sum is then only for it.
    """
    phase = states[0].batch.phase if len(states) == 1 else "prefill"
    reduce, n_layers, experts = collective.all_reduce, arch.hp.n_layers, weights.experts
    featured = frozenset[int]() if features is None else features.feature_layers | {_EMBEDDING}

    if experts is not None:
        experts.release()  # what a step that was stopped has left
    for state in states:
        if collective.rank == 0:
            with weights.lease_embedding(state.batch.token_ids, phase) as (w, rows):
                state.embed(w, rows)
        collective.broadcast(state.hidden)
        if _EMBEDDING in featured:
            state.keep_feature()

    for layer in range(n_layers):
        with weights.lease(Block("attention", layer), phase) as w, kv.lease(layer):
            if experts is not None and arch.hp.carried_size and (layer < n_layers - 1 or phase == "decode"):
                for state in states:  # the router comes before attention, so experts are read while that computes
                    experts.request(layer, state.foresee(layer, w))
            for state in states:
                partial = state.attention(layer, w)
                state.add_attention(layer, w, reduce(partial))
        if layer == n_layers - 1:  # beyond the last attention, only wanted tokens count
            for state in states:
                state.keep_outputs()
            states = [state for state in states if state.batch.n_outputs]
            reduce = collective.all_reduce if collective.splits_head else collective.reduce
        for part in range(weights.n_ffn_parts):
            with weights.lease(Block("ffn", layer, part), phase) as w:
                if experts is not None:
                    stream_experts(states, layer, w, experts, reduce)
                    continue
                for state in states:
                    partial = state.ffn(layer, w)
                    if part == weights.n_ffn_parts - 1:
                        state.add_ffn(layer, w, reduce(partial))
        for state in states if layer in featured else ():
            state.keep_feature()

    for part in range(weights.n_output_parts if collective.rank == 0 or collective.splits_head else 0):
        with weights.lease(Block("output", part=part), phase) as w:
            for state in states:
                state.output(w, part)


def stream_experts(states: Sequence[State], layer: int, w: Weights, experts: Experts,
                   reduce: Callable[[Tensor], Tensor]) -> None:
    """One layer's FFN, each expert computed when it is here, for all tokens of a batch at once.

    Batch by batch, so that one batch's outputs are kept at a time; where not all experts of a layer have room, all
    batches together, so that each expert is still read once.
    """
    for group in [[state] for state in states] if experts.holds_a_layer else [states]:
        span, wanted = range(group[0].batch.start, group[-1].batch.end), dict[int, int]()
        for state in group:
            wanted |= state.route(layer, w, span)
        for slots in experts.waves(layer, wanted):
            for state in group:
                state.compute_experts(layer, experts.weights(layer), slots)
        for state in group:
            partial = state.weigh(layer)
            state.add_ffn(layer, w, reduce(partial))
    experts.release()
