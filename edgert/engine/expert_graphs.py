"""What a batch keeps between its router and the sum of its experts, where experts come one by one.

A *pair* is a token and one of its chosen experts. Each pair's output is written to a row of its own, whichever expert
is here first, and the rows are added in the router's order at the end: the sum does not depend on what was in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Hyperparameters
from edgert.ggml.abi import TYPE_F32, TYPE_I32, TYPE_I64
from edgert.ggml.backend import Backend, Buffer
from edgert.ggml.graph import Context, Tensor

_ALIGN = 64
# ggml keeps a list of rows for every slot, as long as all pairs: 8 bytes * slots * pairs of work memory.
_MAX_ROW_LIST_BYTES = 16 * 2**20
# A graph's rows and what is computed of them take some 20 KiB for each pair (of 2048 values); more pairs at once are
# not faster, and how many come together depends on the disk: with a bound, memory is as planned.
_MAX_PAIRS = 1024
_MAX_PAIR_SHAPES = 256  # each some 3 KiB; a prompt's waves have hardly two of one size


def pairs_at_once(n_slots: int, n_tokens: int) -> int:
    """Pairs that one graph computes. All tokens of an expert must be in one (the kernels choose by their number), and
    one expert can have them all."""
    return max(n_tokens, min(_MAX_PAIRS, _MAX_ROW_LIST_BYTES // (8 * n_slots)))


@dataclass(slots=True)
class PairInputs:
    """The inputs of a graph over some pairs: (n_pairs,) token rows, (1, n_pairs) slots and (n_pairs,) output rows."""

    token_rows: Tensor
    slots: Tensor
    output_rows: Tensor
    arrays: tuple[NDArray[Any], ...]

    @staticmethod
    def size_bytes(n_pairs: int) -> int:
        return (4 + 4 + 8) * n_pairs + 3 * _ALIGN

    @classmethod
    def at(cls, buffer: Buffer, context: Context, n_pairs: int) -> PairInputs:
        made, arrays, address = [], [], buffer.base
        for type_id, shape in ((TYPE_I64, (n_pairs,)), (TYPE_I32, (n_pairs,)), (TYPE_I32, (1, n_pairs))):
            tensor = context.tensor(type_id, shape)
            buffer.place(tensor, address)
            address += -(-tensor.n_bytes // _ALIGN) * _ALIGN
            made.append(tensor)
            arrays.append(Backend.array(tensor).reshape(n_pairs))
        output_rows, token_rows, slots = made
        return cls(token_rows, slots, output_rows, tuple(arrays))

    @property
    def n_pairs(self) -> int:
        return self.token_rows.ne[0]

    def write(self, pairs: NDArray[np.int64], slots: NDArray[np.int32], n_used: int) -> None:
        output_rows, token_rows, slot_ids = self.arrays
        output_rows[:] = pairs
        np.floor_divide(pairs, n_used, out=token_rows, casting="unsafe")
        slot_ids[:] = slots


class Choice:
    """The router's choice for one batch, and what its experts computed. Lies in memory that batches share in turn."""

    def __init__(self, hp: Hyperparameters, n_tokens: int) -> None:
        self._context, n_used = Context(5), hp.n_experts_used
        self._n_used, self._n_experts = n_used, hp.n_experts
        self.n_tokens, self.n_pairs = n_tokens, n_used * n_tokens
        self.x = self._context.tensor(TYPE_F32, (hp.hidden_size, n_tokens))
        self.weights = self._context.tensor(TYPE_F32, (1, n_used, n_tokens))
        self.ids = self._context.tensor(TYPE_I32, (n_used, n_tokens))
        self.pairs = self._context.tensor(TYPE_F32, (hp.hidden_size, n_used * n_tokens))
        self.outputs = self._context.tensor(TYPE_F32, (hp.hidden_size, n_used, n_tokens))  # the same memory
        self._place = 0, 0
        self._ids: NDArray[np.int32]

    @staticmethod
    def size_bytes(hp: Hyperparameters, n_tokens: int) -> int:
        n_used = hp.n_experts_used
        return n_tokens * (4 * hp.hidden_size * (1 + n_used) + 8 * n_used + 5 * _ALIGN)

    def place(self, buffer: Buffer, address: int) -> None:
        """Lie in `size_bytes` from `address` on. Costs nothing where it lies there already."""
        if (buffer.handle, address) == self._place:
            return
        self._place = buffer.handle, address
        address = -(-address // _ALIGN) * _ALIGN
        for tensor in (self.x, self.pairs, self.weights, self.ids):
            buffer.place(tensor, address)
            address += -(-tensor.n_bytes // _ALIGN) * _ALIGN
        buffer.place(self.outputs, self.pairs.data)
        self._ids = Backend.array(self.ids).reshape(-1)

    def last_use(self, end: int) -> dict[int, int]:
        """The chosen experts, with the position of the last token of each; `end` is the position after the last."""
        ids = self._ids.tolist()
        if self.n_tokens == 1:
            return dict.fromkeys(ids, end - 1)
        start = end - self.n_tokens
        return {expert: start + pair // self._n_used for pair, expert in enumerate(ids)}

    def portions(self, slots: Mapping[int, int], most_pairs: int) -> Iterator[tuple[NDArray[np.int64],
                                                                                   NDArray[np.int32]]]:
        """The pairs whose experts lie in these slots, and the slot of each; an expert's pairs come together."""
        slot_of = np.full(self._n_experts, -1, np.int32)
        if len(self._ids) <= most_pairs:
            slot_of[[*slots]] = [*slots.values()]
            yield from self._pairs_in(slot_of)
            return
        counts, n_pairs = np.bincount(self._ids, minlength=self._n_experts).tolist(), 0
        for expert, slot in slots.items():
            if n_pairs and n_pairs + counts[expert] > most_pairs:
                yield from self._pairs_in(slot_of)
                slot_of[:], n_pairs = -1, 0
            slot_of[expert] = slot
            n_pairs += counts[expert]
        yield from self._pairs_in(slot_of)

    def _pairs_in(self, slot_of: NDArray[np.int32]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        slots = slot_of[self._ids]
        pairs = np.flatnonzero(slots >= 0)
        if len(pairs):
            yield pairs, slots[pairs]

    def close(self) -> None:
        self._context.close()


class ExpertMemory:
    """Two buffers that batches use in turn: the inputs of graphs over pairs, and what lives from `route` to `weigh`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._outputs: Buffer | None = None
        self._inputs: Buffer | None = None
        self._context, self._by_size = Context(3 * _MAX_PAIR_SHAPES), dict[int, PairInputs]()

    @property
    def size_bytes(self) -> int:
        return sum(buffer.size_bytes for buffer in (self._outputs, self._inputs) if buffer is not None)

    def outputs(self, size_bytes: int) -> Buffer:
        """Memory for the choices of a step's batches, grown when a step needs more."""
        self._outputs = self._grown(self._outputs, "the experts' outputs", size_bytes)
        return self._outputs

    def inputs(self, n_pairs: int) -> PairInputs:
        """The inputs of a graph over so many pairs; every number of pairs uses the same memory."""
        buffer = self._grown(self._inputs, "the experts' inputs", PairInputs.size_bytes(n_pairs))
        if buffer is not self._inputs or len(self._by_size) == _MAX_PAIR_SHAPES:
            self._inputs = buffer
            self._by_size.clear()
            self._context.close()
            self._context = Context(3 * _MAX_PAIR_SHAPES)
        if n_pairs not in self._by_size:
            self._by_size[n_pairs] = PairInputs.at(buffer, self._context, n_pairs)
        return self._by_size[n_pairs]

    def _grown(self, buffer: Buffer | None, what: str, size_bytes: int) -> Buffer:
        if buffer is not None and buffer.handle and buffer.size_bytes >= size_bytes:
            return buffer
        if buffer is not None:
            buffer.close()
        return self._backend.alloc(what, size_bytes)

    def close(self) -> None:
        """Give all back. It may be used again."""
        for buffer in (self._outputs, self._inputs):
            if buffer is not None:
                buffer.close()
        self._outputs = self._inputs = None
        self._context.close()
