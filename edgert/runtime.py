"""Composes everything: a model file, its text side, a plan for its weights, and the engine.

The only module that knows all parts. `Runtime.load` opens; `generate` and `chat` answer; `close` gives all back.
"""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgert.architectures.base import Architecture
from edgert.cpu import usable_cores
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import KVType
from edgert.engine.layouts import LayoutChoice, Layouts
from edgert.engine.resident import ResidentWeights
from edgert.engine.trace import OFF, Trace
from edgert.errors import ContextOverflow, ModelFileError, TemplateError, UsageError
from edgert.generation import Generation, Timings
from edgert.ggml.library import load_libraries
from edgert.gguf.model_file import ModelFile
from edgert.memory.governor import Governor
from edgert.memory.model import Prediction
from edgert.memory.planner import Plan, predict_pass
from edgert.memory.probe import MemoryProbe
from edgert.models.catalog import Catalog
from edgert.paths import Paths
from edgert.planning import EngineOptions, Planning
from edgert.text.sampler import Sampler, SamplingParams
from edgert.text.stream import TextStream
from edgert.text.template import ChatTemplate, Message
from edgert.text.tokenizer import Tokenizer
from edgert.text.vocabulary_header import has_vocabulary
from edgert.units import parse_bytes

if TYPE_CHECKING:
    from edgert.text.constraint import Constraint, Constraints, JSONSchema

_log = logging.getLogger(__name__)
# Of shorter answers, single tokens say more about the moment than about the device.
_LEARN_FROM_TOKENS = 16


