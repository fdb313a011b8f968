"""One graph for the whole model, where every weight stays in memory: the fast path.

The engine's loop runs once per batch shape, over a state that adds every block to one graph; the graph is kept and
computed as often as the shape comes back. edgert/engine/blockwise.py serves the same loop one block at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture, Hyperparameters, StepInputs, Weights
from edgert.engine.batch import Batch
from edgert.engine.features import FeatureSink
from edgert.engine.kv_cache import KVCache, KVGraph
from edgert.errors import OutOfMemory
from edgert.ggml.abi import TYPE_I32
from edgert.ggml.backend import Allocator, Backend
from edgert.ggml.graph import Context, Graph, Tensor

# Headers per layer: the largest family needs some 60 tensors and views, and a view and a sum for each chosen expert.
_NODES_PER_LAYER, _NODES_BESIDE = 96, 64
# Decode moves to another graph every 256 tokens; prefill's differ with every batch. Few are worth keeping.
_MAX_GRAPHS = 6


def n_nodes(hp: Hyperparameters, n_layers: int) -> int:
    """The most tensors that a graph over so many layers has."""
    return n_layers * (_NODES_PER_LAYER + 2 * hp.n_experts_used) + _NODES_BESIDE


class State(Protocol):
    """One batch on its way through the blocks."""

    batch: Batch

    @property
    def hidden(self) -> Tensor:
        """The hidden state (hidden_size, n_tokens) as it is now."""
        ...

    def embed(self, w: Weights, rows: NDArray[np.int32]) -> None: ...

    def attention(self, layer: int, w: Weights) -> Tensor: ...

    def ffn(self, layer: int, w: Weights) -> Tensor:
        """This rank's part of the FFN's output; of a block that is cut, whole after its last part."""
        ...

    def add_attention(self, layer: int, w: Weights, summed: Tensor) -> None: ...

    def add_ffn(self, layer: int, w: Weights, summed: Tensor) -> None: ...

    def keep_outputs(self) -> None: ...

    def output(self, w: Weights, part: int) -> None: ...

    def keep_feature(self) -> None:
        """The residual stream as it is now is a feature of the batch's tokens."""
        ...

    # Where experts come one by one:
    def foresee(self, layer: int, w: Weights) -> Mapping[int, int]:
        """The experts that `route` will choose, known before attention. As `route`."""
        raise AssertionError("a graph of the whole model cannot wait for experts")

    def route(self, layer: int, w: Weights, span: range) -> Mapping[int, int]:
        """The chosen experts, each with the position of the last token that uses it. Batches of the positions in
        `span` keep their experts' outputs at the same time."""
        raise AssertionError("a graph of the whole model cannot wait for experts")

    def compute_experts(self, layer: int, w: Weights, slots: Mapping[int, int]) -> None:
        """The outputs of these experts for the tokens that chose them."""
        raise AssertionError("a graph of the whole model cannot wait for experts")

    def weigh(self, layer: int) -> Tensor:
        """This rank's part of the FFN block's output: the experts' outputs by weight, in the router's order."""
        raise AssertionError("a graph of the whole model cannot wait for experts")


@dataclass(slots=True)
class Inputs:
    """The graph inputs of one batch shape."""

    token_ids: Tensor
    step: StepInputs
    kv: KVGraph
    output_rows: Tensor | None
    arrays: list[NDArray[Any]] = field(default_factory=list)  # the inputs' memory, once it is placed

    @classmethod
    def of(cls, g: Context, kv: KVCache, batch: Batch) -> Inputs:
        token_ids = g.input("token_ids", TYPE_I32, (batch.n_tokens,))
        positions = g.input("positions", TYPE_I32, (batch.n_tokens,))
        view = kv.open(g, batch.n_tokens, kv.bucket(batch))
        selects = 0 < batch.n_outputs < batch.n_tokens
        rows = g.input("output_rows", TYPE_I32, (batch.n_outputs,)) if selects else None
        return cls(token_ids, StepInputs(positions, view), view, rows)

    def write(self, kv: KVCache, batch: Batch) -> None:
        """Fill every input. Graphs reuse this memory, so it is filled before each computation."""
        if not self.arrays:
            selected = [] if self.output_rows is None else [self.output_rows]
            self.arrays = [Backend.array(t) for t in (self.token_ids, self.step.positions, *selected)]
        token_ids, positions, *rows = self.arrays
        token_ids[:] = batch.token_ids
        positions[:] = range(batch.start, batch.end)
        for array in rows:
            array[:] = range(batch.n_tokens - batch.n_outputs, batch.n_tokens)
        kv.write(self.kv, batch)

    def write_token_ids(self, rows: NDArray[np.int32]) -> None:
        self.arrays[0][:] = rows

    def forget_memory(self) -> None:
        """The inputs were placed anew."""
        self.arrays = []
        self.kv.arrays = []

    def tensors(self) -> list[Tensor]:
        """Every input, for whoever gives them memory."""
        rows = [] if self.output_rows is None else [self.output_rows]
        return [self.token_ids, self.step.positions, *self.kv.inputs(), *rows]

    def attention_sources(self) -> list[Tensor]:
        """What an attention graph reads of these, in the order of `standing_for`."""
        return [self.step.positions, *self.kv.inputs()]

    def standing_for(self, stand_ins: Sequence[Tensor]) -> StepInputs:
        """The inputs with a graph's own stand-ins: attention_sources, then one layer's K and V."""
        positions, *inputs, k, v = stand_ins
        return StepInputs(positions, self.kv.with_inputs(inputs, k, v))


