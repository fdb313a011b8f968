"""Who is measured: edgert, and llama.cpp as its peer, behind one face. Each lives in a process of its own (worker.py).

A contender holds one sequence. It computes the tokens that it is given and chooses none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from apps.bench.speed import Counters

if TYPE_CHECKING:
    from apps.bench.llamacpp import LlamaCpp
    from edgert.engine.kv_cache import KVType
    from edgert.engine.layouts import LayoutChoice
    from edgert.planning import EngineOptions
    from edgert.runtime import Runtime
    from tensorpar.workers import ClusterOptions

EngineName = Literal["edgert", "llama.cpp"]
# A prompt as a person would send it, repeated until it is long enough.
_SENTENCES = ("The lighthouse keeper climbed the stairs and looked at the sea. ",
              "A ship had passed at noon, and its wake was still to be seen. ")


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is opened: one point of a sweep. `memory_bytes` None is no budget, `n_threads` None one a core."""

    memory_bytes: int | None
    n_threads: int
    batch_size: int
    layout: LayoutChoice
    kv_type: KVType
    context_length: int

    def engine_options(self) -> EngineOptions:
        from edgert.planning import EngineOptions

        return EngineOptions(self.memory_bytes, self.context_length, self.n_threads, self.batch_size, self.kv_type,
                             self.layout, "off")


class Contender(Protocol):
    """One sequence over one model."""

    vocab_size: int
    end_ids: list[int]
    """Tokens that end an answer; none are chosen, so that every run makes as many tokens as it should."""

    def step(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Append tokens (n,); logits (vocab_size,) of the last one, valid until the next step."""
        ...

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens`."""
        ...

    def counters(self) -> Counters: ...

    def facts(self) -> dict[str, Any]:
        """How it runs, and the memory that it has taken until now."""
        ...

    def predict_ns(self, n_tokens: int, n_cached: int) -> float | None:
        """How long a pass should take; None where nobody has said."""
        ...

    def first_token(self, n_prompt: int) -> tuple[int, int] | None:
        """Nanoseconds until the first piece of an answer to a text of about `n_prompt` tokens, template, tokenizer and
        sampler included, and how many tokens it had; None where text means nothing to it."""
        ...

    def close(self) -> None: ...


class Edgert:
    """edgert's own Runtime. Nothing is guessed, and nothing learnt from what is measured."""

    def __init__(self, path: Path, setup: Setup, cluster: ClusterOptions | None = None) -> None:
        """Raises what Runtime.load raises."""
        from edgert.runtime import Runtime

        self._runtime: Runtime = Runtime.load(
            path, memory=setup.memory_bytes, context=setup.context_length, threads=setup.n_threads,
            batch=setup.batch_size, kv_type=setup.kv_type, layout=setup.layout, speculate="off", cluster=cluster,
            learn=False)
        engine, tokenizer = self._runtime.engine, self._runtime.tokenizer
        self._engine, self.vocab_size = engine, engine.arch.hp.vocab_size
        self.end_ids = tokenizer.end_ids() if tokenizer else []

    def step(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._engine.step(token_ids)[-1]
        return logits

    def truncate(self, n_tokens: int) -> None:
        self._engine.kv.truncate(n_tokens)

    def counters(self) -> Counters:
        weights = self._engine.weights
        plan = weights.plan() if weights.experts is not None else {}
        return Counters(weights.streamed_bytes, round(weights.waited_s * 1e9), plan.get("expert_hits", 0),
                        plan.get("expert_misses", 0))

    def facts(self) -> dict[str, Any]:
        forecast = self._runtime.forecast
        return {"plan": self._runtime.plan(), **self._runtime.memory(),
                "is_resident": self._engine.weights.resident,
                "is_calibrated": forecast is not None and forecast.planning.is_calibrated}

    def predict_ns(self, n_tokens: int, n_cached: int) -> float | None:
        forecast = self._runtime.forecast
        if forecast is None or not forecast.planning.is_calibrated:
            return None
        return forecast.predict(n_tokens, n_cached).total_s * 1e9

    def first_token(self, n_prompt: int) -> tuple[int, int] | None:
        from edgert.text.sampler import SamplingParams

        runtime = self._runtime
        if runtime.tokenizer is None:
            return None
        text, options = synthetic_text(runtime, n_prompt), {"max_tokens": 1, "sampling": SamplingParams(seed=0)}
        self.truncate(0)  # no prefix is reused
        start_ns = time.monotonic_ns()
        answer = runtime.chat([{"role": "user", "content": text}], **options) if runtime.has_template else \
            runtime.generate(text, **options)  # type: ignore[arg-type]
        next(iter(answer), None)  # nothing, where the answer's first token ends it
        took_ns = time.monotonic_ns() - start_ns
        self.truncate(0)
        return took_ns, len(answer.prompt_token_ids)

    def close(self) -> None:
        self._runtime.close()


class LlamaCppContender:
    """llama.cpp through llama-cpp-python's low-level interface, with the same settings."""

    end_ids: list[int] = []  # noqa: RUF012 - it chooses no tokens

    def __init__(self, path: Path, setup: Setup) -> None:
        from apps.bench.llamacpp import LlamaCpp

        # Its own default repacks, which is what `auto` leaves to it, but for a budget that a second copy would break.
        repacks = setup.layout == "repack" or (setup.layout == "auto" and setup.memory_bytes is None)
        self._peer: LlamaCpp = LlamaCpp(
            path, context_length=setup.context_length, n_threads=setup.n_threads, repack=repacks,
            kv_type=setup.kv_type, batch_size=setup.batch_size)
        self.vocab_size = self._peer.vocab_size

    def step(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._peer.decode(token_ids)

    def truncate(self, n_tokens: int) -> None:
        self._peer.truncate(n_tokens)

    def counters(self) -> Counters:
        return Counters()

    def facts(self) -> dict[str, Any]:
        from edgert.runtime import peak_rss_bytes

        return {"plan": {}, "peak_rss_bytes": peak_rss_bytes(), "is_resident": True, "is_calibrated": False}

    def predict_ns(self, n_tokens: int, n_cached: int) -> float | None:
        return None

    def first_token(self, n_prompt: int) -> tuple[int, int] | None:
        return None

    def close(self) -> None:
        self._peer.close()


def synthetic_text(runtime: Runtime, n_tokens: int) -> str:
    """Sentences of about `n_tokens` tokens together with what the template adds, and always the same."""
    n_each = len(runtime.tokenize("".join(_SENTENCES), add_special=False))
    n_around = len(runtime.render([{"role": "user", "content": ""}])) if runtime.has_template else 0
    n_wanted = max(1, n_tokens - n_around)
    text = "".join(_SENTENCES) * -(-n_wanted // max(1, n_each))
    ids = runtime.tokenize(text, add_special=False)[:n_wanted]
    assert runtime.tokenizer is not None
    return runtime.tokenizer.decode(ids).decode(errors="replace")
