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

import numpy as np

from retrieval.arrays import Amounts, Floats, Positions

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
    late_hold_per_token: float = 1 / 32
    """And where the step must wait for what comes instead, so many times for each token of the budget: then only what
    gains much does, but all of that. In a small set each token matters more. (SmolLM2, 512 tokens of 8k, 192 steps on
    prose and on two texts of code: KL of 0.071, 0.083, 0.089, of 44 rows a step, 21 of them late. If any 24 came late
    that gain at all, and 60 before: 0.074, 0.095, 0.092, of 67. Without bounds 0.064, 0.084, 0.080, of 120. Questions
    at 4k, 128 tokens held 16, 8 and 4 times: 0.37, 0.17, 0.15; 256 tokens: 0.094, 0.084, 0.085.)"""
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
    def late_hold(self) -> float:
        return max(self.hold, self.late_hold_per_token * self.budget)

    # The most tokens that come for a step: beside the one before, while its last layers compute; and late, once the
    # step's own token is known, when it must wait.
    @property
    def n_beside(self) -> int:
        return self.budget // 21

    @property
    def n_late(self) -> int:
        return max(16, self.budget // 8)


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


@dataclass(frozen=True, slots=True)
class Merits:
    """What is known of cached tokens before a step's own is: `weights`, the head's distribution, and with the
    survivors' shares `merit`, each (n,) of those between the first and the last ones, out of `n_tokens`."""

    n_tokens: int
    weights: Amounts
    merit: Amounts


def merits(scores: Floats, survivors: Survivors | None, policy: Policy) -> Merits:
    """Of as many cached tokens as there are `scores` (n,): what the head says of each. One that is no number counts as
    the lowest."""
    n_tokens = len(scores)
    first, end = min(policy.n_sinks, n_tokens), max(policy.n_sinks, n_tokens - policy.n_recent)
    weights = _softmax(scores[first:end])
    merit = weights.copy()
    if survivors is not None:
        _add_shares(merit, _widened(survivors, policy, n_tokens)[first:end], policy.survivor_weight)
    return Merits(n_tokens, weights, merit)


def select(known: Merits, repeated: Amounts | None, policy: Policy, held: Positions | None = None,
           n_exchanged: int | None = None, *, is_late: bool = False) -> Selection:
    """The set for the next step. `repeated` (n,) is how much of the text's end each cached token continues. Of those
    that are not `held`, where some are, at most `n_exchanged` come in, or what the budget lacks; None is any number.
    With `is_late`, the step waits for them.

    At most `policy.budget` positions, or `policy.most` where the head is unsure; all of them while there are so few.
    """
    n_tokens, weights, merit = known.n_tokens, known.weights, known.merit.copy()
    if n_tokens <= policy.budget:
        return Selection(np.arange(n_tokens, dtype=np.int64), 1.0, True)
    first, end = policy.n_sinks, n_tokens - policy.n_recent
    n_best = policy.budget - policy.n_sinks - policy.n_recent
    n_most = n_best + policy.largest - policy.budget
    if repeated is not None:
        _add_shares(merit, repeated[first:end], policy.repeat_weight)
    if held is None:
        candidates = _best(merit, n_most)
    else:
        is_held = np.zeros(n_tokens, bool)
        is_held[held[held < n_tokens]] = True
        mine = np.flatnonzero(is_held[first:end])
        others = merit.copy()
        others[mine] = -1
        merit[mine] *= policy.late_hold if is_late else policy.hold
        n_others = max(n_exchanged, n_best - len(mine)) if n_exchanged is not None else n_most
        candidates = np.concatenate([mine, _best(others, min(n_others, len(others) - len(mine)))])
    ranked = candidates[np.argsort(merit[candidates])[::-1][:n_most]]
    covered = np.cumsum(weights[ranked])
    n_chosen = min(len(ranked), n_best)
    if covered[n_chosen - 1] < policy.least_mass and n_chosen < len(ranked):
        n_chosen += min(len(ranked) - n_chosen, int(np.searchsorted(covered[n_chosen:], policy.least_mass)) + 1)
    mass = float(covered[n_chosen - 1])
    positions = np.concatenate([np.arange(first), first + np.sort(ranked[:n_chosen]), np.arange(end, n_tokens)])
    return Selection(positions, mass, mass >= policy.least_mass)


def _softmax(scores: Floats) -> Amounts:
    """(n,) of scores (n,), of which one that is no number counts as the lowest; even where none of them counts."""
    highest = scores.max(initial=_NEVER)
    if np.isnan(highest):
        scores = np.where(np.isnan(scores), _NEVER, scores)
        highest = scores.max(initial=_NEVER)
    if not np.isfinite(highest):
        return np.full(len(scores), 1 / max(1, len(scores)))
    weights: Amounts = np.exp(np.subtract(scores, highest, dtype=np.float64))
    weights /= weights.sum()
    return weights


def _add_shares(merit: Amounts, amounts: Amounts, weight: float) -> None:
    """To each its part of `weight`, by amounts; nothing where there is nothing to share."""
    total = float(amounts.sum())
    if total > 0:
        merit += amounts * (weight / total)


def _widened(survivors: Survivors, policy: Policy, n_tokens: int) -> Amounts:
    """(n_tokens,): the attention of each survivor, and for those after it as much as the strongest brings."""
    spread = np.zeros(n_tokens)
    spread[survivors.positions] = survivors.attention
    widened = spread.copy()
    for ahead in range(1, policy.n_ahead + 1):
        np.maximum(widened[ahead:], spread[:-ahead] * policy.fade ** ahead, out=widened[ahead:])
    return widened


def _best(merit: Amounts, n: int) -> Positions:
    """Indices of the `n` that merit it most, in no order."""
    if n >= len(merit):
        return np.arange(len(merit))
    return np.argpartition(merit, len(merit) - n)[len(merit) - n:] if n > 0 else np.arange(0)
