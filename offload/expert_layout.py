"""Where experts lie: in the file, all of a layer's side by side in three tensors; and in a slot, one's three matrices.

Pure: knows shapes and offsets, reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgert.architectures.base import Hyperparameters
from offload.direct_file import ALIGN_BYTES
from offload.readers import aligned_range
from offload.residency import Piece


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """One layer's gate, up or down matrices of all experts, as they lie in the file and in a slot."""

    piece: Piece
    slot_offset: int  # where a slot has room for it

    @property
    def expert_bytes(self) -> int:
        return self.piece.n_bytes // self.piece.shape[2]

    @property
    def shift(self) -> int:
        """Where an expert begins in its room. As in the file, where all lie alike there; else they are moved."""
        return 0 if self.expert_bytes % ALIGN_BYTES else self.piece.offset % ALIGN_BYTES

    def offset(self, expert: int) -> int:
        return self.piece.offset + expert * self.expert_bytes


@dataclass(frozen=True, slots=True)
class PoolShape:
    """Every layer's matrices, and how large a slot is: each matrix has room for the largest of its name."""

    layers: Mapping[int, tuple[ExpertMatrix, ...]]
    slot_bytes: int

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> PoolShape:
        rooms: dict[str, int] = {}
        for piece in pieces:
            n_bytes = piece.n_bytes // piece.shape[2]
            offsets = range(piece.offset, piece.offset + piece.n_bytes, n_bytes)
            # Experts of a multiple of ALIGN_BYTES all lie alike; others need the room of the worst one.
            worst = max(aligned_range(offset, n_bytes)[1] for offset in offsets)
            rooms[piece.spec.key] = max(rooms.get(piece.spec.key, 0), worst)
        starts, slot_bytes = {}, 0
        for key, room in sorted(rooms.items()):
            starts[key], slot_bytes = slot_bytes, slot_bytes + room
        layers: dict[int, tuple[ExpertMatrix, ...]] = {}
        for piece in sorted(pieces, key=lambda p: p.spec.key):
            matrix = ExpertMatrix(piece, starts[piece.spec.key])
            layers[piece.block.layer] = (*layers.get(piece.block.layer, ()), matrix)
        return cls(layers, slot_bytes)


def is_expert(piece: Piece) -> bool:
    """Whether the piece holds all experts' matrices of a layer."""
    return piece.block.kind == "ffn" and len(piece.shape) == 3


def split_experts(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Everything but experts, and the experts."""
    return [p for p in pieces if not is_expert(p)], [p for p in pieces if is_expert(p)]


def least_slots(hp: Hyperparameters) -> int:
    """The fewest slots with which reading and computing overlap: a token's experts of one layer, and a few."""
    return min(hp.n_layers * hp.n_experts, hp.n_experts_used + max(1, hp.n_experts_used // 4))
