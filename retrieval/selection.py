"""Which cached tokens the next step attends to. Pure: scores in, a set of positions out.

The set is the first tokens (which gather attention that has nowhere to go), the last ones, and the best of the others
by a sum of three shares: what the retrieval head says; what the step before was seen to attend to, widened forward
(copying needs the token *after* the one that was looked at); and what followed when the text's last tokens stood there
before. How much of the head's own distribution the set covers says how far it can be trusted. Against a set that is
held already, only so many are exchanged: those that gain most.
Sources: StreamingLLM, arXiv 2309.17453 (sinks); SpeContext, arXiv 2512.00722, sections 4 and 9.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]
Shares = NDArray[np.float64]  # of whole ones: float32 would lose the order of those that a sure head leaves
_NEVER = np.float32(-np.inf)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a set is composed. Counts are tokens; the step's own tokens come on top."""

    budget: int
    most: int = 0
    """Where the head is unsure, the set may grow to so many; 0 is never."""
    n_sinks: int = 4
    n_recent: int = 32
    survivor_weight: float = 1.0
    """Of what the step before attended to, beside the head's 1. (Sets of 256 at 4k on SmolLM2, KL on prose and on code:
    0.08 and 0.07; Quest's, on the same four texts, 0.16 and 0.11.)"""
    n_ahead: int = 2
    fade: float = 0.5
    """A survivor brings so many tokens after it, each of which counts so much less than the one before."""
    repeat_weight: float = 0.6
    """Of what continues an earlier occurrence of the text's end (retrieval/repeats.py)."""
    hold: float = 2.0
    """A token that is held counts so many times as much, so that what is about as good is not exchanged."""
    least_mass: float = 0.8
    """The head is sure of a set that holds this share of its own distribution."""

    def __post_init__(self) -> None:
        if self.budget <= self.n_sinks + self.n_recent:
            raise AssertionError(f"a budget of {self.budget} holds {self.n_sinks} sinks and {self.n_recent} recent")

    @property
    def largest(self) -> int:
        """Tokens of the largest set."""
        return max(self.budget, self.most)

    # Tokens that come for a step: as the one before begins, those that it would have liked too; once it has shown its
    # features, while its last layers compute; and late, once the step's own token is known, when it must wait.
    # (SmolLM2 at 4k, sets of 512 to 640, on prose, code, and questions about one fact and four, three or four of each,
    # with as many of the answers right: KL of 0.026, 0.030, 0.038, 0.042; without bounds 0.025, 0.026, 0.032, 0.039.)
    @property
    def n_early(self) -> int:
        return self.budget // 14

    @property
    def n_beside(self) -> int:
        return self.budget // 21

    @property
    def n_late(self) -> int:
        return max(16, self.budget // 21)


@dataclass(frozen=True, slots=True)
class Survivors:
    """Tokens that the step before could see, and the attention that they got: `positions` (m,) rising, `attention`
    (m,) float32, on any scale."""

    positions: Positions
    attention: Floats


@dataclass(frozen=True, slots=True)
class Selection:
    """`positions` rising, (n_selected,) int64. `mass` is the share of the head's distribution, forced tokens left
    out, that they hold."""

    positions: Positions
    mass: float
    is_sure: bool
    next_best: Positions = field(default_factory=lambda: np.zeros(0, np.int64))
    """Those that are not held, and would have come if more were exchanged: rising."""


@dataclass(frozen=True, slots=True)
class Merits:
    """What is known of cached tokens before a step's own is: `weights`, the head's distribution, and with the
    survivors' shares `merit`, each (n,) of those between the first and the last ones, out of `n_tokens`."""

    n_tokens: int
    weights: Shares
    merit: Shares


def merits(scores: Floats, survivors: Survivors | None, policy: Policy) -> Merits:
    """Of as many cached tokens as there are `scores` (n,): what the head says of each. One that is no number counts as
    the lowest."""
    n_tokens = len(scores)
    first, end = min(policy.n_sinks, n_tokens), max(policy.n_sinks, n_tokens - policy.n_recent)
    weights = _softmax(np.where(np.isnan(scores[first:end]), _NEVER, scores[first:end]))
    if survivors is None:
        return Merits(n_tokens, weights, weights)
    shares = _shares(_widened(survivors, policy, n_tokens)[first:end])
    return Merits(n_tokens, weights, weights + policy.survivor_weight * shares)


def select(known: Merits, repeated: Floats | None, policy: Policy, held: Positions | None = None,
           n_exchanged: int | None = None) -> Selection:
    """The set for the next step. `repeated` (n,) is how much of the text's end each cached token continues. Of those
    that are not `held`, where some are, at most `n_exchanged` come in, or what the budget lacks; None is any number.

    At most `policy.budget` positions, or `policy.most` where the head is unsure; all of them while there are so few.
    """
    n_tokens, weights, merit = known.n_tokens, known.weights, known.merit.copy()
    if n_tokens <= policy.budget:
        return Selection(np.arange(n_tokens, dtype=np.int64), 1.0, True)
    first, end = policy.n_sinks, n_tokens - policy.n_recent
    if repeated is not None:
        merit += policy.repeat_weight * _shares(repeated[first:end])
    n_best = policy.budget - policy.n_sinks - policy.n_recent
    candidates, waiting = np.arange(end - first), np.zeros(0, np.int64)
    if held is not None:
        is_held = np.zeros(n_tokens, bool)
        is_held[held[held < n_tokens]] = True
        mine = np.flatnonzero(is_held[first:end])
        merit[mine] *= policy.hold
        if n_exchanged is not None:
            candidates, waiting = _exchangeable(merit, mine, max(n_exchanged, n_best - len(mine)), policy.n_early)
    ranked = candidates[np.argpartition(merit[candidates], -n_best)]
    chosen, others = ranked[-n_best:], ranked[:-n_best]
    mass = float(weights[chosen].sum())
    if mass < policy.least_mass and policy.most > policy.budget:
        more = others[_best(merit[others], policy.most - policy.budget)]
        more = more[np.argsort(-merit[more], kind="stable")]
        n_more = int(np.searchsorted(mass + np.cumsum(weights[more]), policy.least_mass)) + 1
        chosen = np.append(chosen, more[:n_more])
        mass = float(weights[chosen].sum())
    positions = np.concatenate([np.arange(first), first + np.sort(chosen), np.arange(end, n_tokens)])
    waiting = first + np.sort(waiting[merit[waiting] > merit[chosen].min()])
    return Selection(positions.astype(np.int64), mass, mass >= policy.least_mass, waiting)


def _exchangeable(merit: Shares, mine: Positions, n: int, n_more: int) -> tuple[Positions, Positions]:
    """Indices of what is held and of the `n` others that merit most; and of the `n_more` after them."""
    others = merit.copy()
    others[mine] = -1
    best = _best(others, n + n_more)
    best = best[others[best] >= 0]
    best = best[np.argpartition(-others[best], n)] if 0 < n < len(best) else best
    return np.concatenate([mine, best[:n]]), best[n:]


def _softmax(scores: Floats) -> Shares:
    """(n,) of scores (n,); even where none of them counts."""
    highest = scores.max(initial=_NEVER)
    if not np.isfinite(highest):
        return np.full(len(scores), 1 / max(1, len(scores)))
    return _shares(np.exp(scores.astype(np.float64) - highest))


def _shares(weights: NDArray[np.floating[Any]]) -> Shares:
    """Weights over their sum; none where there is nothing to share."""
    total = float(weights.sum(dtype=np.float64))
    return np.asarray(weights / total if total > 0 else np.zeros(len(weights)), np.float64)


def _widened(survivors: Survivors, policy: Policy, n_tokens: int) -> Shares:
    """(n_tokens,): the attention of each survivor, and for those after it as much as the strongest brings."""
    spread = np.zeros(n_tokens)
    spread[survivors.positions] = survivors.attention
    widened = spread.copy()
    for ahead in range(1, policy.n_ahead + 1):
        np.maximum(widened[ahead:], spread[:-ahead] * policy.fade ** ahead, out=widened[ahead:])
    return widened


def _best(merit: Shares, n: int) -> Positions:
    """Indices of the `n` that merit it most, in no order."""
    if n >= len(merit):
        return np.arange(len(merit))
    return np.argpartition(merit, len(merit) - n)[len(merit) - n:] if n > 0 else np.arange(0)
