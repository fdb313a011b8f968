"""Opens engines without a Runtime, and llama.cpp beside them: what the exactness tests compare."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from apps.bench.llamacpp import LlamaCpp
from edgert.architectures.registry import open_architecture
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import KV_TYPES, DenseKVCache, KVType
from edgert.engine.layouts import LayoutChoice, Layouts, choose_layouts
from edgert.engine.resident import ResidentWeights
from edgert.ggml.backend import Backend
from edgert.gguf.model_file import ModelFile
from edgert.paths import Paths


@contextmanager
def open_engine(path: Path, *, layout: LayoutChoice | Layouts = "plain", context_length: int = 1024,
                kv_type: KVType = "f16", fused: bool | None = None, batch_size: int = 512,
                n_threads: int = 1) -> Iterator[Engine]:
    """An engine over resident weights, as the Runtime opens it."""
    file = ModelFile.open(path)
    arch = open_architecture(file)
    backend = Backend(n_threads)
    matrices = frozenset(t.type.id for t in file.tensors.values() if len(t.shape) > 1)
    layouts = layout if isinstance(layout, Layouts) else \
        choose_layouts(layout, backend, matrices, Paths.of_user().cache / "layouts.json")
    kv = DenseKVCache(backend, arch.hp, context_length, kv_type)
    engine = Engine(arch, ResidentWeights(backend, file, arch, layouts), kv, backend, batch_size=batch_size,
                    fused=fused)
    try:
        yield engine
    finally:
        engine.close()


class Oracle(LlamaCpp):
    """llama.cpp with several rows of logits, with truncation, and with its small cache for layers with a window."""

    def __init__(self, path: Path, *, context_length: int = 1024, n_threads: int = 1, repack: bool = False,
                 kv_type: str = "f16", swa_full: bool = True) -> None:
        super().__init__(path, context_length=context_length, n_threads=n_threads, repack=repack, kv_type=kv_type)
        if not swa_full:
            self._keep_windows_only(context_length, n_threads, KV_TYPES[kv_type])

    def _keep_windows_only(self, context_length: int, n_threads: int, kv_type: int) -> None:
        llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context_length, self._batch_size, self._batch_size
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type, params.swa_full = 1, False
        params.type_k = params.type_v = kv_type
        self._context = llama_cpp.llama_init_from_model(self._model, params)

    def last_logits(self, token_ids: Sequence[int], n_outputs: int) -> NDArray[np.float32]:
        """Append tokens of one batch; logits (n_outputs, vocab_size) of the last ones."""
        n_tokens = len(token_ids)
        raw = (ctypes.c_int32 * n_tokens)(*token_ids)  # the batch only points to it
        batch = llama_cpp.llama_batch_get_one(raw, n_tokens)
        batch.logits = (ctypes.c_int8 * n_tokens)(*(i >= n_tokens - n_outputs for i in range(n_tokens)))
        assert llama_cpp.llama_decode(self._context, batch) == 0
        rows = [llama_cpp.llama_get_logits_ith(self._context, i) for i in range(n_tokens - n_outputs, n_tokens)]
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows])

    def truncate(self, n_tokens: int) -> None:
        assert llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, n_tokens, -1)


@contextmanager
def open_oracle(path: Path, *, context_length: int = 1024, n_threads: int = 1, repack: bool = False,
                kv_type: str = "f16", swa_full: bool = True) -> Iterator[Oracle]:
    oracle = Oracle(path, context_length=context_length, n_threads=n_threads, repack=repack, kv_type=kv_type,
                    swa_full=swa_full)
    try:
        yield oracle
    finally:
        oracle.close()


def assert_same_answer(oracle: LlamaCpp, engine: Engine, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """Both get the prompt and then each token that llama.cpp finds best: every logit has the same bits.

    So the greedy answers are the same too; it is returned. With one thread each, both compute at the same time.
    """
    answer: list[int] = []
    step = np.array(prompt, np.int32)
    with ThreadPoolExecutor(1) as other:
        for _ in range(n_tokens + 1):
            pending = other.submit(oracle.step, step)
            if engine.backend.n_threads > 1:
                wait([pending])
            logits, expected = engine.step(step)[0], pending.result()
            assert np.isfinite(expected).all()
            assert np.array_equal(expected, logits), (f"after {len(prompt)} + {len(answer)} tokens: logits differ by "
                                                      f"up to {np.abs(expected - logits).max():.3g}")
            step = np.array([expected.argmax()], np.int32)
            answer.append(int(step[0]))
    return answer


def random_tokens(n_tokens: int, seed: int = 0, vocab_size: int = 300) -> list[int]:
    return [int(token_id) for token_id in np.random.default_rng(seed).integers(0, vocab_size, n_tokens)]
