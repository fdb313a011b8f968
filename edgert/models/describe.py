"""What `edgert show` tells of a model: its shape, its bytes by kind of block, its KV cache per token.

Reads the header through ModelFile and reports what it says; keys that a file lacks are None, not guessed. Does not
know whether edgert can compute the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgert.models.quantisation import quantisation_name

if TYPE_CHECKING:
    from edgert.gguf.model_file import ModelFile

BlockKind = Literal["embedding", "attention", "ffn", "experts", "output head", "other"]
KINDS: tuple[BlockKind, ...] = ("embedding", "attention", "ffn", "experts", "output head", "other")
_F16_BYTES = 2
_Q8_0_BLOCK, _Q8_0_BLOCK_BYTES = 32, 34  # 32 values of one byte and a scale of two


@dataclass(frozen=True, slots=True)
class TensorTypeUse:
    """How many tensors have a type, and the bytes that they take."""

    n_tensors: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Description:
    """One model. `n_heads` and `n_kv_heads` are one number, or one per layer where layers differ."""

    name: str
    path: Path
    parts: tuple[Path, ...]
    file_bytes: int
    architecture: str
    n_parameters: int
    quantisation: str
    context_length: int | None
    n_layers: int | None
    hidden_size: int | None
    n_heads: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    n_experts: int | None
    n_experts_used: int | None
    sliding_window: int | None
    vocabulary_size: int | None
    block_bytes: Mapping[BlockKind, int]
    tied_output: bool  # the embedding is the output head too
    kv_bytes_per_token: Mapping[Literal["f16", "q8_0"], int] | None  # all layers, without regard to windows
    licence: str | None
    has_chat_template: bool
    tensor_types: Mapping[str, TensorTypeUse]


def describe(path: Path) -> Description:
    """Read the header of `path` (the first part of a split model). Raises ModelNotFound or ModelFileError."""
    from edgert.gguf.model_file import ModelFile

    model = ModelFile.open(path)
    types = _tensor_types(model)
    n_layers = _int(model, "{arch}.block_count")
    n_heads = _ints(model, "{arch}.attention.head_count")
    n_kv_heads = _ints(model, "{arch}.attention.head_count_kv") or n_heads
    return Description(
        name=model.name, path=model.path, parts=model.parts, file_bytes=model.file_bytes,
        architecture=model.architecture, n_parameters=model.n_parameters,
        quantisation=quantisation_name(_int(model, "general.file_type"), {t: use.n_bytes for t, use in types.items()}),
        context_length=_int(model, "{arch}.context_length"), n_layers=n_layers,
        hidden_size=_int(model, "{arch}.embedding_length"), n_heads=n_heads, n_kv_heads=n_kv_heads,
        n_experts=_int(model, "{arch}.expert_count"), n_experts_used=_int(model, "{arch}.expert_used_count"),
        sliding_window=_int(model, "{arch}.attention.sliding_window"), vocabulary_size=_vocabulary_size(model),
        block_bytes=_block_bytes(model), tied_output="output.weight" not in model.tensors,
        kv_bytes_per_token=_kv_bytes(model, n_layers or 0, n_heads, n_kv_heads), licence=_licence(model),
        has_chat_template="tokenizer.chat_template" in model.metadata, tensor_types=types)


def block_kind(tensor: str) -> BlockKind:
    """The kind of block that a tensor belongs to, by its name in llama.cpp's naming."""
    if tensor.startswith(("token_embd", "per_layer_token_embd", "position_embd", "token_types")):
        return "embedding"
    if tensor.startswith("output.") or tensor.startswith("output_norm."):
        return "output head"
    _, _, part = tensor.partition(".")[2].partition(".")
    if not tensor.startswith("blk."):
        return "other"
    if "_exps" in part or "_chexps" in part:
        return "experts"
    if part.startswith(("ffn", "post_ffw", "pre_ffw", "exp_probs")):
        return "ffn"
    return "attention" if part.startswith(("attn", "post_attention")) else "other"


def _tensor_types(model: ModelFile) -> dict[str, TensorTypeUse]:
    """By bytes, the most first."""
    uses: dict[str, TensorTypeUse] = {}
    for tensor in model.tensors.values():
        use = uses.get(tensor.type.name, TensorTypeUse(0, 0))
        uses[tensor.type.name] = TensorTypeUse(use.n_tensors + 1, use.n_bytes + tensor.n_bytes)
    return dict(sorted(uses.items(), key=lambda item: -item[1].n_bytes))


def _block_bytes(model: ModelFile) -> dict[BlockKind, int]:
    totals: dict[BlockKind, int] = dict.fromkeys(KINDS, 0)
    for name, tensor in model.tensors.items():
        totals[block_kind(name)] += tensor.n_bytes
    return totals


def _kv_bytes(model: ModelFile, n_layers: int, n_heads: tuple[int, ...],
              n_kv_heads: tuple[int, ...]) -> dict[Literal["f16", "q8_0"], int] | None:
    """Bytes that one cached token takes in all layers; None if the file does not say its heads."""
    hidden_size = _int(model, "{arch}.embedding_length")
    if not n_layers or not n_heads or not max(n_heads) or not hidden_size:
        return None
    head_dim = hidden_size // max(n_heads)
    key_dim = _int(model, "{arch}.attention.key_length") or head_dim
    value_dim = _int(model, "{arch}.attention.value_length") or head_dim
    alike = n_layers if len(n_kv_heads) == 1 else 1  # layers; not expanded, since a file may claim any number of them
    rows = [heads * dim for heads in n_kv_heads[:n_layers] for dim in (key_dim, value_dim)]
    q8_0_bytes = sum(-(-row // _Q8_0_BLOCK) * _Q8_0_BLOCK_BYTES for row in rows)
    return {"f16": alike * sum(rows) * _F16_BYTES, "q8_0": alike * q8_0_bytes}


def _vocabulary_size(model: ModelFile) -> int | None:
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        return getattr(tokens, "length", None)  # a list of texts stays in the file
    embedding = model.tensors.get("token_embd.weight")
    return _int(model, "{arch}.vocab_size") or (embedding.shape[-1] if embedding else None)


def _licence(model: ModelFile) -> str | None:
    named = (model.metadata.get(key) for key in ("general.license", "general.license.name", "general.license.link"))
    return next((text for text in named if isinstance(text, str) and text), None)


def _int(model: ModelFile, key: str) -> int | None:
    return model.get_int(key) if model.has(key) else None


def _ints(model: ModelFile, key: str) -> tuple[int, ...]:
    return model.get_ints(key) if model.has(key) else ()
