"""How likely a token was: the natural logarithm of its share of the softmax, and the likeliest tokens beside it.

Looks at the model's own logits, before any sampler or grammar changed them. Knows no text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgert.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_TOP_LOGPROBS = 20  # OpenAI's own bound


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token's logprob, and up to 20 of the likeliest (token id, logprob), the best first."""

    chosen: float
    top: tuple[tuple[int, float], ...]


def check_n_top(n_top: int) -> None:
    """Raises UsageError for a number of alternatives out of range."""
    if not 0 <= n_top <= MAX_TOP_LOGPROBS:
        raise UsageError(f"{n_top} alternatives are asked for each token",
                         f"Ask for 0 to {MAX_TOP_LOGPROBS} logprobs.")


def token_logprobs(logits: NDArray[np.float32], token_id: int, n_top: int) -> TokenLogprobs:
    """Of one step's logits, (n_vocab,) float32; 0.2 ms for 49k tokens."""
    import numpy as np

    peak = np.float64(logits.max())
    log_sum = peak + np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64))
    n_top = min(n_top, len(logits))
    best = np.argpartition(logits, len(logits) - n_top)[len(logits) - n_top:] if n_top else np.empty(0, np.int64)
    ordered = sorted(best.tolist(), key=lambda one: (-logits[one], one))
    return TokenLogprobs(float(logits[token_id] - log_sum), tuple((one, float(logits[one] - log_sum))
                                                                  for one in ordered))
