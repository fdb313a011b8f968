"""A typed, minimal binding of libllama: vocabularies and sampler chains, described as vendor/llama.cpp's llama.h does.

Knows C structures, functions and who frees what. Knows no policy: what is a valid id, what a hostile vocabulary is and
which samplers follow each other is decided by tokenizer.py, vocabulary_check.py and sampler.py.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_bool, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from edgert.errors import NativeLibraryError
from edgert.ggml.library import load_libraries

KIND_NONE, KIND_SPM, KIND_BPE = 0, 1, 2  # enum llama_vocab_type
LEVEL_ERROR = 4  # enum ggml_log_level
_LOAD_MODE_NONE = 0  # enum llama_load_mode
_OVERRIDE_INT = 0  # enum llama_model_kv_override_type
_PIECE_BYTES = 64  # longer pieces are asked for again with the length that libllama names
_logger = logging.getLogger("edgert.libllama")


class ModelParams(ctypes.Structure):
    """`struct llama_model_params`."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class _OverrideValue(ctypes.Union):
    _fields_ = (("val_i64", c_int64), ("val_str", c_char * 128))


class ModelOverride(ctypes.Structure):
    """`struct llama_model_kv_override`; a list of them ends with an empty key."""

    _fields_ = (("tag", c_int), ("key", c_char * 128), ("value", _OverrideValue))


class TokenData(ctypes.Structure):
    """`struct llama_token_data`: one candidate."""

    _fields_ = (("id", c_int32), ("logit", c_float), ("p", c_float))


class TokenDataArray(ctypes.Structure):
    """`struct llama_token_data_array`: the candidates; samplers reorder and shorten it, the last sets `selected`."""

    _fields_ = (("data", POINTER(TokenData)), ("size", c_size_t), ("selected", c_int64), ("sorted", c_bool))


class LogitBias(ctypes.Structure):
    """`struct llama_logit_bias`."""

    _fields_ = (("token", c_int32), ("bias", c_float))


class SamplerChainParams(ctypes.Structure):
    """`struct llama_sampler_chain_params`."""

    _fields_ = (("no_perf", c_bool),)


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_P, _I, _F = c_void_p, c_int32, c_float

FUNCTIONS: Mapping[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_LogCallback, _P]),
    "llama_model_default_params": (ModelParams, []),
    "llama_model_load_from_file": (_P, [c_char_p, ModelParams]),
    "llama_model_free": (None, [_P]),
    "llama_model_get_vocab": (_P, [_P]),
    "llama_model_meta_val_str": (_I, [_P, c_char_p, c_char_p, c_size_t]),
    "llama_vocab_type": (c_int, [_P]),
    "llama_vocab_n_tokens": (_I, [_P]),
    "llama_vocab_get_text": (c_char_p, [_P, _I]),
    "llama_vocab_is_eog": (c_bool, [_P, _I]),
    "llama_vocab_is_control": (c_bool, [_P, _I]),
    "llama_vocab_bos": (_I, [_P]),
    "llama_vocab_eos": (_I, [_P]),
    "llama_vocab_get_add_bos": (c_bool, [_P]),
    "llama_vocab_get_add_eos": (c_bool, [_P]),
    "llama_tokenize": (_I, [_P, c_char_p, _I, POINTER(_I), _I, c_bool, c_bool]),
    "llama_token_to_piece": (_I, [_P, _I, c_char_p, _I, _I, c_bool]),
    "llama_sampler_chain_init": (_P, [SamplerChainParams]),
    "llama_sampler_chain_add": (None, [_P, _P]),
    "llama_sampler_init_greedy": (_P, []),
    "llama_sampler_init_dist": (_P, [c_uint32]),
    "llama_sampler_init_top_k": (_P, [_I]),
    "llama_sampler_init_top_p": (_P, [_F, c_size_t]),
    "llama_sampler_init_min_p": (_P, [_F, c_size_t]),
    "llama_sampler_init_temp": (_P, [_F]),
    "llama_sampler_init_penalties": (_P, [_I, _I, _F, _F, _F]),
    "llama_sampler_init_logit_bias": (_P, [_I, _I, POINTER(LogitBias)]),
    "llama_sampler_apply": (None, [_P, POINTER(TokenDataArray)]),
    "llama_sampler_accept": (None, [_P, _I]),
    "llama_sampler_reset": (None, [_P]),
    "llama_sampler_free": (None, [_P]),
}


def _forward_to_logging(level: int, text: str) -> None:
    _logger.debug("%s", text.rstrip())


@cache
def libllama() -> Any:
    """The library with every used function declared and its messages sent to Python's logging, at debug level."""
    library = load_libraries().llama
    for name, (result, arguments) in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise NativeLibraryError(f"libllama has no function {name}", "Install the version that edgert knows: "
                                     "pip install llama-cpp-python==0.3.36.") from error
        function.restype, function.argtypes = result, arguments
    _set_log(library, _forward_to_logging)
    return library


def send_log_to(receiver: Callable[[int, str], None]) -> None:
    """Let `receiver(level, text)` have libllama's messages from now on. It may be called from any thread."""
    _set_log(libllama(), receiver)


def _set_log(library: Any, receiver: Callable[[int, str], None]) -> None:
    def deliver(level: int, text: bytes | None, _: object) -> None:
        receiver(level, (text or b"").decode("utf-8", errors="replace"))

    library.edgert_log_callback = callback = _LogCallback(deliver)  # lives as long as the library that calls it
    library.llama_log_set(callback, None)