class Runtime:
    """One model, ready to answer. One request at a time; `Generation.cancel` may come from any thread."""

    def __init__(self, model: ModelFile, engine: Engine, tokenizer: Tokenizer | None, planning: Planning, plan: Plan,
                 trace: Trace, learn: bool) -> None:
        self.model, self.engine, self.tokenizer, self._trace = model, engine, tokenizer, trace
        self._planning, self._plan, self._learns = planning, plan, learn
        self.governor: Governor | None = None  # where weights stream
        if plan.sizes.weights == "streamed":
            from offload.window import WindowWeights

            assert isinstance(engine.weights, WindowWeights)
            self.governor = Governor(plan, engine.weights, engine.kv, MemoryProbe())
            engine.between_steps = self.governor.before_step
        self._template: ChatTemplate | None = None
        self._kv_token_ids: list[int] = []  # what the KV cache holds
        self._running: Generation | None = None
        self._closed = False
        self._constraints: Constraints | None = None

    @classmethod
    def load(cls, model: str | Path, *, memory: str | int | None = None, context: int | None = None,
             threads: int | None = None, batch: int = 512, kv_type: KVType = "f16",
             layout: LayoutChoice = "auto", models_dirs: Sequence[Path] = (), trace: Path | None = None,
             learn: bool = True) -> Self:
        """Open a model: a path, a name that `edgert list` shows, or `user/repo:quant`.

        `memory` (bytes, or a text such as "600M") is a budget for the whole process; weights that it does not hold
        stream from disk. Without it, the budget is what the machine or the control group has left. `context` and
        `batch` count tokens. Memory without a budget: the file's pages (shared with the page cache), a repacked copy
        of the matrices that compute faster so, the KV cache as it fills, and the compute buffer. On a device that
        `edgert plan` has measured, answers correct its profile, unless `learn` is False.
        Raises ModelNotFound, ModelFileError, OutOfMemory (BudgetTooSmall), UsageError, NativeLibraryError.
        """
        paths, tracer = Paths.of_user(), Trace(trace) if trace else OFF
        path = Catalog(paths, models_dirs).find(str(model))
        with tracer.span("header", "load"):
            file = ModelFile.open(path)
        options = EngineOptions(None if memory is None else parse_bytes(memory), context, threads or usable_cores(),
                                batch, kv_type, layout)
        load_libraries()
        with ThreadPoolExecutor(1, "vocabulary") as pool:  # 0.3 s for 150k tokens, beside the weights
            vocabulary = pool.submit(_open_tokenizer, file, tracer)
            if options.memory_bytes is not None:
                vocabulary.result()  # a budget must know what it takes
            with tracer.span("weights", "load"), Planning(file, paths, options, MemoryProbe()) as planning:
                plan = planning.plan()
                engine = open_engine(planning, plan, tracer)
            try:
                tokenizer = vocabulary.result()
                _check_vocabulary(file, tokenizer, engine.arch)
                return cls(file, engine, tokenizer, planning, plan, tracer, learn)
            except BaseException:
                engine.close()
                raise

    @property
    def context_length(self) -> int:
        return self.engine.kv.context_length

    @property
    def has_template(self) -> bool:
        """Whether the file brings a chat template."""
        return self.tokenizer is not None and self.model.has("tokenizer.chat_template")

    def tokenize(self, text: str | bytes, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids; `add_special` adds the begin token as the vocabulary says, `parse_special` takes `<|im_end|>`
        and its like as the tokens that they name."""
        return self._required_tokenizer().encode(text, add_special=add_special, parse_special=parse_special)

    def _required_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(f"{self.model.path.name} has no vocabulary", "Give token ids instead of text.")
        return self.tokenizer

    def generate(self, prompt: str | bytes | Sequence[int], *, max_tokens: int | None = None,
                 sampling: SamplingParams | None = None, stop: Sequence[str] = (),
                 json_schema: JSONSchema | None = None, grammar: str | None = None) -> Generation:
        """Continue a text (taken as it is, no template) or token ids.

        `max_tokens` None goes on until the model ends or the context is full. `json_schema` (its text, or a dict) or
        `grammar` (GBNF) says what the answer must look like. Tokens that the KV cache holds from the request before
        are not computed again. Raises UsageError for an empty prompt, ContextOverflow for a long one, GrammarError.
        """
        prompt_ids = self.tokenize(prompt) if isinstance(prompt, (str, bytes)) else [index(one) for one in prompt]
        self._check(prompt_ids, max_tokens)
        constraint = self._constraint(json_schema, grammar)
        self._learn()
        self._reuse_prefix(prompt_ids)
        tokenizer = self.tokenizer
        self._running = Generation(
            self.engine, prompt_ids, Sampler(sampling or SamplingParams(), self.engine.arch.hp.vocab_size),
            TextStream(tokenizer.piece if tokenizer else lambda _: b"", stop), max_tokens=max_tokens,
            is_end=tokenizer.is_end_of_generation if tokenizer else lambda _: False,
            on_tokens=self._kv_token_ids.extend, constraint=constraint)
        self._forecast(self._running.timings)
        return self._running

    def _forecast(self, timings: Timings) -> None:
        """What the plan promises for this answer, where the device is calibrated."""
        if self._planning.is_calibrated:
            n_prompt, n_cached = timings.prompt_n, timings.cache_n
            timings.forecast_per_second = round(1 / self._predict(1, n_cached + n_prompt).total_s, 3)
            timings.forecast_time_to_first_token_ms = round(self._predict(n_prompt, n_cached).total_s * 1000, 3)

    def _predict(self, n_tokens: int, n_cached: int) -> Prediction:
        return predict_pass(self._planning.demand, self._planning.profile, self._plan, n_tokens, n_cached)

    def _learn(self) -> None:
        """Correct the device's profile by the last answer."""
        answer, self._running = self._running, None
        if answer is None or not self._learns or not self._planning.is_calibrated or \
                answer.decoded_n < _LEARN_FROM_TOKENS or (self.governor is not None and self.governor.given_bytes):
            return
        expected = self._predict(1, self.engine.kv.length - answer.decoded_n // 2)
        self._planning.learn("disk" if expected.limit == "disk" else "compute",
                             answer.decode_s / answer.decoded_n / expected.total_s)

    def chat(self, messages: Sequence[Message], **options: Any) -> Generation:
        """Answer a conversation through the file's chat template. Options as for `generate`; raises TemplateError."""
        return self.generate(self.render(messages), **options)

    def render(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, up to where the answer begins."""
        if not self.has_template or self.tokenizer is None:
            raise TemplateError(str(self.model.path), "the file has none")
        if self._template is None:
            self._template = ChatTemplate(self.model.get_str("tokenizer.chat_template"), path=str(self.model.path),
                                          bos_token=self.tokenizer.bos_text, eos_token=self.tokenizer.eos_text)
        text = self._template.render(messages)
        has_bos = bool(self.tokenizer.bos_text) and text.startswith(self.tokenizer.bos_text)
        return self.tokenize(text, add_special=not has_bos)

    def _constraint(self, json_schema: JSONSchema | None, grammar: str | None) -> Constraint | None:
        if json_schema is None and grammar is None:
            return None
        from edgert.text.constraint import Constraints  # 40 ms and 5 MiB that most answers do not need

        if self._constraints is None:
            self._constraints = Constraints(self._required_tokenizer(), self.engine.arch.hp.vocab_size)
        return self._constraints.make(json_schema=json_schema, grammar=grammar)

    def _check(self, prompt_ids: list[int], max_tokens: int | None) -> None:
        hp, context_length = self.engine.arch.hp, self.context_length
        if self._closed:
            raise UsageError(f"{self.model.path.name} is closed", "Load it again.")
        if not prompt_ids:
            raise UsageError("the prompt is empty", "Give a text as argument, with --prompt-file or on standard input.")
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}", "Ask for at least one token.")
        if not all(0 <= token_id < hp.vocab_size for token_id in prompt_ids):
            raise UsageError("a token id is not in the vocabulary", f"Ids go from 0 to {hp.vocab_size - 1}.")
        if len(prompt_ids) >= context_length:  # the answer needs room for a token
            raise ContextOverflow(len(prompt_ids), context_length, hp.context_length)
        if self._running is not None and self._running.finish_reason is None:
            self._running.close()  # its reader has gone

    def _reuse_prefix(self, prompt_ids: list[int]) -> None:
        """Keep the KV of the tokens that the prompt begins with; at least its last token is computed again."""
        held = self._kv_token_ids
        n_common = next((i for i, (a, b) in enumerate(zip(held, prompt_ids, strict=False)) if a != b),
                        min(len(held), len(prompt_ids)))
        n_kept = min(n_common, len(prompt_ids) - 1)
        del held[n_kept:]
        self.engine.kv.truncate(n_kept)

    def memory(self) -> dict[str, int | None]:
        """Bytes: what is pinned, what was streamed so far, what the KV cache holds, and the process's peak."""
        weights, kv = self.engine.weights, self.engine.kv
        return {"budget_bytes": self._planning.options.memory_bytes, "peak_rss_bytes": peak_rss_bytes(),
                "pinned_bytes": weights.pinned_bytes, "streamed_bytes": weights.streamed_bytes,
                "kv_resident_bytes": kv.size_bytes // kv.n_cells * kv.length, "kv_selected_tokens": None,
                "compute_bytes": self.engine.compute_bytes}

    def plan(self) -> dict[str, Any]:
        """How this model runs here."""
        return {**self.engine.weights.plan(), "threads": self.engine.backend.n_threads,
                "batch": self.engine.batch_size, "context_length": self.context_length}

    def close(self) -> None:
        """Give everything back. Safe to call twice."""
        if self._running is not None and self._running.finish_reason is None:
            self._running.close()
        self._learn()
        self._closed = True
        self.engine.close()
        if self.tokenizer is not None:
            self.tokenizer.close()
        self._trace.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_tokenizer(file: ModelFile, trace: Trace) -> Tokenizer | None:
    """The file's tokenizer; None where it has no vocabulary."""
    if not has_vocabulary(file):
        return None
    with trace.span("vocabulary", "load"):
        return Tokenizer.open(file.path)


def _check_vocabulary(file: ModelFile, tokenizer: Tokenizer | None, arch: Architecture) -> None:
    """As llama.cpp, refuse a file whose tokens are not those of its embedding table: a sampled id must be a token."""
    if tokenizer is not None and tokenizer.n_tokens != arch.hp.vocab_size:
        tokenizer.close()
        raise ModelFileError(str(file.path), f"the vocabulary has {tokenizer.n_tokens} tokens, the embedding table "
                             f"{arch.hp.vocab_size}")


def open_engine(planning: Planning, plan: Plan, trace: Trace = OFF) -> Engine:
    """The engine of the sizes that the plan says. It owns what `planning` has opened."""
    file, arch, backend, kv = planning.file, planning.arch, planning.backend, planning.kv
    if plan.sizes.weights == "streamed":
        from offload.loading import open_window

        planning.graphs.part_tokens = plan.sizes.part_tokens
        weights = open_window(backend, file, arch, planning.pieces, plan, trace=trace)
        engine = Engine(arch, weights, kv, backend, batch_size=plan.batch_size, graphs=planning.graphs, trace=trace)
        planning.release()
        return engine
    layouts = Layouts({"prefill": frozenset(), "decode": frozenset(), **plan.sizes.repacked})
    _log.info("repacked tensor types: %s", {phase: sorted(types) for phase, types in layouts.repacked.items()})
    resident = ResidentWeights(backend, file, arch, layouts)
    planning.release()
    planning.graphs.close()
    return Engine(arch, resident, kv, backend, batch_size=plan.batch_size, trace=trace)


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
