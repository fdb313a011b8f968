"""A whole model in several graphs, so that something can happen between two of them.

`PartedStates` keeps the graphs of some batch shapes in one compute buffer. `PartedGraphs` computes a batch in two: up
to the last layer whose features are wanted, and the rest, during which the disk may work for whoever takes them. The
second call of ggml costs 10 us.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture
from edgert.engine.batch import Batch
from edgert.engine.features import FeatureSink
from edgert.engine.fused import FusedState, Inputs, State, n_nodes
from edgert.engine.kv_cache import KVCache
from edgert.engine.scratch import Memory
from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Allocator, Backend
from edgert.ggml.graph import Context, Graph

_MAX_SHAPES = 4  # one token, and guesses of some lengths


class PartedState(Protocol):
    """A batch shape's graphs, which are computed one after the other."""

    @property
    def graphs(self) -> Sequence[Graph]: ...

    def close(self) -> None: ...


S = TypeVar("S", bound=PartedState)


class PartedStates(Generic[S]):
    """States by batch shape, newest use last. All their graphs share one compute buffer."""

    def __init__(self, backend: Backend, max_shapes: int) -> None:
        self._allocator, self._max_shapes = Allocator(backend), max_shapes
        self._states: OrderedDict[tuple[int, ...], S] = OrderedDict()

    @property
    def compute_bytes(self) -> int:
        return self._allocator.size_bytes

    def __iter__(self) -> Iterator[S]:
        return iter(self._states.values())

    def get(self, shape: tuple[int, ...], make: Callable[[], S], build: Callable[[S], None]) -> S:
        """The state of this shape. Where there is none, `make` opens one and `build` adds its graphs, the largest first
        where that is known: only a graph that is placed later, and needs more, has them all built once more."""
        if shape in self._states:
            self._states.move_to_end(shape)
            return self._states[shape]
        while len(self._states) >= self._max_shapes:
            self._states.popitem(last=False)[1].close()
        while not self._place(state := make(), build):
            pass
        self._states[shape] = state
        return state

    def _place(self, state: S, build: Callable[[S], None]) -> bool:
        """Build the state's graphs and give them their memory. False when a later one has moved the buffer under the
        earlier ones: the state is closed, and the buffer now large enough for all."""
        try:
            build(state)
            moved = [self._allocator.alloc(graph) for graph in state.graphs]
        except BaseException:
            state.close()
            raise
        if any(moved):
            self._drop_all()
        if any(moved[1:]):
            state.close()
            return False
        return True

    def _drop_all(self) -> None:
        for state in self._states.values():
            state.close()
        self._states.clear()

    def close(self) -> None:
        self._drop_all()
        self._allocator.close()


class TwoPartState(FusedState):
    """Adds blocks to a graph, and after the last feature to a second one. Inputs and the hidden state between the two
    lie in memory of their own."""

    def __init__(self, backend: Backend, arch: Architecture, kv: KVCache, batch: Batch, n_features: int) -> None:
        self.batch, self._arch, self._n_features = batch, arch, n_features
        self._carried = self.logits = self.logits_array = None
        self._features, self._streams = [], []
        context = Context(24)
        self.inputs = Inputs.of(context, kv, batch)
        self._between = context.tensor(TYPE_F32, (arch.hp.hidden_size, batch.n_tokens))
        self._memory = Memory(backend, context, [*self.inputs.tensors(), self._between])
        self.graphs: list[Graph] = []
        self._begin_graph()

    def _begin_graph(self) -> None:
        self.graph = Graph(n_nodes(self._arch.hp, self._arch.hp.n_layers))
        self.graphs.append(self.graph)

    def keep_feature(self) -> None:
        super().keep_feature()
        if len(self._features) == self._n_features:
            self.graph.expand(self.graph.copy(self._x, self._between))
            self._x, self._carried = self._between, None  # a layer carries nothing into the next
            self._begin_graph()

    def close(self) -> None:
        for graph in self.graphs:
            graph.close()
        self._memory.close()


class PartedGraphs:
    """As FusedGraphs, but features are taken while the layers beyond them are still to be computed."""

    def __init__(self, backend: Backend, arch: Architecture, kv: KVCache) -> None:
        self._backend, self._arch, self._kv = backend, arch, kv
        self._states = PartedStates[TwoPartState](backend, _MAX_SHAPES)

    @property
    def compute_bytes(self) -> int:
        return self._states.compute_bytes

    def run(self, batch: Batch, forward: Callable[[list[State]], None],
            features: FeatureSink | None = None) -> NDArray[np.float32] | None:
        """Compute one batch. Logits (n_outputs, vocab_size), valid until the next run, or None when none are wanted."""
        state = self.reserve(batch, forward, features)
        state.inputs.write(self._kv, batch)
        first, *rest = state.graphs
        self._backend.compute(first)
        if features is not None:
            features.take(batch, state.streams())
        for graph in rest:
            self._backend.compute(graph)
        if state.logits is None:
            return None
        if state.logits_array is None:
            state.logits_array = Backend.array(state.logits).reshape(batch.n_outputs, self._arch.hp.head_rows)
        return state.logits_array

    def reserve(self, batch: Batch, forward: Callable[[list[State]], None],
                features: FeatureSink | None = None) -> TwoPartState:
        """Build what a batch of this shape needs, where it is not there yet."""
        n_features = 0 if features is None else 1 + len(features.feature_layers)

        return self._states.get((batch.n_tokens, self._kv.bucket(batch), batch.n_outputs, n_features),
                                lambda: TwoPartState(self._backend, self._arch, self._kv, batch, n_features),
                                lambda state: forward([state]))

    def close(self) -> None:
        self._states.close()
