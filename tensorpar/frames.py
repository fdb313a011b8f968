"""Frames on the wire: a fixed header, then as many bytes as it says, within a bound that the receiver sets.

    magic "EDGT" | version | kind | 2 reserved | epoch | pass | turn | length      24 bytes, little endian

Epoch, pass and turn order all frames of a connection: what belongs to an abandoned pass is told apart. No pickle, no
names, nothing that is not a number.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from edgert.errors import ClusterError

VERSION = 2
_MAGIC = b"EDGT"
_LAYOUT = struct.Struct("<4sBBHIIII")
HEADER_BYTES = _LAYOUT.size
# What a control message may take: a plan for 64 devices with their certificates is 70 KiB.
MAX_MESSAGE_BYTES = 2**18
# Hidden states of one batch: 8192 tokens of 8192 float32.
MAX_DATA_BYTES = 2**28


class Kind(IntEnum):
    """What a frame carries."""

    HELLO = 1  # who is connecting and what for; JSON, as SETUP, READY, STATUS and FAULT
    SETUP = 2  # leader to worker: the plan of an epoch
    READY = 3  # worker to leader: the plan stands
    STATUS = 4
    FAULT = 5  # why the other side cannot go on
    CHUNK = 6  # bytes of a slice
    PASS = 7  # leader to workers: a batch's hidden state begins or goes on with a pass
    PART = 8  # a partial result
    SUM = 9  # a sum of partial results
    PULSE = 10  # "I am alive"
    PROBE = 11  # to be sent back as it is: latency and bandwidth
    SPAKE = 12  # pairing (tensorpar/pairing.py)
    CONFIRM = 13
    MEET = 14  # leader to worker: who the other workers are; JSON, as AGREE
    DIAL = 15  # leader to worker: all know each other now, so connect to them
    AGREE = 16  # leader to worker: how quick the network is, and whether all are connected


class BadFrame(ClusterError):
    """What came is no frame, or not one that was allowed here."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"a device sent what is no valid frame: {problem}",
                         "Use the same version of edgert on all devices.")
        self.problem = problem


class Moment(NamedTuple):
    """Where in a session a frame belongs; later moments are greater."""

    epoch: int
    number: int = 0  # of the pass
    turn: int = 0  # within the pass


class Header(NamedTuple):
    kind: Kind
    moment: Moment
    n_bytes: int


def pack(kind: Kind, moment: Moment, n_bytes: int) -> bytes:
    return _LAYOUT.pack(_MAGIC, VERSION, kind, 0, *moment, n_bytes)


def unpack(raw: bytes | memoryview, max_bytes: int) -> Header:
    """The header in 24 bytes. Raises BadFrame; nothing is allocated for what it claims."""
    magic, version, kind, reserved, epoch, number, turn, n_bytes = _LAYOUT.unpack(raw)
    if magic != _MAGIC:
        raise BadFrame("the magic number is missing")
    if version != VERSION:
        raise BadFrame(f"protocol version {version}, this is {VERSION}")
    if reserved or not Kind.HELLO <= kind <= Kind.AGREE:
        raise BadFrame(f"unknown kind {kind}")
    if n_bytes > max_bytes:
        raise BadFrame(f"{n_bytes} bytes announced, {max_bytes} are allowed")
    return Header(Kind(kind), Moment(epoch, number, turn), n_bytes)
