"""Graphs from one sum over ranks to the next: for decoding with other devices, where every weight stays in memory.

The engine's loop runs once per batch shape, over a state that is its collective too: where ranks are to talk, it ends
one graph and begins the next. So a pass is as many calls of ggml as sums, without a line of Python between blocks
(114 bound graphs of blocks took 2 ms of a token's 22, Qwen2.5-1.5B in two halves). Between graphs, the hidden state and
the partial result lie in memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture, Weights
from edgert.engine.batch import Batch
from edgert.engine.collective import Collective
from edgert.engine.fused import FusedState, Inputs, n_nodes
from edgert.engine.kv_cache import KVCache
from edgert.engine.parted import PartedStates
from edgert.engine.scratch import Memory
from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Graph, Tensor

# One for single tokens, one for guesses. Each holds a graph's headers (70 KiB) for every sum.
_MAX_SHAPES = 2
Exchange = Literal["broadcast", "all_reduce", "reduce"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A graph, and what the ranks then do with `shared`. The last one ends with logits, or with nothing."""

    graph: Graph
    exchange: Exchange | None = None
    shared: Tensor | None = None

    def run(self, backend: Backend, collective: Collective) -> None:
        backend.compute(self.graph)
        match self.exchange, self.shared:
            case "broadcast", Tensor() as hidden:
                collective.broadcast(hidden)
            case "all_reduce", Tensor() as partial:
                collective.all_reduce(partial)
            case "reduce", Tensor() as partial:
                collective.reduce(partial)


class SegmentState(FusedState):
    """Adds blocks to a graph, and begins a new one at each exchange. A Collective while it is built."""

    def __init__(self, backend: Backend, arch: Architecture, kv: KVCache, batch: Batch, collective: Collective) -> None:
        self.batch, self.rank, self.world_size = batch, collective.rank, collective.world_size
        self.splits_head = collective.splits_head
        self.selected: NDArray[np.int64] | None = None  # graphs are built here; over what is said with each pass
        self._arch, self._carried = arch, None
        self.segments: list[Segment] = []
        self.logits, self.logits_array = None, None
        self._new_graph()
        context, hp = Context(24), arch.hp
        self.inputs = Inputs.of(context, kv, batch)
        widths = (hp.hidden_size, hp.hidden_size, *([hp.carried_size] if hp.carried_size else []))
        # Hidden state, partial result and what a layer carries: of all tokens, and of those whose logits are wanted.
        self._rooms = {n: [context.tensor(TYPE_F32, (width, n)) for width in widths]
                       for n in {batch.n_tokens, batch.n_outputs}}
        rooms = [one for of_shape in self._rooms.values() for one in of_shape]
        self._memory = Memory(backend, context, [*self.inputs.tensors(), *rooms])
        self._x = self._rooms[batch.n_tokens][0]

    def _new_graph(self) -> None:
        self.graph = Graph(n_nodes(self._arch.hp, 1))

    def embed(self, w: Weights, rows: NDArray[np.int32]) -> None:
        super().embed(w, rows)
        self._keep()

    def _keep(self) -> None:
        """What the next graph needs of this one goes where it stays."""
        hidden, _, *carried = self._rooms[self._x.ne[1]]
        if self._x is not hidden:
            self.graph.expand(self.graph.copy(self._x, hidden))
            self._x = hidden
        if self._carried is not None and self._carried is not carried[0]:
            self.graph.expand(self.graph.copy(self._carried, carried[0]))
            self._carried = carried[0]

    def _end(self, exchange: Exchange | None = None, shared: Tensor | None = None) -> None:
        self.segments.append(Segment(self.graph, exchange, shared))
        self._new_graph()

    # -- as a Collective ---------------------------------------------------------------------------------------
    def broadcast(self, hidden: Tensor) -> None:
        self._end("broadcast", hidden)

    def all_reduce(self, partial: Tensor) -> Tensor:
        return self._exchange("all_reduce", partial)

    def reduce(self, partial: Tensor) -> Tensor:
        return self._exchange("reduce", partial)

    def _exchange(self, exchange: Exchange, partial: Tensor) -> Tensor:
        room = self._rooms[partial.ne[1]][1]
        self.graph.expand(self.graph.copy(partial, room))
        self._keep()
        self._end(exchange, room)
        return room

    def gather(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return logits  # after the last graph, by the ranks' own

    def finish(self) -> None:
        """After the last block."""
        self._end()
        self.graph.close()

    @property
    def graphs(self) -> list[Graph]:
        return [segment.graph for segment in self.segments]

    def read_logits(self) -> NDArray[np.float32]:
        """Of the rows of the head that this rank computes. Where it computes none: zeros of the one that it has."""
        if self.logits_array is None:
            shape = self.batch.n_outputs, self._arch.hp.head_rows
            self.logits_array = (np.zeros(shape, np.float32) if self.logits is None
                                 else Backend.array(self.logits).reshape(shape))
        return self.logits_array

    def close(self) -> None:
        for graph in (*self.graphs, self.graph):
            graph.close()
        self._memory.close()


class SegmentGraphs:
    """Segments by batch shape, newest use last. All share one compute buffer."""

    def __init__(self, backend: Backend, arch: Architecture, kv: KVCache) -> None:
        self._backend, self._arch, self._kv = backend, arch, kv
        self._states = PartedStates[SegmentState](backend, _MAX_SHAPES)

    @property
    def compute_bytes(self) -> int:
        return self._states.compute_bytes

    def run(self, batch: Batch, build: Callable[[SegmentState], None], collective: Collective) -> NDArray[np.float32]:
        """Compute one batch together with the other ranks. Logits (n_outputs, head_rows), valid until the next run."""
        def build_all(state: SegmentState) -> None:
            build(state)
            state.finish()

        state = self._states.get((batch.n_tokens, self._kv.bucket(batch), batch.n_outputs),
                                 lambda: SegmentState(self._backend, self._arch, self._kv, batch, collective),
                                 build_all)
        state.inputs.write(self._kv, batch)
        for segment in state.segments:
            segment.run(self._backend, collective)
        return state.read_logits()

    def close(self) -> None:
        self._states.close()
