"""One graph for each kind of block: for weights that come and go, and for partial results that travel.

A graph is built once per kind and batch shape; for each use its placeholders are rebound to the leased weights, the
layer's cache and the batch's hidden state. Binding costs some 10 us a block. Results are copied out of the shared
compute buffer: hidden states live per batch, so that a whole prompt can pass one layer before the next is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgert.architectures import moe
from edgert.architectures.base import Architecture, Weights
from edgert.engine.batch import Batch, Phase, in_parts
from edgert.engine.expert_graphs import Choice, ExpertMemory, PairInputs, pairs_at_once
from edgert.engine.fused import Inputs, State, n_nodes
from edgert.engine.kv_cache import DenseKVCache
from edgert.errors import OutOfMemory
from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Allocator, Backend, Buffer
from edgert.ggml.graph import Context, Graph, Tensor

_ALIGN = 64
# A prompt of 8k tokens passes in parts whose attention reads 32 numbers of cells: a shape each, and an attention graph
# for every kind of layer (60 KiB each).
MAX_GRAPHS, _MAX_SHAPES = 128, 64
_MAX_OUTPUT_PARTS = 1024
# How many tokens of a batch are computed at once, the default first. Beside 512, prefill takes 2 % longer in parts of
# 256 and 9 % longer in parts of 128 (Qwen2.5-1.5B, Q4_K), in compute buffers of a half and a quarter.
PART_TOKENS = (256, 128)


class _Memory:
    """Tensors that outlive a graph, in one buffer of their own or in one that several sets share in turn."""

    def __init__(self, backend: Backend, context: Context, tensors: list[Tensor], shared: Buffer | None = None) -> None:
        self._context, self._tensors = context, tensors
        self.size_bytes = sum(_aligned(t.n_bytes) for t in tensors)
        self._own = None if shared else backend.alloc("hidden states", self.size_bytes)
        self.place(shared or self._own)

    def place(self, buffer: Buffer | None) -> None:
        assert buffer is not None
        address = buffer.base
        for tensor in self._tensors:
            buffer.place(tensor, address)
            address += _aligned(tensor.n_bytes)

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
        self._context.close()


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGN) * _ALIGN


class _Scratch:
    """What all batches of one shape share: graph inputs, the partial result and the logits. Shapes share the memory
    too, for one batch computes at a time."""

    def __init__(self, graphs: BlockwiseGraphs, batch: Batch) -> None:
        context, hp = Context(24), graphs.arch.hp
        n_rows = max(batch.n_outputs, 1)
        self.inputs = Inputs.of(context, graphs.kv, batch)
        self.partial = context.tensor(TYPE_F32, (hp.hidden_size, batch.n_tokens))
        self.partial_outputs = context.tensor(TYPE_F32, (hp.hidden_size, n_rows))
        self.logits = context.tensor(TYPE_F32, (hp.vocab_size, n_rows))
        self._view_context, self._views = Context(_MAX_OUTPUT_PARTS), dict[int, Tensor]()
        tensors = [*self.inputs.tensors(), self.partial, self.partial_outputs, self.logits]
        size_bytes = sum(_aligned(t.n_bytes) for t in tensors)
        self.memory = _Memory(graphs.backend, context, tensors, graphs.scratch_buffer(size_bytes))
        self.written_for: Batch | None = None

    def logits_rows(self, first: int, n_rows: int) -> Tensor:
        """Rows `first` and on of the logits, as a strided view."""
        view = self._views.get(first)
        if view is None:
            view = self._views[first] = self._view_context.tensor(TYPE_F32, (n_rows, self.logits.ne[1]))
            view.struct.nb[1], view.struct.nb[2], view.struct.nb[3] = (self.logits.nb[d] for d in (1, 2, 3))
        view.struct.data, view.struct.buffer = self.logits.data + 4 * first, self.logits.struct.buffer
        return view

    def close(self) -> None:
        self._view_context.close()
        self.memory.close()


@dataclass(slots=True)
class _BlockGraph:
    graph: Graph
    weights: dict[str, Tensor]
    arguments: list[Tensor]  # stand for the sources that `compute` is given, in its order
    phase: Phase

    def close(self) -> None:
        self.graph.close()


class BlockwiseGraphs:
    """Block graphs by function, layer kind, tensor types and shape. All share one compute buffer per phase."""

    def __init__(self, backend: Backend, arch: Architecture, kv: DenseKVCache) -> None:
        self.backend, self.arch, self.kv = backend, arch, kv
        self._allocators = self._new_allocators()
        self._graphs: OrderedDict[tuple[object, ...], _BlockGraph] = OrderedDict()
        self._scratch: dict[tuple[int, int, int], _Scratch] = {}
        self._buffer: Buffer | None = None
        self.experts = ExpertMemory(backend)
        self._work_bytes = 0
        self.only_measures = False
        self.part_tokens = PART_TOKENS[0]

    @property
    def compute_bytes(self) -> int:
        """Memory of intermediate results, of ggml's work on them, of inputs and logits."""
        return (sum(a.size_bytes for a in self._allocators.values()) + self._work_bytes
                + (self._buffer.size_bytes if self._buffer else 0) + self.experts.size_bytes)

    def run(self, batches: list[Batch], forward: Callable[[list[State]], None]) -> NDArray[np.float32] | None:
        """Pass the batches through the model, layer by layer. Logits of the last batch, or None."""
        states = [BlockState(self, batch) for batch in batches]
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

    def scratch(self, batch: Batch) -> _Scratch:
        shape = (batch.n_tokens, self.kv.bucket(batch), batch.n_outputs)
        found = self._scratch.get(shape)
        if found is None:
            while len(self._scratch) >= _MAX_SHAPES:
                self._scratch.pop(next(iter(self._scratch))).close()
            found = self._scratch[shape] = _Scratch(self, batch)
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

    def compute(self, function: Callable[..., Sequence[Tensor]], kind: tuple[object, ...], w: Weights,
                sources: Sequence[Tensor], into: Sequence[Tensor], phase: Phase) -> None:
        """Run `function(graph, weights, *sources)` and copy its results to `into`. Equal `kind`s have equal graphs but
        for the types of their weights."""
        key = (*kind, phase, *[(k, t.form) for k, t in w.items()])
        built = self._graphs.get(key)
        if built is None:
            built = self._build(function, w, sources, into, phase)
            self._graphs[key] = built
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)[1].close()
        self._graphs.move_to_end(key)
        if self.only_measures:
            return
        for k, placeholder in built.weights.items():
            built.graph.rebind(placeholder, w[k])
        for placeholder, source in zip(built.arguments, (*sources, *into), strict=True):
            built.graph.rebind(placeholder, source)
        self.backend.compute(built.graph)

    def _build(self, function: Callable[..., Sequence[Tensor]], w: Weights, sources: Sequence[Tensor],
               into: Sequence[Tensor], phase: Phase) -> _BlockGraph:
        g = Graph(n_nodes(self.arch.hp, 1))
        weights = {k: g.placeholder(t) for k, t in w.items()}
        stand_ins = [g.placeholder(t) for t in sources]
        targets = [g.placeholder(t) for t in into]
        for result, target in zip(function(g, weights, *stand_ins), targets, strict=True):
            g.expand(g.copy(result, target))
        self._place(g, phase)
        self._work_bytes = max(self._work_bytes, self.backend.work_bytes(g))
        return _BlockGraph(g, weights, [*stand_ins, *targets], phase)

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

    def close(self) -> None:
        self._forget_all()
        for allocator in self._allocators.values():
            allocator.close()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
        self.experts.close()
        self._work_bytes = 0


