"""Makes one answer in the model's process: prompt, functions, pieces, figures.

Knows Runtime and what was asked; gives frames to `emit`. Does not know pipes (worker.py) nor HTTP.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apps.server import tools
from apps.server.asked import Asked, ChatMessage
from apps.server.frames import Frame
from apps.server.pieces import Pieces
from edgert.errors import ContextOverflow, TemplateError
from edgert.text.sampler import SamplingParams

if TYPE_CHECKING:
    from edgert.generation import Generation, Piece
    from edgert.runtime import Runtime

Emit = Callable[[Frame], None]
# A progress bar moves often enough with this, and a prompt of some hundred tokens is over before the first tick.
_TICK_S = 0.25
_MAX_LEFT_OUT = 10_000  # turns that may be left out one after another


@dataclass(slots=True)
class Totals:
    """Figures over the one or two generations of an answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    timings: dict[str, Any] = field(default_factory=dict)

    def add(self, generation: Generation) -> None:
        timings = generation.timings.to_dict()
        if not self.timings:
            self.prompt_tokens, self.timings = len(generation.prompt_token_ids), timings
        else:
            for key in ("predicted_n", "predicted_ms"):
                self.timings[key] = round(self.timings[key] + timings[key], 3)
            self.timings["predicted_ms"] = round(self.timings["predicted_ms"] + timings["prompt_ms"], 3)
            rate = self.timings["predicted_n"] / max(self.timings["predicted_ms"], 1e-3) * 1000
            self.timings["predicted_per_second"] = round(rate, 3)
        self.completion_tokens += len(generation.token_ids)


