"""A KV cache of which a step attends to a part: the whole text in a cold tier, a set of tokens in the hot buffer.

Up to `from_tokens` it is a dense cache, with a dense cache's results. Beyond, `select` says which tokens the next step
needs and `bring` has them in the hot buffer. What a step shows of its attention goes into the next set, which
`look_ahead` plans and begins to fetch before the step has ended: the plan depends on no layer beyond the last that is
observed or gives features. What the sampled token repeats brings only a few more, for which the step waits. So a set
depends on the text alone, and not on how fast a disk is.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Hyperparameters
from edgert.cpu import usable_cores
from edgert.engine.batch import Batch
from edgert.engine.kv_cache import DenseKVCache, KVGraph
from edgert.errors import ContextOverflow, KVStoreError
from edgert.ggml.backend import Backend, Cancelled
from edgert.ggml.graph import Context, Tensor
from retrieval.choosing import Chooser, observed_layers
from retrieval.cold import ColdTier, DenseTier, Fetch
from retrieval.graph import Observation
from retrieval.hot import HotKVCache, slots_for
from retrieval.masked import MaskedKVCache
from retrieval.records import Records
from retrieval.repeats import following, repeats
from retrieval.selection import Merits, Policy, Selection, Survivors
from retrieval.selectors import PAGE_TOKENS, Halves, Selector
from retrieval.staged import LayerFile, StagedKVCache, from_records, in_blocks, record_blocks, to_records
from retrieval.store import DiskTier
from retrieval.workers import Workers, wait_for

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]
# Before a text is too long to be attended whole: so many of its last steps write what the disk is to hold, and the last
# few are observed and bring tokens into the hot buffer.
APPROACH_TOKENS, APPROACH_SETS = 128, 4


@dataclass(slots=True)
class Counts:
    """Of all steps that attended to a set."""

    n_steps: int = 0
    n_whole: int = 0  # steps that looked at everything
    n_selected: int = 0
    n_fetched: int = 0
    n_late: int = 0  # were not there when the step's first layer was to begin
    n_reads: int = 0
    read_bytes: int = 0
    select_s: float = 0.0
    fetch_s: float = 0.0
    aside_s: float = 0.0  # choosing beside the step before


@dataclass(frozen=True, slots=True)
class Plan:
    """What the step of the tokens from `start` to `end` lets know of the one after it: the `positions` that come beside
    the step, who survives, and what is known of `end` tokens. Where only some of them stay, that is None."""

    start: int
    end: int
    positions: Positions
    survivors: Survivors
    known: Merits | None


class RetrievedKVCache:
    """Composes the tiers. Its seam is that of the dense part; `hot` and `whole` have seams of their own."""

    def __init__(self, backend: Backend, hp: Hyperparameters, dense: DenseKVCache, selector: Selector, policy: Policy,
                 from_tokens: int, *, context_length: int | None = None, disk: DiskTier | None = None) -> None:
        """Without `disk`, the dense cache holds the whole context and is the cold tier. With it, the dense cache holds
        `from_tokens`, and is given back when the text becomes longer."""
        n_slots = slots_for(policy)
        observed = self._observed_layers = selector.key_layers or observed_layers(hp)
        self.context_length = context_length or dense.context_length
        self.from_tokens = max(from_tokens, policy.budget)
        if self.from_tokens > dense.context_length and disk is not None:
            raise AssertionError(f"{self.from_tokens} tokens stay in memory, which holds {dense.context_length}")
        self.chooser, self.counts = Chooser(selector, policy, can_look_around=disk is None), Counts()
        self.dense, self.disk, self._backend, self._hp = dense, disk, backend, hp
        self._near = DenseTier(dense)
        self.whole = MaskedKVCache(dense, hp, observed) if disk is None else None
        self.hot = HotKVCache(backend, hp, self.context_length, n_slots, observed)
        self.cold: ColdTier = self._near if disk is None else disk
        self.length = 0
        self.token_ids = array("i")  # of the text, as far as whoever feeds it says
        self.n_attended: int | None = None  # by the last step, its own tokens apart; None for all of them
        self._aside, self._ahead = Workers(1, "kv-ahead"), list[Future[None]]()
        self._plans: list[Plan] = []  # made in the last two steps; one may be taken again
        self._coming: list[tuple[Positions, Fetch]] = []  # beside the step
        self._repeated: Floats | None = None  # by the step
        self._early: Positions = np.zeros(0, np.int64)  # what began to come with it
        self._has_spare_core = backend.n_threads < usable_cores()

    def begin(self) -> None:
        """A request begins: what the one before has shown is no longer used, so that an answer depends on the text
        alone, and not on whether it went on or was brought back from disk."""
        self._settle()
        self._plans = []
        self.chooser.forget()
        self.hot.truncate(0)

    @property
    def selector(self) -> Selector:
        return self.chooser.selector

    @property
    def policy(self) -> Policy:
        return self.chooser.policy

    # -- a step --------------------------------------------------------------------------------------------------
    def select(self, batch: Batch) -> Selection | None:
        """The set for this step; None where it should look at everything."""
        chooser = self.chooser
        self._repeated = self._repeats(batch, 1)
        wait_for(self._ahead)
        plan = next((one for one in self._plans[::-1] if one.start < batch.start <= one.end), None)
        known = plan.known if plan and plan.end == batch.start else None
        if known is None:
            known = chooser.known(batch.start, chooser.survivors)
        return chooser.trusted(chooser.choose(known, self._repeated, plan.positions if plan else None))

    def _repeats(self, batch: Batch, n_read: int) -> Floats | None:
        """What the batch's token repeats that so many are read with; None where somebody has not said all before."""
        if len(self.token_ids) < batch.start:
            return None
        ids = np.array(self.token_ids, np.int32)[:batch.start]
        if n_read > 1:
            ids = np.append(ids, batch.token_ids[:n_read - 1])
        return repeats(ids, int(batch.token_ids[n_read - 1]))

    @property
    def foresight_layers(self) -> frozenset[int] | None:
        """Layers with features such that, behind the last of them, the next set can be planned. None where that takes
        the last layer."""
        last = max(self._observed_layers)
        layers = self.feature_layers
        if last >= self._hp.n_layers - 1:
            return None
        return layers if max(layers, default=-1) >= last else layers | {last}

    def look_early(self, chosen: Selection) -> None:
        """A step over `chosen` begins: begin to fetch what would have come too, were more exchanged."""
        self._early = chosen.next_best
        if self.disk is not None:  # what lies in memory is as soon there when it is wanted
            self._fetch_beside(self._early)

    def look_ahead(self, batch: Batch, chosen: Selection, streams: Sequence[Floats]) -> None:
        """It is computed as far as `foresight_layers`, and these are the features: plan the next one's set, and begin
        to fetch what it lacks. A thread beside the step does that where a core is left for it, and has cache and
        selector for itself until it has ended: where there is none, ggml's threads would wait for the one whose core it
        takes (SmolLM2 at 8k, two threads on two cores: 12.8 ms a step instead of 11.9)."""
        work = partial(self._plan, batch, chosen, streams)
        if self._has_spare_core:
            self._ahead = [self._aside.submit(work)]
        else:
            work()

    def _plan(self, batch: Batch, chosen: Selection, streams: Sequence[Floats]) -> None:
        begin_s = perf_counter()
        self.take(batch, streams)
        survivors, positions = self._seen_of_a_step(batch, chosen), self._early
        known = self.chooser.known(batch.end, survivors)
        if known is not None:
            repeated = self._repeated if batch.n_tokens == 1 else self._repeats(batch, batch.n_tokens)
            expected = None if repeated is None else following(repeated)
            likely = self.chooser.plan(known, expected, np.concatenate([positions, chosen.positions]))
            self._fetch_beside(likely)
            positions = np.concatenate([positions, likely])
        plan = Plan(batch.start, batch.end, positions, survivors, known)
        self._plans = [*[old for old in self._plans if old.start != plan.start][-1:], plan]
        self.counts.aside_s += perf_counter() - begin_s

    def _fetch_beside(self, likely: Positions) -> None:
        missing, slots = self.hot.look_ahead(likely)
        if len(missing):
            self._coming.append((missing, self._start_fetch(slots, missing)))

    def _plan_of(self, start: int) -> Plan | None:
        """What the step from `start` on has let know."""
        wait_for(self._ahead)
        return next((plan for plan in self._plans if plan.start == start), None)

    def bring(self, chosen: Selection, batch: Batch) -> None:
        """Have the set in the hot buffer, by exchanging what differs from the one before."""
        n_late = self._settle(needs=True)
        self._spill(batch.start)
        assignment = self.hot.prepare(chosen.positions, batch)
        try:
            self._start_fetch(assignment.missing_slots, assignment.missing).wait()
        except BaseException:
            self.hot.slots.drop(assignment.missing)
            raise
        in_window = self.hot.missing_in_ring(batch.start)
        if self.hot.ring is not None and len(in_window):
            self.cold.fetch(self.hot.ring, in_window % self.hot.ring.n_rows, in_window)
            self.hot.fill_ring(in_window)
        self.n_attended = len(chosen.positions)
        self.counts.n_late += len(assignment.missing) + n_late

    def _start_fetch(self, slots: Positions, positions: Positions) -> Fetch:
        fetch = self.cold.start_fetch(self.hot.records, slots, positions)
        self.counts.n_fetched += len(positions)
        self.counts.n_reads += fetch.n_reads
        self.counts.read_bytes += fetch.read_bytes
        return fetch

    def _settle(self, *, needs: bool = False) -> int:
        """Nothing is on its way any more: how many rows were. What did not come has no slot; with `needs`, raises
        why."""
        wait_for(self._ahead)
        coming, self._coming = self._coming, []
        n_to_come = sum(fetch.n_to_come for _, fetch in coming)
        problem: BaseException | None = None
        for missing, fetch in coming:
            try:
                fetch.wait()
            except BaseException as error:
                self.hot.slots.drop(missing)
                problem = error
        if problem is not None and (needs or not isinstance(problem, (KVStoreError, Cancelled))):
            raise problem
        return n_to_come

    def commit_step(self, batch: Batch, chosen: Selection | None) -> None:
        """The step was computed, over the hot buffer or, without a set, over everything."""
        if chosen is None:
            assert self.whole is not None  # `select` gave no set
            self.commit(batch)
            self._see_everything(batch.end, self.whole.observations())
            self.chooser.looked_around()
            self.n_attended = None
            self.counts.n_whole += 1
            return
        plan = self._plan_of(batch.start)
        new = np.arange(batch.start, batch.end, dtype=np.int64)
        self.cold.keep(self.hot.records, self.hot.slots.where(new), new)
        if self.hot.ring is not None:
            self.cold.keep(self.hot.ring, new % self.hot.ring.n_rows, new)
        self.hot.commit(batch)
        if self.disk is None:
            self.dense.commit(batch)
        self._show_keys(new, self.hot.slots.where(new))
        self.length = batch.end
        self.chooser.survivors = plan.survivors if plan else self._seen_of_a_step(batch, chosen)
        self.chooser.held = chosen.positions
        self.counts.n_steps += 1
        self.counts.n_selected += len(chosen.positions)

    def _seen_of_a_step(self, batch: Batch, chosen: Selection) -> Survivors:
        positions = np.concatenate([chosen.positions, np.arange(batch.start, batch.end, dtype=np.int64)])
        return self.chooser.surviving(positions, self.hot.slots.where(positions), self.hot.observations())

    def _see_everything(self, end: int, observations: Sequence[Observation]) -> None:
        positions = np.arange(end, dtype=np.int64)
        self.chooser.survivors, self.chooser.held = self.chooser.surviving(positions, positions, observations), None

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
        self._keep_cold(end)
        self.dense.truncate(0)
        self.dense.give_back()

    def _keep_cold(self, end: int) -> None:
        """The first `end` tokens, which the dense cache holds, are in the cold tier too."""
        with record_blocks(self._backend, self._hp) as blocks:
            for records, first, n in in_blocks(blocks, self.cold.n_tokens, end):
                self._near.fetch(records, np.arange(n, dtype=np.int64), np.arange(first, first + n, dtype=np.int64))
                self.cold.write_through(records, first, n)

    def approach(self, end: int, *, at_once: bool) -> None:
        """A text of `end` tokens, attended whole, will soon be longer than that: bring what the first step over a set
        needs where it needs it, some with each step, so that none takes much longer than the others."""
        n_left = self.from_tokens - end
        if n_left >= APPROACH_TOKENS or self.context_length <= self.from_tokens:
            return
        if self.disk is not None:
            n = end - self.cold.n_tokens
            self._keep_cold(self.cold.n_tokens + (n if at_once else -(-n // (n_left + 1))))
        if n_left < APPROACH_SETS:
            self._settle()
            likely = self.chooser.choose(self.chooser.known(end, self.chooser.survivors), None, None)
            if likely is not None:
                self._ahead = [self._aside.submit(partial(self._bring_near, likely.positions))]

    def _bring_near(self, likely: Positions) -> None:
        """Beside a step that attends to everything: have what one over a set would attend to in the hot buffer."""
        missing, slots = self.hot.look_ahead(likely)
        self._near.fetch(self.hot.records, slots, missing)

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
        self._settle()
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
            self._see_everything(end, observations)

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
            self._settle()
            self.hot.truncate(n_tokens)
            self.cold.truncate(n_tokens)
            self.chooser.truncate(n_tokens)
            self._plans = [replace(plan, end=n_tokens, known=None) if plan.end > n_tokens else plan
                           for plan in self._plans if plan.start < n_tokens]
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
        is_quiet = self._aside.close()
        if self.cold.close() and is_quiet:
            self.hot.close()
        self.dense.close()
