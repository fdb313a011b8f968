"""How `edgert show` presents a model: lines of text for 80 columns, or an object for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgert.models.describe import Description
from edgert.units import format_bytes


def card_lines(model: Description) -> Iterator[str]:
    """The text, line by line; values that the file does not tell are left out."""
    yield model.name
    rows = {
        "file": str(model.path) + (f" and {len(model.parts) - 1} more parts" if len(model.parts) > 1 else ""),
        "size": format_bytes(model.file_bytes),
        "architecture": model.architecture,
        "parameters": _parameters(model.n_parameters),
        "quantisation": model.quantisation,
        "context length": _count(model.context_length, "tokens"),
        "layers": _count(model.n_layers),
        "hidden size": _count(model.hidden_size),
        "heads": _heads(model),
        "experts": f"{model.n_experts}, {model.n_experts_used or '?'} used per token" if model.n_experts else "",
        "sliding window": _count(model.sliding_window, "tokens"),
        "vocabulary": _count(model.vocabulary_size, "tokens"),
        "KV per token": _kv(model),
        "licence": model.licence or "not stated in the file",
        "chat template": "yes" if model.has_chat_template else "no",
    }
    yield from (f"  {label:<15} {value}" for label, value in rows.items() if value)
    yield "  bytes by block"
    total_bytes = max(1, sum(model.block_bytes.values()))
    for kind, n_bytes in model.block_bytes.items():
        note = ", is the output head too" if kind == "embedding" and model.tied_output else ""
        if n_bytes:
            yield f"    {kind:<13} {format_bytes(n_bytes):>10} {n_bytes / total_bytes:>6.1%}{note}"
    yield "  tensor types"
    for name, use in model.tensor_types.items():
        yield f"    {name:<13} {format_bytes(use.n_bytes):>10} {use.n_tensors:>6} tensors"


def card_json(model: Description) -> dict[str, Any]:
    """The same, every key always there; null where the file does not tell."""
    return {
        "name": model.name, "path": str(model.path), "parts": [str(part) for part in model.parts],
        "file_bytes": model.file_bytes, "architecture": model.architecture, "n_parameters": model.n_parameters,
        "quantisation": model.quantisation, "context_length": model.context_length, "n_layers": model.n_layers,
        "hidden_size": model.hidden_size, "n_heads": list(model.n_heads), "n_kv_heads": list(model.n_kv_heads),
        "n_experts": model.n_experts, "n_experts_used": model.n_experts_used, "sliding_window": model.sliding_window,
        "vocabulary_size": model.vocabulary_size,
        "block_bytes": {kind.replace(" ", "_"): n_bytes for kind, n_bytes in model.block_bytes.items()},
        "tied_output": model.tied_output,
        "kv_bytes_per_token": dict(model.kv_bytes_per_token) if model.kv_bytes_per_token else None,
        "licence": model.licence, "has_chat_template": model.has_chat_template,
        "tensor_types": {name: {"n_tensors": use.n_tensors, "n_bytes": use.n_bytes}
                         for name, use in model.tensor_types.items()},
    }


def _count(number: int | None, unit: str = "") -> str:
    return f"{number:,} {unit}".rstrip() if number else ""


def _parameters(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _heads(model: Description) -> str:
    if not model.n_heads:
        return ""
    return f"{_per_layer(model.n_heads)} query, {_per_layer(model.n_kv_heads)} key/value"


def _per_layer(heads: tuple[int, ...]) -> str:
    low, high = min(heads), max(heads)
    return str(low) if low == high else f"{low} to {high}"


def _kv(model: Description) -> str:
    if model.kv_bytes_per_token is None:
        return ""
    windows = ", before windows" if model.sliding_window else ""
    return ", ".join(f"{format_bytes(n_bytes)} {name}" for name, n_bytes in model.kv_bytes_per_token.items()) + windows
