"""One answer as it is made: its order, why it ends, and who may stop it. Over an engine that says what it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.errors import ComputeError, UsageError
from edgert.generation import Generation
from edgert.ggml.backend import Cancelled
from edgert.text.sampler import Sampler, SamplingParams
from edgert.text.stream import TextStream

VOCAB_SIZE, END, NONSENSE = 32, 31, 30
GREEDY = SamplingParams(temperature=0)
PIECES = {token_id: chr(ord("a") + token_id).encode() for token_id in range(26)} | {
    26: "é".encode()[:1], 27: "é".encode()[1:], 28: b"!", 29: b"*", NONSENSE: b"?", END: b""}


@dataclass
class FakeKV:
    token_ids: list[int]
    context_length: int = 100

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def truncate(self, n_tokens: int) -> None:
        del self.token_ids[n_tokens:]


@dataclass
class FakeWeights:
    """Each step reads 100 bytes and waits for them for an hour."""

    waited_s: float = 0.0
    streamed_bytes: int = 0


class FakeEngine:
    """Says `script` after the prompt, nonsense after anything else; `on_step` may do what it likes before a step."""

    batch_size = 512

    def __init__(self, prompt: list[int], script: list[int], *, context_length: int = 100, held: int = 0) -> None:
        self.kv, self.weights = FakeKV(prompt[:held], context_length), FakeWeights()
        self._n_prompt, self._text = len(prompt), [*prompt, *script]
        self.steps: list[list[int]] = []
        self.cancelled = False
        self.on_step: Callable[[], object] = lambda: None

    def step(self, token_ids: NDArray[np.int32], n_outputs: int = 1) -> NDArray[np.float32]:
        self.on_step()
        if self.cancelled:
            raise Cancelled
        self.steps.append(token_ids.tolist())
        self.kv.token_ids += token_ids.tolist()
        assert self.kv.length <= self.kv.context_length
        self.weights.waited_s += 3600
        self.weights.streamed_bytes += 100
        logits = np.zeros((n_outputs, VOCAB_SIZE), np.float32)
        for row, end in enumerate(range(self.kv.length - n_outputs + 1, self.kv.length + 1)):
            is_script = self.kv.token_ids[:end] == self._text[:end] and end < len(self._text)
            logits[row, self._text[end] if is_script else NONSENSE] = 1
        return logits

    def cancel(self) -> None:
        self.cancelled = True

    def resume(self) -> None:
        self.cancelled = False


class Guesses:
    """Guesses what it is told to after so many tokens of the answer."""

    def __init__(self, drafts: dict[int, list[int]]) -> None:
        self._drafts = drafts
        self.heard: list[int] = []

    def said(self, token_id: int) -> None:
        self.heard.append(token_id)

    def draft(self, n_most: int) -> list[int]:
        return self._drafts.get(len(self.heard), [])[:max(0, n_most)]

    def measured(self, n_tokens: int, time_s: float) -> None:
        assert time_s >= 0


@dataclass
class Made:
    """A generation and what it reported."""

    generation: Generation
    engine: FakeEngine
    in_cache: list[int] = field(default_factory=list)


def make(script: list[int], *, prompt: list[int] | None = None, max_tokens: int | None = None,
         stop: tuple[str, ...] = (), guesses: dict[int, list[int]] | None = None, sampling: SamplingParams = GREEDY,
         constraint: Any = None, engine_type: type[FakeEngine] = FakeEngine, **engine_options: Any) -> Made:
    prompt = prompt or [1, 2, 3]
    engine = engine_type(prompt, script, **engine_options)
    in_cache: list[int] = []
    generation = Generation(
        engine,  # type: ignore[arg-type]
        prompt, Sampler(sampling, VOCAB_SIZE), TextStream(PIECES.__getitem__, stop),
        max_tokens=max_tokens, is_end=lambda token_id: token_id == END, on_tokens=in_cache.extend,
        constraint=constraint, speculation=Guesses(guesses) if guesses else None)  # type: ignore[arg-type]
    return Made(generation, engine, in_cache)


# -- how an answer goes ------------------------------------------------------------------------------------------------
def test_the_prompt_is_computed_at_once_then_token_after_token() -> None:
    made = make([4, 5, 6, END])
    assert made.generation.finish_reason is None
    pieces = list(made.generation)
    assert made.engine.steps == [[1, 2, 3], [4], [5], [6]]
    assert [piece.token_id for piece in pieces] == made.generation.token_ids == [4, 5, 6]
    assert "".join(piece.text for piece in pieces) == made.generation.text == "efg"
    assert made.in_cache == [1, 2, 3, 4, 5, 6]
    assert made.generation.prompt_token_ids == [1, 2, 3]
    times = [piece.time_ms for piece in pieces]
    assert times == sorted(times)


def test_what_the_cache_holds_is_not_computed_again() -> None:
    made = make([4, END], prompt=[1, 2, 3, 7], held=3)
    assert made.generation.result() == "e"
    assert made.engine.steps == [[7], [4]]
    assert (made.generation.timings.cache_n, made.generation.timings.prompt_n) == (3, 1)
    assert made.in_cache == [7, 4]


def test_nothing_happens_before_the_first_piece_is_asked_for() -> None:
    made = make([4, END])
    assert made.engine.steps == []
    assert next(iter(made.generation)).token_id == 4
    assert made.engine.steps == [[1, 2, 3]]


# -- why it ends -------------------------------------------------------------------------------------------------------
def test_an_end_token_stops_and_is_not_among_the_tokens() -> None:
    made = make([4, END])
    assert made.generation.result() == "e"
    assert made.generation.finish_reason == "stop"
    assert made.generation.token_ids == [4]
    assert made.generation.timings.predicted_n == 2  # as llama-server counts: it was predicted


def test_an_end_token_at_once_is_an_empty_answer() -> None:
    made = make([END])
    assert list(made.generation) == []
    assert (made.generation.text, made.generation.finish_reason, made.generation.token_ids) == ("", "stop", [])


@pytest.mark.parametrize(("script", "stop", "text"), [
    ([0, 1, 2, 3], ("c",), "ab"), ([0, 1, 2, 3], ("bc",), "a"), ([0, 1, 2, 3], ("bd", "cd"), "ab"),
])
def test_a_stop_string_ends_before_itself_also_across_tokens(script: list[int], stop: tuple[str, ...],
                                                             text: str) -> None:
    made = make([*script, 9, 9], stop=stop)
    pieces = list(made.generation)
    assert "".join(piece.text for piece in pieces) == made.generation.text == text
    assert made.generation.finish_reason == "stop"
    assert len(made.engine.steps) == len(made.generation.token_ids) < 5


def test_the_wanted_length_ends_it_and_held_back_text_is_shown() -> None:
    made = make([0, 1, 2], max_tokens=2, stop=("bcd",))
    pieces = list(made.generation)
    assert made.generation.finish_reason == "length"
    assert made.generation.token_ids == [0, 1]
    assert [piece.text for piece in pieces] == ["a", "", "b"]
    assert pieces[-1].token_id == 1
    assert made.generation.text == "ab"
    assert made.engine.steps == [[1, 2, 3], [0]]  # the last token is not computed


def test_a_character_in_two_tokens_is_shown_whole() -> None:
    made = make([0, 26, 27, 1, END])
    assert [piece.text for piece in made.generation] == ["a", "", "é", "b"]


def test_half_a_character_at_the_end_is_marked() -> None:
    made = make([0, 26], max_tokens=2)
    assert made.generation.result() == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("max_tokens", [None, 1000, 5])
def test_a_full_context_ends_it(max_tokens: int | None) -> None:
    made = make(list(range(20)), context_length=8, max_tokens=max_tokens)
    assert made.generation.result() == "abcde"
    assert made.generation.finish_reason == "length"
    assert made.engine.kv.length == 7  # the eighth token is said, and not computed


# -- stopping it -------------------------------------------------------------------------------------------------------
def test_cancelling_between_tokens_keeps_what_was_said() -> None:
    made = make([0, 1, 2, 3], stop=("bX",))
    shown = []
    for piece in made.generation:
        shown.append(piece.text)
        if piece.token_id == 1:
            made.generation.cancel()
    assert made.generation.finish_reason == "cancelled"
    assert "".join(shown) == made.generation.text == "ab"
    assert made.in_cache == [1, 2, 3, 0]
    assert not made.engine.cancelled  # the engine is free for the next request


def test_cancelling_a_prefill_from_another_thread_ends_with_nothing_said() -> None:
    made = make([0, 1])
    made.engine.on_step = lambda: _in_a_thread(made.generation.cancel)
    assert list(made.generation) == []
    assert (made.generation.finish_reason, made.generation.text, made.in_cache) == ("cancelled", "", [])
    assert made.generation.timings.to_dict()["prompt_per_second"] is None
    assert not made.engine.cancelled


def test_cancelling_before_it_begins_computes_nothing() -> None:
    made = make([0, 1])
    made.generation.cancel()
    assert list(made.generation) == []
    assert made.generation.finish_reason == "cancelled"
    assert made.engine.steps == []
    assert not made.engine.cancelled


def test_cancelling_what_has_ended_does_not_touch_the_next_request() -> None:
    first = make([0, END])
    first.generation.result()
    first.generation.cancel()
    assert first.generation.finish_reason == "stop"
    assert not first.engine.cancelled


def test_a_late_cancel_cannot_slip_in_between_two_requests() -> None:
    """A cancel that has looked, and found the answer unfinished, is done before the answer is."""
    made = make([0, END])
    looked, may_go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        looked.set()
        may_go_on.wait(20)
        made.engine.cancelled = True

    made.engine.cancel = slowly  # type: ignore[method-assign]
    pieces = iter(made.generation)
    next(pieces)
    canceller = threading.Thread(target=made.generation.cancel)
    canceller.start()
    assert looked.wait(20)
    ender = threading.Thread(target=lambda: list(pieces))
    ender.start()
    ender.join(0.05)  # it waits for the cancel; if it did not, it would be done by now
    may_go_on.set()
    for thread in (canceller, ender):
        thread.join(20)
        assert not thread.is_alive()
    assert made.generation.finish_reason == "cancelled"
    assert not made.engine.cancelled


def test_a_signal_may_cancel_while_an_answer_ends() -> None:
    """The handler runs in the same thread, at any place: here while the engine is given free."""
    made = make([0, END])
    made.engine.resume = made.generation.cancel  # type: ignore[method-assign]
    made.generation.result()
    assert made.generation.finish_reason in ("stop", "cancelled")


def test_leaving_the_loop_ends_it() -> None:
    made = make([0, 1, 2, 3])
    for piece in made.generation:
        if piece.token_id == 1:
            break
    assert made.generation.finish_reason == "cancelled"
    assert made.generation.text == "ab"
    assert list(made.generation) == []


def test_an_error_in_the_loop_ends_it() -> None:
    made = make([0, 1, 2, 3])
    with pytest.raises(RuntimeError, match="the reader's"):
        for _ in made.generation:
            raise RuntimeError("the reader's")
    assert made.generation.finish_reason == "cancelled"


def test_closing_ends_it_whether_it_has_begun_or_not() -> None:
    for begin in (True, False):
        made = make([0, 1, 2, 3])
        pieces = iter(made.generation)
        if begin:
            next(pieces)
        made.generation.close()
        made.generation.close()
        assert made.generation.finish_reason == "cancelled"
        assert list(pieces) == []
        assert len(made.engine.steps) == begin


def test_closing_while_another_thread_computes_is_refused() -> None:
    made = make([0, 1, END])
    errors: list[BaseException] = []

    def close() -> None:
        try:
            made.generation.close()
        except UsageError as error:
            errors.append(error)

    made.engine.on_step = lambda: _in_a_thread(close)
    assert made.generation.result() == "ab"
    assert len(errors) == 3
    assert "another thread" in str(errors[0])


def test_an_error_of_the_engine_reaches_the_reader_and_what_was_said_stays() -> None:
    made = make([0, 1, 2])

    def fail() -> None:
        if len(made.engine.steps) == 2:
            raise ComputeError("ggml stopped")

    made.engine.on_step = fail
    with pytest.raises(ComputeError):
        made.generation.result()
    assert made.generation.text == "ab"
    assert made.generation.finish_reason is not None
    assert made.in_cache == [1, 2, 3, 0]
    assert list(made.generation) == []


# -- guesses -----------------------------------------------------------------------------------------------------------
def test_right_guesses_are_said_and_wrong_ones_forgotten() -> None:
    made = make([4, 5, 6, 7, 8, 9, END], guesses={1: [5, 6, 20, 8], 4: [7], 5: [9, 9]})
    pieces = list(made.generation)
    assert made.engine.steps == [[1, 2, 3], [4, 5, 6, 20, 8], [7, 7], [8, 9, 9]]
    assert [piece.token_id for piece in pieces] == made.generation.token_ids == [4, 5, 6, 7, 8, 9]
    assert made.generation.finish_reason == "stop"
    assert made.in_cache == made.engine.kv.token_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    timings = made.generation.timings
    assert (timings.draft_n, timings.draft_n_accepted, timings.predicted_n) == (7, 3, 7)


@pytest.mark.parametrize("wrong_every", [1, 2, 3, 5])
@pytest.mark.parametrize("draft_length", [1, 3, 15])
def test_an_answer_is_the_same_whatever_is_guessed(wrong_every: int, draft_length: int) -> None:
    script = [i * i % 26 for i in range(60)]
    drafts = {n: [token_id if i % wrong_every else 29 for i, token_id in enumerate(script[n:n + draft_length], n)]
              for n in range(1, 60)}
    for options in ({"max_tokens": 50}, {"stop": ("zja",)}, {"context_length": 40}, {"stop": ("ab", "e")}):
        alone, guessed = make(script, **options), make(script, guesses=drafts, **options)  # type: ignore[arg-type]
        texts = [[piece.text for piece in made.generation] for made in (alone, guessed)]
        assert texts[0] == texts[1]
        assert alone.generation.token_ids == guessed.generation.token_ids
        assert alone.generation.finish_reason == guessed.generation.finish_reason
        assert alone.generation.timings.predicted_n == guessed.generation.timings.predicted_n
        assert guessed.in_cache == guessed.engine.kv.token_ids
        said = [1, 2, 3, *guessed.generation.token_ids]
        assert guessed.in_cache == said[:len(guessed.in_cache)]
        assert len(said) - len(guessed.in_cache) <= 1


def test_a_guessed_end_token_ends_it() -> None:
    made = make([4, 5, END, 6, 7], guesses={1: [5, END, 6, 7]})
    assert made.generation.result() == "ef"
    assert made.generation.finish_reason == "stop"
    assert made.in_cache == made.engine.kv.token_ids == [1, 2, 3, 4, 5]


def test_guesses_leave_room_in_the_context() -> None:
    made = make(list(range(20)), context_length=8, guesses={1: list(range(1, 20))})
    assert made.generation.result() == "abcde"
    assert made.engine.steps == [[1, 2, 3], [0, 1, 2, 3]]


def test_what_is_guessed_hears_what_is_said() -> None:
    made = make([4, 5, 6, 7, END], guesses={1: [5, 9], 3: [7]})
    made.generation.result()
    assert made.generation._speculation.heard == [4, 5, 6, 7]  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["cancel", "close", "leave", "error"])
def test_stopping_among_guesses_keeps_what_was_said_and_no_more(how: str) -> None:
    made = make([0, 1, 2, 3, 4, 5], guesses={1: [1, 2, 3, 4, 5]})
    pieces = iter(made.generation)
    shown = [next(pieces).token_id for _ in range(3)]
    if how == "cancel":
        made.generation.cancel()
    elif how == "close":
        made.generation.close()
    elif how == "leave":
        pieces.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(RuntimeError):
            pieces.throw(RuntimeError())  # type: ignore[attr-defined]
    assert list(pieces) == []
    assert shown == made.generation.token_ids == [0, 1, 2]
    assert made.generation.finish_reason == "cancelled"
    assert made.in_cache == made.engine.kv.token_ids == [1, 2, 3, 0, 1, 2]


def test_chance_falls_as_it_would_without_guesses() -> None:
    """One draw a token, from the logits of its place: the sampler's state is where it would be."""
    class Undecided(FakeEngine):
        def step(self, token_ids: NDArray[np.int32], n_outputs: int = 1) -> NDArray[np.float32]:
            super().step(token_ids, n_outputs)
            ends = range(self.kv.length - n_outputs, self.kv.length)
            return np.stack([np.random.default_rng(end).normal(size=VOCAB_SIZE).astype(np.float32) for end in ends])

    sampling = SamplingParams(temperature=1.0, seed=5, repeat_penalty=1.3)
    alone = make([], max_tokens=30, sampling=sampling, engine_type=Undecided)
    alone.generation.result()
    said = alone.generation.token_ids
    assert len(set(said)) > 5
    drafts = {n: [*said[n:n + 3], 29] for n in range(1, 30)}
    guessed = make([], max_tokens=30, sampling=sampling, guesses=drafts, engine_type=Undecided)
    guessed.generation.result()
    assert guessed.generation.token_ids == said
    assert guessed.generation.timings.draft_n_accepted > 5


