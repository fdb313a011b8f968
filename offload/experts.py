"""Experts from disk: one pool of slots for all layers, each holding one expert's gate, up and down matrices.

ggml multiplies by a slot's number as it does by an expert's, bit for bit: a tensor's last dimension steps from slot to
slot, and its base says where in a slot the matrix begins. What is here computes while what is missing is read, and what
the next layer may want is read behind it. Which expert gives way, offload/eviction.py decides, and offload/guesses.py
which guess is worth a read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from edgert.architectures.base import Hyperparameters, Weights
from edgert.engine.trace import OFF, Trace
from edgert.ggml.backend import Buffer
from edgert.ggml.graph import Context, Tensor
from edgert.memory.profile import HitCurve
from offload.arena import Arena
from offload.direct_file import DirectFile
from offload.eviction import ExpertSlots, Key
from offload.expert_layout import ExpertMatrix, PoolShape
from offload.guesses import Guesses
from offload.readers import Read, Readers, aligned_range
from offload.working_set import WorkingSet

# A pool of fewer slots, in what a token uses of a layer, has none that guesses would not take from the token itself.
_LEAST_LAYERS_FOR_GUESSES = 4


@dataclass(slots=True)
class Counters:
    """Uses of an expert that found it here, uses that had it read, and what waiting for those reads cost."""

    hits: int = 0
    misses: int = 0
    waited_s: float = 0.0


class ExpertPool:
    """`Experts` (edgert/engine/weights.py) in `n_slots` slots of the arena. Reads with threads of its own."""

    def __init__(self, shape: PoolShape, hp: Hyperparameters, n_slots: int, arena: Arena, buffer: Buffer,
                 files: Sequence[DirectFile], is_cancelled: Callable[[], bool], *, n_threads: int = 4,
                 trace: Trace = OFF) -> None:
        self.shape, self.n_slots = shape, n_slots
        self._files, self._is_cancelled, self._trace, self._arena = files, is_cancelled, trace, arena
        self._n_used, self._of_layer = hp.n_experts_used, hp.n_experts
        self._base = arena.carve(n_slots * shape.slot_bytes)
        self._slots = ExpertSlots(n_slots, hp.n_layers)
        self._clock, self._offset = _Clock(), 0
        self._reads: dict[Key, list[Read]] = {}  # of experts that may not be here yet
        self._unsettled: dict[int, list[Read]] = {}  # by slot: reads that nobody wants, and that may still write there
        self._layer = -1
        self._held: dict[int, int] = {}  # the layer's experts that have a slot, with their slots
        self._missing: dict[int, None] = {}  # those that wait for a slot
        self._last_use: dict[int, int] = {}  # all of them, with the time of their last use
        self._requested: Mapping[int, int] | None = None  # the last request for the layer
        self._guesses = Guesses()
        self._kept: dict[Key, int] = {}  # what the next layer is guessed to want, with the time of its last use
        self._read_ahead: set[Key] = set()  # those of them that were not here, until another layer is requested
        self.counters = Counters()
        self._working_set = WorkingSet(hp.n_layers * hp.n_experts, hp.n_layers * hp.n_experts_used)
        self._context = Context(3 * len(shape.layers))
        self._weights = {layer: {m.piece.spec.key: self._tensor(m, buffer) for m in matrices}
                         for layer, matrices in shape.layers.items()}
        self._readers = Readers(n_threads)

    def _tensor(self, matrix: ExpertMatrix, buffer: Buffer) -> Tensor:
        """This layer's matrices, slot by slot. What lies in a slot of another layer's is never asked for."""
        n_in, n_out, _ = matrix.piece.shape
        tensor = self._context.tensor(matrix.piece.type_id, (n_in, n_out, self.n_slots), matrix.piece.spec.name)
        tensor.struct.nb[2], tensor.struct.nb[3] = self.shape.slot_bytes, self.shape.slot_bytes * self.n_slots
        buffer.place(tensor, self._base + matrix.slot_offset + matrix.shift)
        return tensor

    @property
    def bytes_read(self) -> int:
        return self._readers.bytes_read

    @property
    def holds_a_layer(self) -> bool:
        return self._slots.n_slots >= self._of_layer

    def spare_bytes(self, n_slots: int) -> int:
        """What so many slots may give back: never a layer's, without which all outputs of a prompt would be kept."""
        return max(0, n_slots - self._of_layer) * self.shape.slot_bytes

    def keep(self, n_slots: int, less_bytes: int = 0) -> None:
        """Have `n_slots` of those that the pool was made with, less those that `less_bytes` of their `spare_bytes` are
        worth: the system has the others' memory. Only between two steps. Raises Cancelled."""
        assert n_slots <= self.n_slots
        self.release()  # what a step that was stopped has left
        self._let_go()
        n_slots -= -(-min(less_bytes, self.spare_bytes(n_slots)) // self.shape.slot_bytes)
        before = self._slots.n_slots
        if n_slots == before:
            return
        with self._trace.span(f"{n_slots} slots for experts, were {before}", "load"):
            for key, slot in self._slots.resize(n_slots):
                if key in self._reads:
                    self._abandon(key, slot)
            for slot in [slot for slot in self._unsettled if slot >= n_slots]:
                self._settle(slot)
            if n_slots < before:
                start = n_slots * self.shape.slot_bytes
                self._arena.give_back(self._base + start, before * self.shape.slot_bytes - start)

    def forget(self, layer: int, expert: int) -> None:
        """Read the expert again when it is wanted next; it is here, and no layer is being computed."""
        self._slots.forget((layer, expert))

    def hit_curve(self) -> HitCurve | None:
        return self._working_set.curve()

    def plan(self) -> dict[str, float]:
        return {"expert_slots": self._slots.n_slots, "expert_slot_bytes": self.shape.slot_bytes,
                **{f"expert_{name}": value for name, value in asdict(self.counters).items()},
                "expert_guesses": self._guesses.n_read, "expert_wrong_guesses": self._guesses.n_wrong,
                "expert_read_bytes": self.bytes_read}

    def weights(self, layer: int) -> Weights:
        return self._weights[layer]

    def request(self, layer: int, last_use: Mapping[int, int]) -> Mapping[int, int] | None:
        if layer != self._layer:
            assert self._layer == -1, "the layer before was not released"
            self._offset = self._clock.visit(layer, last_use.values())
            self._layer = layer
            self._guesses.learn(layer, last_use)
            self._let_go([(layer, expert) for expert in last_use])
        self._requested = last_use
        self._clock.newest = max(self._clock.newest, max(last_use.values()) + self._offset)
        new = [expert for expert in last_use if expert not in self._last_use]
        self._last_use |= {expert: position + self._offset for expert, position in last_use.items()}
        if new:  # a token alone uses so many, all at one position
            is_one = len(last_use) == self._n_used and len({*last_use.values()}) == 1
            self._working_set.use(layer, new, self._last_use[new[-1]], counts=is_one)
        unheld = [expert for expert in last_use if expert not in self._held and expert not in self._missing]
        absent = dict.fromkeys(expert for expert in unheld if not self._hold(expert))
        n_early = sum((layer, expert) in self._read_ahead for expert in new if expert not in absent)
        self.counters.misses += len(absent) + n_early
        self.counters.hits += sum(expert not in absent for expert in new) - n_early
        if absent:
            self._missing |= absent
            self._claim()
            return None
        return self._held if all(self._is_here(expert) for expert in last_use) else None

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        if self._missing or self._slots.n_slots < _LEAST_LAYERS_FOR_GUESSES * self._n_used:
            return
        here, absent = list[Key](), list[Key]()
        for expert in experts:
            (here if (layer, expert) in self._slots else absent).append((layer, expert))
        if not self._guesses.make(layer, [expert for _, expert in absent]):
            return
        for key in here:  # or what is read would take their slots
            self._kept[key] = self._slots.last_use(key)
            self._slots.hold(key)
        for key in absent:
            if self._read(key) is not None:
                self._kept[key] = self._clock.newest
                self._read_ahead.add(key)

    def _let_go(self, wanted: Sequence[Key] = ()) -> None:
        """Of the experts that were kept for guesses, hold those that are wanted."""
        for key, step in self._kept.items():
            if key not in wanted:
                self._slots.release(key, step)
        self._read_ahead &= {*wanted}
        self._kept.clear()

    def waves(self, layer: int, last_use: Mapping[int, int]) -> Iterator[Mapping[int, int]]:
        if last_use is not self._requested:
            self.request(layer, last_use)
        waiting = dict.fromkeys(last_use)
        while waiting:
            if self._missing:
                self._make_room(waiting)
            here = {expert: slot for expert, slot in self._held.items() if expert in waiting and self._is_here(expert)}
            if here:
                yield here
            else:
                self._wait(next(expert for expert in waiting if expert in self._held))
            for expert in here:
                del waiting[expert]

    def release(self) -> None:
        for expert in self._held:
            self._slots.release((self._layer, expert), self._last_use[expert])
        self._held.clear()
        self._missing.clear()
        self._last_use.clear()
        self._layer, self._requested = -1, None

    def _hold(self, expert: int) -> bool:
        """Keep an expert that has a slot, though it may still be on its way. A read that failed counts as none."""
        key = self._layer, expert
        slot = self._slots.hold(key)
        if slot is None:
            return False
        if key in self._reads and any(read.is_useless for read in self._reads[key]):
            self._slots.forget(key)
            self._abandon(key, slot)
            return False
        self._held[expert] = slot
        return True

    def _claim(self) -> None:
        """Slots for the missing, and reads into them, as long as others can give way."""
        for expert in [*self._missing]:
            slot = self._read((self._layer, expert))
            if slot is None:
                return
            self._held[expert] = slot
            del self._missing[expert]

    def _read(self, key: Key) -> int | None:
        """A slot for an expert that is not here, held, into which it is read. None where none gives way."""
        claimed = self._slots.claim(key, self._clock.newest)
        if claimed is None:
            return None
        slot, victim = claimed
        if victim is not None and victim in self._reads:
            self._abandon(victim, slot)
        try:
            self._settle(slot)
        except BaseException:
            self._slots.forget(key)
            raise
        self._reads[key] = [self._start(matrix, key[1], slot) for matrix in self.shape.layers[key[0]]]
        return slot

    def _settle(self, slot: int) -> None:
        """Until no reader writes into the slot any more."""
        if slot not in self._unsettled:
            return
        start = time.perf_counter()
        try:
            for read in self._unsettled[slot]:
                read.settle(self._is_cancelled)
        finally:
            self.counters.waited_s += time.perf_counter() - start
        del self._unsettled[slot]

    def _abandon(self, key: Key, slot: int) -> None:
        reads = self._reads.pop(key)
        for read in reads:
            read.abandoned = True
        self._unsettled[slot] = [*self._unsettled.get(slot, ()), *reads]

    def _start(self, matrix: ExpertMatrix, expert: int, slot: int) -> Read:
        offset, n_bytes = aligned_range(matrix.offset(expert), matrix.expert_bytes)
        read = Read(self._files[matrix.piece.part], offset, n_bytes,
                    self._base + slot * self.shape.slot_bytes + matrix.slot_offset,
                    matrix.offset(expert) - offset - matrix.shift)
        self._readers.submit(read)
        return read

    def _make_room(self, waiting: Mapping[int, None]) -> None:
        """Some experts found no slot: those that have been computed give theirs."""
        for expert in [expert for expert in self._held if expert not in waiting]:
            self._slots.release((self._layer, expert), self._last_use[expert])
            del self._held[expert]
        self._claim()

    def _is_here(self, expert: int) -> bool:
        if not self._reads:
            return True
        key = self._layer, expert
        reads = self._reads.get(key)
        if reads is None:
            return True
        if not all(read.done.is_set() and not read.is_useless for read in reads):
            return False
        del self._reads[key]
        return True

    def _wait(self, expert: int) -> None:
        """Until the expert is here; what failed is raised."""
        start = time.perf_counter()
        try:
            with self._trace.span(f"wait expert {self._layer}.{expert}", "wait"):
                for read in self._reads[self._layer, expert]:
                    read.wait(self._is_cancelled)
        finally:
            self.counters.waited_s += time.perf_counter() - start

    def close(self, memory: object) -> bool:
        """End the readers, as `Readers.close`."""
        if not self._readers.close(memory):
            return False
        self._context.close()
        return True


class _Clock:
    """Positions of tokens, made to go on where a sequence begins anew or goes back."""

    def __init__(self) -> None:
        self._layer, self._offset, self.newest = -1, 0, -1

    def visit(self, layer: int, positions: Iterable[int]) -> int:
        """A layer is visited; a pass over the model has begun when it is not behind the last. What to add to the
        positions."""
        if layer <= self._layer:
            self._offset = max(self._offset, self.newest + 1 - min(positions))
        self._layer = layer
        return self._offset
