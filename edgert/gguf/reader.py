"""Reads one GGUF file's header: metadata and the table of tensors, believing nothing that it says.

Every count, length, offset, dimension and type is checked against the file's size and ggml's own limits, so that
whoever uses a `Header` may map the tensors without a second look. Reads no weights; knows no architecture.
Source: the GGUF specification (ggml/docs/gguf.md), versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from edgert.errors import ModelFileError
from edgert.gguf.cursor import Cursor, open_cursor
from edgert.gguf.magic import GGUF_MAGIC, looks_like
from edgert.gguf.types import TENSOR_TYPES, TensorType
from edgert.gguf.values import Value, ValueReader

# Bounds on what a file may ask for. Real files: under 100 keys, under 3,000 tensors. Each entry costs about 500
# bytes of Python objects, so these bounds hold a hostile header under 50 MiB.
MAX_KEYS = 2**14
MAX_TENSORS = 2**16
MAX_KEY_BYTES = 1024  # the specification allows 65,535; the longest key in use has about 60
MAX_NAME_BYTES = 63  # ggml: GGML_MAX_NAME is 64 with the closing zero
MAX_DIMENSIONS = 4  # ggml: GGML_MAX_DIMS
_MAX_INT64 = 2**63 - 1  # ggml counts elements and bytes in int64
# An entry is no smaller than this: key length, one byte, type, one byte / name length, one byte, dimensions, one
# extent, type, offset.
_MIN_KEY_ENTRY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_ENTRY_BYTES = 8 + 1 + 4 + 8 + 4 + 8
_DEFAULT_ALIGNMENT = 32
# The specification wants a multiple of 8; 2 MiB is a huge page, beyond which alignment serves nothing.
_MIN_ALIGNMENT, _MAX_ALIGNMENT = 8, 2**21


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` in ggml's order (ne[0], the row, first) as stored, `offset` in bytes from its file's start.

    `part` is the index of its file in `ModelFile.parts`.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    part: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says about itself, checked. `data_start` is the byte at which the tensors' data begins."""

    version: int
    alignment: int
    data_start: int
    file_bytes: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]


