"""One answer as it is made: prefill, then sample, step, emit, until something ends it.

Knows the order of a request's steps. Does not know where weights lie (engine) nor who reads the text (apps).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgert.engine.engine import Engine
from edgert.errors import UsageError
from edgert.ggml.backend import Cancelled
from edgert.text.sampler import Sampler
from edgert.text.stream import TextStream

if TYPE_CHECKING:
    from edgert.text.constraint import Constraint

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added: its id, the text that can be shown now (may be empty), and when, since the request.

    A last piece may come without a token of its own, with the last one's id and text that was held back until then.
    """

    text: str
    token_id: int
    time_ms: float


@dataclass(slots=True)
class Timings:
    """llama-server's names. `cache_n` prompt tokens were in the KV cache already, `prompt_n` were computed."""

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0
    time_to_first_token_ms: float = 0.0
    forecast_per_second: float | None = None
    """Tokens per second that the plan promised for the answer's beginning; None on a device that is not calibrated."""
    forecast_time_to_first_token_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return {**rounded, "prompt_per_second": _rate(self.prompt_n, self.prompt_ms),
                "predicted_per_second": _rate(self.predicted_n, self.predicted_ms)}


def _rate(n: int, ms: float) -> float | None:
    return round(n / ms * 1000, 3) if n and ms else None


class Generation:
    """An answer in the making: iterate for its pieces. `cancel` stops it from any thread within one token.

    After the last piece, `finish_reason` says why it ended; what was said until then stays in `text`. Closing the
    iterator early (leaving the loop) ends it as well. With a constraint, `stop` means that the answer is complete.
    """

    def __init__(self, engine: Engine, prompt_ids: Sequence[int], sampler: Sampler, stream: TextStream, *,
                 max_tokens: int | None, is_end: Callable[[int], bool], on_tokens: Callable[[list[int]], None],
                 constraint: Constraint | None = None) -> None:
        self.prompt_token_ids = list(prompt_ids)
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.timings = Timings(cache_n=engine.kv.length, prompt_n=len(prompt_ids) - engine.kv.length)
        self._engine, self._sampler, self._stream = engine, sampler, stream
        self._is_end, self._on_tokens, self._constraint = is_end, on_tokens, constraint
        room = engine.kv.context_length - len(self.prompt_token_ids)
        self._max_tokens = room if max_tokens is None else min(max_tokens, room)
        self._cancelled, self._lock = threading.Event(), threading.RLock()  # a signal handler may cancel anywhere
        self.decoded_n, self.decode_s = 0, 0.0  # steps of one token, without the time that the reader took between them
        self._start = time.perf_counter()
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        yield from self._pieces  # in a generator of the loop's own: leaving the loop closes it, and the answer with it

    def cancel(self) -> None:
        """Stop between two operations of the running step. The pieces end; `finish_reason` is `cancelled`."""
        with self._lock:
            self._cancelled.set()
            if self.finish_reason is None:
                self._engine.cancel()

    def close(self) -> None:
        """End the answer here, and give the engine free. Raises UsageError while another thread computes it."""
        try:
            self._pieces.close()
        except ValueError as error:  # Python's word for a generator that is running
            raise UsageError("an answer is being made in another thread", "Cancel it, and wait for its end.") from error
        if self.finish_reason is None:  # it had not begun
            self.finish_reason = "cancelled"
            self._sampler.close()

    def result(self) -> str:
        """Run to the end; the whole text."""
        for _ in self:
            pass
        return self.text

    def _run(self) -> Generator[Piece]:
        self._engine.resume()
        try:
            yield from self._decode()
        except Cancelled:
            self.finish_reason = "cancelled"
        finally:
            with self._lock:  # a cancel that comes later finds it finished, and does not stop the next request
                self.finish_reason = self.finish_reason or "cancelled"
                self._engine.resume()
            self._sampler.close()
        rest = self._stream.finish()
        if rest:
            self.text += rest
            yield Piece(rest, self.token_ids[-1], self._elapsed_ms())

    def _decode(self) -> Iterator[Piece]:
        if self._cancelled.is_set():
            raise Cancelled
        timings, engine = self.timings, self._engine
        for token_id in self.prompt_token_ids:
            self._sampler.accept(token_id)
        logits = self._step(self.prompt_token_ids[timings.cache_n:])
        timings.prompt_ms = self._elapsed_ms()
        while True:
            token_id = self._choose(logits[-1])
            now = self._elapsed_ms()
            timings.time_to_first_token_ms = timings.time_to_first_token_ms or now
            timings.predicted_n += 1
            timings.predicted_ms = now - timings.prompt_ms
            if self._is_end(token_id):
                self.finish_reason = "stop"
                return
            self.token_ids.append(token_id)
            shown = self._stream.push(token_id)
            self.text += shown
            self.finish_reason = self._ended()
            yield Piece(shown, token_id, now)
            if self.finish_reason:
                return
            if self._cancelled.is_set():
                raise Cancelled
            start = time.perf_counter()
            logits = self._step([token_id])
            self.decoded_n, self.decode_s = self.decoded_n + 1, self.decode_s + time.perf_counter() - start
            assert engine.kv.length == len(self.prompt_token_ids) + len(self.token_ids)

    def _choose(self, logits: NDArray[np.float32]) -> int:
        constraint = self._constraint
        token_id = self._sampler.sample(logits if constraint is None else constraint.mask(logits))
        self._sampler.accept(token_id)
        if constraint is not None:
            constraint.accept(token_id)
        return token_id

    def _ended(self) -> FinishReason | None:
        if self._stream.stopped or (self._constraint is not None and self._constraint.is_complete):
            return "stop"
        return "length" if len(self.token_ids) >= self._max_tokens else None

    def _step(self, token_ids: list[int]) -> Any:
        before = self._engine.kv.length
        try:
            return self._engine.step(np.array(token_ids, np.int32))
        finally:  # a cancelled prefill keeps the batches that were done
            self._on_tokens(token_ids[:self._engine.kv.length - before])

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._start) * 1000
