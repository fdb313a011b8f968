"""The tensors and keys of each supported architecture at toy size, as llama.cpp expects them in a file.

Knows names, shapes and roles; does not make weights (tiny_models.py) and does not write files (tiny_gguf.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tiny_gguf import MetaValue

Role = Literal["embedding", "matrix", "output", "norm", "bias", "router", "rope_factors"]
RopeScaling = Literal["none", "linear", "yarn", "llama3"]
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "qwen3moe", "olmoe", "smallthinker")
EXPERT_ARCHITECTURES = ("qwen3moe", "olmoe", "smallthinker")
_GATING = {"softmax": 1, "sigmoid": 2}


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Everything about a tiny model but its numbers. `n_experts` 0 is a dense model."""

    architecture: str
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    tied: bool
    n_experts: int = 0
    n_experts_used: int = 0
    rope_scaling: RopeScaling = "none"
    rope_factor: float = 4.0
    rope_freq_base: float = 10_000.0
    sliding_window: int = 0
    sliding_window_pattern: int | None = None
    expert_gating: Literal["softmax", "sigmoid"] = "sigmoid"


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the model; `shape` in ggml's order."""

    name: str
    shape: tuple[int, ...]
    role: Role


def tensor_plans(shape: TinyShape) -> Iterator[TensorPlan]:
    """Every tensor of the model in the order in which converters write them."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    yield TensorPlan("token_embd.weight", (hidden, vocab), "embedding")
    if shape.rope_scaling == "llama3":
        yield TensorPlan("rope_freqs.weight", (shape.head_dim // 2,), "rope_factors")
    for layer in range(shape.n_layers):
        for plan in (*_attention(shape), *_feed_forward(shape)):
            yield TensorPlan(f"blk.{layer}.{plan.name}", plan.shape, plan.role)
    yield TensorPlan("output_norm.weight", (hidden,), "norm")
    if not shape.tied:
        yield TensorPlan("output.weight", (hidden, vocab), "output")


def _attention(shape: TinyShape) -> Iterator[TensorPlan]:
    hidden, q_size, kv_size = shape.hidden_size, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    yield TensorPlan("attn_norm.weight", (hidden,), "norm")
    for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        yield TensorPlan(f"attn_{name}.weight", (hidden, size), "matrix")
        if shape.architecture == "qwen2":
            yield TensorPlan(f"attn_{name}.bias", (size,), "bias")
    yield TensorPlan("attn_output.weight", (q_size, hidden), "matrix")
    if shape.architecture in ("qwen3", "qwen3moe", "gemma3"):
        yield TensorPlan("attn_q_norm.weight", (shape.head_dim,), "norm")
        yield TensorPlan("attn_k_norm.weight", (shape.head_dim,), "norm")
    elif shape.architecture == "olmoe":  # normalises the whole projection, not each head
        yield TensorPlan("attn_q_norm.weight", (q_size,), "norm")
        yield TensorPlan("attn_k_norm.weight", (kv_size,), "norm")
    if shape.architecture == "gemma3":
        yield TensorPlan("post_attention_norm.weight", (hidden,), "norm")


def _feed_forward(shape: TinyShape) -> Iterator[TensorPlan]:
    hidden, ffn = shape.hidden_size, shape.ffn_size
    yield TensorPlan("ffn_norm.weight", (hidden,), "norm")
    suffix, experts = ("_exps", (shape.n_experts,)) if shape.n_experts else ("", ())
    if shape.n_experts:
        yield TensorPlan("ffn_gate_inp.weight", (hidden, shape.n_experts), "router")
    yield TensorPlan(f"ffn_gate{suffix}.weight", (hidden, ffn, *experts), "matrix")
    yield TensorPlan(f"ffn_up{suffix}.weight", (hidden, ffn, *experts), "matrix")
    yield TensorPlan(f"ffn_down{suffix}.weight", (ffn, hidden, *experts), "matrix")
    if shape.architecture == "gemma3":
        yield TensorPlan("post_ffw_norm.weight", (hidden,), "norm")


def hyperparameters(shape: TinyShape) -> dict[str, MetaValue]:
    """The keys that llama.cpp reads for this architecture, beside the tokenizer's."""
    keys: dict[str, MetaValue] = {
        "block_count": shape.n_layers,
        "context_length": shape.context_length,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.ffn_size,
        "attention.head_count": shape.n_heads,
        "attention.head_count_kv": shape.n_kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": shape.rope_freq_base,
        **_rope_scaling(shape),
    }
    if shape.n_experts:
        keys |= {"expert_count": shape.n_experts, "expert_used_count": shape.n_experts_used}
    if shape.architecture in ("qwen3moe", "smallthinker"):
        keys["expert_feed_forward_length"] = shape.ffn_size
    if shape.architecture == "smallthinker":
        keys["expert_gating_func"] = _GATING[shape.expert_gating]
    if shape.sliding_window:
        keys["attention.sliding_window"] = shape.sliding_window
    if shape.sliding_window_pattern is not None:
        keys["attention.sliding_window_pattern"] = shape.sliding_window_pattern
    return {f"{shape.architecture}.{key}": value for key, value in keys.items()}


def _rope_scaling(shape: TinyShape) -> dict[str, MetaValue]:
    if shape.rope_scaling == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": shape.rope_factor}
    if shape.rope_scaling == "yarn":
        return {"rope.scaling.type": "yarn", "rope.scaling.factor": shape.rope_factor, "rope.scaling.finetuned": True,
                "rope.scaling.original_context_length": int(shape.context_length / shape.rope_factor)}
    return {}  # Llama 3's factors are a tensor, rope_freqs.weight
