"""Slices that a device has received or made: files named by their key, bounded in number of bytes.

A slice is `<key>.gguf` once its SHA-256 was verified and `<key>.partial` before; what a transfer left is resumed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from edgert.errors import ClusterError, NoSpace
from edgert.paths import Paths

KEY_BYTES = 32
DEFAULT_CAP_BYTES = 64 * 2**30
_CHUNK_BYTES = 2**22
_MAX_KEYS = 256


class SliceCache:
    """The slices under one directory, at most `cap_bytes` of them; the longest unused go first."""

    def __init__(self, paths: Paths, cap_bytes: int = DEFAULT_CAP_BYTES) -> None:
        self._directory, self._cap_bytes = paths.cache / "slices", cap_bytes

    def path(self, key: bytes) -> Path:
        """Where the slice lies, or will. The name is made here: nothing that a peer says is a name."""
        if len(key) != KEY_BYTES:
            raise ClusterError("a slice's key has 32 bytes")
        return self._directory / f"{key.hex()}.gguf"

    def has(self, key: bytes) -> bool:
        path = self.path(key)
        if path.is_file():
            os.utime(path)  # used now
            return True
        return False

    def keys(self) -> list[str]:
        """Keys in hex of what is here, whole."""
        return sorted(one.stem for one in self._directory.glob("*.gguf"))[:_MAX_KEYS]

    def largest(self) -> Path:
        """The largest slice, by which the disk may be measured; the directory where there is none."""
        return max(self._directory.glob("*.gguf"), key=lambda one: one.stat().st_size, default=self._directory)

    def received_bytes(self, key: bytes) -> int:
        """How much of a slice has come in earlier transfers."""
        partial = self.path(key).with_suffix(".partial")
        return partial.stat().st_size if partial.is_file() else 0

    def make_room(self, key: bytes, size_bytes: int) -> None:
        """Remove the longest unused slices until `size_bytes` more fit. Raises NoSpace."""
        self._directory.mkdir(parents=True, exist_ok=True)
        others = sorted((one for one in self._directory.iterdir() if one.stem != key.hex()),
                        key=lambda one: one.stat().st_mtime)
        used = sum(one.stat().st_size for one in others)
        missing = size_bytes - self.received_bytes(key)
        while others and (used + size_bytes > self._cap_bytes or self._free_bytes() < missing):
            oldest = others.pop(0)
            used -= oldest.stat().st_size
            oldest.unlink(missing_ok=True)
        if size_bytes > self._cap_bytes or self._free_bytes() < missing:
            raise NoSpace(str(self._directory), size_bytes, min(self._free_bytes(), self._cap_bytes))

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._directory).free

    def append(self, key: bytes) -> BinaryIO:
        """The partial file, open at its end."""
        return self.path(key).with_suffix(".partial").open("ab")

    def finish(self, key: bytes, sha256: bytes) -> Path:
        """Verify what has come, and give it its name. Raises ClusterError and removes it when it is damaged."""
        path = self.path(key)
        partial = path.with_suffix(".partial")
        digest = hashlib.sha256()
        with partial.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        if digest.digest() != sha256:
            partial.unlink()
            raise ClusterError("a slice arrived damaged: its SHA-256 is another one", "Start again; it is sent anew.")
        partial.replace(path)
        return path
