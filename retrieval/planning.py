"""The set of each step, and the plan of the next one's, made while a step computes.

Once a step has shown its features and its attention, the next set is planned, and what it lacks comes beside the last
layers (`look_ahead`). What the sampled token repeats brings only a few more (`select`), for which the next step waits.
So a set depends on the text alone, and not on how fast a disk is. How tokens come is retrieval/exchange.py's business.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np

from edgert.engine.batch import Batch
from retrieval.arrays import Amounts, Floats, Positions
from retrieval.choosing import Chooser
from retrieval.cold import ColdTier
from retrieval.counts import Counts
from retrieval.exchange import Exchange
from retrieval.hot import HotKVCache
from retrieval.repeats import following, repeats
from retrieval.selection import Merits, Selection, Survivors
from retrieval.workers import Workers


@dataclass(frozen=True, slots=True)
class Plan:
    """What the step of the tokens from `start` to `end` lets know of the one after it: the `positions` that come beside
    the step, who survives, and what is known of `end` tokens. Where only some of them stay, that is None."""

    start: int
    end: int
    positions: Positions
    survivors: Survivors
    known: Merits | None


class Planner:
    """Asks the chooser before each step and, where the features are known early enough, during the one before it."""

    def __init__(self, chooser: Chooser, hot: HotKVCache, exchange: Exchange, token_ids: array[int], counts: Counts, *,
                 has_spare_core: bool) -> None:
        """`token_ids` are the text's, as far as whoever appends to them says. With `has_spare_core`, a thread plans
        beside the step."""
        self._chooser, self._hot, self._exchange, self._counts = chooser, hot, exchange, counts
        self._token_ids, self._has_spare_core = token_ids, has_spare_core
        self._aside, self._ahead = Workers(1, "kv-ahead"), list[Future[None]]()
        self._plans: list[Plan] = []  # made in the last two steps; one may be taken again
        self._repeated: Amounts | None = None  # by the step

    def forget(self) -> None:
        """A request begins."""
        self.settle()
        self._plans = []
        self._chooser.forget()

    # -- before a step -------------------------------------------------------------------------------------------
    def select(self, batch: Batch) -> Selection | None:
        """The set for this step; None where it should look at everything."""
        chooser = self._chooser
        self._repeated = self._repeats(batch, 1)
        self.wait()
        plan = next((one for one in self._plans[::-1] if one.start < batch.start <= one.end), None)
        known = plan.known if plan and plan.end == batch.start else None
        if known is None:
            known = chooser.known(batch.start, chooser.survivors)
        return chooser.trusted(chooser.choose(known, self._repeated, plan.positions if plan else None))

    def _repeats(self, batch: Batch, n_read: int) -> Amounts | None:
        """What the batch's token repeats that so many are read with; None where somebody has not said all before."""
        if len(self._token_ids) < batch.start:
            return None
        ids = np.array(self._token_ids, np.int32)[:batch.start]
        if n_read > 1:
            ids = np.append(ids, batch.token_ids[:n_read - 1])
        return repeats(ids, int(batch.token_ids[n_read - 1]))

    def wait(self) -> None:
        """Until nothing is planned any more: cache and selector are the caller's."""
        self._aside.wait(self._ahead)

    def settle(self, *, needs: bool = False) -> int:
        """Nothing is planned, nor on its way any more: how many rows were. With `needs`, raises why one did not
        come."""
        self.wait()
        return self._exchange.settle(needs=needs)

    # -- while it computes ---------------------------------------------------------------------------------------
    def look_ahead(self, batch: Batch, chosen: Selection, streams: Sequence[Floats]) -> None:
        """The step over `chosen` has shown its attention, and these features: plan the next one's set, and begin to
        fetch what it lacks. A thread beside the step does that where a core is left for it, and has cache and
        selector for itself until it has ended: where there is none, ggml's threads would wait for the one whose core it
        takes (SmolLM2 at 8k, two threads on two cores: 12.8 ms a step instead of 11.9)."""
        work = partial(self._plan, batch, chosen, streams)
        if self._has_spare_core:
            self._ahead = [self._aside.submit(work)]
        else:
            work()

    def _plan(self, batch: Batch, chosen: Selection, streams: Sequence[Floats]) -> None:
        begin_s = perf_counter()
        self._chooser.selector.add_features(batch.start, streams)
        survivors, likely = self._seen_of_a_step(batch, chosen), np.zeros(0, np.int64)
        known = self._chooser.known(batch.end, survivors)
        if known is not None:
            repeated = self._repeated if batch.n_tokens == 1 else self._repeats(batch, batch.n_tokens)
            expected = None if repeated is None else following(repeated)
            likely = self._chooser.plan(known, expected, chosen.positions)
            self._exchange.bring_beside(likely)
        plan = Plan(batch.start, batch.end, likely, survivors, known)
        self._plans = [*[old for old in self._plans if old.start != plan.start][-1:], plan]
        self._counts.aside_s += perf_counter() - begin_s

    def _seen_of_a_step(self, batch: Batch, chosen: Selection) -> Survivors:
        positions = np.concatenate([chosen.positions, np.arange(batch.start, batch.end, dtype=np.int64)])
        return self._chooser.surviving(positions, self._hot.slots.where(positions), self._hot.observations())

    # -- after it ------------------------------------------------------------------------------------------------
    def approach(self, end: int, n_steps: int, near: ColdTier) -> None:
        """Behind `end` tokens that were attended whole, so many steps before one over a set: bring a part of what that
        would attend to into the hot buffer, from the tier that has it in memory."""
        self.settle()
        likely = self._chooser.choose(self._chooser.known(end, self._chooser.survivors), None, None)
        if likely is not None:
            lacking = likely.positions[self._hot.slots.where(likely.positions) < 0]
            missing, slots = self._hot.look_ahead(lacking[:-(-len(lacking) // n_steps)])
            near.fetch(self._hot.records, slots, missing)

    def commit(self, batch: Batch, chosen: Selection) -> None:
        """The step over `chosen` was computed."""
        self.wait()
        plan = next((plan for plan in self._plans if plan.start == batch.start), None)
        self._chooser.survivors = plan.survivors if plan else self._seen_of_a_step(batch, chosen)
        self._chooser.held = chosen.positions

    def truncate(self, n_tokens: int) -> None:
        self._chooser.truncate(n_tokens)
        self._plans = [replace(plan, end=n_tokens, known=None) if plan.end > n_tokens else plan
                       for plan in self._plans if plan.start < n_tokens]

    def close(self) -> bool:
        """False where, past a deadline, something is still planned."""
        return self._aside.close()
