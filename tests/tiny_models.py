"""Writes tiny models with random weights that llama.cpp loads and that behave like models: the oracle's food.

The weights are scaled so that logits spread (standard deviation about 3) and greedy tokens vary; they mean nothing.
Each tensor's numbers depend on the seed and its name only, so two quantisations of one seed are one model.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tiny_architectures import (
    ARCHITECTURES,
    EXPERT_ARCHITECTURES,
    RopeScaling,
    TensorPlan,
    TinyShape,
    hyperparameters,
    tensor_plans,
)
from tiny_gguf import MetaValue, TinyTensor, write_gguf, write_split_gguf
from tiny_vocabulary import SPECIAL_TOKENS, no_vocabulary_keys, vocabulary_keys

from edgert.ggml.library import load_libraries
from edgert.gguf.types import TENSOR_TYPES_BY_NAME, TensorType

# What llama.cpp's own mixtures do: better types where errors cost most, each type with a kernel of its own.
_MIXED = (("token_embd", "Q5_K"), ("output.", "Q6_K"), ("attn_v", "Q6_K"), ("attn_k", "Q8_0"), ("ffn_down", "Q6_K"),
          ("attn_output", "F16"), ("attn_q", "Q5_0"), ("ffn_up", "Q4_0"))
_MIXED_REST = "Q4_K"


def write_tiny_model(path: Path, architecture: str, *, quantisation: str = "Q8_0", seed: int = 0,
                     vocabulary: bool = True, split_parts: int = 1, metadata: Mapping[str, MetaValue] | None = None,
                     n_layers: int = 2, hidden_size: int | None = None, n_heads: int = 4, n_kv_heads: int | None = None,
                     head_dim: int | None = None, ffn_size: int | None = None, vocab_size: int = 320,
                     context_length: int = 2048, tied: bool | None = None, n_experts: int | None = None,
                     n_experts_used: int = 2, rope_scaling: RopeScaling = "none", rope_factor: float = 4.0,
                     sliding_window: int | None = None, sliding_window_pattern: int | None = None) -> Path:
    """Write a model and return its path (the first part's, when `split_parts` > 1).

    `quantisation` is a ggml type's name or "MIXED"; norms, biases and routers are F32 always. `metadata` overrides
    keys. Sizes left out suit the type: 256 hidden where blocks have 256 elements, else 128. Experts: 8, 2 of them
    used, for architectures that have them (`n_experts=4` makes a llama a Mixtral). gemma3 has windows of 32 tokens
    on every other layer; `sliding_window=0` turns them off. (llama.cpp takes 4096 for any smallthinker window.)
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"no tiny {architecture}; there are {', '.join(ARCHITECTURES)}")
    gemma = architecture == "gemma3"
    block = 256 if quantisation == "MIXED" else TENSOR_TYPES_BY_NAME[quantisation].block_size
    hidden = hidden_size or (256 if block == 256 else 128)
    experts = n_experts if n_experts is not None else 8 * (architecture in EXPERT_ARCHITECTURES)
    window = sliding_window if sliding_window is not None else 32 * gemma
    shape = TinyShape(
        architecture=architecture, n_layers=n_layers, hidden_size=hidden, n_heads=n_heads,
        # OLMoE's k norm is as wide as its hidden state, so it has no grouped heads.
        n_kv_heads=n_kv_heads or (n_heads if architecture == "olmoe" else max(1, n_heads // 2)),
        head_dim=head_dim or hidden // n_heads, ffn_size=ffn_size or (256 if experts else 2 * hidden),
        vocab_size=vocab_size, context_length=context_length, tied=gemma if tied is None else tied,
        n_experts=experts, n_experts_used=min(n_experts_used, experts), rope_scaling=rope_scaling,
        rope_factor=rope_factor, rope_freq_base=1e6 if gemma else 1e4, sliding_window=window,
        sliding_window_pattern=sliding_window_pattern or (2 if gemma and window else None))
    keys = _metadata(shape, vocabulary) | dict(metadata or {})
    tensors = [_tensor(plan, shape, quantisation, seed) for plan in tensor_plans(shape)]
    if split_parts > 1:
        return write_split_gguf(path, keys, tensors, split_parts)
    return write_gguf(path, keys, tensors)


def _metadata(shape: TinyShape, with_vocabulary: bool) -> dict[str, MetaValue]:
    tokenizer = (vocabulary_keys(shape.vocab_size) if with_vocabulary
                 else no_vocabulary_keys(shape.architecture, shape.vocab_size))
    return {"general.architecture": shape.architecture, "general.type": "model",
            "general.name": f"tiny {shape.architecture}", "general.quantization_version": 2,
            **hyperparameters(shape), **tokenizer}


def _tensor(plan: TensorPlan, shape: TinyShape, quantisation: str, seed: int) -> TinyTensor:
    weights = _weights(plan, shape, np.random.default_rng((seed, zlib.crc32(plan.name.encode()))))
    if plan.role in ("norm", "bias", "router", "rope_factors"):
        return TinyTensor(plan.name, TENSOR_TYPES_BY_NAME["F32"], plan.shape, weights.tobytes())
    tensor_type = TENSOR_TYPES_BY_NAME[_type_name(plan.name, quantisation)]
    return TinyTensor(plan.name, tensor_type, plan.shape, quantise(weights, tensor_type))


def _type_name(name: str, quantisation: str) -> str:
    if quantisation != "MIXED":
        return quantisation
    return next((chosen for part, chosen in _MIXED if part in name), _MIXED_REST)


def _weights(plan: TensorPlan, shape: TinyShape, rng: np.random.Generator) -> NDArray[np.float32]:
    """The tensor's numbers, (..., ne[1], ne[0]) float32."""
    normal = rng.standard_normal(plan.shape[::-1], dtype=np.float32)
    match plan.role:
        case "norm":
            return np.float32(_norm_gain(plan.name, shape)) * (1 + np.float32(0.1) * normal)
        case "bias":
            return np.float32(0.3) * normal
        case "rope_factors":  # low dimensions turn as before, high ones eight times slower, as in Llama 3.1
            return np.geomspace(1, 8, plan.shape[0], dtype=np.float32)
        case "router" | "matrix":
            return normal * np.float32(plan.shape[0] ** -0.5 * _matrix_gain(plan.name))
        case "embedding" | "output":
            return _vocabulary_rows(normal, plan, shape)


def _matrix_gain(name: str) -> float:
    # What a block adds must outweigh the embedding, or a model with a tied output only echoes its input.
    return 2.0 if "attn_output" in name or "ffn_down" in name else 1.5


# Gemma multiplies embeddings by sqrt(hidden) and normalises what a block adds. So the embedding (and its tied output)
# is made small and the last norm makes up for it; and attention, an average over the context that a norm would
# blow up to full size, adds less than the feed-forward part, or all tokens of a text look alike.
_GEMMA_NORM_GAINS = (("output_norm", 30.0), ("post_attention_norm", 0.15), ("_q_norm", 1.5), ("_k_norm", 1.5))


def _norm_gain(name: str, shape: TinyShape) -> float:
    gains = _GEMMA_NORM_GAINS if shape.architecture == "gemma3" else ()
    return next((gain for part, gain in gains if part in name), 1.0)


def _vocabulary_rows(normal: NDArray[np.float32], plan: TensorPlan, shape: TinyShape) -> NDArray[np.float32]:
    # Unit activations times these rows give logits of standard deviation 3.
    rows = normal * np.float32(3 / _norm_gain("output_norm", shape) * plan.shape[0] ** -0.5)
    if plan.role == "output" or shape.tied:
        rows[-len(SPECIAL_TOKENS):] *= np.float32(0.1)  # an answer should rarely end by itself
    return rows


def quantise(weights: NDArray[np.float32], tensor_type: TensorType) -> bytes:
    """`weights` as ggml itself quantises them, with every column equally important where a type asks for that."""
    rows = np.ascontiguousarray(weights.reshape(-1, weights.shape[-1]))
    n_rows, row_size = rows.shape
    data = ctypes.create_string_buffer(n_rows * tensor_type.row_bytes(row_size))
    importance = np.ones(row_size, dtype=np.float32)
    function = load_libraries().base.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
                         ctypes.c_int64, ctypes.c_void_p]
    written = function(tensor_type.id, rows.ctypes.data, data, 0, n_rows, row_size, importance.ctypes.data)
    assert written == len(data), f"ggml does not quantise to {tensor_type.name}"
    return data.raw


QUANTISABLE: Sequence[str] = tuple(
    name for name in TENSOR_TYPES_BY_NAME
    if name not in {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}  # activations and indices, never weights
)
