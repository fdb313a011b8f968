"""Whether guesses of the next layer's experts are worth a read: they are where most have been right lately.

A guess applies the next layer's router to the hidden state of this one. Where reads are what a token waits for, a right
one hides its read behind a layer more; a wrong one takes the disk's time, and a slot. Pure: knows no memory, no reads.
"""

from __future__ import annotations

from collections.abc import Collection

# Of the last guesses about experts that were not here; each new one counts for this share of them.
_WEIGHT_OF_ONE = 1 / 32
# Published ones are right in 81 to 89 of 100 (of temporal ones, the token before's, in 18). A wrong one costs a read of
# the disk's free time, a right one saves no more than a layer's computing.
_LEAST_SHARE = 0.6


class Guesses:
    """Guesses about one layer at a time, and how many of the last were right. None is worth it before some were."""

    def __init__(self) -> None:
        self._layer, self._guessed, self._right_share, self._is_read = -1, list[int](), 0.0, False
        self.n_read = self.n_wrong = 0

    def make(self, layer: int, absent: list[int]) -> bool:
        """The layer may want these experts, which are not here. Whether to read them ahead."""
        self._layer, self._guessed, self._is_read = layer, absent, self._right_share >= _LEAST_SHARE
        return self._is_read

    def learn(self, layer: int, wanted: Collection[int]) -> None:
        """The layer wants these. What was guessed of another one tells nothing."""
        if layer == self._layer:
            for expert in self._guessed:
                self._right_share += _WEIGHT_OF_ONE * ((expert in wanted) - self._right_share)
            if self._is_read:
                self.n_read += len(self._guessed)
                self.n_wrong += sum(expert not in wanted for expert in self._guessed)
        self._layer = -1
