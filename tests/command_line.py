"""The `edgert` command as tests start it: in this process, in one of its own, or on a pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, Self

DEADLINE_S = 120.0  # for a busy machine; only a failing test waits so long
_START = "import sys; from apps.cli.main import main; sys.exit(main())"
_ON_A_TERMINAL = ("import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
                  "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended, and what it wrote."""

    status: int
    out: str
    err: str


class FakeStdin(io.TextIOWrapper):
    """Standard input with these bytes, a pipe or a terminal."""

    def __init__(self, data: bytes = b"", terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data))
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def start(words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """The command in a process of its own, with pipes."""
    return subprocess.Popen([sys.executable, "-c", _START, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def read_until(stream: IO[bytes], wanted: bytes) -> bytes:
    """What a pipe brings until `wanted` has come."""
    got = b""
    deadline = time.monotonic() + DEADLINE_S
    while wanted not in got:
        assert time.monotonic() < deadline and select.select([stream], [], [], DEADLINE_S)[0], got
        part = os.read(stream.fileno(), 4096)
        assert part, f"it ended with {got!r}"
        got += part
    return got


class Terminal:
    """The command on a terminal of 80 columns. `screen` is everything that came, escape sequences included."""

    def __init__(self, words: Sequence[str], stdout: int | None = None) -> None:
        self._fd, child = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ON_A_TERMINAL, "-c", _START, *words], stdin=child,
            stdout=child if stdout is None else stdout, stderr=child, start_new_session=True, env=environment)
        os.close(child)
        self.screen = ""
        self._read_up_to = 0

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> str:
        """What came up to `text`, since the last call; fails when the deadline passes or the command ends before."""
        deadline = time.monotonic() + DEADLINE_S
        while (end := self.screen.find(text, self._read_up_to)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.screen!r}"
            assert self._read(), f"it ended, or fell silent, without {text!r}: {self.screen!r}"
        found = self.screen[self._read_up_to:end + len(text)]
        self._read_up_to = end + len(text)
        return found

    def wait(self) -> int:
        """The exit status."""
        while self._read():
            pass
        return self.process.wait(DEADLINE_S)

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], DEADLINE_S)[0]:
            return False
        try:
            part = os.read(self._fd, 4096)
        except OSError:  # Linux: nobody holds the other end any more
            return False
        self.screen += part.decode("utf-8", errors="replace").replace("\r\n", "\n")
        return bool(part)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)
