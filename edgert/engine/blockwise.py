"""One graph for each kind of block: for weights that come and go, and for partial results that travel.

A graph is built once per kind and batch shape; for each use its placeholders are rebound to the leased weights, the
layer's cache and the batch's hidden state. Binding and starting it cost some 20 us, so operations that follow each
other with nothing to wait for between them make one graph. Results are copied out of the shared compute buffer: hidden
states live per batch, so that a whole prompt can pass one layer before the next is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture
from edgert.engine.batch import Batch, Phase, in_parts
from edgert.engine.block_graph import BlockGraph, Operation
from edgert.engine.block_state import BlockState
from edgert.engine.expert_graphs import ExpertMemory
from edgert.engine.features import FeatureSink
from edgert.engine.fused import State, n_nodes
from edgert.engine.kv_cache import KVCache
from edgert.engine.scratch import Scratch
from edgert.errors import OutOfMemory
from edgert.ggml.backend import Allocator, Backend, Buffer
from edgert.ggml.graph import Graph
from edgert.ggml.library import trim_heap

# A prompt of 8k tokens passes in parts whose attention reads 32 numbers of cells: a shape each, and an attention graph
# for every kind of layer (60 KiB each).
MAX_GRAPHS, _MAX_SHAPES = 128, 64
# How many tokens of a batch are computed at once, the default first. Beside 512, prefill takes 2 % longer in parts of
# 256 and 9 % longer in parts of 128 (Qwen2.5-1.5B, Q4_K), in compute buffers of a half and a quarter.
PART_TOKENS = (256, 128)


class BlockwiseGraphs:
    """Block graphs by function, layer kind, tensor types and shape. All share one compute buffer per phase."""

    def __init__(self, backend: Backend, arch: Architecture, kv: KVCache) -> None:
        self.backend, self.arch, self.kv = backend, arch, kv
        self._allocators = self._new_allocators()
        self._graphs: OrderedDict[tuple[object, ...], BlockGraph] = OrderedDict()
        self._scratch: dict[tuple[int, int, int], Scratch] = {}
        self._buffer: Buffer | None = None
        self.experts = ExpertMemory(backend)
        self._work_bytes = 0
        self.only_measures = False
        self.part_tokens = PART_TOKENS[0]
        self.is_alone = True  # no other device adds to partial results

    @property
    def compute_bytes(self) -> int:
        """Memory of intermediate results, of ggml's work on them, of inputs and logits."""
        return self.own_bytes + self._work_bytes

    @property
    def own_bytes(self) -> int:
        """What `give_back` gives: all but the work memory, which ggml keeps."""
        return (sum(a.size_bytes for a in self._allocators.values())
                + (self._buffer.size_bytes if self._buffer else 0) + self.experts.size_bytes)

    def run(self, batches: list[Batch], forward: Callable[[list[State]], None],
            features: FeatureSink | None = None) -> NDArray[np.float32] | None:
        """Pass the batches through the model, layer by layer. Logits of the last batch, or None."""
        states = [BlockState(self, batch, features, is_only=len(batches) == 1) for batch in batches]
        try:
            forward(list(states))
            return states[-1].read_logits()
        finally:
            for state in states:
                state.close()

    def in_parts(self, batches: list[Batch]) -> list[Batch]:
        """The batches as what is computed at once. Not those of a model with experts, whose kernels go by how many of
        a batch's tokens came to each."""
        if self.arch.hp.n_experts:
            return batches
        return [part for batch in batches for part in in_parts(batch, self.part_tokens)]

    def reserve(self, batches: list[Batch], forward: Callable[[list[State]], None]) -> int:
        """Allocate what these batches need, and no more, without computing. Bytes; later steps of no larger shape take
        none."""
        self.close()
        self._allocators, self.only_measures = self._new_allocators(), True
        try:
            for batch in batches:
                self.run([batch], forward)
        finally:
            self.only_measures = False
            self._forget_all()
        return self.compute_bytes

    def scratch(self, batch: Batch) -> Scratch:
        shape = (batch.n_tokens, self.kv.bucket(batch), batch.n_outputs)
        found = self._scratch.get(shape)
        if found is None:
            while len(self._scratch) >= _MAX_SHAPES:
                self._scratch.pop(next(iter(self._scratch))).close()
            found = self._scratch[shape] = Scratch(self, batch)
        if found.written_for is not batch and not self.only_measures:
            for other in self._scratch.values():
                other.written_for = None
            found.inputs.write(self.kv, batch)
            found.written_for = batch
        return found

    def scratch_buffer(self, size_bytes: int) -> Buffer:
        """The shared memory of all shapes, grown when a shape needs more."""
        if self._buffer is None or self._buffer.size_bytes < size_bytes:
            if self._buffer is not None:
                self._buffer.close()
            self._buffer = self.backend.alloc("step inputs and logits", size_bytes)
            for other in self._scratch.values():
                other.memory.place(self._buffer)
                other.inputs.forget_memory()
                other.written_for = None
        return self._buffer

    def compute(self, operations: Sequence[Operation], phase: Phase) -> None:
        """Run the operations as one graph; what one of them gives, those after it get without a copy."""
        key = phase, *[(op.kind, *[(k, t.form) for k, t in op.weights.items()]) for op in operations]
        built = self._graphs.get(key)
        if built is None:
            built = self._build(operations, phase)
            self._graphs[key] = built
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)[1].close()
        self._graphs.move_to_end(key)
        if self.only_measures:
            return
        built.bind(operations)
        self.backend.compute(built.graph)

    def _build(self, operations: Sequence[Operation], phase: Phase) -> BlockGraph:
        built = BlockGraph.of(operations, phase, n_nodes(self.arch.hp, 1))
        self._place(built.graph, phase)
        self._work_bytes = max(self._work_bytes, self.backend.work_bytes(built.graph))
        return built

    def _place(self, g: Graph, phase: Phase) -> None:
        moved = True
        try:
            moved = self._allocators[phase].alloc(g)
        except OutOfMemory:
            g.close()
            raise
        finally:
            if moved:  # under the other graphs, or their buffer is gone
                for key in [k for k, built in self._graphs.items() if built.phase == phase]:
                    self._graphs.pop(key).close()

    def _new_allocators(self) -> dict[Phase, Allocator]:
        return {"prefill": Allocator(self.backend), "decode": Allocator(self.backend)}

    def _forget_all(self) -> None:
        for scratch in self._scratch.values():
            scratch.close()
        for graph in self._graphs.values():
            graph.close()
        self._scratch.clear()
        self._graphs.clear()

    def give_back(self) -> None:
        """Let the system have all memory but ggml's own; the next batch makes graphs and buffers anew."""
        if self.own_bytes:
            self.close()
            self._allocators = self._new_allocators()
            trim_heap()  # graphs of many sizes leave gaps: the heap was 12 MiB larger after fifty prompts, with it 3

    def close(self) -> None:
        self._forget_all()
        for allocator in self._allocators.values():
            allocator.close()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
        self.experts.close()
        self._work_bytes = 0
