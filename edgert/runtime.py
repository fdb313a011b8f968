"""Composes everything: a model file, its text side, a plan for its weights, and the engine.

The only module that knows all parts. `Runtime.load` opens; `generate` and `chat` answer; `close` gives all back.
"""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from edgert.architectures.base import HEAD_ROWS_KEY, Architecture
from edgert.architectures.registry import open_architecture
from edgert.cpu import usable_cores
from edgert.device import cluster_profile, matrix_types
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.engine.collective import Collective
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import KVType
from edgert.engine.layouts import LayoutChoice, Layouts
from edgert.engine.resident import ResidentWeights
from edgert.engine.retrieval_head import RetrievalHead
from edgert.engine.trace import OFF, Trace
from edgert.engine.weights import WeightSource
from edgert.errors import ContextOverflow, KVStoreError, ModelFileError, TemplateError, UsageError
from edgert.forecast import Forecast
from edgert.generation import Generation
from edgert.ggml.library import load_libraries
from edgert.gguf.model_file import ModelFile
from edgert.kv_tiers import check_kv, head_of
from edgert.memory.governor import Governor
from edgert.memory.planner import Plan
from edgert.memory.probe import MemoryProbe
from edgert.models.catalog import Catalog
from edgert.paths import Paths
from edgert.planning import EngineOptions, Planning, context_length_of
from edgert.speculation import DraftLength, Speculate, Speculation
from edgert.text.logprobs import check_n_top
from edgert.text.sampler import Sampler, SamplingParams
from edgert.text.stream import TextStream
from edgert.text.template import ChatTemplate, Message
from edgert.text.tokenizer import Tokenizer
from edgert.text.vocabulary_header import has_vocabulary
from edgert.units import parse_bytes

if TYPE_CHECKING:
    from edgert.text.constraint import Constraint, Constraints, JSONSchema
    from retrieval.sessions import Session
    from tensorpar.workers import ClusterOptions

_log = logging.getLogger(__name__)


