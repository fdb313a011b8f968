"""A slice as a GGUF file: its bytes in order, from any offset on, and a name for them.

The leader makes the bytes as it sends them and keeps no copy of a worker's slice; its own it writes into the cache.
The same model and shard give the same bytes in every run.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Hyperparameters
from edgert.errors import ModelFileError, NoSpace
from edgert.gguf.model_file import ModelFile
from edgert.gguf.values import ArrayRef, Value, ValueType
from tensorpar.shares import Shard
from tensorpar.slices import TensorSlice, slice_metadata, tensor_slices

_ALIGNMENT = 32  # GGUF's default
# Rows are read in pieces of about this size; a column slice reads whole rows and keeps a part of each.
_PIECE_BYTES = 4 * 2**20


class SliceFile:
    """What the slice file of a shard holds. `key` names model and shard; `size_bytes` is the file's."""

    def __init__(self, model: ModelFile, hp: Hyperparameters, shard: Shard) -> None:
        self._model = model
        self._tensors = list(tensor_slices(model, hp, shard))
        starts, offset = [], 0
        for one in self._tensors:
            starts.append(offset)
            offset += _aligned(one.n_bytes)
        self._header = _header(slice_metadata(model, hp, shard), self._tensors, starts)
        self._starts = [len(self._header) + start for start in starts]
        self.size_bytes = len(self._header) + offset
        layout = repr([(one.info.name, one.info.offset, one.rows, one.columns) for one in self._tensors]).encode()
        self.key = hashlib.sha256(b"edgert-slice-2" + model.fingerprint().encode() + self._header + layout).digest()

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """The file's bytes from `start` on, some MiB at a time. Raises ModelFileError when the model has changed."""
        if start < len(self._header):
            yield self._header[start:]
        for first, one in zip(self._starts, self._tensors, strict=True):
            end = first + _aligned(one.n_bytes)
            if start >= end:
                continue
            with self._model.parts[one.info.part].open("rb") as file:
                position = first
                for n_bytes, read in _pieces(file, one, self._model):
                    if start < position + n_bytes:
                        yield read()[max(0, start - position):]
                    position += n_bytes
            padding = end - max(position, start)
            if padding > 0:
                yield bytes(padding)

    def write(self, path: Path) -> None:
        """Write the file under another name first. Raises NoSpace, ModelFileError."""
        partial = path.with_suffix(".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as out:
                for chunk in self.chunks():
                    out.write(chunk)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise NoSpace(str(path.parent), self.size_bytes, 0) from error

    def tensor_at(self, offset: int) -> str:
        """The tensor that byte `offset` of the file belongs to, for messages."""
        index = bisect_right(self._starts, offset) - 1
        return self._tensors[index].info.name if index >= 0 else "the header"


def _pieces(file: BinaryIO, one: TensorSlice, model: ModelFile) -> Iterator[tuple[int, _Piece]]:
    """(bytes that come out, how to read them) for runs of rows."""
    n_out = sum(end - start for start, end in one.columns)
    n_rows = max(1, _PIECE_BYTES // one.row_bytes)
    for matrix in range(one.n_matrices):
        for start, end in one.rows:
            for first in range(start, end, n_rows):
                n = min(n_rows, end - first)
                offset = one.info.offset + (matrix * one.n_rows + first) * one.row_bytes
                yield n * n_out, _Piece(file, one, model, offset, n)


class _Piece:
    """Some rows of a tensor, not yet read."""

    def __init__(self, file: BinaryIO, one: TensorSlice, model: ModelFile, offset: int, n_rows: int) -> None:
        self._file, self._one, self._model, self._offset, self._n_rows = file, one, model, offset, n_rows

    def __call__(self) -> bytes:
        one, n_bytes = self._one, self._n_rows * self._one.row_bytes
        self._file.seek(self._offset)
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise ModelFileError(str(self._model.parts[one.info.part]), "has become shorter while it was in use",
                                 "Start again with the whole file.")
        if one.columns == ((0, one.row_bytes),):
            return data
        rows: NDArray[np.uint8] = np.frombuffer(data, np.uint8).reshape(self._n_rows, one.row_bytes)
        return np.concatenate([rows[:, start:end] for start, end in one.columns], axis=1).tobytes()


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _header(metadata: Mapping[str, Value], tensors: list[TensorSlice], starts: list[int]) -> bytes:
    """Magic, counts, keys and the table of tensors (ggml/docs/gguf.md, version 3), padded to the alignment."""
    out = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    out += [_text(key) + _value(value) for key, value in metadata.items()]
    for one, start in zip(tensors, starts, strict=True):
        out.append(_text(one.info.name) + struct.pack(f"<I{len(one.shape)}QIQ", len(one.shape), *one.shape,
                                                      one.info.type.id, start))
    header = b"".join(out)
    return header + bytes(_aligned(len(header)) - len(header))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """A value with its type in front. Numbers are written wide: whoever reads them asks for kind and bounds only."""
    match value:
        case bool():
            return struct.pack("<I?", ValueType.BOOL, value)
        case int():
            return struct.pack("<Iq", ValueType.INT64, value)
        case float():
            return struct.pack("<Id", ValueType.FLOAT64, value)
        case str():
            return struct.pack("<I", ValueType.STRING) + _text(value)
        case tuple():
            kind, code = _element(value)
            return struct.pack(f"<IIQ{len(value)}{code}", ValueType.ARRAY, kind, len(value), *value)
        case ArrayRef():
            raise AssertionError("a long array stays in the model's file")


def _element(values: tuple[int | float | bool, ...]) -> tuple[ValueType, str]:
    if all(isinstance(one, bool) for one in values):
        return ValueType.BOOL, "?"
    return (ValueType.INT64, "q") if all(isinstance(one, int) for one in values) else (ValueType.FLOAT64, "d")
