"""From a model file and a device to a plan: reads the header, measures what needs no weights, and asks the planner.

The composition root's other half: it knows the parts (engine, offload) so that edgert/memory need not. `edgert plan`
stops here; `Runtime` goes on and opens what the plan says.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from edgert.architectures.base import MAX_CONTEXT, Architecture
from edgert.architectures.registry import open_architecture
from edgert.device import calibrated
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.engine.kv_cache import DenseKVCache, KVType, kv_bytes_per_token
from edgert.engine.layouts import LayoutChoice, Layouts, choose_layouts
from edgert.engine.retrieval_head import RetrievalHead
from edgert.errors import UsageError
from edgert.ggml.backend import Backend
from edgert.ggml.library import load_libraries
from edgert.gguf.model_file import ModelFile
from edgert.kv_tiers import head_of, with_kv, with_selector
from edgert.memory.demand_store import DemandStore
from edgert.memory.hits import HIT_CURVE
from edgert.memory.model import predict
from edgert.memory.planner import Demand, Plan, default_context, make_plan
from edgert.memory.probe import MemoryProbe
from edgert.memory.profile import DeviceProfile, HitCurve, Part
from edgert.memory.profile_store import ProfileStore
from edgert.memory.sizes import Sizes
from edgert.model_shape import shape_of
from edgert.neighbours import Neighbours
from edgert.paths import Paths
from edgert.speculation import MAX_PASS_TOKENS, Speculate
from edgert.text.tokenizer import Tokenizer
from edgert.text.vocabulary_header import has_vocabulary

if TYPE_CHECKING:
    from offload.residency import Piece

_log = logging.getLogger(__name__)
_MIN_CONTEXT_LENGTH, _MAX_BATCH = 8, 8192
_MAX_THREADS = 512  # GGML_MAX_N_THREADS; libgomp crashes on many more
# Other programs' memory is not ours to push out.
_SHARE_OF_AVAILABLE = 0.9
# The first calibration of a device: kernels; then the disk, and 1-3 s for a rehearsal. Together under 10 s.
_KERNELS_S = 5.0
_REHEARSAL_SHARE = 0.25  # of the memory that is left


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to open an engine: bytes or None for what is left, tokens or None for the default, and layouts."""

    memory_bytes: int | None = None
    context: int | None = None
    n_threads: int = 1
    batch_size: int = 512
    kv_type: KVType = "f16"
    layout: LayoutChoice = "auto"
    speculate: Speculate = "auto"
    kv_budget: int | Literal["full"] | None = None  # tokens that a step attends to; None leaves it to the plan
    kv_store: Path | None = None  # where keys and values lie that have no room in memory

    @property
    def settled_layout(self) -> LayoutChoice:
        """Within a budget weights are as the file holds them, resident or streamed: the budget never changes an
        answer."""
        return "plain" if self.memory_bytes is not None and self.layout == "auto" else self.layout

    def may_speculate(self, arch: Architecture) -> bool:
        """Never with experts: each token of a pass brings its own, so that bytes grow with guesses, right or wrong."""
        return self.speculate != "off" and arch.hp.n_experts == 0