class BlockState:
    """One batch between two blocks: its hidden state and what a layer carries, in memory of its own."""

    def __init__(self, graphs: BlockwiseGraphs, batch: Batch) -> None:
        self.batch = batch
        self._graphs, self._arch = graphs, graphs.arch
        context, n_rows = Context(4), max(batch.n_outputs, 1)
        hidden, carried = self._arch.hp.hidden_size, self._arch.hp.carried_size
        self._all = context.tensor(TYPE_F32, (hidden, batch.n_tokens))
        self._outputs = context.tensor(TYPE_F32, (hidden, n_rows))
        self._carried = [context.tensor(TYPE_F32, (carried, n)) for n in (batch.n_tokens, n_rows)] if carried else []
        self._memory = _Memory(graphs.backend, context, [self._all, self._outputs, *self._carried])
        self._x = self._all
        self._n_logits_rows = 0
        self._choice: Choice | None = None
        self._carried_layer = -1

    @property
    def hidden(self) -> Tensor:
        return self._x

    def embed(self, w: Weights, rows: NDArray[np.int32]) -> None:
        scratch = self._scratch
        if not self._graphs.only_measures:
            scratch.inputs.write_token_ids(rows)
        self._compute(self._arch.embed, ("embed",), w, [scratch.inputs.token_ids], self._x)

    def attention(self, layer: int, w: Weights) -> Tensor:
        inputs, kv, partial = self._scratch.inputs, self._graphs.kv, self._scratch.partial
        sources = [self._x, *inputs.attention_sources(), kv.k[layer], kv.v[layer]]
        if self._carried and self._carried_layer != layer:
            self._carry(layer, w)

        def function(g: Graph, weights: Weights, x: Tensor, *stand_ins: Tensor) -> Tensor:
            return self._arch.attention(g, layer, weights, x, inputs.standing_for(stand_ins))

        kind = ("attention", self._arch.layer_kind(layer), kv.bucket(self.batch))
        self._compute(function, kind, w, sources, partial)
        return partial

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

        self._compute(function, ("add_attention", self._arch.layer_kind(layer)), w, [self._x, summed], self._x)

    def ffn(self, layer: int, w: Weights) -> Tensor:
        def function(g: Graph, weights: Weights, x: Tensor, carried: Tensor | None = None) -> Tensor:
            return self._arch.ffn(g, layer, weights, x, carried)

        partial = self._partial
        self._compute(function, ("ffn", self._arch.layer_kind(layer)), w, [self._x, *self._carried[:1]], partial)
        return partial

    def add_ffn(self, layer: int, w: Weights, summed: Tensor) -> None:
        def function(g: Graph, weights: Weights, x: Tensor, summed: Tensor) -> Tensor:
            return self._arch.add_ffn(g, layer, weights, x, summed)

        self._compute(function, ("add_ffn", self._arch.layer_kind(layer)), w, [self._x, summed], self._x)

    def foresee(self, layer: int, w: Weights) -> Mapping[int, int]:
        choice = self._choice_in(range(self.batch.start, self.batch.end))

        def function(g: Graph, weights: Weights, x: Tensor) -> list[Tensor]:
            carried = self._arch.carry(g, layer, weights, x)
            assert carried is not None  # hp.carried_size says so
            return [carried, self._arch.foresee(g, layer, carried)]

        self._compute_all(function, ("foresee", self._arch.layer_kind(layer)), w, [self._x],
                          [self._carried[0], choice.ids])
        self._carried_layer = layer
        return self._last_use(choice)

    def route(self, layer: int, w: Weights, span: range) -> Mapping[int, int]:
        choice = self._choice_in(span)

        def function(g: Graph, weights: Weights, x: Tensor, carried: Tensor | None = None) -> list[Tensor]:
            routing = cast(moe.ExpertArchitecture, self._arch).router(g, layer, weights, x, carried)
            return [routing.x, routing.weights, routing.ids]

        self._compute_all(function, ("route", self._arch.layer_kind(layer)), w, [self._x, *self._carried[:1]],
                          [choice.x, choice.weights, choice.ids])
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
            self._compute_all(function, ("experts", inputs.n_pairs), w, sources, [])

        most_pairs = pairs_at_once(w["ffn_up_exps.weight"].ne[2], choice.n_tokens)
        if graphs.only_measures:
            compute(graphs.experts.inputs(min(most_pairs, choice.n_pairs)))
            return
        for pairs, slot_ids in choice.portions(slots, most_pairs):
            inputs = graphs.experts.inputs(len(pairs))
            inputs.write(pairs, slot_ids, self._arch.hp.n_experts_used)
            compute(inputs)

    def weigh(self, layer: int) -> Tensor:
        choice, partial = self._choice, self._partial
        assert choice is not None  # `route` came first
        self._compute(lambda g, _, outputs, weights: moe.weigh(g, outputs, weights), ("weigh",), {},
                      [choice.outputs, choice.weights], partial)
        return partial

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
        into = self._scratch.logits_rows(self._n_logits_rows, n_rows)
        self._n_logits_rows += n_rows
        self._compute(self._arch.output, ("output",), w, [self._x], into)

    def read_logits(self) -> NDArray[np.float32] | None:
        if self.batch.n_outputs == 0:
            return None
        return Backend.array(self._scratch.logits).reshape(self.batch.n_outputs, self._arch.hp.vocab_size)

    @property
    def _scratch(self) -> _Scratch:
        return self._graphs.scratch(self.batch)

    @property
    def _partial(self) -> Tensor:
        """Where this rank's part of the FFN's output goes."""
        return self._scratch.partial if self._x is self._all else self._scratch.partial_outputs

    def _compute(self, function: Callable[..., Tensor], kind: tuple[object, ...], w: Weights, sources: list[Tensor],
                 into: Tensor) -> None:
        self._compute_all(lambda *given: [function(*given)], kind, w, sources, [into])

    def _compute_all(self, function: Callable[..., Sequence[Tensor]], kind: tuple[object, ...], w: Weights,
                     sources: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        shape = (sources[0].ne[0], sources[0].ne[1], into[0].ne[1] if into else 0)
        self._graphs.compute(function, (*kind, *shape), w, sources, into, self.batch.phase)

    def close(self) -> None:
        if self._choice is not None:
            self._choice.close()
        self._memory.close()