class FusedState(State):
    """Adds every block to one graph."""

    def __init__(self, arch: Architecture, kv: KVCache, batch: Batch) -> None:
        self.batch = batch
        self._arch = arch
        self.graph = Graph(n_nodes(arch.hp, arch.hp.n_layers))
        self.inputs = Inputs.of(self.graph, kv, batch)
        for tensor in self.inputs.tensors():
            self.graph.expand(tensor)  # placed even where no layer reads it: positions without RoPE, a mask
        self._x: Tensor
        self._carried: Tensor | None = None
        self.logits: Tensor | None = None
        self.logits_array: NDArray[np.float32] | None = None
        self._features: list[Tensor] = []
        self._streams: list[NDArray[np.float32]] = []

    @property
    def hidden(self) -> Tensor:
        return self._x

    def embed(self, w: Weights, rows: NDArray[np.int32]) -> None:
        # A resident source's rows are the token ids, which are an input of the graph.
        self._x = self._arch.embed(self.graph, w, self.inputs.token_ids)

    def attention(self, layer: int, w: Weights) -> Tensor:
        self._carried = self._arch.carry(self.graph, layer, w, self._x)
        return self._arch.attention(self.graph, layer, w, self._x, self.inputs.step)

    def ffn(self, layer: int, w: Weights) -> Tensor:
        return self._arch.ffn(self.graph, layer, w, self._x, self._carried)

    def add_attention(self, layer: int, w: Weights, summed: Tensor) -> None:
        self._x = self._arch.add_attention(self.graph, layer, w, self._x, summed)

    def add_ffn(self, layer: int, w: Weights, summed: Tensor) -> None:
        self._x = self._arch.add_ffn(self.graph, layer, w, self._x, summed)

    def keep_outputs(self) -> None:
        rows = self.inputs.output_rows
        if rows is not None:
            self._x = self.graph.get_rows(self._x, rows)
            self._carried = None if self._carried is None else self.graph.get_rows(self._carried, rows)
        elif self.batch.n_outputs == 0:
            self.graph.expand(self._x)

    def output(self, w: Weights, part: int) -> None:
        self.logits = self.graph.output(self._arch.output(self.graph, w, self._x))

    def keep_feature(self) -> None:
        self._features.append(self.graph.output(self._x))

    def streams(self) -> list[NDArray[np.float32]]:
        """The kept features, each (n_tokens, hidden_size), valid until the next computation."""
        if not self._streams:
            self._streams = [Backend.array(t).reshape(self.batch.n_tokens, -1) for t in self._features]
        return self._streams


class FusedGraphs:
    """Whole-model graphs by shape, newest use last. All share one compute buffer per phase."""

    def __init__(self, backend: Backend, arch: Architecture, kv: KVCache) -> None:
        self._backend, self._arch, self._kv = backend, arch, kv
        self._allocators = {"prefill": Allocator(backend), "decode": Allocator(backend)}
        self._states: OrderedDict[tuple[int, int, int], FusedState] = OrderedDict()

    @property
    def compute_bytes(self) -> int:
        return sum(a.size_bytes for a in self._allocators.values())

    def run(self, batch: Batch, forward: Callable[[list[State]], None],
            features: FeatureSink | None = None) -> NDArray[np.float32] | None:
        """Compute one batch. Logits (n_outputs, vocab_size), valid until the next run, or None when none are wanted."""
        state = self._state(batch, forward)
        state.inputs.write(self._kv, batch)
        self._backend.compute(state.graph)
        if features is not None:
            features.take(batch, state.streams())
        if state.logits is None:
            return None
        if state.logits_array is None:
            state.logits_array = Backend.array(state.logits).reshape(batch.n_outputs, self._arch.hp.head_rows)
        return state.logits_array

    def reserve(self, batches: list[Batch], forward: Callable[[list[State]], None]) -> int:
        """Bytes that the compute buffers of these batches take, without computing."""
        for batch in batches:
            self._state(batch, forward)
        return self.compute_bytes

    def _state(self, batch: Batch, forward: Callable[[list[State]], None]) -> FusedState:
        shape = (batch.n_tokens, self._kv.bucket(batch), batch.n_outputs)
        state = self._states.get(shape)
        if state is not None:
            self._states.move_to_end(shape)
            return state
        state = FusedState(self._arch, self._kv, batch)
        forward([state])
        self._place(state)
        self._states[shape] = state
        while len(self._states) > _MAX_GRAPHS:
            self._states.popitem(last=False)[1].graph.close()
        return state

    def _place(self, state: FusedState) -> None:
        phase, moved = state.batch.phase, True
        try:
            moved = self._allocators[phase].alloc(state.graph)
        except OutOfMemory:
            state.graph.close()
            raise
        finally:
            if moved:
                self._drop(lambda other: other.batch.phase == phase)  # the buffer moved under them, or is gone

    def _drop(self, stale: Callable[[FusedState], bool]) -> None:
        for shape in [s for s, state in self._states.items() if stale(state)]:
            self._states.pop(shape).graph.close()

    def close(self) -> None:
        self._drop(lambda _: True)
        for allocator in self._allocators.values():
            allocator.close()
