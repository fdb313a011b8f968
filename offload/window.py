"""Dense weights from disk: pinned pieces stay, the others pass through a ring, readers ahead of the computation.

The order in which a step needs blocks is always the same, so the readers simply go round: they fill whatever the ring
has free, across the end of a token into the next one. A lease waits for its block and gives the ring its room back.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture, Block, Weights
from edgert.engine.batch import Phase
from edgert.engine.trace import OFF, Trace
from edgert.errors import ModelFileError
from edgert.ggml.backend import Backend, Buffer
from edgert.ggml.graph import Context
from edgert.gguf.model_file import ModelFile
from offload.arena import Arena
from offload.direct_file import DirectFile
from offload.embedding import EmbeddingRows
from offload.expert_layout import PoolShape
from offload.experts import ExpertPool
from offload.readers import Read, Readers, aligned_range
from offload.residency import Piece, Residency, always_pinned, n_parts

_log = logging.getLogger(__name__)
_SETTLE_S = 10.0  # four chunks from a disk of 1 MB/s
# A row of the embedding is latency, the more while blocks are read ahead: two at a time, a prompt of 64 waited 25 ms.
_ROW_THREADS = 8


@dataclass(slots=True)
class _InFlight:
    """A piece in the ring: being read, or there."""

    piece: Piece
    read: Read
    ring_bytes: int  # with the gap that it left at the ring's end


class Ring:
    """Room for pieces in the order in which they are freed again. Addresses are page aligned."""

    def __init__(self, base: int, size_bytes: int) -> None:
        self._base, self.size_bytes = base, size_bytes
        self._head = 0
        self.used_bytes = 0

    def take(self, n_bytes: int) -> tuple[int, int] | None:
        """(address, bytes taken with the gap at the end), or None when there is no room yet."""
        gap = self.size_bytes - self._head if self._head + n_bytes > self.size_bytes else 0
        if self.used_bytes + gap + n_bytes > self.size_bytes:
            return None
        address = self._base + (0 if gap else self._head)
        self._head = (address - self._base + n_bytes) % self.size_bytes
        self.used_bytes += gap + n_bytes
        return address, gap + n_bytes

    def free(self, n_bytes: int) -> None:
        """Give back the oldest `n_bytes`."""
        self.used_bytes -= n_bytes

    def reset(self) -> None:
        self._head = self.used_bytes = 0


class WindowWeights:
    """A WeightSource for models larger than memory. Holds `arena.size_bytes`; the file is never mapped.

    Pinned pieces are a stack in order of worth: `pin` cuts the top off between two steps, when memory is wanted for
    something else, and reads it back later. What is cut off streams meanwhile, so that answers stay the same: where
    everything was pinned, through a window of `spare_window_bytes` that takes memory only then.
    """

    resident = False

    def __init__(self, backend: Backend, model: ModelFile, arch: Architecture, residency: Residency, arena: Arena,
                 *, n_threads: int = 4, batch_size: int = 512, context_length: int = 0, trace: Trace = OFF,
                 pool: tuple[PoolShape, int] | None = None, spare_window_bytes: int = 0) -> None:
        self._arena, self._trace, self.residency = arena, trace, residency
        self._is_cancelled: Callable[[], bool] = lambda: backend.cancel.is_set
        self._files: list[DirectFile] = []
        self._readers, self._row_readers = Readers(n_threads), Readers(_ROW_THREADS)
        self.experts: ExpertPool | None = None
        self._buffer: Buffer = backend.wrap(arena.base, arena.size_bytes)
        self._buffer.mark_as_weights()
        pieces = residency.pieces
        self._context = Context(len(pieces) + 8)
        self._tensors = {piece: self._context.tensor(piece.type_id, piece.shape, piece.spec.name) for piece in pieces}
        self._blocks = by_block(pieces)
        self._weights: dict[Block, Weights] = {
            block: {piece.spec.key: self._tensors[piece] for piece in of_block}
            for block, of_block in self._blocks.items()}
        self.n_output_parts, self.n_ffn_parts = n_parts([*self._blocks])
        self._last = Block("output", part=self.n_output_parts - 1)
        self._slots: list[int] = []  # addresses of the pinned pieces, in order of worth
        self._ends = [*accumulate(piece.slot_bytes for piece in residency.keep)]
        self._n_small = sum(always_pinned(piece) for piece in residency.keep)
        self._n_pinned = self._pinning_bytes = 0
        self._let_stream(len(residency.keep))
        self._ring_pieces: deque[_InFlight] = deque()
        self._waited_s = 0.0
        try:
            self._open_files(model)
            self.embedding = EmbeddingRows(self._files, model, self._context, self._buffer, arena, batch_size,
                                           context_length or arch.hp.context_length, self._row_readers)
            if pool is not None:
                shape, n_slots = pool
                self.experts = ExpertPool(shape, arch.hp, n_slots, arena, self._buffer, self._files, self._is_cancelled,
                                          n_threads=n_threads, trace=trace)
            self._slots = [arena.carve(piece.slot_bytes) for piece in residency.keep]
            self._fill(len(residency.keep))
        except BaseException:
            self.close()
            raise
        window_bytes = residency.window_bytes + spare_window_bytes
        self.window_bytes, self._spare_bytes = window_bytes, spare_window_bytes
        self.window_address = arena.carve(window_bytes)
        self._ring = Ring(self.window_address, window_bytes)
        self._read_ahead()

    @property
    def pinned_bytes(self) -> int:
        return sum(piece.slot_bytes for piece in self.residency.keep[:self._n_pinned])

    @property
    def streamed_bytes(self) -> int:
        experts_bytes = self.experts.bytes_read if self.experts else 0
        return self._readers.bytes_read + self.embedding.bytes_read + experts_bytes - self._pinning_bytes

    @property
    def stay(self) -> bool:
        return not self._cycle

    @property
    def bytes_per_pass(self) -> int:
        """What every pass reads now."""
        return sum(piece.slot_bytes for piece in self._cycle)

    @property
    def waited_s(self) -> float:
        """Seconds that computing has waited for bytes: blocks, rows of the embedding, and experts."""
        return self._waited_s + (self.experts.counters.waited_s if self.experts else 0.0)

    def plan(self) -> dict[str, Any]:
        return {"weights": "streamed", "streamed_bytes_per_pass": self.bytes_per_pass,
                "window_bytes": self.residency.window_bytes, "read_method": self._files[0].method,
                **(self.experts.plan() if self.experts else {})}

    def pin(self, n_bytes: int) -> None:
        """Let pinned pieces worth at most `n_bytes` stay, small tensors always; only between two steps. A window that
        was not there before takes its memory from `n_bytes`.

        Fewer than before: their memory goes back to the system. More, up to what was pinned first: they are read.
        Raises what a failing read raises, Cancelled; then it is as before.
        """
        ends, before = self._ends, self._n_pinned
        wanted = bisect_right(ends, n_bytes)
        if wanted < len(ends):
            wanted = max(self._n_small, bisect_right(ends, n_bytes - self._spare_bytes))
        if wanted == before:
            return
        was, is_to_be = (ends[n - 1] >> 20 if n else 0 for n in (before, wanted))
        with self._trace.span(f"pin {is_to_be} MiB, was {was}", "load"):
            self._forget_read_ahead()
            try:
                if wanted > before:
                    self._fill(wanted)
            except BaseException:
                wanted = before
                raise
            finally:
                self._give_back(wanted)
                self._let_stream(wanted)
                if self._spare_bytes and not self._cycle:
                    self._arena.give_back(self.window_address, self._spare_bytes)
                self._read_ahead()

    def spare_expert_bytes(self, n_slots: int) -> int:
        """What so many slots of experts could give back."""
        return self.experts.spare_bytes(n_slots) if self.experts else 0

    def keep_experts(self, n_slots: int, less_bytes: int) -> None:
        """Let experts have `n_slots`, less those that `less_bytes` are worth; only between two steps. Raises
        Cancelled."""
        if self.experts is not None:
            self.experts.keep(n_slots, less_bytes)

    def _fill(self, n_pinned: int) -> None:
        """Read the pieces of the stack from where it is filled up to `n_pinned`."""
        first = self._n_pinned
        reads = [self._start(piece, address) for piece, address in
                 zip(self.residency.keep[first:n_pinned], self._slots[first:n_pinned], strict=True)]
        try:
            for read in reads:
                read.wait(self._is_cancelled)
        finally:
            for read in reads:  # one has failed: the others' memory is given back, and nobody may write there
                read.abandoned |= not read.done.is_set()
            for read in reads:
                read.done.wait(_SETTLE_S)
        self._n_pinned = n_pinned
        self._pinning_bytes += sum(piece.slot_bytes for piece in self.residency.keep[first:n_pinned])

    def _give_back(self, n_pinned: int) -> None:
        """The memory of the stack above `n_pinned`: one range, so that whole huge pages go."""
        if n_pinned < len(self._slots):
            end = self._slots[-1] + self.residency.keep[-1].slot_bytes  # a multiple of a page
            self._arena.give_back(self._slots[n_pinned], end - self._slots[n_pinned])

    def _let_stream(self, n_pinned: int) -> None:
        """Every piece that is not among the first `n_pinned` of the stack streams."""
        self._cycle = self.residency.streamed_beyond(n_pinned)
        self._n_streamed = Counter(piece.block for piece in self._cycle)
        self._n_pinned, self._next = min(self._n_pinned, n_pinned), 0  # the next piece to be read, in the cycle

    def _open_files(self, model: ModelFile) -> None:
        for path, n_bytes in zip(model.parts, model.part_bytes, strict=True):
            self._files.append(DirectFile(path))
            if self._files[-1].size_bytes != n_bytes:
                raise ModelFileError(str(path), "the file has changed since its header was read", "Start again.")

    def _start(self, piece: Piece, address: int) -> Read:
        """Read a piece to `address`, and let its tensor lie there."""
        offset, n_bytes = aligned_range(piece.offset, piece.n_bytes)
        read = Read(self._files[piece.part], offset, n_bytes, address)
        self._buffer.place(self._tensors[piece], address + piece.offset - offset)
        self._readers.submit(read)
        return read

    def _read_ahead(self) -> None:
        """Queue reads until the ring is full. Goes round, but never twice past the same piece."""
        while self._cycle and len(self._ring_pieces) < len(self._cycle):
            piece = self._cycle[self._next]
            room = self._ring.take(piece.slot_bytes)
            if room is None:
                return
            address, ring_bytes = room
            self._ring_pieces.append(_InFlight(piece, self._start(piece, address), ring_bytes))
            self._next = (self._next + 1) % len(self._cycle)

    @contextmanager
    def lease(self, block: Block, phase: Phase) -> Iterator[Weights]:
        n_streamed = self._wait_for(block)
        try:
            yield self._weights[block]
        finally:
            for _ in range(n_streamed):
                self._ring.free(self._ring_pieces.popleft().ring_bytes)
            if n_streamed:
                self._read_ahead()

    def _wait_for(self, block: Block) -> int:
        """Wait until the block's streamed pieces, which are the ring's oldest, are there. How many they are."""
        n = self._n_streamed[block]
        if n:
            oldest = [*islice(self._ring_pieces, n)]
            if len(oldest) < n or any(entry.piece.block != block or entry.read.is_useless for entry in oldest):
                self._restart_at(block)
                oldest = [*islice(self._ring_pieces, n)]
            with self._trace.span(f"wait {block.kind} {block.layer}", "wait"):
                for entry in oldest:
                    self._waited_s += entry.read.wait(self._is_cancelled)
        if block == self._last:  # all that this pass computes with has been read: no logits of two files mixed
            for file in self._files:
                file.check_unchanged()
        return n

    def _restart_at(self, block: Block) -> None:
        """A step was stopped in the middle, or a read failed: forget what was read ahead, begin again at `block`."""
        self._forget_read_ahead()
        self._next = next(i for i, piece in enumerate(self._cycle) if piece.block == block)
        self._read_ahead()

    def _forget_read_ahead(self) -> None:
        for entry in self._ring_pieces:
            entry.read.abandoned = True
        for entry in self._ring_pieces:  # the ring's memory is free only when no reader writes into it
            entry.read.settle(self._is_cancelled)
        self._ring_pieces.clear()
        self._ring.reset()

    @contextmanager
    def lease_embedding(self, token_ids: NDArray[np.int32],
                        phase: Phase) -> Iterator[tuple[Weights, NDArray[np.int32]]]:
        with self._trace.span("wait embedding", "wait"):
            start = time.perf_counter()
            # A prompt's rows come before blocks, which are there before they are computed: 64 took 18 ms beside them.
            with self._readers.held_back() if phase == "prefill" else nullcontext():
                rows = self.embedding.read(token_ids, self._is_cancelled)
            self._waited_s += time.perf_counter() - start
        yield {self.embedding.key: self.embedding.table}, rows

    def close(self) -> None:
        everyone = [one for one in (self._readers, self._row_readers, self.experts) if one is not None]
        have_ended = [one.close(self._arena) for one in everyone]
        if not all(have_ended):
            _log.warning("%s: the disk does not answer; memory that it may still write to is kept", self._files[0].path)
            return
        self._buffer.close()
        self._context.close()
        for file in self._files:
            file.close()
        self._arena.close()


def by_block(pieces: Sequence[Piece]) -> dict[Block, list[Piece]]:
    """Each block's pieces, by name: blocks with the same tensors share a graph, whichever of them are pinned."""
    blocks: dict[Block, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda p: p.spec.key):
        blocks.setdefault(piece.block, []).append(piece)
    for block, of_block in blocks.items():  # every part of a block needs the norms around it
        if block.part:
            of_block += [p for p in blocks[replace(block, part=0)] if p.spec.use == "vector"]
    return blocks
