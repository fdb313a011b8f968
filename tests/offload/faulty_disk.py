"""A disk that can be told to fail, to be slow and to read little at a time: stands in for `os.preadv`.

Faults hold for one file; everything else is read as ever. Slow means: not before `answer` is called.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

# No test waits that long: a disk that is never told to answer does so in the end, so that its threads do.
_PATIENCE_S = 20.0


class FaultyDisk:
    """Put in place by `install`, and gone with the test."""

    def __init__(self, path: Path) -> None:
        self._identity = _identity(path.stat())
        self._read = os.preadv
        self.fails_with: int | None = None
        self.fails_from, self.fails_before = 0, 1 << 62  # file offsets between which reads fail
        self.most_bytes: int | None = None
        self.offsets: list[int] = []
        self.flags: list[int] = []
        self.is_stuck = threading.Event()  # a read waits for `answer`
        self._answers = threading.Event()
        self._answers.set()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
        monkeypatch.setattr(os, "preadv", self.preadv)
        return self

    def stop_answering(self) -> None:
        self.is_stuck.clear()
        self._answers.clear()

    def answer(self) -> None:
        self._answers.set()

    def preadv(self, fd: int, buffers: Iterable[Any], offset: int, flags: int = 0) -> int:
        if _identity(os.fstat(fd)) != self._identity:
            return self._read(fd, list(buffers), offset, flags)
        if not self._answers.is_set():
            self.is_stuck.set()
            self._answers.wait(_PATIENCE_S)
        self.offsets.append(offset)
        self.flags.append(flags)
        (buffer,) = (memoryview(b) for b in buffers)
        if self.fails_with is not None and self.fails_from < offset + len(buffer) and offset < self.fails_before:
            raise OSError(self.fails_with, os.strerror(self.fails_with))
        if self.most_bytes is not None:
            buffer = buffer[:self.most_bytes]
        return self._read(fd, [buffer], offset, flags)


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
