"""The sessions of a directory, by their names: listed, removed, and the oldest forgotten when all take too much.

What a session holds is retrieval/sessions.py's business.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import EdgertError, KVStoreError, UsageError
from retrieval.session_card import Damaged, SessionCard

CARD, _LOCK = "card.json", "lock"
# All sessions together; the ones that were used longest ago go first.
MAX_BYTES = 8 * 2**30
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listed:
    """A session as `edgert list --sessions` shows it; `problem` where its card cannot be read."""

    name: str
    model: str
    n_tokens: int
    size_bytes: int
    used_s: float  # when it was saved last, seconds since the epoch
    problem: str = ""


def list_sessions(directory: Path) -> list[Listed]:
    """Every session, the one that was used last first."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if not _NAME.fullmatch(path.name) or not path.is_dir():
            continue
        with contextlib.suppress(OSError):
            size_bytes = sum(one.stat().st_blocks * 512 for one in path.iterdir())
            used_s = max((one.stat().st_mtime for one in path.iterdir()), default=path.stat().st_mtime)
            try:
                card = SessionCard.read(path / CARD)
                found.append(Listed(path.name, card.model, card.n_tokens, size_bytes, used_s))
            except (Damaged, FileNotFoundError) as error:
                problem = "has nothing yet" if isinstance(error, FileNotFoundError) else str(error)
                found.append(Listed(path.name, "", 0, size_bytes, used_s, problem))
    return sorted(found, key=lambda one: -one.used_s)


def remove_session(directory: Path, name: str) -> int:
    """Delete a session; the bytes that it took. Raises UsageError where there is none, or it is open;
    KVStoreError."""
    path = path_of(directory, name)
    listed = next((one for one in list_sessions(directory) if one.name == name), None)
    if listed is None:
        raise UsageError(f"there is no session {name!r}", "See `edgert list --sessions`.")
    try:
        with _held(path):
            shutil.rmtree(path)
    except OSError as error:
        raise KVStoreError(str(path), f"cannot be removed: {error.strerror}", "See whose directory it is.") from error
    return listed.size_bytes


def forget_oldest(directory: Path, but: str, max_bytes: int = MAX_BYTES) -> None:
    """Delete sessions until the rest takes no more than `max_bytes`: the oldest first, never `but` nor an open one."""
    listed = list_sessions(directory)
    total = sum(one.size_bytes for one in listed)
    for one in reversed(listed):
        if total <= max_bytes:
            return
        if one.name != but:
            with contextlib.suppress(EdgertError, OSError):
                remove_session(directory, one.name)
                total -= one.size_bytes
                _log.warning("session %s was removed: sessions take more than %d GiB", one.name, max_bytes >> 30)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    lock = take_lock(path)
    try:
        yield
    finally:
        os.close(lock)


def take_lock(path: Path) -> int:
    """Hold the session in this directory until the descriptor is closed, or the process ends. Raises UsageError where
    another one does, OSError where the directory does not allow it."""
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise UsageError(f"session {path.name!r} is open in another process",
                             "End that process first, or name another session.") from None
        raise
    return lock


def path_of(directory: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} is no name for a session", "Use letters, digits, '.', '-' and '_', up to 64.")
    return directory / name
