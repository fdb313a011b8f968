"""Guesses how a text goes on by where its last tokens stood before: code that is edited repeats itself.

Prompt lookup decoding, with the hash chains of deflate (RFC 1951, section 4) to find the longest match: constant work
a token. Knows token ids alone; how far a guess is worth a computation is edgert/speculation.py's to say.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

# Shorter matches are chance, and longer ones are not more certain.
_MIN_MATCH, MAX_MATCH = 2, 32
# Newest first; a file's indentation may stand there a hundred times, so the place of the last guess is tried too.
_MAX_CANDIDATES = 16
_N_HEADS = 2**13  # 32 KiB; texts of more tokens have longer chains
_NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Guess:
    """`token_ids` may come next, because the last `match_length` tokens stood before them already. 1 stands for a copy
    with one other token in it, which is believed to go on behind that."""

    match_length: int
    token_ids: list[int]


class PromptLookup:
    """One text, token by token. Holds 8 bytes a token, and 32 KiB."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._heads = array("i", [_NOWHERE]) * _N_HEADS  # by hash of two tokens: where the second stood last
        self._previous = array("i")  # where it stood before that
        self._source = _NOWHERE  # the place that the text's end is a copy of, as the last guess had it
        self._missed = False  # its last token was another one

    def append(self, token_id: int) -> None:
        """The text goes on."""
        end = len(self._tokens)
        self._tokens.append(token_id)
        if end == 0:
            self._previous.append(_NOWHERE)
            return
        slot = (self._tokens[end - 1] * 0x9E3779B1 + token_id * 0x85EBCA77 >> 7) % _N_HEADS
        self._previous.append(self._heads[slot])
        self._heads[slot] = end
        if self._source != _NOWHERE:
            is_copy = self._tokens[self._source + 1] == token_id
            self._source = self._source + 1 if is_copy or not self._missed else _NOWHERE
            self._missed = not is_copy

    def guess(self, n_tokens: int) -> Guess | None:
        """How it may go on for `n_tokens`; None without a match. A text that repeats a period repeats it on."""
        end, tokens = len(self._tokens) - 1, self._tokens
        length, source = self._match()
        if length >= _MIN_MATCH:
            self._source, self._missed = source, False
        elif self._source != _NOWHERE:
            length, source = 1, self._source
        else:
            return None
        period = end - source
        return Guess(length, [tokens[source + 1 + i % period] for i in range(n_tokens)])

    def _match(self) -> tuple[int, int]:
        """(length, end) of the longest match with the text's end, the newest of equals."""
        end = len(self._tokens) - 1
        best = (0, _NOWHERE)
        if 0 <= self._source < end:
            best = (self._common(self._source), self._source)
        source = self._previous[end] if end >= 0 else _NOWHERE
        for _ in range(_MAX_CANDIDATES):
            if source == _NOWHERE or best[0] == MAX_MATCH:
                break
            length = self._common(source)
            if length > best[0]:
                best = length, source
            source = self._previous[source]
        return best

    def _common(self, source: int) -> int:
        """How many tokens up to `source` are those at the text's end, at most MAX_MATCH."""
        tokens, end = self._tokens, len(self._tokens) - 1
        limit = min(MAX_MATCH, source + 1)
        return next((i for i in range(limit) if tokens[source - i] != tokens[end - i]), limit)
