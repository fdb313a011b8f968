"""One model on disk, whole or split into parts: its metadata with typed getters, and its tensors.

Knows GGUF and the naming of split files; does not map weights, and does not know what any architecture needs.
Every problem is a ModelFileError that names the file, the key or the missing part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from edgert.errors import ModelFileError
from edgert.gguf.cursor import open_cursor
from edgert.gguf.reader import TensorInfo, read_header
from edgert.gguf.split import joined_tensors, part_paths, read_parts
from edgert.gguf.values import ArrayRef, Value

_MAX_ARCHITECTURE_LENGTH = 64
_MAX_INT32 = 2**31 - 1
# The fingerprint reads this much of the weights: enough to notice another quantisation or fine-tune of the same
# shape (every tensor differs), little enough for a cold disk.
_N_SAMPLES, _SAMPLE_BYTES = 16, 4096
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model's files and what they say, checked against their sizes. Holds no file open and no weights."""

    path: Path
    parts: tuple[Path, ...]
    metadata: Mapping[str, Value] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    part_bytes: tuple[int, ...]
    n_parameters: int
    data_starts: tuple[int, ...]

    @classmethod
    def open(cls, path: Path | str) -> ModelFile:
        """Read the header of `path` and of its sibling parts. Raises ModelNotFound or ModelFileError."""
        path = Path(path)
        first = read_header(path)
        parts = part_paths(path, first)
        headers = read_parts(first, parts)
        tensors = joined_tensors(path, headers)
        return cls(path, parts, first.metadata, MappingProxyType(tensors), tuple(one.file_bytes for one in headers),
                   sum(one.n_elements for one in tensors.values()), tuple(one.data_start for one in headers))

    @property
    def file_bytes(self) -> int:
        """Of all parts together."""
        return sum(self.part_bytes)

    @property
    def architecture(self) -> str:
        """`general.architecture`, as the file writes it."""
        name = self.get_str("general.architecture")
        if not name.isprintable() or not 0 < len(name) <= _MAX_ARCHITECTURE_LENGTH:
            raise self._problem(f"general.architecture is {name[:40]!r}, which is no name")
        return name

    @property
    def name(self) -> str:
        """`general.name` with unprintable characters removed, or the file's name without its ending."""
        name = self.metadata.get("general.name")
        shown = "".join(filter(str.isprintable, name)).strip() if isinstance(name, str) else ""
        return shown or self.path.stem

    def has(self, key: str) -> bool:
        """Whether the file has `key`; `{arch}` in it stands for the architecture here and in all getters."""
        return self._expand(key) in self.metadata

    def get_int(self, key: str, default: int | None = None, *, minimum: int = 0, maximum: int = _MAX_INT32) -> int:
        """A whole number within bounds. Without a default the key must be there."""
        key = self._expand(key)
        value = self.metadata.get(key, default)
        if type(value) is not int:
            raise self._wrong(key, value, "a whole number")
        return self._bounded(key, value, minimum, maximum)

    def get_float(self, key: str, default: float | None = None) -> float:
        """A finite number; whole numbers are taken too."""
        key = self._expand(key)
        value = self.metadata.get(key, default)
        if type(value) is not float and type(value) is not int:
            raise self._wrong(key, value, "a number")
        if not math.isfinite(value):
            raise self._problem(f"key {key!r} is {value}")
        return float(value)

    def get_bool(self, key: str, default: bool | None = None) -> bool:
        key = self._expand(key)
        value = self.metadata.get(key, default)
        if type(value) is not bool:
            raise self._wrong(key, value, "true or false")
        return value

    def get_str(self, key: str, default: str | None = None) -> str:
        """A text, with bytes that are not UTF-8 replaced."""
        key = self._expand(key)
        value = self.metadata.get(key, default)
        if type(value) is not str:
            raise self._wrong(key, value, "a text")
        return value

    def get_ints(self, key: str, default: tuple[int, ...] | None = None, *,
                 minimum: int = 0, maximum: int = _MAX_INT32) -> tuple[int, ...]:
        """Whole numbers (at most 1,024; truth values count as 0 and 1); a single number is a tuple of one."""
        key = self._expand(key)
        value = self.metadata.get(key, default)
        values = value if type(value) is tuple else (value,)
        numbers: list[int] = []
        for one in values:
            if not isinstance(one, int):
                raise self._wrong(key, value, "a whole number or a short array of them")
            numbers.append(self._bounded(key, int(one), minimum, maximum))
        return tuple(numbers)

    def fingerprint(self) -> str:
        """A SHA-256 over every part's header and size and 16 samples of its weights: notices another file.

        Cheap (milliseconds) and therefore no proof against somebody who changes weights between the samples.
        """
        digest = hashlib.sha256(b"edgert-fingerprint-1")
        for path, data_start in zip(self.parts, self.data_starts, strict=True):
            with open_cursor(path) as cursor:
                header_bytes = min(data_start, cursor.size_bytes)
                digest.update(cursor.size_bytes.to_bytes(8, "little") + header_bytes.to_bytes(8, "little"))
                for offset in range(0, header_bytes, _CHUNK_BYTES):
                    digest.update(cursor.read_at(offset, min(_CHUNK_BYTES, header_bytes - offset)))
                for offset in _sample_offsets(header_bytes, cursor.size_bytes):
                    digest.update(cursor.read_at(offset, _SAMPLE_BYTES))
        return digest.hexdigest()

    def _expand(self, key: str) -> str:
        return key.replace("{arch}", self.architecture) if "{arch}" in key else key

    def _bounded(self, key: str, value: int, minimum: int, maximum: int) -> int:
        if not minimum <= value <= maximum:
            raise self._problem(f"key {key!r} is {value}; {minimum} to {maximum} are accepted")
        return value

    def _problem(self, text: str) -> ModelFileError:
        return ModelFileError(str(self.path), text)

    def _wrong(self, key: str, value: Value | None, wanted: str) -> ModelFileError:
        if value is None:
            return self._problem(f"key {key!r} is missing")
        found = {bool: "a truth value", int: "a whole number", float: "a number with a fraction", str: "a text",
                 tuple: "an array", ArrayRef: "a long array or text"}[type(value)]
        return self._problem(f"key {key!r} is {found}, {wanted} is needed")


def _sample_offsets(start: int, end: int) -> list[int]:
    """Evenly from the first to the last whole sample between `start` and `end`."""
    reach = max(0, end - start - _SAMPLE_BYTES)
    return [start + reach * index // (_N_SAMPLES - 1) for index in range(_N_SAMPLES)]
