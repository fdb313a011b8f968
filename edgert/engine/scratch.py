"""Memory beside the graphs of blocks: what outlives one graph, and what the batches of one shape share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgert.architectures.base import Hyperparameters
from edgert.engine.batch import Batch
from edgert.engine.fused import Inputs
from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Backend, Buffer
from edgert.ggml.graph import Context, Tensor

if TYPE_CHECKING:
    from edgert.engine.blockwise import BlockwiseGraphs

_ALIGN = 64
_MAX_PARTS = 1024


class Memory:
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


class Rows:
    """A matrix (n_rows, n_columns) float32 that graphs fill some rows at a time."""

    def __init__(self, whole: Tensor) -> None:
        self.whole, self._n_filled = whole, 0
        self._context, self._views = Context(_MAX_PARTS), dict[int, Tensor]()

    def at(self, first: int, n_rows: int) -> Tensor:
        """Rows `first` and on, as a strided view."""
        view = self._views.get(first)
        if view is None:
            view = self._views[first] = self._context.tensor(TYPE_F32, (n_rows, self.whole.ne[1]))
            view.struct.nb[1], view.struct.nb[2], view.struct.nb[3] = (self.whole.nb[d] for d in (1, 2, 3))
        view.struct.data, view.struct.buffer = self.whole.data + 4 * first, self.whole.struct.buffer
        return view

    def next(self, n_rows: int) -> Tensor:
        """The rows after those that were given last; after the last ones, the first again."""
        first = self._n_filled % self.whole.ne[0]
        self._n_filled = first + n_rows
        return self.at(first, n_rows)

    def close(self) -> None:
        self._context.close()


class FfnParts:
    """What a batch keeps of an FFN that comes in parts: its hidden values and its output, some rows at a time."""

    def __init__(self, backend: Backend, hp: Hyperparameters, n_tokens: int) -> None:
        context, self.n_tokens = Context(2), n_tokens
        self.hidden = Rows(context.tensor(TYPE_F32, (hp.ffn_size, n_tokens)))
        self.output = Rows(context.tensor(TYPE_F32, (hp.hidden_size, n_tokens)))
        self._memory = Memory(backend, context, [self.hidden.whole, self.output.whole])

    @staticmethod
    def bytes_per_token(hp: Hyperparameters) -> int:
        return 4 * (hp.ffn_size + hp.hidden_size)

    def close(self) -> None:
        for rows in (self.hidden, self.output):
            rows.close()
        self._memory.close()


class Scratch:
    """What all batches of one shape share: graph inputs, the partial result and the logits. Shapes share the memory
    too, for one batch computes at a time. Partial results that no other device adds to are never kept, and have none.
    """

    def __init__(self, graphs: BlockwiseGraphs, batch: Batch) -> None:
        context, hp = Context(24), graphs.arch.hp
        n_rows = max(batch.n_outputs, 1)
        self.inputs = Inputs.of(context, graphs.kv, batch)
        self.partial = context.tensor(TYPE_F32, (hp.hidden_size, batch.n_tokens))
        self.partial_outputs = context.tensor(TYPE_F32, (hp.hidden_size, n_rows))
        self.logits = context.tensor(TYPE_F32, (hp.head_rows, n_rows))
        self.logits_rows = Rows(self.logits)
        partial = [] if graphs.is_alone else [self.partial, self.partial_outputs]
        tensors = [*self.inputs.tensors(), *partial, self.logits]
        size_bytes = sum(_aligned(t.n_bytes) for t in tensors)
        self.memory = Memory(graphs.backend, context, tensors, graphs.scratch_buffer(size_bytes))
        self.written_for: Batch | None = None

    def close(self) -> None:
        self.logits_rows.close()
        self.memory.close()
