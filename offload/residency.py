"""What stays in memory and what streams: a pure function of the model's tensors and the bytes there are.

Every byte that is pinned is a byte less to read for every token, so all memory that the window does not need is
pinned. Pinned tensors are spread evenly between streamed ones: their computation hides the next read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from edgert.architectures.base import OUTPUT, Architecture, Block, TensorSpec, blocks_of
from edgert.gguf.model_file import ModelFile
from offload.arena import PAGE_BYTES
from offload.readers import aligned_range

# A larger output head is cut by rows, so that the window stays small: one of 182 MiB is twelve pieces.
MAX_PIECE_BYTES = 16 * 2**20
# Rows of a cut piece: a multiple of every kernel's tile, so that no row is computed by another path than uncut.
_ROWS_MULTIPLE = 256
# Below this a read is latency, not bandwidth, and the tensor is always pinned.
_SMALL_BYTES = 128 * 2**10
_GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor, or a range of its rows, as it lies in the file."""

    block: Block
    spec: TensorSpec
    type_id: int
    shape: tuple[int, ...]
    first_row: int
    part: int
    offset: int
    n_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Memory that it takes: the enclosing aligned range of the file."""
        return aligned_range(self.offset, self.n_bytes)[1]


@dataclass(frozen=True, slots=True)
class Residency:
    """All `pieces` in the order in which a step needs them; those of `keep` stay, the others pass through a window.

    `keep` is in order of worth: when memory has to be given back, its last piece goes first.
    """

    pieces: tuple[Piece, ...]
    keep: tuple[Piece, ...]
    window_bytes: int

    @property
    def pinned(self) -> tuple[Piece, ...]:
        kept = frozenset(self.keep)
        return tuple(p for p in self.pieces if p in kept)

    @property
    def streamed(self) -> tuple[Piece, ...]:
        return self.streamed_beyond(len(self.keep))

    def streamed_beyond(self, n_kept: int) -> tuple[Piece, ...]:
        """What streams when only the first `n_kept` of `keep` stay."""
        kept = frozenset(self.keep[:n_kept])
        return tuple(p for p in self.pieces if p not in kept)

    @property
    def pinned_bytes(self) -> int:
        return sum(p.slot_bytes for p in self.keep)

    @property
    def streamed_bytes(self) -> int:
        """What every pass over the model reads."""
        return sum(p.slot_bytes for p in self.streamed)


def cut(model: ModelFile, arch: Architecture) -> list[Piece]:
    """Every tensor of every block but the embedding, large ones cut. Output parts are blocks ("output", part)."""
    pieces = []
    for block in blocks_of(arch.hp):
        if block.kind == "embedding":
            continue
        for spec in arch.specs(block):
            info = model.tensors.get(spec.name)
            if info is None:
                continue
            n_rows = 1 if len(info.shape) < 2 else info.shape[1]
            n_per_piece = n_rows
            if block == OUTPUT and info.n_bytes > MAX_PIECE_BYTES:
                row_bytes = info.n_bytes // n_rows
                n_per_piece = max(_ROWS_MULTIPLE, MAX_PIECE_BYTES // row_bytes // _ROWS_MULTIPLE * _ROWS_MULTIPLE)
            for number, first in enumerate(range(0, n_rows, n_per_piece)):
                n = min(n_per_piece, n_rows - first)
                n_bytes = info.n_bytes // n_rows * n
                shape = info.shape if n == n_rows else (info.shape[0], n)
                pieces.append(Piece(Block("output", number) if block == OUTPUT else block, spec, info.type.id, shape,
                                    first, info.part, info.offset + info.n_bytes // n_rows * first, n_bytes))
    return pieces


def choose(pieces: Sequence[Piece], pinned_bytes: int, window_bytes: int) -> Residency:
    """Pin pieces worth `pinned_bytes`, stream the rest through a window of at least `window_bytes`.

    The sizes come from the plan (edgert/memory/planner.py), which gives small tensors and the least window their room.
    """
    small, large = [p for p in pieces if always_pinned(p)], [p for p in pieces if not always_pinned(p)]
    chosen = _spread(large, pinned_bytes - sum(p.slot_bytes for p in small))
    keep = (*small, *chosen)
    # What pinning left over, for it pins whole pieces, makes the window wider.
    spare = pinned_bytes - sum(p.slot_bytes for p in keep) if len(keep) < len(pieces) else 0
    return Residency(tuple(pieces), keep, window_bytes + spare // PAGE_BYTES * PAGE_BYTES)


def block_bytes(pieces: Sequence[Piece]) -> dict[Block, int]:
    sizes: dict[Block, int] = {}
    for piece in pieces:
        sizes[piece.block] = sizes.get(piece.block, 0) + piece.slot_bytes
    return sizes


def always_pinned(piece: Piece) -> bool:
    """Small tensors, and vectors of any size: every part of the output head needs the norm before it."""
    return piece.n_bytes < _SMALL_BYTES or piece.spec.use == "vector"


def _spread(pieces: Sequence[Piece], room_bytes: int) -> dict[Piece, None]:
    """Pieces worth up to `room_bytes`, evenly spread, in order of worth. More room is never filled with fewer bytes."""
    # Steps of the golden ratio round a circle: the first n of them lie evenly, whatever n is.
    order = sorted(range(len(pieces)), key=lambda index: index * _GOLDEN_RATIO % 1)
    ends = [*accumulate(pieces[index].slot_bytes for index in order)]
    n_chosen = bisect_right(ends, room_bytes)
    chosen = dict.fromkeys(pieces[index] for index in order[:n_chosen])
    used = ends[n_chosen - 1] if n_chosen else 0
    for piece in sorted((pieces[index] for index in order[n_chosen:]), key=lambda p: -p.slot_bytes):
        if used + piece.slot_bytes <= room_bytes:  # what still fits, the largest first
            chosen[piece] = None
            used += piece.slot_bytes
    return chosen
