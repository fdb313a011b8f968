"""Writes GGUF files byte by byte, whole or split, for tests: small, complete, and able to lie where asked.

Knows the file format only. Deliberately shares no code with the reader under test but the numbers of the value
types, so that the two check each other (and llama.cpp checks both).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgert.gguf.types import TensorType
from edgert.gguf.values import ValueType

_FORMATS = {
    ValueType.UINT8: "B", ValueType.INT8: "b", ValueType.UINT16: "H", ValueType.INT16: "h", ValueType.UINT32: "I",
    ValueType.INT32: "i", ValueType.FLOAT32: "f", ValueType.BOOL: "?", ValueType.UINT64: "Q", ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True, slots=True)
class Typed:
    """A scalar of a value type that Python does not tell apart, such as a 64-bit integer."""

    value_type: ValueType
    value: int | float | bool


@dataclass(frozen=True, slots=True)
class Array:
    """An array of one value type; a list of Python values chooses INT32, FLOAT32, BOOL or STRING by itself."""

    value_type: ValueType
    values: Sequence[int | float | bool | str | bytes]


MetaValue = bool | int | float | str | bytes | list[int] | list[float] | list[bool] | list[str] | Typed | Array


@dataclass(frozen=True, slots=True)
class TinyTensor:
    """A tensor to write: `shape` in ggml's order, `data` as it goes into the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: bytes


def string_bytes(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(value: MetaValue) -> bytes:
    """A value with its type in front, as it follows a key."""
    match value:
        case Typed():
            return struct.pack(f"<I{_FORMATS[value.value_type]}", value.value_type, value.value)
        case Array():
            return struct.pack("<IIQ", ValueType.ARRAY, value.value_type, len(value.values)) + _elements(value)
        case list():
            return value_bytes(Array(_element_type(value), value))
        case bool():
            return struct.pack("<I?", ValueType.BOOL, value)
        case int():
            return struct.pack("<II", ValueType.UINT32, value)
        case float():
            return struct.pack("<If", ValueType.FLOAT32, value)
        case str() | bytes():
            return struct.pack("<I", ValueType.STRING) + string_bytes(value)


def _element_type(values: Sequence[object]) -> ValueType:
    if all(isinstance(one, bool) for one in values):
        return ValueType.BOOL
    if all(isinstance(one, int) for one in values):
        return ValueType.INT32
    return ValueType.FLOAT32 if all(isinstance(one, float) for one in values) else ValueType.STRING


def _elements(array: Array) -> bytes:
    if array.value_type is ValueType.STRING:
        return b"".join(string_bytes(one) for one in array.values if isinstance(one, str | bytes))
    return struct.pack(f"<{len(array.values)}{_FORMATS[array.value_type]}", *array.values)


def gguf_bytes(metadata: Mapping[str, MetaValue], tensors: Sequence[TinyTensor] = (), *, version: int = 3,
               alignment: int = 32) -> bytes:
    """A whole file. `alignment` other than 32 is written into the metadata."""
    if alignment != 32:
        metadata = {"general.alignment": alignment, **metadata}
    header = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += string_bytes(key) + value_bytes(value)
    data = bytearray()
    for tensor in tensors:
        header += string_bytes(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.type.id, len(data))
        data += tensor.data
        data += b"\0" * (-len(data) % alignment)
    if tensors:
        header += b"\0" * (-len(header) % alignment)
    return bytes(header + data)


def write_gguf(path: Path, metadata: Mapping[str, MetaValue], tensors: Sequence[TinyTensor] = (), *,
               version: int = 3, alignment: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes(metadata, tensors, version=version, alignment=alignment))
    return path


def write_split_gguf(path: Path, metadata: Mapping[str, MetaValue], tensors: Sequence[TinyTensor],
                     n_parts: int) -> Path:
    """The model in `n_parts` files beside `path`, as llama.cpp's gguf-split does it; returns the first part's path."""
    parts = [path.with_name(f"{path.stem}-{number:05}-of-{n_parts:05}.gguf") for number in range(1, n_parts + 1)]
    for number, part in enumerate(parts):
        split: dict[str, MetaValue] = {
            "split.no": Typed(ValueType.UINT16, number), "split.count": Typed(ValueType.UINT16, n_parts),
            "split.tensors.count": Typed(ValueType.INT32, len(tensors)),
        }
        start, end = len(tensors) * number // n_parts, len(tensors) * (number + 1) // n_parts
        write_gguf(part, {**metadata, **split} if number == 0 else split, tensors[start:end])
    return parts[0]
