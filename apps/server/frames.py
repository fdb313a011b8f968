"""What passes between the server and the process that holds a model: JSON objects, each behind its length.

Knows bytes and bounds only. No pickle: what comes from a crashed process must not become code.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any, BinaryIO

from edgert.errors import ComputeError

# The largest request (apps/server/settings.py) as JSON, whose escapes may double it.
MAX_FRAME_BYTES = 48 * 2**20
_LENGTH = struct.Struct(">I")

Frame = dict[str, Any]


def encode(frame: Frame) -> bytes:
    """The bytes of one frame. Raises ComputeError for one that is too long."""
    body = json.dumps(frame, separators=(",", ":")).encode()
    _check(len(body))
    return _LENGTH.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> Frame | None:
    """The next frame, waiting for it; None at the end of the stream. Raises ComputeError for what is no frame."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    n_bytes = _check(_LENGTH.unpack(header)[0])
    body = stream.read(n_bytes)
    return _decode(body) if len(body) == n_bytes else None


async def receive(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame; None at the end of the stream. Raises ComputeError for what is no frame."""
    try:
        header = await reader.readexactly(_LENGTH.size)
        return _decode(await reader.readexactly(_check(_LENGTH.unpack(header)[0])))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _check(n_bytes: int) -> int:
    if not 2 <= n_bytes <= MAX_FRAME_BYTES:
        raise ComputeError(f"a frame of {n_bytes} bytes between processes", "This is a defect in edgert.")
    return n_bytes


def _decode(body: bytes) -> Frame:
    try:
        frame = json.loads(body)
    except (ValueError, RecursionError):
        frame = None
    if not isinstance(frame, dict):
        raise ComputeError("a frame between processes is no JSON object", "This is a defect in edgert.")
    return frame
