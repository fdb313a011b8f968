"""Which cached tokens the next step attends to. Pure: scores in, a set of positions out.

The set is the first tokens (which gather attention that has nowhere to go), the last ones, and the best of the others
by a sum of three shares: what the retrieval head says; what the step before was seen to attend to, widened forward
(copying needs the token *after* the one that was looked at); and what followed when the text's last tokens stood there
before. How much of the head's own distribution the set covers says how far it can be trusted. Against a set that is
held already, only so many are exchanged: those that gain most.
Sources: StreamingLLM, arXiv 2309.17453 (sinks); SpeContext, arXiv 2512.00722, sections 4 and 9.
"""

from __future__ import annotations

from dataclasses import dataclass
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

    @property
    def n_exchanged_beside(self) -> int:
        """Tokens that come for a step while the one before computes: nobody waits for them."""
        return self.budget // 9

    @property
    def n_exchanged_late(self) -> int:
        """Tokens that come once the step's own token is known: it waits for them. (SmolLM2 at 4k, sets of 512 to 640,
        56 beside and 28 late, of which 18 come: the KL on prose, code, and questions about one fact and four is 0.026,
        0.031, 0.040 and 0.037; without bounds, with 70 to 82 instead of 62 to 69 tokens exchanged and as many of the
        answers right, 0.025, 0.029, 0.032 and 0.035.)"""
        return max(16, self.budget // 18)


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


def select(scores: Floats, survivors: Survivors | None, repeated: Floats | None, policy: Policy,
           held: Positions | None = None, n_exchanged: int | None = None) -> Selection:
    """The set for the next step, of as many cached tokens as there are `scores` (n,): what the head says of each.
    `repeated` (n,) is how much of the text's end each continues. Of the tokens that are not `held` (rising), where
    some are, at most `n_exchanged` come in, or what the budget lacks; None is any number.

    At most `policy.budget` positions, or `policy.most` where the head is unsure; all of them while there are so few.
    A score that is no number counts as the lowest.
    """
    n_tokens = len(scores)
    if n_tokens <= policy.budget:
        return Selection(np.arange(n_tokens, dtype=np.int64), 1.0, True)
    first, end = policy.n_sinks, n_tokens - policy.n_recent
    weights = _softmax(np.where(np.isnan(scores[first:end]), _NEVER, scores[first:end]))
    merit = weights.copy()
    if survivors is not None:
        merit += policy.survivor_weight * _shares(_widened(survivors, policy, n_tokens)[first:end])
    if repeated is not None:
        merit += policy.repeat_weight * _shares(repeated[first:end])
    n_best = policy.budget - policy.n_sinks - policy.n_recent
    candidates = np.arange(end - first)
    if held is not None:
        mine = held[np.searchsorted(held, first):np.searchsorted(held, end)] - first
        merit[mine] *= policy.hold
        if n_exchanged is not None:
            candidates = _exchangeable(merit, mine, max(n_exchanged, n_best - len(mine)))
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
    return Selection(positions.astype(np.int64), mass, mass >= policy.least_mass)


def _exchangeable(merit: Shares, mine: Positions, n: int) -> Positions:
    """Indices of what is held, and of the `n` others that merit most."""
    others = merit.copy()
    others[mine] = -1
    best = _best(others, n)
    return np.concatenate([mine, best[others[best] >= 0]])


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
