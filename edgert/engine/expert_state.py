"""What a token passes where every weight but experts stays in memory: graphs from one wait for experts to the next.

The engine's loop runs over a state that ends a graph where the router's choice must be known, once for layers that
await experts and once for those that do not. Between graphs, what the next one needs lies in memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgert.architectures import moe
from edgert.architectures.base import Architecture, Block, Weights
from edgert.engine.batch import Batch, Phase
from edgert.engine.fused import FusedState, Inputs, n_nodes
from edgert.engine.kv_cache import KVCache
from edgert.engine.scratch import Memory, Rows
from edgert.engine.weights import Experts, Leases
from edgert.ggml.abi import TYPE_F32, TYPE_I32, TYPE_I64
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Graph, Tensor

_NODES_OF_EXPERTS = 24  # headers of a graph that computes experts alone: three products, and views around them
_NODES_OF_OUTPUT = 8  # of a part of the output head
_PROMISED = {0: 0}  # while graphs are made, any choice stands for all


@dataclass(frozen=True, slots=True)
class SomeExperts:
    """A graph that computes so many experts of any layer whose matrices have these forms."""

    graph: Graph
    weights: Weights  # placeholders

    def of_layer(self, weights: Weights) -> Graph:
        """The graph, over a layer's matrices."""
        for key, placeholder in self.weights.items():
            self.graph.rebind(placeholder, weights[key])
        return self.graph


@dataclass(slots=True)
class LayerGraphs:
    """What a token passes in a layer: attention, experts as they come, and the rest; or everything at once."""

    attention: Graph | None = None  # where the choice is known before it
    experts: Sequence[SomeExperts] = ()  # one, two, ... experts
    rest: Graph | None = None  # up to the next layer's choice, or to the logits
    whole: Graph | None = None  # all of it, where nothing is awaited

    def __iter__(self) -> Iterator[Graph]:
        """But for the experts', which layers share; the largest first."""
        return (graph for graph in (self.whole, self.rest, self.attention) if graph is not None)


