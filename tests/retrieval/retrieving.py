"""Opens engines whose steps attend to a set of tokens, over tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from random_head import head_selector

from edgert.architectures.registry import open_architecture
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.layouts import Layouts
from edgert.engine.resident import ResidentWeights
from edgert.engine.retrieval_head import Floats
from edgert.ggml.backend import Backend
from edgert.gguf.model_file import ModelFile
from retrieval.cache import RetrievedKVCache
from retrieval.engine import RetrievalEngine
from retrieval.selection import Policy, Selection, merits
from retrieval.store import DiskTier, temporary_files

FROM_TOKENS = 200
PLAIN = Layouts({"prefill": frozenset(), "decode": frozenset()})


@contextmanager
def open_dense(path: Path, context_length: int = 1024, **options: Any) -> Iterator[Engine]:
    file = ModelFile.open(path)
    arch, backend = open_architecture(file), Backend(1)
    weights = ResidentWeights(backend, file, arch, PLAIN)
    engine = Engine(arch, weights, DenseKVCache(backend, arch.hp, context_length), backend, **options)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def open_retrieving(path: Path, store: Path | None = None, *, policy: Policy | None = None,
                    selector: Any = head_selector, context_length: int = 1024, from_tokens: int = FROM_TOKENS,
                    **options: Any) -> Iterator[RetrievalEngine]:
    """With `store`, the cold tier is on disk."""
    file = ModelFile.open(path)
    arch, backend = open_architecture(file), Backend(1)
    policy = policy or Policy(96, 128, n_recent=16)
    disk = None if store is None else DiskTier(backend, arch.hp, context_length, temporary_files(store))
    dense = DenseKVCache(backend, arch.hp, context_length if store is None else from_tokens)
    kv = RetrievedKVCache(backend, arch.hp, dense, selector(arch.hp, context_length), policy, from_tokens,
                          context_length=context_length, disk=disk)
    weights = ResidentWeights(backend, file, arch, PLAIN)
    engine = RetrievalEngine(arch, weights, kv, backend, store=store or Path(), **options)
    try:
        yield engine
    finally:
        engine.close()


def answer(engine: Engine, prompt: list[int], n_tokens: int) -> Floats:
    """Logits (n_tokens + 1, vocab_size) after the prompt and after each token of a fixed text."""
    rows = [engine.step(np.array(prompt, np.int32))[0].copy()]
    rows += [engine.step(np.array([(7 * i + 3) % 250], np.int32))[0].copy() for i in range(n_tokens)]
    return np.stack(rows)


def random_tokens(n_tokens: int, seed: int = 0) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).integers(0, 300, n_tokens)]


def share_sets(near: RetrievalEngine, far: RetrievalEngine) -> None:
    """Let both attend to the same sets, which move through the text."""
    def set_for(n_tokens: int) -> Selection:
        rng = np.random.default_rng(n_tokens)
        recent = np.arange(n_tokens - 20, n_tokens)
        return Selection(np.unique([0, 1, *rng.choice(n_tokens, 40), *recent]).astype(np.int64), 1.0, True)

    for engine in (near, far):
        chooser = engine._retrieved.chooser
        chooser.choose = lambda known, *_: set_for(known.n_tokens)  # type: ignore[method-assign]
        chooser.plan = lambda known, *_: set_for(known.n_tokens).positions  # type: ignore[method-assign]
        chooser.known = lambda n_tokens, survivors, policy=engine._retrieved.policy: merits(  # type: ignore[method-assign]
            np.zeros(n_tokens, np.float32), None, policy)
