"""What the steps of an answer have shown, and the set that follows from it.

Knows the selector, the policy and who survived; knows neither slots nor where keys and values lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgert.architectures.base import Hyperparameters
from retrieval.arrays import Amounts, Positions
from retrieval.graph import Observation
from retrieval.selection import Merits, Policy, Selection, Survivors, merits, select
from retrieval.selectors import Selector

# A step that looks at everything costs a dense step, four or five others at 8k tokens: at most one of so many.
_FULL_EVERY = 64
_N_OBSERVED = 6  # layers; three cost 1 % of a step


def page_layers(hp: Hyperparameters) -> frozenset[int]:
    """Where pages of keys are bounded, and observed: two of the layers that see everything, one third and one half on
    the way. Then the other half of a step computes while the next one's tokens are read.

    (SmolLM2 at 8k, bounds on pages, 512 tokens, one text of 40: with layers 10 and 14 the KL is 0.12 and all but no row
    comes late; with 4, 14 and 24 it is 0.11, and 14 % do.)
    """
    full = [layer for layer in range(hp.n_layers) if layer not in hp.window_layers]
    return frozenset((full[len(full) // 3], full[max(0, len(full) // 2 - 1)]))


def observed_layers(hp: Hyperparameters) -> frozenset[int]:
    """What is observed beside a head: every other one of the late layers that see everything, but not the last,
    behind which nothing can be prepared.

    Late ones say best what is still needed. (SmolLM2 at 4k, a set of 256, four texts: the KL on prose is 0.080 with the
    last six, or six of the last twelve; 0.083 with the last ten, 0.088 with all, 0.098 with the ten in the middle, 0.10
    with six of all, 0.128 with the first ten.)
    """
    full = [layer for layer in range(hp.n_layers) if layer not in hp.window_layers]
    return frozenset(([layer for layer in full if layer < hp.n_layers - 1] or full)[::-2][:_N_OBSERVED])


class Chooser:
    """`survivors` are those of the last step that was committed, `held` its set, if it had one."""

    def __init__(self, selector: Selector, policy: Policy, *, can_look_around: bool) -> None:
        """With `can_look_around`, a step may attend to everything instead of a set."""
        self.selector, self.policy, self._can_look_around = selector, policy, can_look_around
        self.survivors: Survivors | None = None
        self.held: Positions | None = None  # rising
        self._n_since_whole = _FULL_EVERY

    def known(self, n_tokens: int, survivors: Survivors | None) -> Merits | None:
        """What selector and survivors say of the first `n_tokens` for the step after them; None where nothing tells
        and everything can be looked at."""
        scores = self.selector.scores(n_tokens)
        if scores is None and self._can_look_around:
            return None
        return merits(np.zeros(n_tokens, np.float32) if scores is None else scores, survivors, self.policy)

    def choose(self, known: Merits | None, repeated: Amounts | None, ahead: Positions | None) -> Selection | None:
        """The set for a step whose token is known. What was planned, `ahead`, and the set before it are there. None
        where it can only look at everything."""
        if known is None:
            return None
        held = self.held if self.held is None or ahead is None else np.concatenate([ahead, self.held])
        return select(known, repeated, self.policy, held, self.policy.n_late, is_late=True)

    def plan(self, known: Merits, expected: Amounts | None, held: Positions) -> Positions:
        """The likely set for the step after one over the set that is `held`, whose token is not known."""
        return select(known, expected, self.policy, held, self.policy.n_beside).positions

    def trusted(self, chosen: Selection | None) -> Selection | None:
        """None where the step should rather look at everything. Asked once a step."""
        self._n_since_whole += 1
        looks_around = self._can_look_around and self._n_since_whole >= _FULL_EVERY
        return None if chosen is None or (looks_around and not chosen.is_sure) else chosen

    def looked_around(self) -> None:
        self._n_since_whole = 0

    def surviving(self, positions: Positions, cells: Positions, observations: Sequence[Observation]) -> Survivors:
        """Who got attention survives, of the tokens at `positions` in `cells`; where nothing was observed, all do
        alike. The last one is the step's own, and the selector learns of it."""
        if observations:
            seen = np.stack([one.attention for one in observations])  # (n_observed, n_heads, n_cells)
            attention = (seen.sum((0, 1)) / seen.shape[1] + seen.max(1).sum(0))[cells]
            self.selector.saw(int(positions[-1]), observations)
        else:
            attention = np.ones(len(positions), np.float32)
        n_most = 2 * self.policy.budget
        if len(positions) > n_most:
            best = np.sort(np.argpartition(attention, len(attention) - n_most)[-n_most:])
            positions, attention = positions[best], attention[best]
        return Survivors(positions, attention)

    def saw_everything(self, end: int, observations: Sequence[Observation]) -> None:
        """A step attended to all of the first `end` tokens."""
        positions = np.arange(end, dtype=np.int64)
        self.survivors, self.held = self.surviving(positions, positions, observations), None

    def truncate(self, n_tokens: int) -> None:
        if self.survivors is not None:
            kept = self.survivors.positions < n_tokens
            self.survivors = Survivors(self.survivors.positions[kept], self.survivors.attention[kept])
        if self.held is not None:
            held = self.held[self.held < n_tokens]
            self.held = held if len(held) else None

    def forget(self) -> None:
        """A request begins."""
        self.selector.forget()
        self.survivors, self.held, self._n_since_whole = None, None, _FULL_EVERY
