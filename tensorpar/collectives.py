"""Summing partial results over devices: a star, a one-shot exchange, and reduce-scatter with all-gather.

With one-way latency a, bandwidth B, N ranks and b bytes, one sum costs: star 2a + 2(N-1)b/B at the leader; one-shot
a + (N-1)b/B; scatter 2a + 2(N-1)/N b/B. `choose` takes the least. Sums are added in rank order in all three.
Sources: TPI-LLM, arXiv 2410.00531, section 3.2 (star); Thakur et al. 2005, section 4 (reduce-scatter).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ClusterError, PeerLost
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Tensor
from tensorpar.frames import MAX_DATA_BYTES, BadFrame, Kind, Moment
from tensorpar.link import Link
from tensorpar.shares import Range, length
from tensorpar.sum_times import SumTimes
from tensorpar.wire import WIRES, Floats, WireName

Algorithm = Literal["star", "one-shot", "scatter"]
# Ranks that send to each other at once send this much before they read: it always fits the sockets' buffers.
_PIECE_BYTES = 2**16
# Tensors whose memory is known as an array; each batch shape has two.
_MAX_ARRAYS = 64
_NOTHING: tuple[Tensor | None, int, Floats] = (None, 0, np.empty(0, np.float32))
_OF_A_PASS = frozenset((Kind.PASS, Kind.PART, Kind.SUM))
# Start, tokens of the whole step, rows of logits, tokens of this batch, and how many cached tokens it attends to, whose
# positions follow.
_PASS = struct.Struct("<IIIII")
_ALL = 2**32 - 1


class MeshBroken(ClusterError):
    """A worker has lost its link to another: both may be there, but not connected."""


class Abandoned(ClusterError):
    """The leader has given this pass up, and says something else."""


@dataclass(frozen=True, slots=True)
class PassStart:
    """What a step computes: tokens at positions `start` and on, logits for the last `n_outputs`."""

    start: int
    n_tokens: int
    n_outputs: int


@dataclass(frozen=True, slots=True)
class Network:
    """What was measured between the devices; `is_mesh`: every two of them are connected."""

    latency_s: float  # one way
    bytes_per_s: float
    is_mesh: bool


def seconds(algorithm: Algorithm, n_bytes: int, n_ranks: int, network: Network) -> float:
    """What one sum costs, by the formulas above."""
    transfer_s = n_bytes / network.bytes_per_s
    match algorithm:
        case "star":
            return 2 * network.latency_s + 2 * (n_ranks - 1) * transfer_s
        case "one-shot":
            return network.latency_s + (n_ranks - 1) * transfer_s
        case "scatter":
            return 2 * network.latency_s + 2 * (n_ranks - 1) / n_ranks * transfer_s


@lru_cache(maxsize=256)
def choose(n_bytes: int, n_ranks: int, network: Network) -> Algorithm:
    """The fastest way to sum so many bytes. Two ranks are a mesh always."""
    if n_ranks > 2 and not network.is_mesh:
        return "star"
    candidates: tuple[Algorithm, ...] = ("one-shot", "scatter", "star")
    return min(candidates, key=lambda one: seconds(one, n_bytes, n_ranks, network))


class Group:
    """A Collective over links to other ranks: all of them, or (star only) just the leader's.

    `algorithm` None chooses for every size anew. Every rank must be given the same network, wire, algorithm and
    `splits_head`; with that, rank 0 also the rows of the output head that each rank computes.
    """

    def __init__(self, rank: int, world_size: int, links: Mapping[int, Link], *, epoch: int = 0, network: Network,
                 wire: WireName = "f32", algorithm: Algorithm | None = None, splits_head: bool = False,
                 head_rows: Sequence[Sequence[Range]] = (), times: SumTimes | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self.network, self._wire, self._algorithm = network, WIRES[wire], algorithm
        self._links = dict(sorted(links.items()))
        self._moment = Moment(epoch)
        self._pass = PassStart(0, 0, 0)
        self.selected: NDArray[np.int64] | None = None
        self._arrays: dict[int, tuple[Tensor | None, int, Floats]] = {}
        self._rooms: dict[int, memoryview] = {}
        self._times = times or SumTimes()
        self.splits_head, self._head_rows = splits_head, head_rows
        self._logits: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self.n_broadcasts = self.n_all_reduces = self.n_reduces = 0

    @property
    def waited_s(self) -> float:
        """How long other ranks were waited for so far."""
        return sum(link.waited_s for link in self._links.values())

    def join(self, links: Mapping[int, Link], network: Network) -> None:
        """From here on these links to other workers are used too."""
        self._links, self.network = dict(sorted({**self._links, **links}.items())), network

    def look(self) -> bool:
        """For whoever waits for another worker: whether the leader is ahead, which has that worker's part then. It was
        sent to all at once; and behind what the leader says of the pass, a word that it gave it up would not be seen.
        Raises Abandoned when that is what it says."""
        link = self._links[0]
        if not link.has_begun():
            return False
        header = link.peek(MAX_DATA_BYTES)
        if header.kind not in _OF_A_PASS or header.moment[:2] != self._moment[:2]:
            raise Abandoned("the leader has given this pass up")
        return True

    def algorithm(self, n_bytes: int) -> Algorithm:
        """How so many bytes are summed; only a star where workers are not connected."""
        can_choose = self.network.is_mesh or self.world_size == 2
        return (self._algorithm if can_choose else None) or choose(n_bytes, self.world_size, self.network)

    # -- a pass ------------------------------------------------------------------------------------------------
    def begin(self, start: PassStart) -> None:
        """On the leader, before each step. Frames of a step that was broken off are older than all that follow."""
        self._moment = Moment(self._moment.epoch, self._moment.number + 1)
        self._pass, self.selected = start, None

    def follow(self) -> PassStart:
        """On the others: what the PASS frame that waits in the leader's link begins. Its hidden state stays there
        for `broadcast`. Raises BadFrame."""
        header = self._links[0].peek(MAX_DATA_BYTES)
        if header.kind is not Kind.PASS or header.moment.turn:
            raise BadFrame(f"{header.kind.name} came where a pass was to begin")
        self._moment = header.moment
        raw = memoryview(bytearray(_PASS.size))
        self._links[0].take_part(raw)
        start, n_tokens, n_outputs, _, n_selected = _PASS.unpack(raw)
        self.selected = None if n_selected == _ALL else self._positions(n_selected, start)
        return PassStart(start, n_tokens, n_outputs)

    def _positions(self, n: int, n_cached: int) -> NDArray[np.int64]:
        """The next so many in the leader's link. Raises BadFrame for what is no set of that many cached tokens."""
        if not 1 <= n <= n_cached or 4 * n > self._links[0].peek(MAX_DATA_BYTES).n_bytes:
            raise BadFrame(f"a set of {n} tokens, of {n_cached}")
        positions = np.empty(n, np.uint32)
        self._links[0].take_part(positions.data.cast("B"))
        rising = positions.astype(np.int64)
        if rising[-1] >= n_cached or (np.diff(rising) <= 0).any():
            raise BadFrame("a set of tokens that are not there")
        return rising

    def broadcast(self, hidden: Tensor) -> None:
        values = Backend.array(hidden).reshape(-1)
        self.n_broadcasts += 1
        if self.rank == 0:
            chosen = b"" if self.selected is None else self.selected.astype(np.uint32).tobytes()
            payload = _PASS.pack(self._pass.start, self._pass.n_tokens, self._pass.n_outputs, hidden.ne[1],
                                 _ALL if self.selected is None else len(self.selected))
            frame = memoryview(payload + chosen + values.tobytes())
            for link in self._links.values():
                link.send(Kind.PASS, self._moment, frame)
        else:
            link = self._links[0]
            if self._moment.turn:  # of a step's first batch it was taken by `follow`
                self._expect(link, Kind.PASS, _PASS.size + values.nbytes)
                link.take_part(memoryview(bytearray(_PASS.size)))
            link.take(values.data.cast("B"))
        self._advance()

    def all_reduce(self, partial: Tensor) -> Tensor:
        self.n_all_reduces += 1
        began_s = time.perf_counter()
        values = self._values(partial)
        match self.algorithm(self._wire.n_bytes(len(values))):
            case "star":
                self._star(values)
            case "one-shot":
                self._one_shot(values)
            case "scatter":
                self._scatter(values)
        self._advance()
        self._times.add(time.perf_counter() - began_s)
        return partial

    def reduce(self, partial: Tensor) -> Tensor:
        self.n_reduces += 1
        values = self._values(partial)
        if self.rank:
            self._links[0].send(Kind.PART, self._moment, self._wire.encode(values))
        else:
            self._gather(values)
        self._advance()
        return partial

    def gather(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Token by token, and as float32 whatever the wire."""
        if not self.splits_head:
            return logits
        if self.rank:
            for row in logits:
                self._links[0].send(Kind.PART, self._moment, row.data.cast("B"))
        else:
            logits = self._gather_rows(logits)
        self._advance()
        return logits

    def _gather_rows(self, own: NDArray[np.float32]) -> NDArray[np.float32]:
        shape = len(own), sum(map(length, self._head_rows))
        if self._logits.shape != shape:
            self._logits = np.empty(shape, np.float32)
        for rank, ranges in enumerate(self._head_rows):
            for index, row in enumerate(self._logits):
                parts = [row[start:end] for start, end in ranges]
                if rank:
                    self._receive_into(self._links[rank], [one.data.cast("B") for one in parts])
                else:
                    position = 0
                    for part in parts:
                        part[:] = own[index, position:position + len(part)]
                        position += len(part)
        return self._logits

    def _advance(self) -> None:
        self._moment = Moment(self._moment.epoch, self._moment.number, self._moment.turn + 1)

    def _values(self, tensor: Tensor) -> Floats:
        """The tensor's memory, flat. A layer asks for the same again and again, and making an array takes 5 us."""
        tensor_, data, values = self._arrays.get(id(tensor), _NOTHING)
        if tensor_ is not tensor or data != tensor.data:
            if len(self._arrays) >= _MAX_ARRAYS:
                self._arrays.clear()
            values = Backend.array(tensor).reshape(-1)
            self._arrays[id(tensor)] = tensor, tensor.data, values
        return values

    def _room(self, rank: int, n_bytes: int) -> memoryview:
        """Where the next `n_bytes` of this rank come; the same memory each time."""
        room = self._rooms.get(rank)
        if room is None or len(room) < n_bytes:
            room = self._rooms[rank] = memoryview(bytearray(n_bytes))
        return room[:n_bytes]

    # -- the three ways ----------------------------------------------------------------------------------------
    def _star(self, values: Floats) -> None:
        wire = self._wire
        encoded = wire.encode(values)
        if self.rank:
            self._links[0].send(Kind.PART, self._moment, encoded)
            raw = self._room(0, len(encoded))
            self._receive(self._links[0], Kind.SUM, raw)
            values[:] = wire.decode(raw, len(values))
            return
        self._gather(values)
        encoded = wire.encode(values)
        for link in self._links.values():
            link.send(Kind.SUM, self._moment, encoded)
        self._take_as_sent(values, encoded)

    def _gather(self, values: Floats) -> None:
        """The sum of all parts, on the leader. Its own is exact: nobody else adds it."""
        for rank, link in self._links.items():
            raw = self._room(rank, self._wire.n_bytes(len(values)))
            self._receive(link, Kind.PART, raw)
            values += self._wire.decode(raw, len(values))

    def _one_shot(self, values: Floats) -> None:
        encoded = self._wire.encode(values)
        received = {rank: self._room(rank, len(encoded)) for rank in self._links}
        self._swap(Kind.PART, dict.fromkeys(self._links, encoded), received)
        self._take_as_sent(values, encoded)
        self._add_in_order(values, received)

    def _scatter(self, values: Floats) -> None:
        """Each rank sums its own range of the values, and gives the sum to all."""
        wire = self._wire
        bounds = [len(values) * rank // self.world_size // 32 * 32 for rank in range(self.world_size)] + [len(values)]
        ranges = [values[start:end] for start, end in pairwise(bounds)]
        own = ranges[self.rank]
        received = {rank: self._room(rank, wire.n_bytes(len(own))) for rank in self._links}
        self._swap(Kind.PART, {rank: wire.encode(ranges[rank]) for rank in self._links}, received)
        self._add_in_order(own, received)
        encoded = wire.encode(own)
        sums = {rank: self._room(rank, wire.n_bytes(len(ranges[rank]))) for rank in self._links}
        self._swap(Kind.SUM, dict.fromkeys(self._links, encoded), sums)
        self._take_as_sent(own, encoded)
        for rank, raw in sums.items():
            ranges[rank][:] = wire.decode(raw, len(ranges[rank]))

    def _add_in_order(self, values: Floats, received: Mapping[int, memoryview]) -> None:
        """values = the sum of all ranks' parts, in rank order; this rank's is in `values`."""
        if len(received) == 1:  # of two numbers the order does not matter
            values += self._wire.decode(next(iter(received.values())), len(values))
            return
        total = values if self.rank == 0 else self._wire.decode(received[0], len(values))
        for rank in range(1, self.world_size):
            total += values if rank == self.rank else self._wire.decode(received[rank], len(values))
        values[:] = total

    def _take_as_sent(self, values: Floats, encoded: memoryview) -> None:
        """Let `values` be what the others decode of them."""
        if not self._wire.is_exact:
            values[:] = self._wire.decode(encoded, len(values))

    # -- frames ------------------------------------------------------------------------------------------------
    def _swap(self, kind: Kind, out: Mapping[int, memoryview], into: Mapping[int, memoryview]) -> None:
        """Send and receive at once, piece by piece, so that nobody waits for a full buffer to empty."""
        longest = max(len(view) for view in (*out.values(), *into.values()))
        for start in range(0, longest, _PIECE_BYTES):
            for rank, link in self._links.items():
                if start < len(out[rank]):
                    link.send(kind, self._moment, out[rank][start:start + _PIECE_BYTES])
            for rank, link in self._links.items():
                if start < len(into[rank]):
                    self._receive(link, kind, into[rank][start:start + _PIECE_BYTES])

    def _receive(self, link: Link, kind: Kind, into: memoryview) -> None:
        self._expect(link, kind, len(into))
        link.take(into)

    def _receive_into(self, link: Link, parts: Sequence[memoryview]) -> None:
        """One frame, into several places."""
        self._expect(link, Kind.PART, sum(map(len, parts)))
        for part in parts[:-1]:
            link.take_part(part)
        link.take(parts[-1])

    def _expect(self, link: Link, kind: Kind, n_bytes: int) -> None:
        """Drop what an abandoned pass left; then the frame that belongs here is next. Raises Abandoned, BadFrame."""
        header = link.peek(MAX_DATA_BYTES, foreseen=n_bytes)
        while header.kind in _OF_A_PASS and header.moment < self._moment:
            link.skip(MAX_DATA_BYTES)
            header = link.peek(MAX_DATA_BYTES, foreseen=n_bytes)
        if header.kind is Kind.FAULT:
            fault = link.receive_message(Kind.FAULT)[1]
            if fault.get("lost"):
                raise MeshBroken(f"device {link.rank} has lost device {fault['lost']}")
            raise PeerLost(link.rank, str(fault.get("problem"))[:200])
        if link.rank == 0 and header.kind not in _OF_A_PASS:
            raise Abandoned("the leader has given this pass up")
        if header.moment != self._moment or header.kind is not kind:
            if self.rank and header.moment[:2] > self._moment[:2]:
                raise Abandoned("the leader has given this pass up")
            raise BadFrame(f"{header.kind.name} {header.moment} came, {kind.name} {self._moment} was expected")
        if header.n_bytes != n_bytes:
            raise BadFrame(f"{header.n_bytes} bytes came, {n_bytes} were expected")