class Runtime:
    """One model, ready to answer. One request at a time; `Generation.cancel` may come from any thread."""

    def __init__(self, model: ModelFile, engine: Engine, tokenizer: Tokenizer | None, budget_bytes: int | None,
                 trace: Trace, *, speculates: bool = False, forecast: Forecast | None = None,
                 session: Session | None = None, is_exact: bool = False) -> None:
        self.model, self.engine, self.tokenizer, self._trace = model, engine, tokenizer, trace
        self._budget_bytes, self.forecast = budget_bytes, forecast
        self._template: ChatTemplate | None = None
        self.session = session
        self._kv_token_ids: list[int] = []  # what the KV cache holds
        if session is not None:
            with trace.span("session", "load"):
                self._kv_token_ids = session.restore(engine.kv, engine.backend, is_exact=is_exact)
        self._running: Generation | None = None
        self._closed = False
        self._constraints: Constraints | None = None
        self._draft_length = DraftLength() if speculates else None

    @classmethod
    def load(cls, model: str | Path, *, memory: str | int | None = None, context: int | None = None,
             threads: int | None = None, batch: int = 512, kv_type: KVType = "f16",
             layout: LayoutChoice = "auto", models_dirs: Sequence[Path] = (), trace: Path | None = None,
             speculate: Speculate = "auto", cluster: ClusterOptions | None = None, learn: bool = True,
             kv_budget: int | Literal["full"] | None = None, kv_store: Path | None = None,
             session: str | None = None) -> Self:
        """Open a model: a path, a name that `edgert list` shows, or `user/repo:quant`.

        `memory` (bytes, or a text such as "600M") is a budget for the whole process; weights that it does not hold
        stream from disk. Without it, the budget is what the machine or the control group has left. `context` and
        `batch` count tokens. Memory without a budget: the file's pages (shared with the page cache), a repacked copy
        of the matrices that compute faster so, the KV cache as it fills, and the compute buffer.
        `speculate` "auto" guesses tokens from the text before where weights stream, or where the devices of a cluster
        are far from each other, so that a pass gives several: they are those that the sampler chooses from the pass's
        logits, which batches of other sizes round otherwise. "on" does so everywhere. `kv_budget` is how many cached
        tokens a step attends to, "full" for all of them; None leaves it to the memory manager, which attends to all of
        them unless a memory budget has no room. Keys and values that have no room lie in the directory `kv_store`.
        `session` names a text whose keys and values `save_session` keeps on disk: they are there again, and not
        computed, whenever it is named. With `cluster`, the paired devices compute too, and what is said about memory is
        about this one. Answers correct what is known of the device's speed, unless `learn` is False; nothing is
        measured for it.
        Raises ModelNotFound, ModelFileError, OutOfMemory (BudgetTooSmall), UsageError, NativeLibraryError.
        """
        paths, tracer = Paths.of_user(), Trace(trace) if trace else OFF
        path = Catalog(paths, models_dirs).find(str(model))
        with tracer.span("header", "load"):
            file = ModelFile.open(path)
        if file.has(HEAD_ROWS_KEY):
            raise ModelFileError(str(path), "is one device's part of a model", "Use the model's own file.")
        options = EngineOptions(None if memory is None else parse_bytes(memory), context, threads or usable_cores(),
                                batch, kv_type, layout, speculate, kv_budget, kv_store)
        if session is not None and (cluster is not None or kv_type != "f16"):
            raise UsageError(f"--session does not work with --{'cluster' if cluster else 'kv-type'}",
                             "Leave out one of them.")
        load_libraries()
        with ThreadPoolExecutor(1, "vocabulary") as pool:  # 0.3 s for 150k tokens, beside the weights
            vocabulary = pool.submit(_open_tokenizer, file, tracer)
            if options.memory_bytes is not None or cluster is not None:
                vocabulary.result()  # a budget must know what it takes, and links are measured in quiet
            forecast = None
            with tracer.span("weights", "load"):
                if cluster is not None:
                    engine = _open_cluster(file, paths, options, cluster, tracer)
                else:
                    with Planning(file, paths, options, MemoryProbe()) as planning:
                        plan = planning.plan()
                        engine, governor = open_planned(planning, plan, tracer)
                    forecast = Forecast(planning, plan, engine.weights, governor, learn)
            try:
                tokenizer = vocabulary.result()
                _check_vocabulary(file, tokenizer, engine.arch)
                speculates = speculate == "on" or engine.passes_are_costly
                return cls(file, engine, tokenizer, options.memory_bytes, tracer, forecast=forecast,
                           speculates=speculates and options.may_speculate(engine.arch),
                           session=None if session is None else _open_session(paths, session, file, engine.arch),
                           is_exact=kv_budget == "full")
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
                 json_schema: JSONSchema | None = None, grammar: str | None = None,
                 logprobs: int | None = None) -> Generation:
        """Continue a text (taken as it is, no template) or token ids.

        `max_tokens` None goes on until the model ends or the context is full. `json_schema` (its text, or a dict) or
        `grammar` (GBNF) says what the answer must look like. With `logprobs`, each piece tells its token's logprob and
        those of as many alternatives (0 to 20). Tokens that the KV cache holds from the request before
        are not computed again. Raises UsageError for an empty prompt, ContextOverflow for a long one, GrammarError.
        """
        prompt_ids = self.tokenize(prompt) if isinstance(prompt, (str, bytes)) else [index(one) for one in prompt]
        self._check(prompt_ids, max_tokens)
        if logprobs is not None:
            check_n_top(logprobs)
        constraint = self._constraint(json_schema, grammar)
        self._learn()
        self._reuse_prefix(prompt_ids)
        tokenizer = self.tokenizer
        self._running = Generation(
            self.engine, prompt_ids, Sampler(sampling or SamplingParams(), self.engine.arch.hp.vocab_size),
            TextStream(tokenizer.piece if tokenizer else lambda _: b"", stop), max_tokens=max_tokens,
            is_end=tokenizer.is_end_of_generation if tokenizer else lambda _: False,
            on_tokens=self._kv_token_ids.extend, constraint=constraint, speculation=self._speculation(prompt_ids),
            n_logprobs=logprobs)
        if self.forecast is not None:
            self.forecast.promise(self._running.timings)
        return self._running

    def _learn(self) -> None:
        """Once an answer has ended, take from it what it tells of the device."""
        answer, self._running = self._running, None
        if answer is not None and self.forecast is not None:
            self.forecast.learn(answer)

    def chat(self, messages: Sequence[Message], **options: Any) -> Generation:
        """Answer a conversation through the file's chat template. Options as for `generate`; raises TemplateError."""
        return self.generate(self.render(messages), **options)

    def render(self, messages: Sequence[Message | Mapping[str, object]],
               tools: Sequence[Mapping[str, object]] | None = None) -> list[int]:
        """The token ids of a conversation, up to where the answer begins; `tools` are for templates that tell them."""
        if not self.has_template or self.tokenizer is None:
            raise TemplateError(str(self.model.path), "the file has none")
        if self._template is None:
            self._template = ChatTemplate(self.model.get_str("tokenizer.chat_template"), path=str(self.model.path),
                                          bos_token=self.tokenizer.bos_text, eos_token=self.tokenizer.eos_text)
        text = self._template.render(messages, tools=tools)
        has_bos = bool(self.tokenizer.bos_text) and text.startswith(self.tokenizer.bos_text)
        return self.tokenize(text, add_special=not has_bos)

    def _speculation(self, prompt_ids: list[int]) -> Speculation | None:
        lengths = self._draft_length
        return None if lengths is None else Speculation(lengths, prompt_ids, self.engine.batch_size)

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
        self.engine.refresh()
        held = self._kv_token_ids
        del held[self.engine.kv.length:]
        n_common = next((i for i, (a, b) in enumerate(zip(held, prompt_ids, strict=False)) if a != b),
                        min(len(held), len(prompt_ids)))
        n_kept = min(n_common, len(prompt_ids) - 1)
        try:
            self.engine.kv.truncate(n_kept)
        except KVStoreError as error:  # what has to be read for that is damaged
            _log.warning("%s; %d tokens are computed anew", error.message, n_kept)
            n_kept = 0
            self.engine.kv.truncate(n_kept)
        del held[n_kept:]

    def memory(self) -> dict[str, int | None]:
        """Bytes: what is pinned, what was streamed so far, what the KV cache holds, and the process's peak."""
        weights, kv = self.engine.weights, self.engine.kv
        return {"budget_bytes": self._budget_bytes, "peak_rss_bytes": peak_rss_bytes(),
                "pinned_bytes": weights.pinned_bytes, "streamed_bytes": weights.streamed_bytes,
                "kv_resident_bytes": kv.resident_bytes, "kv_selected_tokens": self.engine.selected_tokens,
                "compute_bytes": self.engine.compute_bytes}

    def save_session(self, conversation: dict[str, Any]) -> None:
        """Keep what the KV cache holds, and `conversation` (an object for JSON, whatever the caller needs to go on).
        Raises UsageError without a session; KVStoreError, NoSpace."""
        if self.session is None:
            raise UsageError("no session is open", "Load the model with a session's name.")
        with self._trace.span("session", "load"):
            self.session.save(self.engine.kv, self.engine.backend, self._kv_token_ids, conversation)

    def plan(self) -> dict[str, Any]:
        """How this model runs here."""
        return {**self.engine.plan(), "threads": self.engine.backend.n_threads,
                "batch": self.engine.batch_size, "context_length": self.context_length}

    def close(self) -> None:
        """Give everything back. Safe to call twice."""
        if self._running is not None and self._running.finish_reason is None:
            self._running.close()
        self._learn()
        self._closed = True
        if self.session is not None:
            self.session.close()
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


