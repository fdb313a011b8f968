"""What stays in memory and what streams: a pure function of the model's tensors and the bytes there are.

Every byte that is pinned is a byte less to read for every token, so all memory that the window does not need is
pinned. The output head first: a prompt computes its layers for every token and the head for the last one, so there is
nothing that reading the head could hide behind. Then layers, spread evenly between streamed ones: their computation
hides the next read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from edgert.architectures.base import OUTPUT, Architecture, Block, TensorSpec, blocks_of
from edgert.engine.scratch import FfnParts
from edgert.gguf.model_file import ModelFile
from edgert.gguf.reader import TensorInfo
from edgert.memory.sizes import MAX_BLOCK_BYTES
from offload.arena import PAGE_BYTES
from offload.readers import aligned_range

# What is larger is cut by rows, so that the window stays small and little memory holds some of it: an output head of
# 182 MiB is 32 pieces. In 12, none was pinned of it in a quarter of the model, where memory that keys and values leave
# grows by 8 MiB, and a prompt of 64 tokens waited 44 ms for the head, now 27, of 360. An FFN of 76 MiB is three blocks:
# two of gate and up, one of down.
MAX_PIECE_BYTES = 6 * 2**20
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


def cut(model: ModelFile, arch: Architecture, n_tokens: int = 0, *, is_whole: bool = False) -> list[Piece]:
    """Every tensor of every block but the embedding, in the order in which a step needs them; large ones cut by rows,
    unless all `is_whole`.

    The output head is cut wherever it is large; FFN blocks where that takes less memory, with `n_tokens` in the cache.
    """
    rows = _rows_per_part(model, arch)
    if is_whole or n_tokens * FfnParts.bytes_per_token(arch.hp) > _largest_ffn(model, arch):
        rows = {}
    pieces = []
    for block in blocks_of(arch.hp)[1:]:
        of_block = list[Piece]()
        for spec in arch.specs(block):
            info = model.tensors.get(spec.name)
            if info is None:
                continue
            n_rows = 1 if len(info.shape) < 2 else info.shape[1]
            first_part, n_per_part = 0, n_rows
            if block == OUTPUT and info.n_bytes > MAX_PIECE_BYTES and not is_whole:
                n_per_part = _rows_within(MAX_PIECE_BYTES, info.n_bytes // n_rows)
            elif block.kind == "ffn":
                first_part, n_per_part = rows.get(spec.key, (0, n_rows))
            of_block += _parts(block, spec, info, n_rows, first_part, n_per_part)
        pieces += sorted(of_block, key=lambda piece: piece.block.part)
    return pieces


def _parts(block: Block, spec: TensorSpec, info: TensorInfo, n_rows: int, first_part: int,
           n_per_part: int) -> Iterator[Piece]:
    """A tensor as pieces of `n_per_part` rows, of the block's parts from `first_part` on."""
    row_bytes = info.n_bytes // n_rows
    for part, first in enumerate(range(0, n_rows, n_per_part), first_part):
        n = min(n_per_part, n_rows - first)
        shape = info.shape if n == n_rows else (info.shape[0], n)
        yield Piece(replace(block, part=part), spec, info.type.id, shape, first, info.part,
                    info.offset + row_bytes * first, row_bytes * n)


