"""Writes random-weight GGUF models of published shapes, for measurements where only the size matters.

    python benchmarks/random_model.py llama2-7b OUT.gguf
    python benchmarks/random_model.py qwen3-30b-a3b OUT.gguf --layers 4

Weights are random bytes with sane block scales, so values stay finite; written tensor by tensor, in little memory. No
vocabulary: prompts are token ids.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.gguf.types import TENSOR_TYPES_BY_NAME, TensorType

_ALIGNMENT = 32
_CHUNK_BLOCKS = 1 << 18
Value = int | float | str


@dataclass(frozen=True, slots=True)
class Shape:
    """A published model's sizes, with the type of its matrices."""

    architecture: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    n_experts: int = 0
    n_used: int = 0
    type: str = "Q4_0"
    extra: dict[str, Value] = field(default_factory=dict)


SHAPES = {
    "llama2-7b": Shape("llama", 32, 4096, 32, 32, 128, 11008, 32000, 4096),
    "smallthinker-4b": Shape("smallthinker", 32, 1536, 12, 2, 128, 768, 151936, 32768, 32, 4,
                             extra={"expert_gating_func": 2}),
    "qwen3-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 4, 128, 768, 151936, 32768, 128, 8, type="Q4_K"),
}


def tensors(shape: Shape) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, type, shape in ggml's order) of every tensor."""
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    yield "token_embd.weight", shape.type, (shape.hidden, shape.vocab)
    for layer in range(shape.n_layers):
        def name(part: str, layer: int = layer) -> str:
            return f"blk.{layer}.{part}.weight"

        yield name("attn_norm"), "F32", (shape.hidden,)
        yield name("attn_q"), shape.type, (shape.hidden, q)
        yield name("attn_k"), shape.type, (shape.hidden, kv)
        yield name("attn_v"), shape.type, (shape.hidden, kv)
        yield name("attn_output"), shape.type, (q, shape.hidden)
        if shape.architecture == "qwen3moe":
            yield name("attn_q_norm"), "F32", (shape.head_dim,)
            yield name("attn_k_norm"), "F32", (shape.head_dim,)
        yield name("ffn_norm"), "F32", (shape.hidden,)
        if not shape.n_experts:
            yield name("ffn_gate"), shape.type, (shape.hidden, shape.ffn)
            yield name("ffn_up"), shape.type, (shape.hidden, shape.ffn)
            yield name("ffn_down"), shape.type, (shape.ffn, shape.hidden)
            continue
        yield name("ffn_gate_inp"), "F32", (shape.hidden, shape.n_experts)
        yield name("ffn_gate_exps"), shape.type, (shape.hidden, shape.ffn, shape.n_experts)
        yield name("ffn_up_exps"), shape.type, (shape.hidden, shape.ffn, shape.n_experts)
        yield name("ffn_down_exps"), shape.type, (shape.ffn, shape.hidden, shape.n_experts)
    yield "output_norm.weight", "F32", (shape.hidden,)
    yield "output.weight", shape.type, (shape.hidden, shape.vocab)


def write(path: Path, shape: Shape, seed: int = 0) -> None:
    """Write the model to `path`, replacing what is there."""
    arch, rng = shape.architecture, np.random.default_rng(seed)
    metadata: dict[str, Value] = {
        "general.architecture": arch, "general.name": f"random {arch}", "tokenizer.ggml.model": "no_vocab",
        f"{arch}.vocab_size": shape.vocab, f"{arch}.block_count": shape.n_layers,
        f"{arch}.context_length": shape.context, f"{arch}.embedding_length": shape.hidden,
        f"{arch}.feed_forward_length": shape.ffn, f"{arch}.attention.head_count": shape.n_heads,
        f"{arch}.attention.head_count_kv": shape.n_kv_heads, f"{arch}.attention.key_length": shape.head_dim,
        f"{arch}.attention.value_length": shape.head_dim, f"{arch}.rope.dimension_count": shape.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6, f"{arch}.rope.freq_base": 1e6}
    if shape.n_experts:
        metadata |= {f"{arch}.expert_count": shape.n_experts, f"{arch}.expert_used_count": shape.n_used,
                     f"{arch}.expert_feed_forward_length": shape.ffn}
    metadata |= {f"{arch}.{key}": value for key, value in shape.extra.items()}
    entries, offset = [], 0
    for name, type_name, dims in tensors(shape):
        n_bytes = _n_bytes(TENSOR_TYPES_BY_NAME[type_name], dims)
        entries.append((name, type_name, dims, offset))
        offset += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
    with path.open("wb") as out:
        out.write(struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(metadata)))
        for key, value in metadata.items():
            out.write(_text(key) + _value(value))
        for name, type_name, dims, start in entries:
            out.write(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims,
                                                TENSOR_TYPES_BY_NAME[type_name].id, start))
        out.write(b"\0" * (-out.tell() % _ALIGNMENT))
        for _, type_name, dims, _ in entries:
            for chunk in _random(rng, TENSOR_TYPES_BY_NAME[type_name], dims):
                out.write(chunk.tobytes())
            out.write(b"\0" * (-out.tell() % _ALIGNMENT))


def _n_bytes(tensor_type: TensorType, dims: tuple[int, ...]) -> int:
    return tensor_type.row_bytes(dims[0]) * int(np.prod(dims[1:], dtype=np.int64))


def _random(rng: np.random.Generator, tensor_type: TensorType, dims: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
    """Random blocks; scales such that a matrix keeps the size of a vector about as it is."""
    if tensor_type.name == "F32":
        n = int(np.prod(dims, dtype=np.int64))
        values = np.ones(n, np.float32) if len(dims) == 1 else rng.normal(0, dims[0] ** -0.5, n).astype(np.float32)
        yield values.view(np.uint8)
        return
    n_blocks = _n_bytes(tensor_type, dims) // tensor_type.type_bytes
    # Q4_0: a scale times -8..7. Q4_K: a scale times 0..63 times 0..15, less a minimum of about half that.
    scale = dims[0] ** -0.5 / {"Q4_0": 4.6, "Q4_K": 300.0}[tensor_type.name]
    for start in range(0, n_blocks, _CHUNK_BLOCKS):
        n = min(_CHUNK_BLOCKS, n_blocks - start)
        blocks = rng.integers(0, 256, (n, tensor_type.type_bytes), np.uint8)
        blocks[:, 0:2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        if tensor_type.name == "Q4_K":
            blocks[:, 2:4] = np.frombuffer(np.float16(scale * 7.5).tobytes(), np.uint8)
        yield blocks


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the published model")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    from dataclasses import replace

    write(args.path, replace(shape, n_layers=args.layers or shape.n_layers))


if __name__ == "__main__":
    main()
