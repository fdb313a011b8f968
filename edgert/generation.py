"""One answer as it is made: prefill, then sample, step, emit, until something ends it.

Knows the order of a request's steps, and verifies the tokens that speculation guesses. Does not know where weights
lie (engine) nor who reads the text (apps).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgert.engine.account import Account, Laps
from edgert.engine.engine import Engine
from edgert.errors import UsageError
from edgert.ggml.backend import Cancelled
from edgert.text.logprobs import TokenLogprobs, token_logprobs
from edgert.text.sampler import Sampler
from edgert.text.stream import TextStream

if TYPE_CHECKING:
    from edgert.speculation import Speculation
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
    logprobs: TokenLogprobs | None = None  # where they were asked for


@dataclass(slots=True)
class Timings:
    """llama-server's names. `cache_n` prompt tokens were in the KV cache already, `prompt_n` were computed. `draft_n`
    tokens of the answer were guessed before they were computed, and `draft_n_accepted` of them rightly.

    `prompt` and `predicted` say where `prompt_ms` and `predicted_ms` went.
    """

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0
    draft_n: int = 0
    draft_n_accepted: int = 0
    time_to_first_token_ms: float = 0.0
    prompt: Account = field(default_factory=Account)
    predicted: Account = field(default_factory=Account)
    forecast_per_second: float | None = None
    """Tokens per second that the plan promised for the answer's beginning; None on a device of which nothing is known,
    neither by `edgert plan` nor by an answer."""
    forecast_time_to_first_token_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat: the parts of `prompt_ms` are `prompt_compute_ms`, `prompt_wait_ms` and `prompt_rest_ms`."""
        values = asdict(self)
        for phase in ("prompt", "predicted"):
            values |= {f"{phase}_{key}": value for key, value in values.pop(phase).items()}
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}
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
                 constraint: Constraint | None = None, speculation: Speculation | None = None,
                 n_logprobs: int | None = None) -> None:
        self.prompt_token_ids = list(prompt_ids)
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.timings = Timings(cache_n=engine.kv.length, prompt_n=len(prompt_ids) - engine.kv.length)
        self._engine, self._sampler, self._stream = engine, sampler, stream
        self._is_end, self._on_tokens, self._constraint = is_end, on_tokens, constraint
        self._speculation, self._n_logprobs = speculation, n_logprobs
        room = engine.kv.context_length - len(self.prompt_token_ids)
        self._max_tokens = room if max_tokens is None else min(max_tokens, room)
        self._cancelled, self._lock = threading.Event(), threading.RLock()  # a signal handler may cancel anywhere
        self.decoded_n, self.decode_s = 0, 0.0  # passes of one token, without what happens between them
        self._start, self._laps = time.perf_counter(), Laps(engine.weights)
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
        timings = self.timings
        for token_id in self.prompt_token_ids:
            self._sampler.accept(token_id)
        logits = self._prefill(self.prompt_token_ids[timings.cache_n:])
        timings.prompt_ms = self._elapsed_ms()
        draft: list[int] = []
        while True:
            yield from self._say(logits, draft)
            if self.finish_reason:
                return
            if self._cancelled.is_set():
                raise Cancelled
            draft = self._draft()
            logits = self._step([self.token_ids[-1], *draft])

    def _say(self, logits: NDArray[np.float32], draft: list[int]) -> Iterator[Piece]:
        """Choose a token from each row, for as long as it is the one that was guessed; forget the other guesses."""
        n_right = 0
        try:
            for row, guess in zip(logits, [*draft, None], strict=True):
                piece = self._emit(self._choose(row), guess, row)
                if piece is None:
                    return
                n_right += piece.token_id == guess
                yield piece
                if self.finish_reason or self._cancelled.is_set() or piece.token_id != guess:
                    return
        finally:
            self._keep(draft, n_right)

    def _emit(self, token_id: int, guess: int | None, logits: NDArray[np.float32]) -> Piece | None:
        """Say the token. None for an end token, which is not said; the last piece sets `finish_reason`."""
        timings, now = self.timings, self._elapsed_ms()
        self._laps.rest(timings.predicted)
        timings.time_to_first_token_ms = timings.time_to_first_token_ms or now
        timings.predicted_n += 1
        timings.predicted_ms = now - timings.prompt_ms
        if self._is_end(token_id):
            self.finish_reason = "stop"
            return None
        timings.draft_n_accepted += token_id == guess
        self.token_ids.append(token_id)
        if self._speculation is not None:
            self._speculation.said(token_id)
        shown = self._stream.push(token_id)
        self.text += shown
        self.finish_reason = self._ended()
        return Piece(shown, token_id, now, self._logprobs(logits, token_id))

    def _choose(self, logits: NDArray[np.float32]) -> int:
        constraint = self._constraint
        token_id = self._sampler.sample(logits if constraint is None else constraint.mask(logits))
        self._sampler.accept(token_id)
        if constraint is not None:
            constraint.accept(token_id)
        return token_id

    def _logprobs(self, logits: NDArray[np.float32], token_id: int) -> TokenLogprobs | None:
        return None if self._n_logprobs is None else token_logprobs(logits, token_id, self._n_logprobs)

    def _ended(self) -> FinishReason | None:
        if self._stream.stopped or (self._constraint is not None and self._constraint.is_complete):
            return "stop"
        return "length" if len(self.token_ids) >= self._max_tokens else None

    def _draft(self) -> list[int]:
        """Guesses at the tokens after the last one, so few that the answer's end is not passed."""
        if self._speculation is None:
            return []
        draft = self._speculation.draft(self._max_tokens - len(self.token_ids) - 1)
        self.timings.draft_n += len(draft)
        return draft

    def _keep(self, draft: list[int], n_right: int) -> None:
        """Forget the guesses that were not said: the KV cache holds tokens of this answer alone."""
        kv = self._engine.kv
        kv.truncate(kv.length - (len(draft) - n_right))
        self._on_tokens(draft[:n_right])

    def _prefill(self, token_ids: list[int]) -> NDArray[np.float32]:
        before = self._engine.kv.length
        self._laps.rest(self.timings.prompt)
        try:
            logits = self._engine.step(np.array(token_ids, np.int32))
        finally:  # a cancelled one keeps the batches that were done
            self._on_tokens(token_ids[:self._engine.kv.length - before])
        self._laps.step(self.timings.prompt)
        return logits

    def _step(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Compute the last token and the guesses after it; logits of all of them."""
        assert self._engine.kv.length == len(self.prompt_token_ids) + len(self.token_ids) - 1
        self._laps.rest(self.timings.predicted)
        logits = self._engine.step(np.array(token_ids, np.int32), len(token_ids))
        self._on_tokens(token_ids[:1])
        step_s = self._laps.step(self.timings.predicted)
        if len(token_ids) == 1:
            self.decoded_n, self.decode_s = self.decoded_n + 1, self.decode_s + step_s
        if self._speculation is not None:
            self._speculation.measured(len(token_ids), step_s)
        return logits

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._start) * 1000
