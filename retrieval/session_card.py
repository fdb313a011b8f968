"""What a session's directory says of itself: whose keys and values it holds, of which tokens, with which checksums.

The card is replaced in one step, last, so what it names is on the disk. It is read without being believed.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import MAX_CONTEXT

_VERSION = 1
# Twelve bytes a token in base64, and the conversation: far above 128k tokens.
_MAX_CARD_BYTES = 64 * 2**20
MAX_CONVERSATION_BYTES = 16 * 2**20


class Damaged(ValueError):
    """A card that is none, and why."""


@dataclass(frozen=True, slots=True)
class SessionCard:
    """`checksums` by kind of record, (n_tokens,) uint32 each; `selector` says what kept `selector_file` beside them."""

    model: str  # its file's name, for people
    fingerprint: str  # of the model's file, its tokenizer in it
    shape: tuple[int, ...]  # how records are laid out
    token_ids: NDArray[np.int32]
    checksums: dict[str, NDArray[np.uint32]]
    selector: str = ""
    selector_checksum: int = 0
    conversation: dict[str, Any] = field(default_factory=dict)
    n_exact: int = 0
    """The first tokens, which were computed over all before them; the others, some of them over a set."""

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises Damaged; FileNotFoundError where there is none."""
        try:
            with path.open("rb") as file:
                raw = file.read(_MAX_CARD_BYTES + 1)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Damaged(f"cannot be read: {error.strerror}") from error
        if len(raw) > _MAX_CARD_BYTES:
            raise Damaged("is too large")
        body, _, check = raw.rpartition(b"\n")
        if check != f"{zlib.crc32(body):08x}".encode():
            raise Damaged("is damaged")
        try:
            return cls._of(json.loads(body))
        except (ValueError, TypeError, KeyError, AttributeError, binascii.Error, RecursionError) as error:
            raise Damaged("is of another version, or damaged") from error

    @classmethod
    def _of(cls, raw: dict[str, Any]) -> Self:
        if raw["version"] != _VERSION:
            raise ValueError("another version")
        token_ids = np.frombuffer(base64.b64decode(raw["token_ids"], validate=True), np.int32)
        checksums = {str(kind): np.frombuffer(base64.b64decode(one, validate=True), np.uint32)
                     for kind, one in raw["checksums"].items()}
        if len(token_ids) > MAX_CONTEXT or any(len(one) != len(token_ids) for one in checksums.values()):
            raise ValueError("lengths differ")
        conversation = raw["conversation"]
        if not isinstance(conversation, dict):
            raise TypeError("no conversation")
        return cls(str(raw["model"])[:256], str(raw["fingerprint"]), tuple(map(int, raw["shape"])), token_ids,
                   checksums, str(raw["selector"]), int(raw["selector_checksum"]), conversation,
                   max(0, min(int(raw.get("n_exact", 0)), len(token_ids))))

    def write(self, path: Path) -> None:
        """Replace the card, on the disk when this returns. Raises OSError."""
        body = json.dumps({
            "version": _VERSION, "model": self.model, "fingerprint": self.fingerprint, "shape": self.shape,
            "token_ids": _text(self.token_ids), "checksums": {k: _text(one) for k, one in self.checksums.items()},
            "selector": self.selector, "selector_checksum": self.selector_checksum,
            "conversation": self.conversation, "n_exact": self.n_exact}).encode()
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(body + f"\n{zlib.crc32(body):08x}".encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _text(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