def _open_session(paths: Paths, name: str, file: ModelFile, arch: Architecture) -> Session:
    from retrieval.sessions import Session

    return Session(paths.sessions, name, file.fingerprint(), file.path.name, arch.hp)


def _open_cluster(file: ModelFile, paths: Paths, options: EngineOptions, cluster: ClusterOptions,
                  trace: Trace) -> Engine:
    """The engine of the device that leads a cluster."""
    from tensorpar.leader import ClusterEngine
    from tensorpar.messages import Settings

    arch, head = open_architecture(file), None
    context_length = context_length_of(arch, options)
    options = replace(options, context=context_length)
    if isinstance(options.kv_budget, int):
        check_kv(options, arch)
        head = head_of(file, arch, paths)
    profile = cluster_profile(paths, options, matrix_types(file), arch.hp.head_dim, file.path)
    return ClusterEngine(
        file, arch, paths, profile,
        Settings(context_length, options.batch_size, options.kv_type, options.settled_layout),
        lambda part, collective: open_engine(part, paths, options, trace, collective, head), cluster)


def open_engine(file: ModelFile, paths: Paths, options: EngineOptions, trace: Trace = OFF,
                collective: Collective | None = None, head: RetrievalHead | None = None) -> Engine:
    """The engine for a file, of the sizes that its plan says. With `collective`, one rank of a cluster, over the slice
    that the file is; where there is a budget for a step's tokens, the one that leads, with the whole model's `head`."""
    is_shard = collective is not None and collective.world_size > 1
    with Planning(file, paths, options, MemoryProbe(), is_shard=is_shard, head=head) as planning:
        return open_planned(planning, planning.plan(), trace, collective)[0]


