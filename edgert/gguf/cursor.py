"""A position in a file of known size that moves forward and never believes a length.

Every read is checked against the file's end before a byte is allocated. Reads through a window of at most
256 KiB instead of a memory map: a map raises SIGBUS when somebody truncates the file meanwhile, a read does not.
Knows bytes, little-endian integers and GGUF's length-prefixed strings; knows nothing of keys and tensors.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from edgert.errors import ModelFileError, ModelNotFound

# Headers of real models take 0.5 to 40 MiB, nearly all of it vocabulary. The bound limits the time that a
# crafted file can cost: 2**28 bytes hold at most 2**25 strings, which are skipped in about three seconds.
MAX_HEADER_BYTES = 2**28
# Large enough that a vocabulary of 6 MiB takes 24 reads, small enough to stay in a core's L2 cache.
_WINDOW_BYTES = 2**18
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """Reads one open file forward. `position` is a byte offset; everything raises ModelFileError at the end."""

    def __init__(self, file: FileIO, path: str, size_bytes: int) -> None:
        self._file = file
        self.path = path
        self.size_bytes = size_bytes
        self._window = b""
        self._window_start = 0
        self.position = 0

    def problem(self, text: str) -> ModelFileError:
        return ModelFileError(self.path, text)

    def require(self, n_bytes: int, what: str) -> None:
        """Check that `n_bytes` more belong to the file and to a header of sane size."""
        end = self.position + n_bytes
        if end > self.size_bytes:
            raise self.problem(f"{what} needs {n_bytes} bytes at byte {self.position}, "
                               f"but the file ends at byte {self.size_bytes}")
        if end > MAX_HEADER_BYTES:
            raise self.problem(f"{what} reaches byte {end}; a header ends within {MAX_HEADER_BYTES} bytes")

    def take(self, n_bytes: int, what: str) -> bytes:
        self.require(n_bytes, what)
        start = self.position - self._window_start
        if not 0 <= start <= len(self._window) - n_bytes:
            self._fill(n_bytes)
            start = 0
        self.position += n_bytes
        return self._window[start:start + n_bytes]

    def u32(self, what: str) -> int:
        value: int = _U32.unpack(self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack(self.take(8, what))[0]
        return value

    def skip(self, n_bytes: int, what: str) -> None:
        self.require(n_bytes, what)
        self.position += n_bytes

    def skip_strings(self, count: int, what: str) -> None:
        """Pass `count` length-prefixed strings without making an object of any (25 ms for 300,000 of them)."""
        self.require(8 * count, what)
        unpack_length = _U64.unpack_from
        while count:
            self.require(8, what)
            self._fill(8)
            window, offset, passed = self._window, 0, 0
            try:
                for passed in range(count):  # noqa: B007 - how far it came is read below
                    offset += 8 + unpack_length(window, offset)[0]
                passed = count
            except (struct.error, OverflowError):
                pass  # the next length lies behind the window: refill there, if the file reaches that far
            self.skip(offset, what)
            count -= passed

    def read_at(self, offset: int, n_bytes: int) -> bytes:
        """Up to `n_bytes` from byte `offset`, anywhere in the file, without moving the cursor."""
        self._file.seek(offset)
        return _read_exactly(self._file, min(n_bytes, max(0, self.size_bytes - offset)))

    def _fill(self, n_bytes: int) -> None:
        # `require` has been called: no more than the file holds is ever asked for.
        wanted = min(max(n_bytes, _WINDOW_BYTES), self.size_bytes - self.position)
        self._file.seek(self.position)
        self._window = _read_exactly(self._file, wanted)
        self._window_start = self.position
        if len(self._window) < n_bytes:
            raise self.problem(f"the file shrank while it was read (byte {self.position})")


def _read_exactly(file: FileIO, n_bytes: int) -> bytes:
    """`n_bytes`, or fewer at the end of the file. One system call where the kernel gives all at once."""
    data = file.read(n_bytes) or b""
    while len(data) < n_bytes:
        more = file.read(n_bytes - len(data))
        if not more:
            break
        data += more
    return data


def _open_descriptor(path: Path) -> int:
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer; without effect on regular files.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise ModelNotFound(str(path)) from error


@contextmanager
def open_cursor(path: Path) -> Iterator[Cursor]:
    """Open a model file for reading. Raises ModelNotFound or ModelFileError for whatever the system says."""
    try:
        with FileIO(_open_descriptor(path)) as file:
            status = os.fstat(file.fileno())
            if stat.S_ISDIR(status.st_mode):
                raise ModelFileError(str(path), "is a directory", "Give the path of a .gguf file in it.")
            if not stat.S_ISREG(status.st_mode):
                raise ModelFileError(str(path), "is not a regular file", "Give the path of a .gguf file.")
            yield Cursor(file, str(path), status.st_size)
    except OSError as error:
        raise ModelFileError(str(path), f"cannot be read: {error.strerror or error}",
                             "Check that the file may be read and that its disk works.") from error