class Planning:
    """A model with everything that a plan needs, open but without weights. Whoever goes on takes `backend`, `kv` and
    `graphs` with `release`; else `close` gives them back."""

    def __init__(self, file: ModelFile, paths: Paths, options: EngineOptions, probe: MemoryProbe, *,
                 is_shard: bool = False, head: RetrievalHead | None = None) -> None:
        """With `is_shard`, for one rank of a cluster, whose whole model has that `head`. Raises ModelFileError,
        UsageError, OutOfMemory."""
        from offload.disk_speed import disk_key
        from offload.loading import measure_overheads
        from offload.residency import cut

        check_options(options)
        self.file, self.options = file, options
        self.kv_store = options.kv_store or paths.cache / "kv"
        self.arch = open_architecture(file)
        self.pieces: Sequence[Piece] = cut(file, self.arch, context_length_of(self.arch, options))
        self.left_bytes = probe.process_bytes() + int(probe.available_bytes() * _SHARE_OF_AVAILABLE)
        self.budget_bytes = self.left_bytes if options.memory_bytes is None else options.memory_bytes
        with ExitStack() as opened:
            self.backend = Backend(options.n_threads)
            opened.callback(self.backend.close)
            self.kv = DenseKVCache(self.backend, self.arch.hp, context_length_of(self.arch, options), options.kv_type)
            opened.callback(self.kv.close)
            self.graphs = BlockwiseGraphs(self.backend, self.arch, self.kv)
            opened.callback(self.graphs.close)
            self.layouts = _layouts(file, self.backend, options, paths)
            self._store = ProfileStore(paths.cache / "device.json")
            self.keys = self.backend.speed_key, disk_key(file.path)
            known, _ = self._store.load(*self.keys)
            self.profile = known or DeviceProfile(n_threads=options.n_threads)
            overheads = measure_overheads(self.backend, file, self.arch, self.kv, self.graphs, self.pieces,
                                          batch_size=options.batch_size, is_shard=is_shard, probe=probe,
                                          n_logits=MAX_PASS_TOKENS if options.may_speculate(self.arch) else 1,
                                          budget_bytes=self.budget_bytes)
            shape = shape_of(file, self.arch, self.pieces, options.kv_type)
            self.demand = Demand(shape, overheads, self.kv.context_length, options.batch_size, self.layouts.repacked,
                                 self.profile.curves.get(shape.key, HIT_CURVE))
            self.head = head
            if is_shard:
                self.demand = with_selector(self.demand, options, self.arch, head)
            else:
                DemandStore(paths.cache / "demands.json").save(file.path, self.demand, *self.keys)
                self.head = head_of(file, self.arch, paths)
                self.demand = with_kv(self.demand, options, self.arch, self.head, self.budget_bytes)
            self._opened = opened.pop_all()

    @classmethod
    def open(cls, path: Path, paths: Paths, options: EngineOptions) -> Self:
        """Plan for a file as `Runtime` would find the process: with ggml's libraries and the vocabulary in memory."""
        file = ModelFile.open(path)
        load_libraries()
        vocabulary = Tokenizer.open(path) if has_vocabulary(file) else None
        try:
            return cls(file, paths, options, MemoryProbe())
        finally:
            if vocabulary is not None:
                vocabulary.close()

    def calibrate(self) -> None:
        """Measure what is not known yet of this device and of this model on it: 10 s at the most, and once."""
        shape = self.demand.shape
        types = {*shape.matrix_bytes, *shape.head_bytes, *shape.expert_bytes}
        profile = calibrated(self._store, self.keys, self.backend, types, self.arch.hp.head_dim, _KERNELS_S,
                             self.file.path, shape.expert_bytes)
        self.profile = self.rehearsed(profile)
        if self.profile != profile:
            self._store.save(*self.keys, self.profile)

    def rehearsed(self, profile: DeviceProfile) -> DeviceProfile:
        """With this model's pass of one token, unless that was rehearsed before, or would take long."""
        from offload.rehearsal import LONG_S, rehearse

        shape = self.demand.shape
        before = profile.rehearsals.get(shape.key)
        is_settled = before is not None and not before.is_doubtful
        if is_settled or predict(shape, profile, Sizes("resident"), 1).multiply_s > LONG_S:
            return profile
        others = Neighbours()
        rehearsal = rehearse(self.backend, self.file, self.arch, self.pieces, shape, self.options.kv_type,
                             int(self.left_bytes * _REHEARSAL_SHARE))
        if rehearsal is None:
            return profile
        if others.disturb:
            rehearsal = rehearsal.disturbed(before)
        return replace(profile, rehearsals={**profile.rehearsals, shape.key: rehearsal})

    @property
    def is_rehearsed(self) -> bool:
        """Whether this model's pass was timed while nobody else computed, or often enough."""
        rehearsal = self.profile.rehearsals.get(self.demand.shape.key)
        return rehearsal is not None and not rehearsal.is_doubtful

    @property
    def is_calibrated(self) -> bool:
        return self.profile.is_measured

    @property
    def is_settled(self) -> bool:
        """Whether the device was measured while nobody else computed, or often enough."""
        return self.profile.is_measured and not self.profile.is_doubtful

    def learn(self, part: Part, measured_over_predicted: float) -> None:
        """Correct the profile by an answer that took so many times what was predicted, and keep it."""
        self.profile = self.profile.learn(part, measured_over_predicted)
        self._store.save(*self.keys, self.profile)

    def learn_hits(self, curve: HitCurve) -> None:
        """Keep how often this model's experts were found, for the plans to come."""
        self.profile = replace(self.profile, curves={**self.profile.curves, self.demand.shape.key: curve})
        self.demand = replace(self.demand, curve=curve)
        self._store.save(*self.keys, self.profile)

    def plan(self, budget_bytes: int | None = None) -> Plan:
        """The best plan within `budget_bytes`, or within what was asked for. Raises BudgetTooSmall."""
        return make_plan(self.demand, self.profile, self.budget_bytes if budget_bytes is None else budget_bytes)

    def release(self) -> None:
        """Backend, KV cache and graphs belong to somebody else now."""
        self._opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def check_options(options: EngineOptions) -> None:
    """Raises UsageError for sizes that make no sense."""
    if not 1 <= options.batch_size <= _MAX_BATCH:
        raise UsageError(f"--batch {options.batch_size} is not between 1 and {_MAX_BATCH}")
    if not 1 <= options.n_threads <= _MAX_THREADS:
        raise UsageError(f"--threads {options.n_threads} is not between 1 and {_MAX_THREADS}")


def _layouts(file: ModelFile, backend: Backend, options: EngineOptions, paths: Paths) -> Layouts:
    matrices = frozenset(t.type.id for t in file.tensors.values() if len(t.shape) > 1)
    return choose_layouts(options.settled_layout, backend, matrices, paths.cache / "layouts.json")


def context_length_of(arch: Architecture, options: EngineOptions) -> int:
    """Tokens of context: what was asked for, or the default. Raises UsageError."""
    trained = arch.hp.context_length
    if options.context is None:
        return default_context(trained, kv_bytes_per_token(arch.hp, options.kv_type), options.memory_bytes)
    if options.context < _MIN_CONTEXT_LENGTH:
        raise UsageError(f"a context of {options.context} tokens holds nothing", f"At least {_MIN_CONTEXT_LENGTH}.")
    if options.context > MAX_CONTEXT:
        raise UsageError(f"a context of {options.context} tokens is beyond every memory", f"At most {MAX_CONTEXT}.")
    if options.context > trained:
        _log.warning("the model was trained for %d tokens; --context %d goes beyond", trained, options.context)
    return options.context
