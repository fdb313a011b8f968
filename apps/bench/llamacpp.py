"""llama.cpp itself, through llama-cpp-python's low-level interface: the oracle for numbers and the peer for speed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgert.errors import ComputeError

_KV_TYPES = {"f16": 1, "q8_0": 8}


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: int) -> None:
    pass


class LlamaCpp:
    """One context over one model: flash attention on, 512-token batches, the sequence appended by `step`."""

    def __init__(self, path: Path, *, context_length: int = 2048, n_threads: int = 2, repack: bool = False,
                 kv_type: str = "f16", batch_size: int = 512) -> None:
        llama_cpp.llama_log_set(_silent, None)
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = repack
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ComputeError(f"llama.cpp does not load {path}", "Measure without it, or try another model file.")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = context_length, batch_size, batch_size
        context.n_threads = context.n_threads_batch = n_threads
        context.flash_attn_type = 1
        context.type_k = context.type_v = _KV_TYPES[kv_type]
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise ComputeError(f"llama.cpp has no memory for a context of {context_length} tokens",
                               "Ask for smaller tests, or measure without it.")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch_size = batch_size
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def step(self, token_ids: Iterable[int]) -> NDArray[np.float32]:
        """Append tokens; a copy of the logits (vocab_size,) of the last one."""
        return self.decode(token_ids).copy()

    def decode(self, token_ids: Iterable[int]) -> NDArray[np.float32]:
        """Append tokens; logits (vocab_size,) of the last one, valid until the next ones."""
        ids = np.fromiter(token_ids, np.int32)
        for start in range(0, len(ids), self._batch_size):
            part = np.ascontiguousarray(ids[start:start + self._batch_size])
            pointer = part.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(pointer, len(part))) != 0:
                raise ComputeError("llama.cpp: llama_decode failed")
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))

    def greedy(self, prompt: Iterable[int], n_tokens: int) -> list[int]:
        """`n_tokens` tokens, each the argmax, end tokens included."""
        logits, chosen = self.step(prompt), []
        for _ in range(n_tokens):
            chosen.append(int(logits.argmax()))
            logits = self.step(chosen[-1:])
        return chosen

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), add_special, True)
        return list(ids[:n])

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first tokens."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, n_tokens, -1)

    def close(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_model_free(self._model)
            self._context = self._model = None
