"""Writes random-weight GGUF models of published shapes, for measurements where only the size matters.

    python benchmarks/random_model.py llama2-7b OUT.gguf
    python benchmarks/random_model.py qwen3-30b-a3b OUT.gguf --layers 4

Weights are random bytes with sane block scales, so values stay finite; written tensor by tensor, in little memory. No
vocabulary: prompts are token ids.

A random router chooses uniformly, so that nothing could be cached. Models with experts are therefore given what makes
real routing uneven (`Skew`), by the first block of numbers in a row, everything else stays random:
- Every token's embedding begins with the same block. The router's weights for it are a normal deviate for each layer
  and expert, so that some experts are chosen often by all tokens: on ../shared/traces the busiest quarter of a layer's
  experts takes 86 % of all uses, half of them 99 %.
- Queries and keys see that block as a constant, which RoPE makes into attention that fades with distance by a power
  of it. So the hidden state, and with it the choice, has much in common with that of the last few tokens: in the
  trace 38 % of a token's experts are those of the token before, 27 % those of 4 tokens before, 20 % of 64 before.
- The output head's row of a token is the embedding of the token before: an answer counts through the vocabulary, where
  a random head gives one token over and over, with always the same experts. Neither head nor values see the block.
Guesses of the next layer's experts (offload/guesses.py) are right in 98 of 100 here, for an FFN adds little to the
hidden state; of trained models, 81 to 89 in 100 were published.
What such a model chose, replayed by benchmarks/expert_cache.py, hits 61, 83 and 97 % at 12.5, 25 and 50 % residency
(smallthinker-4b, 80 tokens); the real trace 61, 83 and 97 %.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
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


@dataclass(frozen=True, slots=True)
class Skew:
    """How uneven the routing is; the defaults come near the real trace's figures."""

    block_energy: float = 0.3  # of a token's embedding, in the block that all tokens share
    expert_spread: float = 3.0  # standard deviation of an expert's constant part, in those of what changes
    recency: float = 2.2  # a query's constant part, in standard deviations of the rest
    attention_gain: float = 1.5  # what attention adds to the hidden state, against what a random matrix would
    ffn_gain: float = 0.2


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
        weights = Weights(shape, rng)
        for name, type_name, dims, _ in entries:
            for chunk in weights.of(name, TENSOR_TYPES_BY_NAME[type_name], dims):
                out.write(chunk.tobytes())
            out.write(b"\0" * (-out.tell() % _ALIGNMENT))


def _n_bytes(tensor_type: TensorType, dims: tuple[int, ...]) -> int:
    return tensor_type.row_bytes(dims[0]) * int(np.prod(dims[1:], dtype=np.int64))


