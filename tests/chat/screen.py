"""A screen that nobody sees (Xvfb), whose picture can be read: is a colour there, and what does it look like."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Self

_WIDTH, _HEIGHT = 1280, 860
_HEADER = struct.Struct(">25I")  # of the X Window Dump file that Xvfb keeps its picture in


class Screen:
    """Use as a context. `display` is the value of DISPLAY."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "Xvfb_screen0"
        told, telling = os.pipe()
        self._process = subprocess.Popen(
            ["Xvfb", "-displayfd", str(telling), "-screen", "0", f"{_WIDTH}x{_HEIGHT}x24", "-fbdir", str(directory),
             "-nolisten", "tcp"], pass_fds=[telling], stderr=subprocess.DEVNULL)
        os.close(telling)
        with os.fdopen(told) as file:
            self.display = f":{file.readline().strip()}"

    def _pixels(self) -> bytes:
        """Four bytes each: blue, green, red, nothing."""
        raw = self._file.read_bytes()
        header = _HEADER.unpack_from(raw)
        return raw[header[0] + 12 * header[19]:]  # after the header and the table of colours

    def count(self, red: int, green: int, blue: int) -> int:
        """How many pixels have this colour."""
        pixels, wanted, found, at = self._pixels(), bytes((blue, green, red)), 0, -1
        while (at := pixels.find(wanted, at + 1)) >= 0:
            found += at % 4 == 0
        return found

    def save(self, path: Path) -> None:
        """Write the picture as PNG."""
        pixels = bytearray(self._pixels()[:4 * _WIDTH * _HEIGHT])
        pixels[0::4], pixels[2::4] = pixels[2::4], pixels[0::4]
        del pixels[3::4]
        lines = b"".join(b"\0" + pixels[at:at + 3 * _WIDTH] for at in range(0, len(pixels), 3 * _WIDTH))
        parts = [(b"IHDR", struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(lines)),
                 (b"IEND", b"")]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in parts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