def load_vocabulary(path: Path) -> Vocabulary | None:
    """Load the vocabulary of `path` and nothing else of it; None when libllama refuses it (its log says why).

    Only this file is read: a split model's first part holds the whole vocabulary, and an override of `split.count`
    keeps libllama from opening the others. An empty device list keeps it from waking a GPU.
    """
    library = libllama()
    overrides = (ModelOverride * 2)()
    overrides[0].tag, overrides[0].key = _OVERRIDE_INT, b"split.count"
    devices = (c_void_p * 1)()
    params = library.llama_model_default_params()
    params.vocab_only, params.load_mode, params.n_gpu_layers = True, _LOAD_MODE_NONE, 0
    params.devices, params.kv_overrides = ctypes.addressof(devices), ctypes.addressof(overrides)
    model = library.llama_model_load_from_file(os.fsencode(path), params)
    return Vocabulary(library, model) if model else None


class Vocabulary:
    """A loaded vocabulary. Ids must be valid: libllama ends the process on others. Not usable after `close`."""

    def __init__(self, library: Any, model: int) -> None:
        self._library, self._model = library, model
        self._pointer: int = library.llama_model_get_vocab(model)
        self.kind: int = library.llama_vocab_type(self._pointer)
        self.n_tokens: int = library.llama_vocab_n_tokens(self._pointer)

    def close(self) -> None:
        if self._model:
            self._library.llama_model_free(self._model)
            self._model = self._pointer = 0

    @property
    def closed(self) -> bool:
        return not self._model

    @property
    def bos_id(self) -> int:
        """The begin token, or -1."""
        return int(self._library.llama_vocab_bos(self._pointer))

    @property
    def eos_id(self) -> int:
        """The end token, or -1."""
        return int(self._library.llama_vocab_eos(self._pointer))

    @property
    def adds_bos(self) -> bool:
        return bool(self._library.llama_vocab_get_add_bos(self._pointer))

    @property
    def adds_eos(self) -> bool:
        return bool(self._library.llama_vocab_get_add_eos(self._pointer))

    @property
    def pre_tokenizer(self) -> str:
        """`tokenizer.ggml.pre`, or an empty text."""
        buffer = ctypes.create_string_buffer(128)
        self._library.llama_model_meta_val_str(self._model, b"tokenizer.ggml.pre", buffer, len(buffer))
        return buffer.value.decode("utf-8", errors="replace")

    def text(self, token_id: int) -> bytes:
        """How the file writes the token, up to a zero byte."""
        return bytes(self._library.llama_vocab_get_text(self._pointer, token_id))

    def is_end_of_generation(self, token_id: int) -> bool:
        return bool(self._library.llama_vocab_is_eog(self._pointer, token_id))

    def is_control(self, token_id: int) -> bool:
        return bool(self._library.llama_vocab_is_control(self._pointer, token_id))

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """The token ids of `text`. Other Python threads run meanwhile. Raises MemoryError above 2**31 tokens."""
        capacity = len(text) + 8  # a token per byte, and room for what is added around them
        while True:
            tokens = (_I * capacity)()
            count = self._library.llama_tokenize(self._pointer, text, len(text), tokens, capacity, add_special,
                                                 parse_special)
            if count >= 0:
                return list(tokens[:count])
            if count == -2**31:
                raise MemoryError("libllama counts tokens in 31 bits")
            capacity = -count

    def piece(self, token_id: int, *, special: bool) -> bytes:
        """The bytes that a token stands for; control tokens are empty unless `special`."""
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        count = self._library.llama_token_to_piece(self._pointer, token_id, buffer, len(buffer), 0, special)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._library.llama_token_to_piece(self._pointer, token_id, buffer, len(buffer), 0, special)
        return buffer.raw[:count]

    def pieces(self) -> list[bytes]:
        """What each token shows, in the order of ids; control tokens are empty. 1 us a token: one buffer serves all."""
        to_piece, pointer = self._library.llama_token_to_piece, self._pointer
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        view = memoryview(buffer).cast("B")
        counts = ((token_id, to_piece(pointer, token_id, buffer, _PIECE_BYTES, 0, False))
                  for token_id in range(self.n_tokens))
        return [bytes(view[:count]) if count >= 0 else self.piece(token_id, special=False)
                for token_id, count in counts]

    def end_ids(self) -> list[int]:
        """The tokens for which `is_end_of_generation` is true."""
        is_end, pointer = self._library.llama_vocab_is_eog, self._pointer
        return [token_id for token_id in range(self.n_tokens) if is_end(pointer, token_id)]


class SamplerChain:
    """`llama_sampler_chain_*`: samplers in the order in which they were added. Not usable after `close`."""

    def __init__(self) -> None:
        self._library = libllama()
        self._pointer: int = self._library.llama_sampler_chain_init(SamplerChainParams(no_perf=True))

    def add(self, name: str, *arguments: Any) -> None:
        """Append `llama_sampler_init_<name>(*arguments)`; the chain owns it."""
        sampler = getattr(self._library, f"llama_sampler_init_{name}")(*arguments)
        self._library.llama_sampler_chain_add(self._pointer, sampler)

    def apply(self, candidates: TokenDataArray) -> None:
        """Let every sampler work on `candidates`; the last one sets `selected`."""
        self._library.llama_sampler_apply(self._pointer, candidates)

    def accept(self, token_id: int) -> None:
        """Tell every sampler which token was chosen."""
        self._library.llama_sampler_accept(self._pointer, token_id)

    def reset(self) -> None:
        """Back to the state before the first token; the random generator starts from its seed again."""
        self._library.llama_sampler_reset(self._pointer)

    def close(self) -> None:
        if self._pointer:
            self._library.llama_sampler_free(self._pointer)
            self._pointer = 0

    @property
    def closed(self) -> bool:
        return not self._pointer