class Weights:
    """Random numbers, tensor by tensor; a matrix keeps the size of a vector about as it is."""

    def __init__(self, shape: Shape, rng: np.random.Generator, skew: Skew | None = None) -> None:
        self._shape, self._rng = shape, rng
        self._skew = (skew or Skew()) if shape.n_experts else None
        self._block_type = TENSOR_TYPES_BY_NAME[shape.type]
        self._block = self._blocks(self._block_type, 1, 1.0)[0]  # what every embedding begins with, of size 1
        self._embedding_seed = int(rng.integers(1 << 32))

    def of(self, name: str, tensor_type: TensorType, dims: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
        if tensor_type.name == "F32":
            yield self._floats(name, dims).view(np.uint8).reshape(-1)
            return
        per_row = dims[0] // tensor_type.block_size
        n_rows, at_once = int(np.prod(dims[1:], dtype=np.int64)), max(1, _CHUNK_BLOCKS // per_row)
        size, first = self._sizes(name, dims[0])
        rng = self._rng
        if self._skew is not None and name in ("token_embd.weight", "output.weight"):
            rng = np.random.default_rng(self._embedding_seed)
            if name == "output.weight":  # the embedding, one row down
                n_rows -= 1
                yield np.zeros((1, per_row, tensor_type.type_bytes), np.uint8)
        for start in range(0, n_rows, at_once):
            n = min(at_once, n_rows - start)
            rows = self._blocks(tensor_type, n * per_row, size, rng).reshape(n, per_row, -1)
            if first is not None:
                rows[:, 0] = _scaled(self._block, first, tensor_type)
            yield rows

    def _sizes(self, name: str, n_in: int) -> tuple[float, float | None]:
        """The standard deviation of a tensor's numbers, and what its rows' shared first block is multiplied by."""
        if self._skew is None:
            return n_in**-0.5, None
        skew, part = self._skew, name.split(".")[-2]
        block_size = self._block_type.block_size
        # Embeddings have numbers of size 1; their first block is larger, and has its share of the whole.
        gain = (skew.block_energy / (1 - skew.block_energy) * (self._shape.hidden - block_size) / block_size) ** 0.5
        seen = block_size * gain * (1 - skew.block_energy) ** 0.5  # by a row that begins with a block of size 1
        match part:
            case "token_embd":
                return 1.0, gain
            case "attn_q" | "attn_k":
                return n_in**-0.5, skew.recency / seen
            case "output" | "attn_v":
                return n_in**-0.5, 0.0
            case "attn_output":
                return skew.attention_gain * n_in**-0.5, None
            case "ffn_down_exps":
                return skew.ffn_gain * n_in**-0.5, None
        return n_in**-0.5, None

    def _floats(self, name: str, dims: tuple[int, ...]) -> NDArray[np.float32]:
        if len(dims) == 1:
            # Queries and keys that are normed keep the constant part's share, and need its size.
            is_qk = self._skew is not None and ("attn_q_norm" in name or "attn_k_norm" in name)
            return np.full(dims, 1.25 if is_qk else 1.0, np.float32)
        values = self._rng.normal(0, dims[0] ** -0.5, dims[::-1]).astype(np.float32)
        if self._skew is not None and "ffn_gate_inp" in name:
            n_block, skew = self._block_type.block_size, self._skew
            direction = dequantize(self._block, self._ggml_type()).reshape(-1)
            spread = self._rng.normal(0, skew.expert_spread, (len(values), 1))
            share = (skew.block_energy / (1 - skew.block_energy)) ** 0.5
            values[:, :n_block] = spread * direction / np.linalg.norm(direction) * dims[0] ** -0.5 / share
        return values

    def _ggml_type(self) -> GGMLQuantizationType:
        return GGMLQuantizationType(self._block_type.id)

    def _blocks(self, tensor_type: TensorType, n: int, size: float,
                rng: np.random.Generator | None = None) -> NDArray[np.uint8]:
        # Q4_0: a scale times -7..7. Q4_K: a scale times 0..63 times 0..15, less a minimum of about half that.
        scale = size / {"Q4_0": 4.6, "Q4_K": 300.0}[tensor_type.name]
        blocks = (rng or self._rng).integers(0, 256, (n, tensor_type.type_bytes), np.uint8)
        blocks[:, 0:2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        if tensor_type.name == "Q4_K":
            blocks[:, 2:4] = np.frombuffer(np.float16(scale * 7.5).tobytes(), np.uint8)
        else:  # no -8: numbers that are -0.5 on average add up, until every token's state is the same
            numbers = blocks[:, 2:]
            numbers |= np.where(numbers & 0x0F, 0, 0x08).astype(np.uint8)
            numbers |= np.where(numbers & 0xF0, 0, 0x80).astype(np.uint8)
        return blocks


def _scaled(block: NDArray[np.uint8], factor: float, tensor_type: TensorType) -> NDArray[np.uint8]:
    """A block times a number: its scales, float16 at its beginning, are multiplied."""
    scaled = block.copy()
    n_scales = 2 if tensor_type.name == "Q4_K" else 1
    scaled[:2 * n_scales] = (block[:2 * n_scales].view(np.float16) * np.float16(factor)).view(np.uint8)
    return scaled


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