def test_guesses_obey_a_constraint_token_by_token() -> None:
    """A guess that the form does not allow is not said, though the model finds it best."""
    class EvenThenOdd:
        is_complete = False

        def __init__(self) -> None:
            self.accepted: list[int] = []

        def mask(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
            masked = logits.copy()
            masked[1 - len(self.accepted) % 2::2] = -np.inf
            return masked

        def accept(self, token_id: int) -> None:
            assert token_id % 2 == len(self.accepted) % 2
            self.accepted.append(token_id)
            self.is_complete = len(self.accepted) == 5

    constraint = EvenThenOdd()
    made = make([4, 5, 6, 8], guesses={1: [5, 6, 8, 9]}, constraint=constraint)
    list(made.generation)
    assert made.engine.steps[1] == [4, 5, 6, 8, 9]
    assert made.generation.token_ids == constraint.accepted
    assert made.generation.token_ids[:3] == [4, 5, 6]
    assert made.generation.token_ids[3] % 2 == 1
    assert made.in_cache == made.engine.kv.token_ids
    assert made.generation.finish_reason == "stop"


# -- its figures -------------------------------------------------------------------------------------------------------
def test_timings_have_llama_servers_names() -> None:
    made = make([0, 1, END])
    made.generation.result()
    timings = made.generation.timings.to_dict()
    assert set(timings) == {"cache_n", "prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms",
                            "predicted_per_second", "time_to_first_token_ms", "draft_n", "draft_n_accepted",
                            "forecast_per_second", "forecast_time_to_first_token_ms",
                            *(f"{phase}_{part}" for phase in ("prompt", "predicted")
                              for part in ("compute_ms", "wait_ms", "rest_ms", "read_bytes"))}
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (0, 3, 3)
    assert 0 < timings["prompt_ms"] <= timings["time_to_first_token_ms"]
    assert timings["prompt_per_second"] == pytest.approx(3 / made.generation.timings.prompt_ms * 1000, abs=0.01)
    assert timings["predicted_per_second"] == pytest.approx(3 / made.generation.timings.predicted_ms * 1000, abs=0.01)


def test_the_time_is_accounted_for() -> None:
    """Waits of an hour a step are told from computing, and no moment is counted twice or left out."""
    made = make([0, 1, 2, END])
    made.engine.on_step = lambda: time.sleep(0.01)
    for _ in made.generation:
        time.sleep(0.005)  # whoever reads it
    timings = made.generation.timings.to_dict()
    hour_ms = 3600e3
    for phase, n_steps in (("prompt", 1), ("predicted", 3)):
        compute_ms, wait_ms, rest_ms = (timings[f"{phase}_{part}_ms"] for part in ("compute", "wait", "rest"))
        assert wait_ms == pytest.approx(n_steps * hour_ms)
        assert compute_ms + n_steps * hour_ms >= n_steps * 10
        assert rest_ms >= (15 if phase == "predicted" else 0)
        assert compute_ms + wait_ms + rest_ms == pytest.approx(timings[f"{phase}_ms"], abs=3)
        assert timings[f"{phase}_read_bytes"] == 100 * n_steps


def _in_a_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
