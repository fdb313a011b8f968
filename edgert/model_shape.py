"""What a model file is to the memory manager: bytes and counts from its header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

from edgert.architectures.base import Architecture
from edgert.engine.expert_graphs import Choice
from edgert.engine.kv_cache import KVType, kv_bytes_per_token
from edgert.engine.scratch import FfnParts
from edgert.gguf.model_file import ModelFile
from edgert.memory.shape import ModelShape

if TYPE_CHECKING:
    from offload.residency import Piece


def shape_of(file: ModelFile, arch: Architecture, pieces: Sequence[Piece], kv_type: KVType) -> ModelShape:
    """The model as the memory manager sees it."""
    from offload.expert_layout import PoolShape, least_slots, split_experts
    from offload.residency import always_pinned, block_bytes

    hp, (static, of_experts) = arch.hp, split_experts(pieces)
    small, large = ([p for p in static if always_pinned(p) == stays] for stays in (True, False))
    matrices, head, experts = Counter[int](), Counter[int](), Counter[int]()
    in_parts = any(piece.block.kind == "ffn" and piece.block.part for piece in pieces)
    for piece in pieces:
        if piece.spec.use != "vector":
            group = head if piece.block.kind == "output" else experts if piece in of_experts else matrices
            group[piece.type_id] += piece.n_bytes
    return ModelShape(
        file_bytes=file.file_bytes, small_bytes=sum(p.slot_bytes for p in small),
        large_bytes=sum(p.slot_bytes for p in large), largest_block_bytes=max(block_bytes(large).values(), default=0),
        largest_piece_bytes=max((p.slot_bytes for p in large), default=0), matrix_bytes=dict(matrices),
        head_bytes=dict(head), expert_bytes=dict(experts), n_layers=hp.n_layers, n_heads=hp.n_heads,
        n_kv_heads=hp.n_kv_heads, head_dim=hp.head_dim, kv_bytes_per_token=kv_bytes_per_token(hp, kv_type),
        hidden_size=hp.hidden_size,
        hidden_bytes_per_token=4 * (hp.hidden_size + hp.carried_size) + in_parts * FfnParts.bytes_per_token(hp),
        n_experts=hp.n_experts,
        n_experts_used=hp.n_experts_used, slot_bytes=PoolShape.of(of_experts).slot_bytes if of_experts else 0,
        least_slots=least_slots(hp) if of_experts else 0,
        kept_bytes_per_token=Choice.size_bytes(hp, 1) if of_experts else 0, window=hp.window,
        n_window_layers=len(hp.window_layers), context_length=hp.context_length,
        repackable_bytes=dict(matrices + head + experts), foresees=bool(hp.carried_size), key=_key(arch, pieces))


def _key(arch: Architecture, pieces: Sequence[Piece]) -> str:
    """The same for models whose passes cost the same: names, shapes and types of all tensors."""
    parts = sorted((piece.spec.name, piece.first_row, piece.shape, piece.type_id) for piece in pieces)
    return f"{arch.hp.architecture}-{sha256(repr(parts).encode()).hexdigest()[:16]}"
