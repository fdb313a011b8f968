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
from edgert.errors import BudgetTooSmall
from edgert.gguf.model_file import ModelFile
from offload.arena import PAGE_BYTES
from offload.readers import aligned_range

# A larger output head is cut by rows, so that the window stays small: one of 182 MiB is twelve pieces.
MAX_PIECE_BYTES = 16 * 2**20
# Rows of a cut piece: a multiple of every kernel's tile, so that no row is computed by another path than uncut.
_ROWS_MULTIPLE = 256
# Below this a read is latency, not bandwidth, and the tensor is always pinned.
_SMALL_BYTES = 128 * 2**10
# Beside the block that is computed with and the ring's gap, so much is on its way: the disk is busy meanwhile. Half of
# it costs 6-16 % of a token's speed (Qwen2.5-1.5B at 1/2 and 1/4 of its size, a disk of 3.8 GB/s).
_IN_FLIGHT_BYTES = 40 * 2**20
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
    """`pinned` and `streamed` pieces in the order in which a step needs them; `window_bytes` for the streamed ones."""

    pinned: tuple[Piece, ...]
    streamed: tuple[Piece, ...]
    window_bytes: int

    @property
    def pinned_bytes(self) -> int:
        return sum(p.slot_bytes for p in self.pinned)

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


def choose(pieces: Sequence[Piece], available_bytes: int, budget_bytes: int, fixed_bytes: int) -> Residency:
    """Pin what fits in `available_bytes`, stream the rest through a window.

    Raises BudgetTooSmall with the smallest budget: `fixed_bytes` (everything but weights), small tensors and window.
    """
    total_bytes = sum(p.slot_bytes for p in pieces)
    if total_bytes <= available_bytes:
        return Residency(tuple(pieces), (), 0)
    small = [p for p in pieces if _always_pinned(p)]
    large = [p for p in pieces if not _always_pinned(p)]
    small_bytes = sum(p.slot_bytes for p in small)
    window = _least_window(large)
    least_bytes = min(small_bytes + window, total_bytes)
    if least_bytes > available_bytes:
        raise BudgetTooSmall("this model", fixed_bytes + least_bytes, budget_bytes, fixed_bytes + least_bytes)
    comfortable = window + max(*block_bytes(large).values(), _IN_FLIGHT_BYTES)
    window = max(window, min(comfortable, (available_bytes - small_bytes) * 9 // 10))
    chosen = _spread(large, available_bytes - small_bytes - window)
    pinned = tuple(p for p in pieces if _always_pinned(p) or p in chosen)
    streamed = tuple(p for p in large if p not in chosen)
    # What pinning left over, for it pins whole pieces, makes the window wider.
    spare = available_bytes - sum(p.slot_bytes for p in pinned) - window
    return Residency(pinned, streamed, window + spare // PAGE_BYTES * PAGE_BYTES)


def block_bytes(pieces: Sequence[Piece]) -> dict[Block, int]:
    sizes: dict[Block, int] = {}
    for piece in pieces:
        sizes[piece.block] = sizes.get(piece.block, 0) + piece.slot_bytes
    return sizes


def _always_pinned(piece: Piece) -> bool:
    """Small tensors, and vectors of any size: every part of the output head needs the norm before it."""
    return piece.n_bytes < _SMALL_BYTES or piece.spec.use == "vector"


def _least_window(large: Sequence[Piece]) -> int:
    """The largest block at once, and the gap that a ring leaves at its end."""
    return max(block_bytes(large).values(), default=0) + max((p.slot_bytes for p in large), default=0)


def _spread(pieces: Sequence[Piece], room_bytes: int) -> set[Piece]:
    """Pieces worth up to `room_bytes`, evenly spread. More room is never filled with fewer bytes."""
    # Steps of the golden ratio round a circle: the first n of them lie evenly, whatever n is.
    order = sorted(range(len(pieces)), key=lambda index: index * _GOLDEN_RATIO % 1)
    ends = [*accumulate(pieces[index].slot_bytes for index in order)]
    n_chosen = bisect_right(ends, room_bytes)
    chosen = {pieces[index] for index in order[:n_chosen]}
    used = ends[n_chosen - 1] if n_chosen else 0
    for piece in sorted((pieces[index] for index in order[n_chosen:]), key=lambda p: -p.slot_bytes):
        if used + piece.slot_bytes <= room_bytes:  # what still fits, the largest first
            chosen.add(piece)
            used += piece.slot_bytes
    return chosen