def _rows_per_part(model: ModelFile, arch: Architecture) -> dict[str, tuple[int, int]]:
    """Of gate, up and down: the first part of a large FFN that has rows of it, and how many each part has. The same for
    every layer. Nothing where FFNs are small, have experts or biases."""
    hp = arch.hp
    row_bytes = dict[str, int]()
    for spec in (spec for layer in range(hp.n_layers) for spec in arch.specs(Block("ffn", layer))):
        if spec.use == "vector" and spec.name in model.tensors and spec.key.endswith(".bias"):
            return {}
        if spec.use == "matrix":
            info = model.tensors[spec.name]
            row_bytes[spec.key] = max(row_bytes.get(spec.key, 0), info.n_bytes // info.shape[1])
    if row_bytes.keys() != {"ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"} or hp.n_experts \
            or _largest_ffn(model, arch) <= MAX_BLOCK_BYTES:
        return {}
    gate_rows = _rows_within(MAX_BLOCK_BYTES, row_bytes["ffn_gate.weight"] + row_bytes["ffn_up.weight"])
    first_down = -(-hp.ffn_size // gate_rows)
    return {"ffn_gate.weight": (0, gate_rows), "ffn_up.weight": (0, gate_rows),
            "ffn_down.weight": (first_down, _rows_within(MAX_BLOCK_BYTES, row_bytes["ffn_down.weight"]))}


def _largest_ffn(model: ModelFile, arch: Architecture) -> int:
    """Bytes of the largest FFN block."""
    return max(sum(model.tensors[spec.name].n_bytes for spec in arch.specs(Block("ffn", layer))
                   if spec.name in model.tensors) for layer in range(arch.hp.n_layers))


def _rows_within(limit_bytes: int, row_bytes: int) -> int:
    """Rows worth at most `limit_bytes`, a multiple of _ROWS_MULTIPLE."""
    return max(_ROWS_MULTIPLE, limit_bytes // row_bytes // _ROWS_MULTIPLE * _ROWS_MULTIPLE)


def choose(pieces: Sequence[Piece], pinned_bytes: int, window_bytes: int, later: Sequence[int] = ()) -> Residency:
    """Pin pieces worth `pinned_bytes`, stream the rest through a window of at least `window_bytes`.

    `later` says how much may stay once memory is wanted for something else: what stays longest is chosen first, and for
    each of these sizes what fills it. Pieces are large: of 24 MiB that became 19, 4 were left when one of 16 had to go.
    The sizes come from the plan (edgert/memory/planner.py), which gives small tensors and the least window their room.
    """
    small, large = [p for p in pieces if always_pinned(p)], [p for p in pieces if not always_pinned(p)]
    chosen, ordered, small_bytes = dict.fromkeys(small), _by_worth(large), sum(p.slot_bytes for p in small)
    for n_bytes in sorted({pinned_bytes, *later}):
        chosen |= _filling(ordered, n_bytes - small_bytes, chosen)
    keep = tuple(chosen)
    # What pinning left over, for it pins whole pieces, makes the window wider.
    spare = pinned_bytes - sum(p.slot_bytes for p in keep) if len(keep) < len(pieces) else 0
    return Residency(tuple(pieces), keep, window_bytes + spare // PAGE_BYTES * PAGE_BYTES)


def block_bytes(pieces: Sequence[Piece]) -> dict[Block, int]:
    sizes: dict[Block, int] = {}
    for piece in pieces:
        sizes[piece.block] = sizes.get(piece.block, 0) + piece.slot_bytes
    return sizes


def n_parts(blocks: Sequence[Block]) -> tuple[int, int]:
    """Parts of the output head, and of each FFN. A file without a head, a worker's, has none."""
    n_output, n_ffn = (max((block.part + 1 for block in blocks if block.kind == kind), default=0)
                       for kind in ("output", "ffn"))
    return n_output, n_ffn


def always_pinned(piece: Piece) -> bool:
    """Small tensors, and vectors of any size: every part of the output head needs the norm before it."""
    return piece.n_bytes < _SMALL_BYTES or piece.spec.use == "vector"


def _by_worth(pieces: Sequence[Piece]) -> list[Piece]:
    """The head, then layers evenly spread: steps of the golden ratio round a circle, of which the first n lie evenly,
    whatever n is."""
    order = sorted(range(len(pieces)), key=lambda i: (pieces[i].block.kind != "output", i * _GOLDEN_RATIO % 1))
    return [pieces[index] for index in order]


def _filling(ordered: Sequence[Piece], room_bytes: int, chosen: Mapping[Piece, None]) -> dict[Piece, None]:
    """What comes to those that are chosen, for all to be worth up to `room_bytes`: in order of worth, then the largest
    that still fit."""
    rest = [piece for piece in ordered if piece not in chosen]
    used = sum(piece.slot_bytes for piece in ordered) - sum(piece.slot_bytes for piece in rest)
    n_first = bisect_right([*accumulate(piece.slot_bytes for piece in rest)], room_bytes - used)
    found = dict.fromkeys(rest[:n_first])
    used += sum(piece.slot_bytes for piece in found)
    for piece in sorted(rest[n_first:], key=lambda p: -p.slot_bytes):
        if used + piece.slot_bytes <= room_bytes:
            found[piece] = None
            used += piece.slot_bytes
    return found
