"""How many guessed tokens a pass through the model should verify: as many as pay.

A pass that streams its weights reads the same bytes for one token and for sixteen, so a right guess is a token for
nothing, until computing takes longer than reading. What a guess is worth is counted, by the length of the match that
it was made from, and what a pass takes is measured: no knob, and nothing lost where there is nothing to gain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Literal

from edgert.text.prompt_lookup import Guess, PromptLookup

Speculate = Literal["auto", "on", "off"]
# Tokens of a pass. Few shapes, for each has graphs of its own; and sixteen rows of logits are 9 MiB for 152k tokens.
SHAPES = (1, 4, 16)
MAX_PASS_TOKENS = SHAPES[-1]
# Less is within what measured times vary, and a wrong guess costs power.
_LEAST_GAIN = 1.2
# How often a guess is right that was made from a match of 1, 2-3, 4-7, 8-15, 16-31 and more tokens, before any is seen.
_PRIOR_RATES, _PRIOR_WEIGHT = (0.3, 0.3, 0.5, 0.7, 0.8, 0.9), 4.0
_FORGET = 0.95  # what was seen twenty guesses ago counts a third
_N_TIMES = 8
# A pass that was slow by chance is tried again after so many others.
_MAX_AGE_PASSES = 256


class DraftLength:
    """Chooses the shape of each pass. One for an engine: what passes take is the device's."""

    def __init__(self) -> None:
        self._hits = [rate * _PRIOR_WEIGHT for rate in _PRIOR_RATES]
        self._seen = [_PRIOR_WEIGHT] * len(_PRIOR_RATES)
        self._times_s: dict[int, deque[float]] = {}
        self._last_pass: dict[int, int] = {}
        self._n_passes = 0

    def choose(self, match_length: int, n_most: int) -> int:
        """How many tokens to verify after a match, at most `n_most`; 0 where it does not pay."""
        best, best_gain = 0, _LEAST_GAIN
        for shape in SHAPES[1:]:
            gain = self._gain(match_length, shape) if shape <= n_most + 1 else 0.0
            if gain > best_gain:
                best, best_gain = shape - 1, gain
        return best

    def _gain(self, match_length: int, shape: int) -> float:
        """Speed over that without guesses, as expected; 0 where nothing is known yet."""
        alone_s, pass_s = self._expected_time_s(1), self._expected_time_s(shape)
        if alone_s is None or pass_s is None:
            return 0.0
        return self._expected_tokens(match_length, shape - 1) * alone_s / pass_s

    def _expected_tokens(self, match_length: int, n_guessed: int) -> float:
        """Tokens that a pass gives: its own, and the guesses before the first wrong one."""
        expected, chance = 1.0, 1.0
        for i in range(n_guessed):
            kind = _kind(match_length + i)
            chance *= self._hits[kind] / self._seen[kind]
            expected += chance
        return expected

    def saw(self, match_length: int, were_right: Sequence[bool]) -> None:
        """How the guesses of one match turned out, computed or not: none is told after the first wrong one."""
        for i, was_right in enumerate(were_right):
            kind = _kind(match_length + i)
            self._hits[kind] = self._hits[kind] * _FORGET + was_right
            self._seen[kind] = self._seen[kind] * _FORGET + 1

    def measured(self, n_tokens: int, time_s: float) -> None:
        """A pass of `n_tokens` took so long."""
        if self._is_stale(n_tokens):
            del self._times_s[n_tokens]
        self._n_passes += 1
        self._times_s.setdefault(n_tokens, deque(maxlen=_N_TIMES)).append(time_s)
        self._last_pass[n_tokens] = self._n_passes

    def _is_stale(self, shape: int) -> bool:
        return shape > 1 and shape in self._times_s and self._n_passes - self._last_pass[shape] >= _MAX_AGE_PASSES

    def _expected_time_s(self, shape: int) -> float | None:
        """What a pass takes: as measured, or for the next larger shape as the smaller ones let hope."""
        known = self._times_s.get(shape)
        if known and not self._is_stale(shape):
            return median(known)
        if shape == 1:
            return None
        smaller = [n for n in SHAPES if n < shape]
        times_s = [median(self._times_s[n]) for n in smaller if n in self._times_s]
        if len(times_s) < len(smaller):
            return None
        if len(smaller) == 1:
            return times_s[0]
        # Larger batches take less for each token: half of what the last step up has cost for each.
        slope_s = (times_s[-1] - times_s[-2]) / (smaller[-1] - smaller[-2])
        return times_s[-1] + max(0.0, slope_s / 2 * (shape - smaller[-1]))


def _kind(match_length: int) -> int:
    """Matches of 1, 2-3, 4-7, 8-15, 16-31 and more tokens."""
    return min(match_length.bit_length() - 1, len(_PRIOR_RATES) - 1)


class Speculation:
    """The guesses of one answer: `draft` what a pass should verify, and tell what was `said`."""

    def __init__(self, lengths: DraftLength, prompt_ids: Sequence[int], max_pass_tokens: int) -> None:
        self._lengths, self._max_pass_tokens = lengths, min(max_pass_tokens, MAX_PASS_TOKENS)
        self._lookup = PromptLookup()
        self._guess: Guess | None = None
        self._were_right: list[bool] = []
        for token_id in prompt_ids:
            self._lookup.append(token_id)

    def said(self, token_id: int) -> None:
        """The answer goes on with this token, guessed or not."""
        guess, were_right = self._guess, self._were_right
        if guess is not None and len(were_right) < len(guess.token_ids) and all(were_right):
            were_right.append(token_id == guess.token_ids[len(were_right)])
        self._lookup.append(token_id)

    def draft(self, n_most: int) -> list[int]:
        """Tokens to verify after the last one that was said, at most `n_most`. Often none."""
        if self._guess is not None:
            self._lengths.saw(self._guess.match_length, self._were_right)
        n_most = min(n_most, self._max_pass_tokens - 1)
        self._guess, self._were_right = self._lookup.guess(n_most) if n_most > 0 else None, []
        if self._guess is None:
            return []
        return self._guess.token_ids[:self._lengths.choose(self._guess.match_length, n_most)]

    def measured(self, n_tokens: int, time_s: float) -> None:
        """A pass of `n_tokens`, drafted ones among them, took so long."""
        self._lengths.measured(n_tokens, time_s)
