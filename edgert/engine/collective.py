"""The seam between ranks: summing the partial results of a block.

Contract: `all_reduce(partial)` gives the sum over all ranks, added in rank order, so that every rank holds the same
bits. It blocks until the sum is there or a deadline passes, and then raises a typed error. Every rank calls it the
same number of times in the same order. `broadcast` fills every rank's tensor with rank 0's, `reduce` gives the sum to
rank 0 alone: a pass begins with one and ends with the other. Where every rank has rows of the output head, it ends with
`gather` instead, which gives rank 0 all logits.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.ggml.graph import Tensor


class Collective(Protocol):
    world_size: int
    rank: int
    splits_head: bool
    """Every rank has rows of the output head, so that all need the last sum."""
    selected: NDArray[np.int64] | None
    """The cached tokens that the running pass attends to beside its own, rising; None for all. Rank 0 sets it before a
    pass of one batch, others find what it said."""

    def broadcast(self, hidden: Tensor) -> None:
        """Rank 0's values, on every rank."""
        ...

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum of every rank's `partial`, which may be overwritten."""
        ...

    def reduce(self, partial: Tensor) -> Tensor:
        """The same on rank 0; on others something of the same shape."""
        ...

    def gather(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """On rank 0, every rank's logits (n_outputs, its rows of the head) as (n_outputs, vocab_size), valid until the
        next pass; on others what they gave."""
        ...


class Solo:
    """One rank: the sum is the part itself."""

    world_size = 1
    rank = 0
    splits_head = False
    selected: NDArray[np.int64] | None = None

    def broadcast(self, hidden: Tensor) -> None:
        """Nobody else is there."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        return partial

    def reduce(self, partial: Tensor) -> Tensor:
        return partial

    def gather(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return logits
