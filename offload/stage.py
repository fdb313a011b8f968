"""What stands for a model's weights in a rehearsal (offload/rehearsal.py): memory that is gone round, blocks and
experts that lie there, and a file of which any matrix will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np

from edgert.engine.calibration import bytes_like_weights
from edgert.engine.weights import Experts
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Tensor
from edgert.gguf.model_file import ModelFile
from offload.arena import Arena
from offload.direct_file import ALIGN_BYTES, DirectFile
from offload.expert_layout import split_experts
from offload.experts import ExpertPool
from offload.loading import Headers
from offload.residency import Piece

# Reads at a time, and how far apart: what a disk reads ahead is nobody's expert.
_N_READS, _STRIDE = 8, 37


class Stage:
    """Memory that stands for more: each tensor lies where the one before ended, and round again after `ring_bytes`.
    Vectors are ones, so that values neither grow nor vanish from layer to layer."""

    def __init__(self, backend: Backend, ring_bytes: int, largest_bytes: int, largest_vector_bytes: int = 0, *,
                 huge_pages: bool = True) -> None:
        self.ring_bytes = ring_bytes
        room_bytes = aligned(largest_bytes) + ring_bytes
        self._arena = Arena(room_bytes + largest_vector_bytes, huge_pages=huge_pages)
        self.buffer = backend.wrap(self._arena.base, self._arena.size_bytes)
        self._next, self._ones = 0, self._arena.base + room_bytes
        pattern, memory = bytes_like_weights(), self._arena.array()
        for start in range(0, len(memory), len(pattern)):
            memory[start:start + len(pattern)] = pattern[:len(memory) - start]
        memory[self._ones - self._arena.base:].view(np.float32)[:] = 1

    def place(self, tensor: Tensor) -> None:
        """A matrix, or a cache's keys or values."""
        self.buffer.place(tensor, self._arena.base + self._next)
        self._next = (self._next + aligned(tensor.n_bytes)) % self.ring_bytes

    def place_vector(self, tensor: Tensor) -> None:
        self.buffer.place(tensor, self._ones)

    def close(self) -> None:
        self.buffer.close()
        self._arena.close()


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES


class StagedBlocks(Headers):
    """A WeightSource whose bytes are the stage's. With a pool, experts come one by one."""

    def __init__(self, backend: Backend, pieces: Sequence[Piece], model: ModelFile, stage: Stage,
                 pool: ExpertPool | None = None, missed: Mapping[int, int] | None = None) -> None:
        self._stage = stage
        experts = split_experts(pieces)[1]
        largest_bytes = max((piece.n_bytes // piece.shape[2] for piece in experts), default=1)
        n_slots = max(1, min(stage.ring_bytes // (3 * largest_bytes), len(experts) and experts[0].shape[2]))
        super().__init__(backend, pieces, model, 1, n_slots, are_whole=pool is None)
        if pool is not None and self.experts is not None:
            self.experts = StagedExperts(self.experts, pool, n_slots, missed or {})

    def _tensor(self, type_id: int, shape: tuple[int, ...]) -> Tensor:
        tensor = self._context.tensor(type_id, shape)
        (self._stage.place if len(shape) > 1 else self._stage.place_vector)(tensor)
        return tensor


class StagedExperts:
    """A real pool decides what is here and what is read; products go round the slots on the stage. An expert keeps the
    slot that it had first, so that every pass computes, and chooses, the same: guesses of the next layer are right."""

    holds_a_layer = True

    def __init__(self, on_stage: Experts, pool: ExpertPool, n_slots: int, missed: Mapping[int, int]) -> None:
        self._pool, self._n_slots, self._missed = pool, n_slots, missed
        self._slots: dict[tuple[int, int], int] = {}
        self._chosen: dict[int, list[int]] = {}
        self._layer = -1
        self.weights, self.hit_curve = on_stage.weights, pool.hit_curve

    def request(self, layer: int, last_use: Mapping[int, int]) -> Mapping[int, int] | None:
        self._layer, self._chosen[layer] = layer, [*last_use]
        here = self._pool.request(layer, last_use)
        return None if here is None else self._on_stage(here)

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        self._pool.expect(layer, self._chosen.get(layer, ()))

    def waves(self, layer: int, last_use: Mapping[int, int]) -> Iterator[Mapping[int, int]]:
        for here in self._pool.waves(layer, last_use):
            yield self._on_stage(here)

    def _on_stage(self, experts: Iterable[int]) -> Mapping[int, int]:
        return {expert: self._slots.setdefault((self._layer, expert), len(self._slots) % self._n_slots)
                for expert in experts}

    def release(self) -> None:
        """With the next pass in mind, in which the layer is to miss some."""
        self._pool.release()
        for expert in self._chosen.get(self._layer, [])[:self._missed.get(self._layer, 0)]:
            self._pool.forget(self._layer, expert)
        self._layer = -1


class AnyMatrix(DirectFile):
    """Whatever is read, is a matrix of the file, the next one each time, into memory of its own."""

    def __init__(self, path: Path, matrix_bytes: int) -> None:
        super().__init__(path)
        self._matrix_bytes = aligned(min(matrix_bytes, self.size_bytes))
        self._arena, self._numbers = Arena(_N_READS * self._matrix_bytes), count()

    def read_into(self, address: int, offset: int, n_bytes: int) -> None:
        number, most = next(self._numbers), max(1, self.size_bytes // self._matrix_bytes)
        super().read_into(self._arena.base + number % _N_READS * self._matrix_bytes,
                          number * _STRIDE % most * self._matrix_bytes, self._matrix_bytes)

    def close(self) -> None:
        super().close()
        if hasattr(self, "_arena"):
            self._arena.close()
