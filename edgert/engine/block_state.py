"""One batch on its way through block graphs: the state that the engine's loop moves from block to block.

Knows which operations each block asks for, where their results go, and which of them can wait for the next and share
its graph. Building and keeping graphs is blockwise.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from edgert.architectures import moe
from edgert.architectures.base import Weights
from edgert.engine.batch import Batch
from edgert.engine.block_graph import Operation
from edgert.engine.expert_graphs import Choice, PairInputs, pairs_at_once
from edgert.engine.features import FeatureSink
from edgert.engine.scratch import FfnParts, Memory, Scratch
from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Graph, Tensor

if TYPE_CHECKING:
    from edgert.engine.blockwise import BlockwiseGraphs


class BlockState:
    """One batch between two blocks: its hidden state and what a layer carries, in memory of its own.

    What nobody waits for is put off until the next operation that somebody does, and shares its graph: alone, a block's
    output until it is added to the hidden state; in a cluster, that addition until the next block's output. No lease
    ends before its matrices were used: additions read none. Batches that pass a block in turn share the memory of
    partial results, so they put off nothing that another batch comes before.
    """

    def __init__(self, graphs: BlockwiseGraphs, batch: Batch, features: FeatureSink | None = None, *,
                 is_only: bool) -> None:
        self.batch, self._is_only, self._features = batch, is_only, features
        self._put_off: list[Operation] = []
        self._graphs, self._arch = graphs, graphs.arch
        context, n_rows = Context(4), max(batch.n_outputs, 1)
        hidden, carried = self._arch.hp.hidden_size, self._arch.hp.carried_size
        self._all = context.tensor(TYPE_F32, (hidden, batch.n_tokens))
        self._outputs = context.tensor(TYPE_F32, (hidden, n_rows))
        self._carried = [context.tensor(TYPE_F32, (carried, n)) for n in (batch.n_tokens, n_rows)] if carried else []
        self._memory = Memory(graphs.backend, context, [self._all, self._outputs, *self._carried])
        self._x = self._all
        self._n_logits_rows = 0
        self._choice: Choice | None = None
        self._ffn_parts: FfnParts | None = None
        self._carried_layer, self._foreseen = -1, (-1, 0)
        self._streams: list[NDArray[np.float32]] = []  # the kept features, each (n_tokens, hidden_size)

    @property
    def hidden(self) -> Tensor:
        self._catch_up()
        return self._x

    def embed(self, w: Weights, rows: NDArray[np.int32]) -> None:
        scratch = self._scratch
        if not self._graphs.only_measures:
            scratch.inputs.write_token_ids(rows)
        self._compute(self._arch.embed, ("embed",), w, [scratch.inputs.token_ids], self._x)

    def attention(self, layer: int, w: Weights) -> Tensor:
        inputs, kv = self._scratch.inputs, self._graphs.kv
        sources = [self._x, *inputs.attention_sources(), kv.k[layer], kv.v[layer]]
        if self._carried and self._carried_layer != layer:
            self._carry(layer, w)

        def function(g: Graph, weights: Weights, x: Tensor, *stand_ins: Tensor) -> Tensor:
            return self._arch.attention(g, layer, weights, x, inputs.standing_for(stand_ins))

        kind = ("attention", self._arch.layer_kind(layer), inputs.kv.variant(layer), kv.bucket(self.batch))
        return self._compute_part(function, kind, w, sources, self._scratch.partial)

    def _carry(self, layer: int, w: Weights) -> None:
        def function(g: Graph, weights: Weights, x: Tensor) -> Tensor:
            carried = self._arch.carry(g, layer, weights, x)
            assert carried is not None  # hp.carried_size says so
            return carried

        self._compute(function, ("carry", self._arch.layer_kind(layer)), w, [self._x], self._carried[0])
        self._carried_layer = layer

    def add_attention(self, layer: int, w: Weights, summed: Tensor) -> None:
        def function(g: Graph, weights: Weights, x: Tensor, summed: Tensor) -> Tensor:
            return self._arch.add_attention(g, layer, weights, x, summed)

        self._add(function, ("add_attention", self._arch.layer_kind(layer)), w, summed)

    def ffn(self, layer: int, w: Weights) -> Tensor:
        if ("ffn_up.weight" in w) != ("ffn_down.weight" in w):
            return self._ffn_part(layer, w)

        def function(g: Graph, weights: Weights, x: Tensor, carried: Tensor | None = None) -> Tensor:
            return self._arch.ffn(g, layer, weights, x, carried)

        return self._compute_part(function, ("ffn", self._arch.layer_kind(layer)), w,
                                  [self._x, *self._carried[:1]], self._partial)

    def _ffn_part(self, layer: int, w: Weights) -> Tensor:
        """Some rows of hidden values, or of the output. The norm is computed for each part anew: it costs nothing."""
        arch, parts = self._arch, self._ffn_parts
        if parts is None or parts.n_tokens != self._x.ne[1]:
            if parts is not None:
                parts.close()
            parts = self._ffn_parts = FfnParts(self._graphs.backend, arch.hp, self._x.ne[1])
        kind = arch.layer_kind(layer)
        if "ffn_up.weight" in w:
            into = parts.hidden.next(w["ffn_up.weight"].ne[1])
            self._compute(arch.ffn_hidden, ("ffn_hidden", kind), w, [self._x], into)
        else:
            into = parts.output.next(w["ffn_down.weight"].ne[1])
            self._compute(arch.ffn_down, ("ffn_down", kind), w, [parts.hidden.whole], into)
        return parts.output.whole

    def add_ffn(self, layer: int, w: Weights, summed: Tensor) -> None:
        def function(g: Graph, weights: Weights, x: Tensor, summed: Tensor) -> Tensor:
            return self._arch.add_ffn(g, layer, weights, x, summed)

        self._add(function, ("add_ffn", self._arch.layer_kind(layer)), w, summed)

    def foresee(self, layer: int, w: Weights) -> Mapping[int, int]:
        choice = self._choice_in(range(self.batch.start, self.batch.end))

        def function(g: Graph, weights: Weights, x: Tensor) -> list[Tensor]:
            carried = self._arch.carry(g, layer, weights, x)
            assert carried is not None  # hp.carried_size says so
            return [carried, self._arch.foresee(g, layer, carried)]

        self._compute_all(function, ("foresee", self._arch.layer_kind(layer)), w, [self._x],
                          [self._carried[0], choice.ids])
        self._carried_layer, self._foreseen = layer, (layer, choice.n_tokens)
        return self._last_use(choice)

    def route(self, layer: int, w: Weights, span: range) -> Mapping[int, int]:
        choice = self._choice_in(span)

        def function(g: Graph, weights: Weights, x: Tensor, carried: Tensor | None = None) -> list[Tensor]:
            routing = cast(moe.ExpertArchitecture, self._arch).router(g, layer, weights, x, carried)
            return [routing.x, routing.weights, routing.ids]

        is_known = self._is_only and self._foreseen == (layer, choice.n_tokens)  # then nobody waits for it
        self._compute_all(function, ("route", self._arch.layer_kind(layer)), w, [self._x, *self._carried[:1]],
                          [choice.x, choice.weights, choice.ids], put_off=is_known)
        return self._last_use(choice)

    def _choice_in(self, span: range) -> Choice:
        """The batch's choice, placed in memory for the tokens at the positions of `span`."""
        hp, n_tokens, choice = self._arch.hp, self._x.ne[1], self._choice
        if choice is None or choice.n_tokens != n_tokens:
            if choice is not None:
                choice.close()
            choice = self._choice = Choice(hp, n_tokens)
        buffer = self._graphs.experts.outputs(Choice.size_bytes(hp, len(span)))
        choice.place(buffer, buffer.base + Choice.size_bytes(hp, self.batch.start - span.start))
        return choice

    def _last_use(self, choice: Choice) -> Mapping[int, int]:
        return {0: self.batch.start} if self._graphs.only_measures else choice.last_use(self.batch.end)

    def compute_experts(self, layer: int, w: Weights, slots: Mapping[int, int]) -> None:
        choice, graphs = self._choice, self._graphs
        assert choice is not None  # `route` came first

        def function(g: Graph, weights: Weights, x: Tensor, token_rows: Tensor, ids: Tensor, output_rows: Tensor,
                     pairs: Tensor) -> list[Tensor]:
            rows, arch = g.get_rows(x, token_rows), cast(moe.ExpertArchitecture, self._arch)
            outputs = arch.experts(g, layer, weights, rows, ids)
            g.expand(g.set_rows(pairs, g.reshape(outputs, x.ne[0], token_rows.ne[0]), output_rows))
            return []

        def compute(inputs: PairInputs) -> None:
            sources = [choice.x, inputs.token_rows, inputs.slots, inputs.output_rows, choice.pairs]
            self._compute_all(function, ("experts", inputs.n_pairs), w, sources, [], put_off=are_all_here)

        most_pairs = pairs_at_once(w["ffn_up_exps.weight"].ne[2], choice.n_tokens)
        # Each pair has an expert of its own, and one graph takes them all: no other will write these inputs.
        are_all_here = graphs.is_alone and self._is_only and len(slots) == choice.n_pairs <= most_pairs
        if graphs.only_measures:
            compute(graphs.experts.inputs(min(most_pairs, choice.n_pairs)))
            return
        for pairs, slot_ids in choice.portions(slots, most_pairs):
            inputs = graphs.experts.inputs(len(pairs))
            inputs.write(pairs, slot_ids, self._arch.hp.n_experts_used)
            compute(inputs)

    def weigh(self, layer: int) -> Tensor:
        choice = self._choice
        assert choice is not None  # `route` came first
        return self._compute_part(lambda g, _, outputs, weights: moe.weigh(g, outputs, weights), ("weigh",), {},
                                  [choice.outputs, choice.weights], self._partial)

    def keep_outputs(self) -> None:
        rows = self._scratch.inputs.output_rows
        if rows is None:
            return
        pairs = [(self._x, self._outputs), *zip(self._carried[:1], self._carried[1:], strict=True)]
        for everything, kept in pairs:
            self._compute(lambda g, _, x, ids: g.get_rows(x, ids), ("keep_outputs", rows.ne[0]), {},
                          [everything, rows], kept)
        self._x, self._carried = self._outputs, self._carried[1:]

    def output(self, w: Weights, part: int) -> None:
        n_rows = max(t.ne[1] for t in w.values())  # the head's, or of the part of it that is here
        into = self._scratch.logits_rows.at(self._n_logits_rows, n_rows)
        self._n_logits_rows += n_rows
        self._compute(self._arch.output, ("output",), w, [self._x], into)

    def keep_feature(self) -> None:
        if self._graphs.only_measures or self._features is None:
            return
        self._streams.append(Backend.array(self.hidden).reshape(self.batch.n_tokens, -1).copy())
        if len(self._streams) == 1 + len(self._features.feature_layers):
            self._features.take(self.batch, self._streams)
            self._streams = []

    def read_logits(self) -> NDArray[np.float32] | None:
        if self.batch.n_outputs == 0:
            return None
        return Backend.array(self._scratch.logits).reshape(self.batch.n_outputs, self._arch.hp.head_rows)

    @property
    def _scratch(self) -> Scratch:
        return self._graphs.scratch(self.batch)

    @property
    def _partial(self) -> Tensor:
        """Where this rank's part of the FFN's output goes."""
        return self._scratch.partial if self._x is self._all else self._scratch.partial_outputs

    def _add(self, function: Callable[..., Tensor], kind: tuple[object, ...], w: Weights, summed: Tensor) -> None:
        """Renew the hidden state."""
        self._compute_all(lambda *given: [function(*given)], kind, w, [self._x, summed], [self._x],
                          put_off=self._is_only and not self._graphs.is_alone)

    def _compute_part(self, function: Callable[..., Tensor], kind: tuple[object, ...], w: Weights,
                      sources: list[Tensor], into: Tensor) -> Tensor:
        """This rank's part of a block's output, in `into`; alone, not before it is added."""
        self._compute_all(lambda *given: [function(*given)], kind, w, sources, [into],
                          put_off=self._graphs.is_alone, is_kept=not self._graphs.is_alone)
        return into

    def _compute(self, function: Callable[..., Tensor], kind: tuple[object, ...], w: Weights, sources: list[Tensor],
                 into: Tensor) -> None:
        self._compute_all(lambda *given: [function(*given)], kind, w, sources, [into])

    def _compute_all(self, function: Callable[..., Sequence[Tensor]], kind: tuple[object, ...], w: Weights,
                     sources: Sequence[Tensor], into: Sequence[Tensor], *, put_off: bool = False,
                     is_kept: bool = True) -> None:
        shape = (sources[0].ne[0], sources[0].ne[1], into[0].ne[1] if into else 0)
        self._put_off.append(Operation(function, (*kind, *shape), w, sources, into, is_kept))
        if not put_off:
            self._catch_up()

    def _catch_up(self) -> None:
        """Carry out what was put off."""
        operations, self._put_off = self._put_off, []
        if operations:
            self._graphs.compute(operations, self.batch.phase)

    def close(self) -> None:
        for kept in (self._choice, self._ffn_parts):
            if kept is not None:
                kept.close()
        self._memory.close()
