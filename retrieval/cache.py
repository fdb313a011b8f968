"""A KV cache of which a step attends to a part: the whole text in a cold tier, a set of tokens in the hot buffer.

Up to `from_tokens` it is a dense cache, with a dense cache's results. Beyond, the planner says which tokens the next
step needs (retrieval/planning.py), and `bring` has them in the hot buffer (retrieval/exchange.py). Here is where
tokens lie, and how they move between the tiers.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgert.architectures.base import Hyperparameters
from edgert.cpu import usable_cores
from edgert.engine.batch import Batch
from edgert.engine.kv_cache import DenseKVCache, KVGraph
from edgert.errors import ContextOverflow
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Tensor
from retrieval.arrays import Floats, Halves, Positions
from retrieval.choosing import Chooser, observed_layers
from retrieval.cold import ColdTier, DenseTier
from retrieval.counts import Counts
from retrieval.exchange import Exchange
from retrieval.hot import HotKVCache, slots_for
from retrieval.masked import MaskedKVCache
from retrieval.planning import Planner
from retrieval.records import Records
from retrieval.selection import Policy, Selection
from retrieval.selectors import PAGE_TOKENS, Selector
from retrieval.staged import LayerFile, StagedKVCache, from_records, in_blocks, record_blocks, to_records
from retrieval.store import DiskTier

# Before a text is too long to be attended whole: so many of its last steps write what the disk is to hold, and the last
# few are observed and bring tokens into the hot buffer, a MiB each at most, for a first touch of 2 MiB can take the
# system 5 ms. As many steps beyond it give back what the text had in memory.
APPROACH_TOKENS, APPROACH_SETS = 128, 16


class RetrievedKVCache:
    """Composes the tiers. Its seam is that of the dense part; `hot` and `whole` have seams of their own."""

    def __init__(self, backend: Backend, hp: Hyperparameters, dense: DenseKVCache, selector: Selector, policy: Policy,
                 from_tokens: int, *, context_length: int | None = None, disk: DiskTier | None = None) -> None:
        """Without `disk`, the dense cache holds the whole context and is the cold tier. With it, the dense cache holds
        `from_tokens`, and is given back when the text becomes longer."""
        n_slots = slots_for(policy)
        observed = self._observed_layers = selector.key_layers or observed_layers(hp)
        self.context_length = context_length or dense.context_length
        self.from_tokens = min(self.context_length, max(from_tokens, policy.budget))
        if self.from_tokens > dense.context_length and disk is not None:
            raise AssertionError(f"{self.from_tokens} tokens stay in memory, which holds {dense.context_length}")
        self.chooser, self.counts = Chooser(selector, policy, can_look_around=disk is None), Counts()
        self.dense, self.disk, self._backend, self._hp = dense, disk, backend, hp
        self._near = DenseTier(dense)
        self.whole = MaskedKVCache(dense, hp, observed) if disk is None else None
        self.hot = HotKVCache(backend, hp, self.context_length, n_slots, observed)
        self.cold: ColdTier = self._near if disk is None else disk
        self.length = 0
        self.approximate_from = self.context_length  # tokens from here on have followed a step over a set
        self._n_given_back = hp.n_layers  # of the dense cache, since a text has left it
        self.token_ids = array("i")  # of the text, as far as whoever feeds it says
        self.n_attended: int | None = None  # by the last step, its own tokens apart; None for all of them
        self._exchange = Exchange(self.hot, self.cold, self.counts)
        self.planner = Planner(self.chooser, self.hot, self._exchange, self.token_ids, self.counts,
                               has_spare_core=backend.n_threads < usable_cores())

    def begin(self) -> None:
        """A request begins: what the one before has shown is no longer used, so that an answer depends on the text
        alone, and not on whether it went on or was brought back from disk."""
        self.planner.forget()
        self.hot.truncate(0)

    @property
    def selector(self) -> Selector:
        return self.chooser.selector

    @property
    def policy(self) -> Policy:
        return self.chooser.policy

    # -- a step --------------------------------------------------------------------------------------------------
    @property
    def foresight_layers(self) -> frozenset[int] | None:
        """Layers with features such that, behind the last of them, the next set can be planned. None where that takes
        the last layer."""
        last = max(self._observed_layers)
        layers = self.feature_layers
        if last >= self._hp.n_layers - 1:
            return None
        return layers if max(layers, default=-1) >= last else layers | {last}

    def bring(self, chosen: Selection, batch: Batch) -> None:
        """Have the set in the hot buffer, by exchanging what differs from the one before."""
        n_late = self.planner.settle(needs=True)
        self._spill(batch.start)
        self.counts.n_late += n_late + self._exchange.bring(chosen.positions, batch)
        self.n_attended = len(chosen.positions)

    def commit_step(self, batch: Batch, chosen: Selection | None) -> None:
        """The step was computed, over the hot buffer or, without a set, over everything."""
        if chosen is None:
            assert self.whole is not None  # `select` gave no set
            self.commit(batch)
            self.chooser.saw_everything(batch.end, self.whole.observations())
            self.chooser.looked_around()
            self.n_attended = None
            self.counts.n_whole += 1
            return
        self.planner.wait()
        new = np.arange(batch.start, batch.end, dtype=np.int64)
        self.cold.keep(self.hot.records, self.hot.slots.where(new), new)
        if self.hot.ring is not None:
            self.cold.keep(self.hot.ring, new % self.hot.ring.n_rows, new)
        self.hot.commit(batch)
        if self.disk is None:
            self.dense.commit(batch)
        self._show_keys_in(self.hot.records, self.hot.slots.where(new), batch.start)
        self.length, self.approximate_from = batch.end, min(self.approximate_from, batch.start)
        self.planner.commit(batch, chosen)
        self._give_back_dense(-(-self._hp.n_layers // APPROACH_SETS))
        self.counts.n_steps += 1
        self.counts.n_selected += len(chosen.positions)

    def _show_keys_in(self, records: Records, rows: Positions, start: int) -> None:
        """A selector sees the keys of the tokens from `start` on, which lie in these rows."""
        values, layers = records.values(), records.shape.layers
        self.show_keys(start, {layer: values[rows, layers.index(layer), 0]
                               for layer in self.selector.key_layers if layer in layers})

    def show_keys(self, start: int, keys: dict[int, Halves]) -> None:
        """A selector sees the keys (n, kv_size) of tokens from `start` on, of some of its layers."""
        if keys:
            self.selector.add_keys(start, {layer: rows.reshape(len(rows), -1, self._hp.head_dim)
                                           for layer, rows in keys.items()})

    # -- between the tiers ---------------------------------------------------------------------------------------
    def _spill(self, end: int) -> None:
        """Keep in the cold tier what only the dense cache holds, and leave that."""
        self.cold.truncate(end)  # a step that was stopped after its token was kept
        if self.disk is None:
            return
        if self.cold.n_tokens < end:
            self._copy(self._near, self.cold, self.cold.n_tokens, end)
        if self.dense.length:
            self.dense.truncate(0)
            self._n_given_back = 0

    def _give_back_dense(self, n_layers: int) -> None:
        """Let the system have the memory of so many more layers of a dense cache that the text has left."""
        layers = slice(self._n_given_back, self._n_given_back + n_layers)
        self._n_given_back = min(self._hp.n_layers, layers.stop)
        self.dense.give_back_layers(layers)

    def _copy(self, source: ColdTier, target: ColdTier, start: int, end: int) -> None:
        """The tokens from `start` to `end` are in the other tier too."""
        with record_blocks(self._backend, self._hp) as blocks:
            for records, first, n in in_blocks(blocks, start, end):
                source.fetch(records, np.arange(n, dtype=np.int64), np.arange(first, first + n, dtype=np.int64))
                target.write_through(records, first, n)

    def approach(self, end: int, *, at_once: bool) -> None:
        """A text of `end` tokens, attended whole, will soon be longer than that: bring what the first step over a set
        needs where it needs it, some with each step, so that none takes much longer than the others."""
        n_left = self.from_tokens - end
        if n_left >= APPROACH_TOKENS or self.context_length <= self.from_tokens:
            return
        if self.disk is not None:
            start = self.cold.n_tokens
            n = end - start if at_once else -(-(end - start) // (n_left + 1))
            self._copy(self._near, self.cold, start, start + n)
        if n_left < APPROACH_SETS:
            self.planner.approach(end, n_left + 1, self._near)

    def gather(self, end: int) -> None:
        """Have the first `end` tokens in the dense cache, which has room for them."""
        if self.dense.length < end:
            self._copy(self.cold, self._near, self.dense.length, end)
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
            self._show_keys_in(records, np.arange(n), first)
        self.length = first + n
        if is_near:
            self.dense.length = first + n

    @contextmanager
    def staging(self, directory: Path, start: int, end: int) -> Iterator[StagedKVCache]:
        """A cache for a prompt from `start` to `end`, one layer at a time. Its tokens are kept once the block ends."""
        assert self.disk is not None
        self.planner.settle()
        self._spill(start)
        self._n_given_back = 0  # also where a text was forgotten that it had held
        self._give_back_dense(self._hp.n_layers)
        file = LayerFile(directory, self._hp, end, self.disk.lacking_bytes(end))
        with record_blocks(self._backend, self._hp) as blocks, closing(file):
            from_records(file, self.cold, blocks, start)
            with closing(StagedKVCache(self._backend, self._hp, end, file, self._staged_keys,
                                       self._observed_layers)) as staged:
                yield staged
                observations = staged.observations
            to_records(file, self.cold, blocks, start, end)
        self.length, self.n_attended = end, None
        if observations:
            self.chooser.saw_everything(end, observations)

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
            self.planner.settle()
            self.hot.truncate(n_tokens)
            self.cold.truncate(n_tokens)
            self.planner.truncate(n_tokens)
            self._show_page_again(n_tokens)
        self.dense.truncate(n_tokens)
        self.length = min(self.length, n_tokens)
        if n_tokens <= self.approximate_from:
            self.approximate_from = self.context_length

    def _show_page_again(self, end: int) -> None:
        """Of the page that forgotten tokens were in, a selector has seen their keys too."""
        start = end // PAGE_TOKENS * PAGE_TOKENS
        if start == end or not self.selector.key_layers:
            return
        positions = np.arange(start, end, dtype=np.int64)
        slots = self.hot.slots.where(positions)
        if (slots >= 0).all():
            self._show_keys_in(self.hot.records, slots, start)
            return
        with record_blocks(self._backend, self._hp) as blocks:
            rows = np.arange(end - start, dtype=np.int64)
            self.holder().fetch(blocks[0], rows, positions)
            self._show_keys_in(blocks[0], rows, start)

    def give_back(self) -> None:
        self.dense.give_back()

    def close(self) -> None:
        is_quiet = self.planner.close()
        if self.cold.close() and is_quiet:
            self.hot.close()
        self.dense.close()