def open_planned(planning: Planning, plan: Plan, trace: Trace = OFF,
                 collective: Collective | None = None) -> tuple[Engine, Governor | None]:
    """The engine of the plan's sizes, which owns what `planning` has opened; and who moves its weights, where they are
    not all mapped."""
    file, arch, backend, kv = planning.file, planning.arch, planning.backend, planning.kv
    if plan.sizes.weights == "streamed":
        from offload.loading import open_window

        planning.graphs.part_tokens = plan.sizes.part_tokens
        weights = open_window(backend, file, arch, planning.pieces, plan, trace=trace)
        engine = _engine(planning, weights, plan, trace, collective, planning.graphs)
        planning.release()
        governor = Governor(plan, weights, kv, planning.graphs, MemoryProbe())
        engine.between_steps = governor.before_step
        return engine, governor
    layouts = Layouts({"prefill": frozenset(), "decode": frozenset(), **plan.sizes.repacked})
    _log.info("repacked tensor types: %s", {phase: sorted(types) for phase, types in layouts.repacked.items()})
    resident = ResidentWeights(backend, file, arch, layouts)
    engine = _engine(planning, resident, plan, trace, collective)
    planning.release()
    planning.graphs.close()
    return engine, None


def _engine(planning: Planning, weights: WeightSource, plan: Plan, trace: Trace, collective: Collective | None,
            graphs: BlockwiseGraphs | None = None) -> Engine:
    """The engine whose steps attend to all tokens, or to a set of them."""
    sizes, budget = planning.demand.shape.kv, planning.options.kv_budget
    if collective is not None and collective.world_size > 1:
        from retrieval.opening import open_rank

        return open_rank(planning.arch, weights, planning.kv, planning.backend, collective,
                         budget if isinstance(budget, int) else None, planning.head, batch_size=plan.batch_size,
                         graphs=graphs, trace=trace)
    if sizes is None:
        return Engine(planning.arch, weights, planning.kv, planning.backend, collective=collective,
                      batch_size=plan.batch_size, graphs=graphs, trace=trace)
    from retrieval.opening import open_retrieval

    return open_retrieval(planning.arch, weights, planning.kv, planning.backend, sizes, planning.head,
                          planning.kv_store, batch_size=plan.batch_size, graphs=graphs, trace=trace)


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
