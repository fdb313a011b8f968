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
# (attention takes 64 queries at a time), and every multiple of 64 keeps the tiles where they were.
PART_TOKENS = 64
MAX_PART_TOKENS = 2 * PART_TOKENS - 1


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


def in_parts(batch: Batch) -> list[Batch]:
    """The batch as several of PART_TOKENS tokens, the last one with what is left over: the same results, bit for bit,
    in compute buffers that need not hold more than MAX_PART_TOKENS. Wanted logits lie in the last part together."""
    n_parts = max(1, min(batch.n_tokens, batch.n_tokens - batch.n_outputs + PART_TOKENS) // PART_TOKENS)
    ends = [*range(PART_TOKENS, n_parts * PART_TOKENS, PART_TOKENS), batch.n_tokens]
    return [Batch(batch.token_ids[a:b], batch.start + a, batch.n_outputs if b == batch.n_tokens else 0)
            for a, b in pairwise([0, *ends])]
