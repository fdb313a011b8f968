"""Chooses the next token from logits: llama.cpp's sampler chain, in llama.cpp's default order.

Knows sampling parameters and their bounds. Works without a vocabulary (only its size counts), does not know text,
and leaves stopping to its caller.
"""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from edgert.errors import ComputeError, UsageError
from edgert.text.libllama import LogitBias, SamplerChain, TokenData, TokenDataArray

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MIN_TEMPERATURE = 0.001  # below that, logits divided by it overflow float32; 0 is greedy
_MAX_TEMPERATURE = 100.0  # beyond that every choice is uniform within float32
_MAX_PENALTY = 100.0
MAX_REPEAT_LAST_N = 2**17  # libllama allocates a ring of this many ids; no context in use is longer
MAX_LOGIT_BIASES = 1024  # libllama may compare every candidate with every bias
MAX_SEED = 2**32 - 2  # libllama takes 2**32 - 1 for "choose one"
_MIN_KEEP = 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens; the defaults are llama.cpp's. Raises UsageError for values out of range.

    `temperature` 0 takes the likeliest token. `top_k` 0, `top_p` 1, `min_p` 0, `repeat_penalty` 1 and the other
    penalties 0 switch their sampler off. `seed` None draws one. `logit_bias` adds to the logits of single tokens; -inf
    bans a token.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.temperature != 0:
            _check_number("temperature", self.temperature, _MIN_TEMPERATURE, _MAX_TEMPERATURE)
        _check_whole("top_k", self.top_k, 0, 2**31 - 1)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repeat_penalty", self.repeat_penalty, 0.01, _MAX_PENALTY)
        _check_whole("repeat_last_n", self.repeat_last_n, 0, MAX_REPEAT_LAST_N)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, MAX_SEED)
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise UsageError(f"logit_bias has {len(self.logit_bias)} tokens",
                             f"At most {MAX_LOGIT_BIASES} are possible.")
        for token_id, bias in self.logit_bias.items():
            _check_whole("a token id in logit_bias", token_id, 0, 2**31 - 1)
            if bias != -math.inf:
                _check_number("a bias in logit_bias", bias, -1e4, 1e4)
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the likeliest token is chosen and nothing changes the logits before."""
        return self.temperature == 0 and not self.penalises and not self.logit_bias

    @property
    def penalises(self) -> bool:
        return self.repeat_last_n > 0 and (self.repeat_penalty, self.frequency_penalty, self.presence_penalty) != (
            1, 0, 0)


def _check_number(name: str, value: float, minimum: float, maximum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
        or_zero = "0, or " if name == "temperature" else ""
        raise UsageError(f"{name} is {value!r}", f"Give {or_zero}a number from {minimum:g} to {maximum:g}.")


def _check_whole(name: str, value: int, minimum: int, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise UsageError(f"{name} is {value!r}", f"Give a whole number from {minimum} to {maximum}.")


class Sampler:
    """Chooses tokens for one sequence. For one thread at a time; holds 12 bytes per token of the vocabulary.

    `seed` is the one in use, also when the parameters left it open, so that an answer can be had again.
    Measured per token with 49k and 152k tokens in the vocabulary: plain greedy 4 and 14 us, the default chain 57 and
    155 us, with a repeat penalty 210 and 650 us, without top_k 2.7 and 9.4 ms (libllama sorts).
    """

    def __init__(self, params: SamplingParams, n_vocab: int) -> None:
        _check_whole("n_vocab", n_vocab, 1, 2**31 - 1)
        outside = next((token_id for token_id in params.logit_bias if token_id >= n_vocab), None)
        if outside is not None:
            raise UsageError(f"logit_bias names token {outside}", f"The vocabulary ends at {n_vocab - 1}.")
        self.params, self.n_vocab = params, n_vocab
        self.seed = secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed
        self._chain = None if params.is_plain_greedy else self._build_chain()
        self._closed = False
        if self._chain is not None:
            self._prepare_candidates()

    def _build_chain(self) -> SamplerChain:
        params, chain = self.params, SamplerChain()
        if params.logit_bias:
            biases = [LogitBias(token_id, bias) for token_id, bias in params.logit_bias.items()]
            chain.add("logit_bias", self.n_vocab, len(biases), (LogitBias * len(biases))(*biases))
        if params.penalises:
            chain.add("penalties", self.n_vocab, params.repeat_last_n, params.repeat_penalty,
                      params.frequency_penalty, params.presence_penalty)
        if params.temperature == 0:
            chain.add("greedy")
            return chain
        chain.add("top_k", params.top_k)
        chain.add("top_p", params.top_p, _MIN_KEEP)
        chain.add("min_p", params.min_p, _MIN_KEEP)
        chain.add("temp", params.temperature)
        chain.add("dist", self.seed)
        return chain

    def _prepare_candidates(self) -> None:
        import numpy as np

        # The layout of llama_token_data. Samplers reorder it, so ids are written anew for every token.
        self._rows = np.empty(self.n_vocab, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._ids = np.arange(self.n_vocab, dtype=np.int32)
        self._first_row = ctypes.cast(self._rows.ctypes.data, ctypes.POINTER(TokenData))
        self._candidates = TokenDataArray()

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The chosen token's id. `logits`: (n_vocab,) float32, C-contiguous, left as they are.

        Does not accept the token. Raises ComputeError when no logit is a finite number or one is NaN or +inf.
        """
        self._check(logits)
        if self._chain is None:
            best = int(logits.argmax())  # the first of equals, as in llama.cpp
            self._check_best(float(logits[best]))
            return best
        self._check_best(float(logits.max()))
        # A grammar's mask belongs here: between the model's logits and the first sampler.
        self._rows["id"], self._rows["logit"] = self._ids, logits
        candidates = self._candidates
        candidates.data, candidates.size, candidates.selected, candidates.sorted = (
            self._first_row, self.n_vocab, -1, False)
        self._chain.apply(candidates)
        if not 0 <= candidates.selected < candidates.size:
            raise ComputeError("the sampler chose no token", "Loosen the sampling options or the logit_bias.")
        return int(candidates.data[candidates.selected].id)

    def accept(self, token_id: int) -> None:
        """Count `token_id` as said: the repeat penalty looks at the last `repeat_last_n` accepted tokens."""
        self._require_open()
        if not 0 <= token_id < self.n_vocab:
            raise UsageError(f"token id {token_id} is not in the vocabulary", f"Ids go from 0 to {self.n_vocab - 1}.")
        if self._chain is not None:
            self._chain.accept(token_id)

    def reset(self) -> None:
        """Forget all accepted tokens and start the random numbers anew from the seed."""
        self._require_open()
        if self._chain is not None:
            self._chain.reset()

    def close(self) -> None:
        self._closed = True
        if self._chain is not None:
            self._chain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("the sampler is closed", "Make a new one.")

    def _check(self, logits: NDArray[np.float32]) -> None:
        self._require_open()
        if logits.shape != (self.n_vocab,) or logits.dtype.str != "<f4" or not logits.flags.c_contiguous:
            raise UsageError(f"logits are {logits.dtype} of shape {logits.shape}",
                             f"Give {self.n_vocab} contiguous float32 numbers.")

    def _check_best(self, best: float) -> None:
        # max and argmax find a NaN first; a NaN would make libllama's sorting undefined.
        if not math.isfinite(best):
            raise ComputeError(f"the largest logit is {best}",
                               "The model file may be damaged, or its numbers overflow; try another one.")
