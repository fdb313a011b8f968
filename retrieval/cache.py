"""A KV cache of which a step attends to a part: the whole text in a cold tier, a set of tokens in the hot buffer.

Up to `from_tokens` it is a dense cache, with a dense cache's results. Beyond, `select` says which tokens the next step
needs and `bring` has them in the hot buffer; what the step has shown of its attention goes into the next set.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Hyperparameters
from edgert.engine.batch import Batch
from edgert.engine.kv_cache import DenseKVCache, KVGraph
from edgert.errors import ContextOverflow
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Tensor
from retrieval.cold import ColdTier, DenseTier
from retrieval.graph import Observation
from retrieval.hot import HotKVCache, slots_for
from retrieval.masked import MaskedKVCache
from retrieval.records import Records
from retrieval.repeats import repeats
from retrieval.selection import Policy, Selection, Survivors, select
from retrieval.selectors import PAGE_TOKENS, Halves, Selector
from retrieval.staged import LayerFile, StagedKVCache, from_records, in_blocks, record_blocks, to_records
from retrieval.store import DiskTier

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]
_N_PAGED, _N_OBSERVED = 3, 6  # layers; three cost 1 % of a step
# A step that looks at everything costs a dense step, four or five others at 8k tokens: at most one of so many.
_FULL_EVERY = 64


def page_layers(hp: Hyperparameters) -> frozenset[int]:
    """Where pages of keys are bounded, and observed: a few of the layers that see everything, evenly spread."""
    full = [layer for layer in range(hp.n_layers) if layer not in hp.window_layers]
    n = min(_N_PAGED, len(full))
    return frozenset(full[(2 * i + 1) * len(full) // (2 * n)] for i in range(n))


def observed_layers(hp: Hyperparameters) -> frozenset[int]:
    """What is observed beside a head: every other one of the late layers that see everything, but not the last,
    behind which nothing can be prepared.

    Late ones say best what is still needed. (SmolLM2 at 4k, a set of 256, four texts: the KL on prose is 0.080 with the
    last six, or six of the last twelve; 0.083 with the last ten, 0.088 with all, 0.098 with the ten in the middle, 0.10
    with six of all, 0.128 with the first ten.)
    """
    full = [layer for layer in range(hp.n_layers) if layer not in hp.window_layers]
    return frozenset(([layer for layer in full if layer < hp.n_layers - 1] or full)[::-2][:_N_OBSERVED])


@dataclass(slots=True)
class Counts:
    """Of all steps that attended to a set."""

    n_steps: int = 0
    n_whole: int = 0  # steps that looked at everything
    n_selected: int = 0
    n_fetched: int = 0
    n_reads: int = 0
    read_bytes: int = 0
    select_s: float = 0.0
    fetch_s: float = 0.0


class RetrievedKVCache:
    """Composes the tiers. Its seam is that of the dense part; `hot` and `whole` have seams of their own."""

    def __init__(self, backend: Backend, hp: Hyperparameters, dense: DenseKVCache, selector: Selector, policy: Policy,
                 from_tokens: int, *, context_length: int | None = None, disk: DiskTier | None = None) -> None:
        """Without `disk`, the dense cache holds the whole context and is the cold tier. With it, the dense cache holds
        `from_tokens`, and is given back when the text becomes longer."""
        n_slots = slots_for(max(policy.budget, policy.most))
        observed = self._observed_layers = selector.key_layers or observed_layers(hp)
        self.context_length = context_length or dense.context_length
        self.from_tokens = max(from_tokens, policy.budget)
        if self.from_tokens > dense.context_length and disk is not None:
            raise AssertionError(f"{self.from_tokens} tokens stay in memory, which holds {dense.context_length}")
        self.selector, self.policy, self.counts = selector, policy, Counts()
        self.dense, self.disk, self._backend, self._hp = dense, disk, backend, hp
        self._near = DenseTier(dense)
        self.whole = MaskedKVCache(dense, hp, observed) if disk is None else None
        self.hot = HotKVCache(backend, hp, self.context_length, n_slots, observed)
        self.cold: ColdTier = self._near if disk is None else disk
        self.length = 0
        self.token_ids = array("i")  # of the text, as far as whoever feeds it says
        self._survivors: Survivors | None = None
        self.n_attended: int | None = None  # by the last step, its own tokens apart; None for all of them
        self._n_since_whole = _FULL_EVERY

    def begin(self) -> None:
        """A request begins: what the one before has shown is no longer used, so that an answer depends on the text
        alone, and not on whether it went on or was brought back from disk."""
        self._survivors, self._n_since_whole = None, _FULL_EVERY
        self.hot.truncate(0)

    # -- choosing ------------------------------------------------------------------------------------------------
    def select(self, batch: Batch) -> Selection | None:
        """The set for this step; None where it should look at everything."""
        scores = self.selector.scores(batch.start)
        self._n_since_whole += 1
        if scores is None and self.whole is not None:
            return None
        scores = np.zeros(batch.start, np.float32) if scores is None else scores
        ids = np.array(self.token_ids, np.int32)[:batch.start]
        repeated = repeats(ids, int(batch.token_ids[0])) if len(ids) == batch.start else None
        chosen = select(scores, self._survivors, repeated, self.policy)
        looks_around = self.whole is not None and not chosen.is_sure and self._n_since_whole >= _FULL_EVERY
        return None if looks_around else chosen

    def bring(self, chosen: Selection, batch: Batch) -> None:
        """Have the set in the hot buffer, by exchanging what differs from the one before."""
        self._spill(batch.start)
        assignment = self.hot.prepare(chosen.positions, batch)
        before = (self.disk.n_reads, self.disk.read_bytes) if self.disk is not None else (0, 0)
        try:
            self.cold.fetch(self.hot.records, assignment.missing_slots, assignment.missing)
        except BaseException:
            self.hot.slots.drop(assignment.missing)
            raise
        in_window = self.hot.missing_in_ring(batch.start)
        if self.hot.ring is not None and len(in_window):
            self.cold.fetch(self.hot.ring, in_window % self.hot.ring.n_rows, in_window)
            self.hot.fill_ring(in_window)
        self.n_attended = len(chosen.positions)
        self.counts.n_fetched += len(assignment.missing)
        if self.disk is not None:
            self.counts.n_reads += self.disk.n_reads - before[0]
            self.counts.read_bytes += self.disk.read_bytes - before[1]

    def commit_step(self, batch: Batch, chosen: Selection | None) -> None:
        """The step was computed, over the hot buffer or, without a set, over everything."""
        if chosen is None:
            assert self.whole is not None  # `select` gave no set
            self.commit(batch)
            everything = np.arange(batch.end, dtype=np.int64)
            self._observed(everything, everything, self.whole.observations(), batch.end)
            self._n_since_whole, self.n_attended = 0, None
            self.counts.n_whole += 1
            return
        new = np.arange(batch.start, batch.end, dtype=np.int64)
        self.cold.keep(self.hot.records, self.hot.slots.where(new), new)
        if self.hot.ring is not None:
            self.cold.keep(self.hot.ring, new % self.hot.ring.n_rows, new)
        self.hot.commit(batch)
        if self.disk is None:
            self.dense.commit(batch)
        self._show_keys(new, self.hot.slots.where(new))
        self.length = batch.end
        positions = np.concatenate([chosen.positions, new])
        self._observed(positions, self.hot.slots.where(positions), self.hot.observations(), batch.end)
        self.counts.n_steps += 1
        self.counts.n_selected += len(chosen.positions)

    def _observed(self, positions: Positions, cells: Positions, observations: Sequence[Observation],
                  end: int) -> None:
        """Who got attention survives; where nothing was observed, what was selected does, all alike."""
        if observations:
            attention = np.mean([one.attention.mean(0) + one.attention.max(0) for one in observations], axis=0)[cells]
            self.selector.saw(end - 1, observations)
        else:
            attention = np.ones(len(positions), np.float32)
        n_most = 2 * self.policy.budget
        if len(positions) > n_most:
            best = np.sort(np.argpartition(attention, len(attention) - n_most)[-n_most:])
            positions, attention = positions[best], attention[best]
        self._survivors = Survivors(positions, attention.astype(np.float32))

    def _show_keys(self, positions: Positions, rows: Positions) -> None:
        """A selector sees the keys of new tokens, which lie in these rows of the hot buffer."""
        values, layers = self.hot.records.values(), self.hot.records.shape.layers
        self.show_keys(int(positions[0]), {layer: values[rows, layers.index(layer), 0]
                                           for layer in self.selector.key_layers})

    def show_keys(self, start: int, keys: dict[int, Halves]) -> None:
        """A selector sees the keys (n, kv_size) of tokens from `start` on, of some of its layers."""
        if keys:
            self.selector.add_keys(start, {layer: rows.reshape(len(rows), -1, self._hp.head_dim)
                                           for layer, rows in keys.items()})

    # -- between the tiers ---------------------------------------------------------------------------------------
    def _spill(self, end: int) -> None:
        """Keep in the cold tier what only the dense cache holds, and give its memory back."""
        if self.cold.n_tokens > end:
            self.cold.truncate(end)  # a step that was stopped after its token was kept
        if self.disk is None or self.cold.n_tokens == end:
            return
        start = self.cold.n_tokens
        with record_blocks(self._backend, self._hp) as blocks:
            for records, first, n in in_blocks(blocks, start, end):
                self._near.fetch(records, np.arange(n, dtype=np.int64), np.arange(first, first + n, dtype=np.int64))
                self.cold.write_through(records, first, n)
        self.dense.truncate(0)
        self.dense.give_back()

    def gather(self, end: int) -> None:
        """Have the first `end` tokens in the dense cache, which has room for them."""
        start = self.dense.length
        if start >= end:
            return
        with record_blocks(self._backend, self._hp) as blocks:
            for records, first, n in in_blocks(blocks, start, end):
                rows, positions = np.arange(n, dtype=np.int64), np.arange(first, first + n, dtype=np.int64)
                self.cold.fetch(records, rows, positions)
                self._near.keep(records, rows, positions)
        self.dense.length = end

    def holder(self) -> ColdTier:
        """Who has all tokens now."""
        if self.disk is None or self.dense.length == self.length:
            return self._near
        return self.cold

    def fill(self, blocks: Sequence[Records], first: int, n: int, n_tokens: int) -> None:
        """The next `n` tokens of a text of `n_tokens`, from `first` on, are in these blocks."""
        is_near = self.disk is None or n_tokens <= self.from_tokens
        for records in blocks:
            (self._near if is_near else self.cold).write_through(records, first, n)
            layers = records.shape.layers
            self.show_keys(first, {layer: records.values()[:n, layers.index(layer), 0]
                                   for layer in self.selector.key_layers if layer in layers})
        self.length = first + n
        if is_near:
            self.dense.length = first + n

    @contextmanager
    def staging(self, directory: Path, start: int, end: int) -> Iterator[StagedKVCache]:
        """A cache for a prompt from `start` to `end`, one layer at a time. Its tokens are kept once the block ends."""
        assert self.disk is not None
        self._spill(start)
        file = LayerFile(directory, self._hp, end)
        with record_blocks(self._backend, self._hp) as blocks, closing(file):
            from_records(file, self.cold, blocks, start)
            with closing(StagedKVCache(self._backend, self._hp, end, file, self._staged_keys,
                                       self._observed_layers)) as staged:
                yield staged
                observations = staged.observations
            to_records(file, self.cold, blocks, start, end)
        self.length, self.n_attended = end, None
        if observations:
            self._observed(np.arange(end, dtype=np.int64), np.arange(end, dtype=np.int64), observations, end)

    def _staged_keys(self, layer: int, start: int, keys: Halves) -> None:
        if layer in self.selector.key_layers:
            self.show_keys(start, {layer: keys})

    # -- features ------------------------------------------------------------------------------------------------
    @property
    def feature_layers(self) -> frozenset[int]:
        return self.selector.feature_layers or frozenset()

    def take(self, batch: Batch, streams: Sequence[Floats]) -> None:
        self.selector.add_features(batch.start, streams)

    # -- the seam ------------------------------------------------------------------------------------------------
    @property
    def k(self) -> Sequence[Tensor]:
        return self.dense.k

    @property
    def v(self) -> Sequence[Tensor]:
        return self.dense.v

    @property
    def resident_bytes(self) -> int:
        cold_bytes = 0 if self.disk is None else self.disk.resident_bytes
        return self.dense.resident_bytes + cold_bytes + self.hot.resident_bytes + self.selector.resident_bytes

    def bucket(self, batch: Batch) -> int:
        return self.dense.bucket(batch)

    def open(self, g: Context, n_tokens: int, n_cells: int) -> KVGraph:
        return self.dense.open(g, n_tokens, n_cells)

    def write(self, inputs: Any, batch: Batch) -> None:
        self.dense.write(inputs, batch)

    def lease(self, layer: int) -> AbstractContextManager[None]:
        return self.dense.lease(layer)

    def check_room(self, n_tokens: int, trained_length: int | None = None) -> None:
        if n_tokens > self.context_length:
            raise ContextOverflow(n_tokens, self.context_length, trained_length)

    def commit(self, batch: Batch) -> None:
        """A dense pass over the last of several batches has ended."""
        start = self.dense.length
        self.dense.commit(batch)
        self.length, self.n_attended = batch.end, None
        self.show_keys(start, {layer: self._near.keys(layer, start, batch.end) for layer in self.selector.key_layers})

    def truncate(self, n_tokens: int) -> None:
        if n_tokens < self.length:
            self.hot.truncate(n_tokens)
            self.cold.truncate(n_tokens)
            if self._survivors is not None:
                kept = self._survivors.positions < n_tokens
                self._survivors = Survivors(self._survivors.positions[kept], self._survivors.attention[kept])
            self._show_page_again(n_tokens)
        self.dense.truncate(n_tokens)
        self.length = min(self.length, n_tokens)

    def _show_page_again(self, end: int) -> None:
        """Of the page that forgotten tokens were in, a selector has seen their keys too."""
        start = end // PAGE_TOKENS * PAGE_TOKENS
        if start == end or not self.selector.key_layers:
            return
        positions = np.arange(start, end, dtype=np.int64)
        slots = self.hot.slots.where(positions)
        if (slots >= 0).all():
            self._show_keys(positions, slots)
            return
        with record_blocks(self._backend, self._hp) as blocks:
            records, layers = blocks[0], blocks[0].shape.layers
            self.holder().fetch(records, np.arange(end - start, dtype=np.int64), positions)
            self.show_keys(start, {layer: records.values()[:end - start, layers.index(layer), 0]
                                   for layer in self.selector.key_layers})

    def give_back(self) -> None:
        self.dense.give_back()

    def close(self) -> None:
        self.cold.close()
        self.hot.close()
        self.dense.close()