def read_header(path: Path, part: int = 0) -> Header:
    """Read and check the header of the file at `path`, part number `part` of its model.

    Raises ModelNotFound for a missing file and ModelFileError for everything else. Memory: the values, the tensor
    table and a window of 256 KiB, never more than 50 MiB whatever the file says.
    """
    with open_cursor(path) as cursor:
        version = _read_version(cursor)
        n_tensors, n_keys = cursor.u64("the number of tensors"), cursor.u64("the number of keys")
        _check_count(cursor, "keys", n_keys, MAX_KEYS, _MIN_KEY_ENTRY_BYTES)
        _check_count(cursor, "tensors", n_tensors, MAX_TENSORS, _MIN_TENSOR_ENTRY_BYTES)
        metadata = _read_metadata(cursor, n_keys)
        alignment = _alignment(cursor, metadata)
        relative = [_read_tensor(cursor, part) for _ in range(n_tensors)]
        data_start = -(-cursor.position // alignment) * alignment
        tensors = _place(cursor, relative, data_start, alignment)
        return Header(version, alignment, data_start, cursor.size_bytes,
                      MappingProxyType(metadata), MappingProxyType(tensors))


def _read_version(cursor: Cursor) -> int:
    if cursor.size_bytes == 0:
        raise cursor.problem("the file is empty")
    head = cursor.take(min(cursor.size_bytes, 64), "the magic number")
    if not head.startswith(GGUF_MAGIC):
        raise ModelFileError(cursor.path, f"is not a GGUF file; it looks like {looks_like(head)}",
                             "Give the path of a .gguf file, or fetch the model in GGUF form.")
    cursor.position = len(GGUF_MAGIC)
    version = cursor.u32("the version")
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0 and version != 0:  # a small number with its bytes swapped
        raise ModelFileError(cursor.path, "is a big-endian GGUF file", "Fetch the little-endian file of this model.")
    raise ModelFileError(cursor.path, f"has GGUF version {version}; versions 2 and 3 are supported",
                         "Fetch or convert the model with a current tool.")


def _check_count(cursor: Cursor, what: str, count: int, limit: int, least_bytes: int) -> None:
    if count > limit:
        raise cursor.problem(f"claims {count} {what}; at most {limit} are accepted")
    cursor.require(count * least_bytes, f"a table of {count} {what}")


def _read_name(cursor: Cursor, limit_bytes: int, what: str) -> str:
    """A key or a tensor's name: UTF-8, printable (it is shown on terminals), neither empty nor too long."""
    n_bytes = cursor.u64(f"the length of {what}")
    if not 0 < n_bytes <= limit_bytes:
        raise cursor.problem(f"{what} has {n_bytes} bytes; 1 to {limit_bytes} are accepted")
    raw = cursor.take(n_bytes, what)
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise cursor.problem(f"{what} {raw[:40]!r} is not UTF-8") from None
    if not name.isprintable():
        raise cursor.problem(f"{what} {name[:40]!r} has unprintable characters")
    return name


def _read_metadata(cursor: Cursor, n_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    values = ValueReader(cursor)
    for _ in range(n_keys):
        key = _read_name(cursor, MAX_KEY_BYTES, "a key")
        if key in metadata:
            raise cursor.problem(f"key {key!r} occurs twice")
        metadata[key] = values.read(key)
    return metadata


def _alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(value) is not int or not _MIN_ALIGNMENT <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise cursor.problem(f"general.alignment must be a power of two from {_MIN_ALIGNMENT} to {_MAX_ALIGNMENT}")
    return value


def _read_tensor(cursor: Cursor, part: int) -> TensorInfo:
    """One entry of the tensor table, with its offset still relative to the data section."""
    name = _read_name(cursor, MAX_NAME_BYTES, "a tensor's name")
    n_dimensions = cursor.u32("a tensor's number of dimensions")
    if n_dimensions > MAX_DIMENSIONS:
        raise cursor.problem(f"tensor {name!r} has {n_dimensions} dimensions; at most {MAX_DIMENSIONS} are possible")
    # A tensor without dimensions is a scalar: one row of one element.
    shape = tuple(cursor.u64("a tensor's dimension") for _ in range(n_dimensions)) or (1,)
    if not all(0 < extent <= _MAX_INT64 for extent in shape) or math.prod(shape) > _MAX_INT64:
        raise cursor.problem(f"tensor {name!r} has the impossible shape {shape}")
    type_id = cursor.u32("a tensor's type")
    tensor_type = TENSOR_TYPES.get(type_id)
    if tensor_type is None:
        raise ModelFileError(cursor.path, f"tensor {name!r} has type {type_id}, which ggml does not know",
                             "Fetch a current quantisation of this model, such as Q4_K_M.")
    if shape[0] % tensor_type.block_size:
        raise cursor.problem(f"tensor {name!r} has rows of {shape[0]} elements, which are no whole number of "
                             f"{tensor_type.name} blocks of {tensor_type.block_size}")
    n_bytes = tensor_type.row_bytes(shape[0]) * math.prod(shape[1:])
    return TensorInfo(name, tensor_type, shape, cursor.u64("a tensor's offset"), n_bytes, part)


def _place(cursor: Cursor, relative: list[TensorInfo], data_start: int, alignment: int) -> dict[str, TensorInfo]:
    """Make the offsets absolute, in the table's order, checking alignment, the file's end, overlaps and names."""
    tensors: dict[str, TensorInfo] = {}
    for info in relative:
        offset = data_start + info.offset
        if info.offset % alignment:
            raise cursor.problem(f"tensor {info.name!r} lies at offset {info.offset}, not a multiple of {alignment}")
        if offset + info.n_bytes > cursor.size_bytes:
            raise cursor.problem(f"is cut short: tensor {info.name!r} ends at byte {offset + info.n_bytes}, "
                                 f"the file at byte {cursor.size_bytes}")
        if info.name in tensors:
            raise cursor.problem(f"tensor {info.name!r} occurs twice")
        tensors[info.name] = TensorInfo(info.name, info.type, info.shape, offset, info.n_bytes, info.part)
    end = data_start
    for info in sorted(tensors.values(), key=lambda one: one.offset):
        if info.offset < end:
            raise cursor.problem(f"tensor {info.name!r} overlaps another")
        end = info.offset + info.n_bytes
    return tensors