class ExpertState(FusedState):
    """Adds blocks to a graph, and begins a new one where experts are awaited. While graphs are made, it is the Leases
    and the Experts of the loop too; of a token, it holds what lies between graphs."""

    def __init__(self, backend: Backend, arch: Architecture, kv: KVCache, batch: Batch, weights: Leases) -> None:
        assert weights.experts is not None and batch.n_tokens == batch.n_outputs == 1
        self.batch, self._arch, self._carried, self._source = batch, arch, None, weights
        self._experts, self.holds_a_layer, self.stay = weights.experts, True, True
        self.n_output_parts, self.n_ffn_parts = weights.n_output_parts, weights.n_ffn_parts
        self.first: Graph | None = None
        self.layers = [LayerGraphs() for _ in range(arch.hp.n_layers)]
        context, hp, n_used = Context(32), arch.hp, arch.hp.n_experts_used
        self.inputs = Inputs.of(context, kv, batch)
        self._hidden, self._normed = (context.tensor(TYPE_F32, (hp.hidden_size, 1)) for _ in range(2))
        self._carried_room = context.tensor(TYPE_F32, (max(1, hp.carried_size), 1))
        self._choice, self._guessed = (context.tensor(TYPE_I32, (n_used, 1)) for _ in range(2))
        self._shares = context.tensor(TYPE_F32, (1, n_used, 1))
        self._outputs = context.tensor(TYPE_F32, (hp.hidden_size, n_used))
        self._slots, self._rows = context.tensor(TYPE_I32, (n_used,)), context.tensor(TYPE_I64, (n_used,))
        self._all_logits = context.tensor(TYPE_F32, (hp.head_rows, 1))
        self._logits_rows = Rows(self._all_logits)
        self._memory = Memory(backend, context, [
            *self.inputs.tensors(), self._hidden, self._normed, self._carried_room, self._choice, self._guessed,
            self._shares, self._outputs, self._slots, self._rows, self._all_logits])
        self._ids, self._guessed_ids, self._slot_ids, self._row_numbers = (
            Backend.array(t) for t in (self._choice, self._guessed, self._slots, self._rows))
        self.all_logits = Backend.array(self._all_logits).reshape(1, hp.head_rows)
        self.waits, self._foreseen = True, -1
        self._routing: moe.Routing
        self._computed: Tensor
        self._some_experts = dict[object, list[SomeExperts]]()
        self._new_graph()

    @property
    def size_bytes(self) -> int:
        return self._memory.size_bytes

    @property
    def graphs(self) -> list[Graph]:
        """All of them, from the largest on: with the output head."""
        experts = [some.graph for of_form in self._some_experts.values() for some in of_form]
        first = [] if self.first is None else [self.first]
        return [*(graph for layer in reversed(self.layers) for graph in layer), *first, *experts]

    def begin(self) -> None:
        """Make all graphs, of layers that wait for experts or of those that do not."""
        self.graph.close()
        if self.first is not None:
            self.first.close()
        self._carried, self._foreseen = None, -1
        self._new_graph()

    def _new_graph(self) -> None:
        self.graph = Graph(n_nodes(self._arch.hp, 1) + _NODES_OF_OUTPUT * self.n_output_parts)

    # -- as a State: what the loop adds ------------------------------------------------------------------------
    def foresee(self, layer: int, w: Weights) -> Mapping[int, int]:
        carried = self._arch.carry(self.graph, layer, w, self._x)
        assert carried is not None  # hp.carried_size says so
        self._keep(self._arch.foresee(self.graph, layer, carried), self._choice)
        self._carried, self._foreseen = self._keep(carried, self._carried_room), layer
        self._end_before(layer)
        return _PROMISED

    def attention(self, layer: int, w: Weights) -> Tensor:
        return self._arch.attention(self.graph, layer, w, self._x, self.inputs.step)

    def route(self, layer: int, w: Weights, span: range) -> Mapping[int, int]:
        arch = cast(moe.ExpertArchitecture, self._arch)
        self._routing = routing = arch.router(self.graph, layer, w, self._x, self._carried)
        if self._foreseen == layer and not self.waits:
            return _PROMISED
        for result, room in ((routing.x, self._normed), (routing.weights, self._shares)):
            self._keep(result, room)
        self._routing = moe.Routing(self._normed, self._shares, self._choice)
        self._guess(layer + 1)
        if self._foreseen == layer:
            self.layers[layer].attention = self._ended()
        else:
            self._keep(routing.ids, self._choice)
            self._end_before(layer)
        return _PROMISED

    def _guess(self, layer: int) -> None:
        """What the layer would choose of the hidden state as it is before it."""
        if layer == len(self.layers):
            return
        with self._source.lease(Block("attention" if self._arch.hp.carried_size else "ffn", layer), "decode") as w:
            carried = self._arch.carry(self.graph, layer, w, self._x)
            ids = (cast(moe.ExpertArchitecture, self._arch).router(self.graph, layer, w, self._x, None).ids
                   if carried is None else self._arch.foresee(self.graph, layer, carried))
            self._keep(ids, self._guessed)

    def compute_experts(self, layer: int, w: Weights, slots: Mapping[int, int]) -> None:
        """Those of one slot each, or graphs for every number of experts that may come at once."""
        if not self.waits:
            ids = self.graph.reshape(self._slots, self._slots.ne[0], 1)
            arch = cast(moe.ExpertArchitecture, self._arch)
            self._computed = arch.experts(self.graph, layer, w, self._routing.x, ids)
            return
        self._computed = self._outputs
        forms = tuple((key, t.form, t.nb) for key, t in w.items())
        if forms not in self._some_experts:
            self._some_experts[forms] = [self._compute_some(layer, w, n) for n in range(1, self._slots.ne[0] + 1)]
        self.layers[layer].experts = self._some_experts[forms]

    def _compute_some(self, layer: int, w: Weights, n: int) -> SomeExperts:
        """Experts in the first `n` slots that were written; their outputs go to the rows that were written."""
        g, arch = Graph(_NODES_OF_EXPERTS), cast(moe.ExpertArchitecture, self._arch)
        weights = {key: g.placeholder(t) for key, t in w.items()}
        outputs = arch.experts(g, layer, weights, self._normed, g.view(self._slots, (n, 1), (self._slots.nb[1],)))
        g.expand(g.set_rows(self._outputs, g.reshape(outputs, self._normed.ne[0], n), g.view(self._rows, (n,), ())))
        return SomeExperts(g, weights)

    def weigh(self, layer: int) -> Tensor:
        outputs = self.graph.reshape(self._computed, *self._outputs.ne[:2], 1)
        return moe.weigh(self.graph, outputs, self._routing.weights)

    def output(self, w: Weights, part: int) -> None:
        logits = self._arch.output(self.graph, w, self._x)
        self._keep(logits, self._logits_rows.next(logits.ne[0]))
        if part == self.n_output_parts - 1:
            self._end_before(len(self.layers))

    def _keep(self, result: Tensor, room: Tensor) -> Tensor:
        """What another graph needs of this one goes where it stays."""
        self.graph.expand(self.graph.copy(result, room))
        return room

    def _end_before(self, layer: int) -> None:
        """The graph that gives the layer's choice ends what came before it."""
        if layer == 0:
            self.first = self._ended()
        elif self.waits:
            self.layers[layer - 1].rest = self._ended()
        else:
            self.layers[layer - 1].whole = self._ended()

    def _ended(self) -> Graph:
        graph, self._x = self.graph, self._keep(self._x, self._hidden)
        self._new_graph()
        return graph

    # -- as Leases and Experts: what the loop reads while it makes graphs --------------------------------------
    @property
    def experts(self) -> Experts:
        return self

    def lease_embedding(self, token_ids: NDArray[np.int32],
                        phase: Phase) -> AbstractContextManager[tuple[Weights, NDArray[np.int32]]]:
        return self._source.lease_embedding(token_ids, phase)

    def lease(self, block: Block, phase: Phase) -> AbstractContextManager[Weights]:
        return self._source.lease(block, phase)

    def request(self, layer: int, last_use: Mapping[int, int]) -> None:
        """Nothing is read yet."""

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """Nor here."""

    def waves(self, layer: int, last_use: Mapping[int, int]) -> Iterator[Mapping[int, int]]:
        yield last_use

    def weights(self, layer: int) -> Weights:
        return self._experts.weights(layer)

    def release(self) -> None:
        """Nothing is held."""

    def hit_curve(self) -> None:
        """Nothing is learnt."""

    # -- for a token ------------------------------------------------------------------------------------------
    def write(self, kv: KVCache, batch: Batch, rows: NDArray[np.int32]) -> None:
        self.inputs.write(kv, batch)
        self.inputs.write_token_ids(rows)

    def chosen(self) -> list[int]:
        """The layer's experts, best first."""
        ids: list[int] = self._ids.tolist()
        return ids

    def guessed(self) -> list[int]:
        """Likely ones of the next layer."""
        ids: list[int] = self._guessed_ids.tolist()
        return ids

    def everything(self, layer: int, chosen: list[int], slots: Mapping[int, int]) -> Graph:
        """The layer's graph, over experts that are all here."""
        self._slot_ids[:] = [slots[expert] for expert in chosen]
        return cast(Graph, self.layers[layer].whole)

    def experts_in(self, layer: int, chosen: list[int], slots: Mapping[int, int]) -> Graph:
        """The graph that computes the experts of these slots."""
        n = 0
        for row, expert in enumerate(chosen):
            if expert in slots:
                self._slot_ids[n], self._row_numbers[n] = slots[expert], row
                n += 1
        return self.layers[layer].experts[n - 1].of_layer(self._experts.weights(layer))

    def close(self) -> None:
        self.graph.close()
        for graph in self.graphs:
            graph.close()
        self._logits_rows.close()
        self._memory.close()
