"""What one pass through the model computes: consecutive tokens of one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Phase = Literal["prefill", "decode"]
# Up to this many tokens a batch is weight-bound and uses the layout that is best for one token.
MAX_DECODE_TOKENS = 4
# A batch computed in parts of this many tokens or more has the same bits: ggml's kernels change their way at fewer
# (attention takes 64 queries at a time), and boundaries at multiples of 64 keep the tiles where they were.
LEAST_PART_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """`token_ids` (n_tokens,) int32 at positions start, start + 1, ...; logits are wanted for the last `n_outputs`."""

    token_ids: NDArray[np.int32]
    start: int
    n_outputs: int = 1

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def end(self) -> int:
        return self.start + self.n_tokens

    @property
    def phase(self) -> Phase:
        return "decode" if self.n_tokens <= MAX_DECODE_TOKENS else "prefill"


def split(token_ids: NDArray[np.int32], start: int, batch_size: int, n_outputs: int = 1) -> list[Batch]:
    """Cut tokens into batches of at most `batch_size`; logits are wanted for the last `n_outputs` tokens.

    Those lie in the last batch together, whose logits are one array: the batch before it may be shorter for that.
    """
    n_tokens = len(token_ids)
    if not 1 <= n_outputs <= min(n_tokens, batch_size):
        raise AssertionError(f"logits of {n_outputs} tokens wanted, of {n_tokens} in batches of {batch_size}")
    ends = [*range(batch_size, n_tokens, batch_size), n_tokens]
    if len(ends) > 1:
        ends[-2] = min(ends[-2], n_tokens - n_outputs)
    starts = [0, *ends[:-1]]
    return [Batch(token_ids[a:b], start + a, n_outputs if b == n_tokens else 0)
            for a, b in zip(starts, ends, strict=True)]


def in_parts(batch: Batch, part_tokens: int) -> list[Batch]:
    """The batch as several of at most `part_tokens` (a multiple of LEAST_PART_TOKENS, twice that or more): the same
    results, bit for bit, in smaller compute buffers. No part is shorter than LEAST_PART_TOKENS, unless the batch is.
    Wanted logits lie in the last part together, which may be longer for that."""
    ends, start, least = [], 0, max(LEAST_PART_TOKENS, batch.n_outputs)
    while batch.n_tokens - start > part_tokens:
        longest = max(0, batch.n_tokens - start - least) // LEAST_PART_TOKENS * LEAST_PART_TOKENS
        if not longest:
            break
        start += min(part_tokens, longest)
        ends.append(start)
    return [Batch(batch.token_ids[a:b], batch.start + a, batch.n_outputs if b == batch.n_tokens else 0)
            for a, b in pairwise([0, *ends, batch.n_tokens])]