class Answering:
    """One answer. `cancel` may come from any thread, also before it begins."""

    def __init__(self, runtime: Runtime, asked: Asked, emit: Emit) -> None:
        self._runtime, self._asked, self._emit = runtime, asked, emit
        self._totals = Totals()
        self._left_out = 0
        self._generation: Generation | None = None
        self._cancelled, self._lock = False, threading.Lock()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._generation is not None:
                self._generation.cancel()

    def run(self) -> None:
        """Emit pieces, calls, and the end. Raises EdgertError."""
        choice = self._asked.tools
        prompt_ids = self._prompt_ids()
        if choice is None or choice.use == "none":
            finish_reason = self._plain(prompt_ids)
        elif choice.use == "auto":
            finish_reason = self._text_or_call(prompt_ids)
        else:
            finish_reason = self._required_call(prompt_ids)
        self._emit({"event": "ended", "finish_reason": finish_reason, "prompt_tokens": self._totals.prompt_tokens,
                    "completion_tokens": self._totals.completion_tokens,
                    "cached_tokens": self._totals.timings["cache_n"], "timings": self._totals.timings,
                    "memory": self._runtime.memory(), "plan": plan_of(self._runtime), "left_out": self._left_out})

    def check(self) -> None:
        """Raise what `run` would refuse the prompt with; computes nothing."""
        n_tokens, runtime = len(self._prompt_ids()), self._runtime
        if n_tokens >= runtime.context_length:
            raise ContextOverflow(n_tokens, runtime.context_length, runtime.engine.arch.hp.context_length)

    def _prompt_ids(self) -> list[int]:
        asked, runtime = self._asked, self._runtime
        if isinstance(asked.prompt, str):
            return runtime.tokenize(asked.prompt)
        if asked.prompt is not None:
            return list(asked.prompt)
        messages = list(asked.messages)
        prompt_ids = self._render(messages)
        while not asked.keep_oldest and len(prompt_ids) >= self._room() and self._left_out < _MAX_LEFT_OUT:
            shorter = without_oldest(messages)
            if len(shorter) == len(messages):
                break
            self._left_out += len(messages) - len(shorter)
            messages = shorter
            prompt_ids = self._render(messages)
        return prompt_ids

    def _room(self) -> int:
        """Tokens that a prompt may take when turns are left out: an answer needs some as well."""
        length = self._runtime.context_length
        return length - min(self._asked.max_tokens or length // 4, length // 4)

    def _render(self, messages: Sequence[ChatMessage]) -> list[int]:
        runtime, choice = self._runtime, self._asked.tools
        if not runtime.has_template:
            raise TemplateError(str(runtime.model.path.name), "the file has none")
        functions = () if choice is None or choice.use == "none" else choice.functions
        if tools.is_native(runtime.model.get_str("tokenizer.chat_template")):
            told = [{"type": "function", "function": dict(function)} for function in functions] or None
            return runtime.render([dict(message) for message in messages], tools=told)
        return runtime.render(tools.told(messages, functions))

    def _plain(self, prompt_ids: Sequence[int]) -> str:
        generation = self._generate(prompt_ids, json_schema=self._asked.json_schema, grammar=self._asked.grammar)
        self._show(generation)
        return _reason(generation)

    def _text_or_call(self, prompt_ids: Sequence[int]) -> str:
        """Free text, until it opens a call: that is then made under the functions' schema."""
        generation = self._generate(prompt_ids, stop=(*self._asked.stop, tools.OPEN))
        self._show(generation)
        tokenizer, choice = self._runtime.tokenizer, self._asked.tools
        assert tokenizer is not None and choice is not None
        said = tokenizer.decode(generation.token_ids).decode("utf-8", errors="replace")
        if generation.finish_reason != "stop" or not said[len(generation.text):].startswith(tools.OPEN):
            return _reason(generation)
        opened = self._runtime.tokenize(f"{generation.text}{tools.OPEN}\n", add_special=False)
        return self._call([*prompt_ids, *opened], tools.call_schema(choice.functions))

    def _required_call(self, prompt_ids: Sequence[int]) -> str:
        choice = self._asked.tools
        assert choice is not None
        wanted = [one for one in choice.functions if choice.name in (None, one["name"])]
        if len(wanted) > 1:
            opened = self._runtime.tokenize(f"{tools.OPEN}\n", add_special=False)
            return self._call([*prompt_ids, *opened], tools.call_schema(wanted))
        name = wanted[0]["name"]
        opened = self._runtime.tokenize(tools.call_prefix(name), add_special=False)
        generation = self._generate([*prompt_ids, *opened], json_schema=tools.arguments_schema(wanted[0]), stop=())
        generation.result()
        self._finish(generation)
        self._emit({"event": "tool_call", "name": name, "arguments": generation.text})
        return "tool_calls" if generation.finish_reason == "stop" else _reason(generation)

    def _call(self, prompt_ids: Sequence[int], schema: Mapping[str, Any]) -> str:
        generation = self._generate(prompt_ids, json_schema=schema, stop=())
        generation.result()
        self._finish(generation)
        call = tools.parse_call(generation.text)
        if call is None:
            return _reason(generation)
        self._emit({"event": "tool_call", "name": call[0], "arguments": call[1]})
        return "tool_calls"

    def _generate(self, prompt_ids: Sequence[int], **options: Any) -> Generation:
        asked = self._asked
        sampling = {**asked.sampling}
        if "logit_bias" in sampling:  # JSON's keys are texts
            sampling["logit_bias"] = {int(key): value for key, value in sampling["logit_bias"].items()}
        spent = self._totals.completion_tokens
        max_tokens = None if asked.max_tokens is None else max(1, asked.max_tokens - spent)
        generation = self._runtime.generate(prompt_ids, **{
            "max_tokens": max_tokens, "sampling": SamplingParams(**sampling), "stop": asked.stop,
            "logprobs": asked.logprobs, **options})
        with self._lock:
            self._generation = generation
            if self._cancelled:
                generation.cancel()
        return generation

    def _show(self, generation: Generation) -> None:
        with Ticker(self._runtime, generation, self._emit) as ticker, Pieces(self._emit) as pieces:
            for piece in generation:
                ticker.stop()
                pieces.add(piece.text, None if piece.logprobs is None else self._logprobs(piece))
        self._finish(generation)

    def _finish(self, generation: Generation) -> None:
        self._totals.add(generation)
        with self._lock:
            self._generation = None

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        assert piece.logprobs is not None
        return {**self._token(piece.token_id, piece.logprobs.chosen),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in piece.logprobs.top]}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        tokenizer = self._runtime.tokenizer
        raw = tokenizer.piece(token_id, special=True) if tokenizer is not None else b""
        return {"token": raw.decode("utf-8", errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def _reason(generation: Generation) -> str:
    return generation.finish_reason or "stop"


def without_oldest(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The conversation without its oldest turn: what a user said, and all up to what the user said next. The system
    message and the last turn stay."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    following = next((i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"), None)
    return list(messages) if following is None else [*messages[:first], *messages[following:]]


class Ticker:
    """Emits how far the prompt is: at once, and from a thread of its own until the first token."""

    def __init__(self, runtime: Runtime, generation: Generation, emit: Emit) -> None:
        self._engine, self._generation, self._emit = runtime.engine, generation, emit
        weights = self._engine.weights
        self._bytes_per_pass = int(weights.plan().get("streamed_bytes_per_pass", 0))
        self._bytes_before = weights.streamed_bytes
        self._start = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefill-progress", daemon=True)

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(_TICK_S):
            self._tell(self._n_done())

    def _tell(self, n_done: int) -> None:
        generation = self._generation
        self._emit({"event": "prefill", "n_done": n_done, "n_total": len(generation.prompt_token_ids),
                    "n_cached": generation.timings.cache_n, "time_ms": round((time.monotonic() - self._start) * 1000)})

    def _n_done(self) -> int:
        """Tokens in the KV cache; where weights stream, all tokens pass a layer together, so the share of the bytes
        that were read."""
        timings = self._generation.timings
        n_cached = min(max(0, self._engine.kv.length - timings.cache_n), timings.prompt_n)
        if self._bytes_per_pass:
            share = (self._engine.weights.streamed_bytes - self._bytes_before) / self._bytes_per_pass
            n_cached = max(n_cached, int(min(1.0, share) * timings.prompt_n))
        return timings.cache_n + n_cached

    def __enter__(self) -> Ticker:
        self._tell(self._generation.timings.cache_n)  # how long the prompt is
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


def describe(runtime: Runtime) -> Frame:
    """What the server tells of a loaded model."""
    hp = runtime.engine.arch.hp
    return {"context_length": runtime.context_length, "trained_length": hp.context_length,
            "vocab_size": hp.vocab_size, "plan": plan_of(runtime), "memory": runtime.memory(),
            "has_template": runtime.has_template}


def plan_of(runtime: Runtime) -> Frame:
    """How the model runs now, as JSON has it: what streams and which devices compute may change between answers."""
    plan: Frame = json.loads(json.dumps(runtime.plan(), default=str))
    return plan
