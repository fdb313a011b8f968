"""A model file while it arrives: `FILE.partial` under a lock, what is known of it beside it, then renamed.

Knows locks, hashes, disk space and the order of writes that leaves nothing half-made under the final name.
Does not know where the bytes come from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

from edgert.errors import ChecksumMismatch, DownloadError, NoSpace, is_full
from edgert.models.progress import Progress

CHUNK_BYTES = 1 << 20
SPACE_MARGIN_BYTES = 16 << 20  # a disk filled to its last byte breaks other programs
MAX_SIDECAR_BYTES = 64 << 10
LOCK_POLL_S = 0.05
LOCK_STALL_S = 600.0  # another process that has written nothing for so long hangs

FreeBytes = Callable[[Path], int]


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the bytes of a `.partial` belong to; bytes of another provenance are never continued."""

    url: str
    etag: str
    size_bytes: int


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write on the disk of `directory`, which need not exist yet."""
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def require_space(directory: Path, needed_bytes: int, free: FreeBytes = free_bytes) -> None:
    """Raises NoSpace unless `needed_bytes` and a margin fit on the disk of `directory`."""
    available_bytes = free(directory)
    if needed_bytes > 0 and needed_bytes + SPACE_MARGIN_BYTES > available_bytes:
        raise NoSpace(str(directory), needed_bytes + SPACE_MARGIN_BYTES, available_bytes)


def partial_path(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def sidecar_path(target: Path) -> Path:
    return target.with_name(target.name + ".partial.json")


def is_complete(target: Path, size_bytes: int) -> bool:
    """Whether the target is here in full. Its hash was checked when it got its name."""
    return target.is_file() and target.stat().st_size == size_bytes


def partial_bytes(target: Path) -> int:
    """How much of `target` an earlier run has left."""
    try:
        return partial_path(target).stat().st_size
    except OSError:
        return 0


class PartialFile:
    """The bytes of `target` so far. Made by `locked`; one process at a time holds it."""

    def __init__(self, target: Path, file: FileIO) -> None:
        self.target = target
        self._file = file
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def resume(self, size_bytes: int) -> Provenance | None:
        """Take over what an earlier run left of a file of `size_bytes`: hash it, and say what it belongs to.

        None, with nothing kept, if there is nothing or nobody knows what it belongs to.
        """
        provenance = _read_sidecar(sidecar_path(self.target))
        if provenance is None or provenance.size_bytes != size_bytes or partial_bytes(self.target) > size_bytes:
            self.restart()
            return None
        self._file.seek(0)
        while chunk := self._file.read(CHUNK_BYTES):
            self._hash.update(chunk)
            self.size_bytes += len(chunk)
        return provenance if self.size_bytes else None

    def restart(self) -> None:
        """Throw away what is here."""
        self._file.seek(0)
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        sidecar_path(self.target).unlink(missing_ok=True)

    def belongs_to(self, provenance: Provenance) -> None:
        """Remember it for a later run, before the first byte is written."""
        sidecar = sidecar_path(self.target)
        temporary = sidecar.with_name(sidecar.name + ".tmp")
        temporary.write_text(json.dumps(asdict(provenance)), encoding="utf-8")
        temporary.replace(sidecar)

    def write(self, chunk: bytes, size_bytes: int) -> None:
        """Append `chunk` to a file that shall have `size_bytes`. Raises NoSpace if the disk is full after all."""
        try:
            rest = memoryview(chunk)
            while rest:  # a raw file may take less than it is given
                rest = rest[self._file.write(rest) or 0:]
        except OSError as error:
            if not is_full(error):
                raise
            directory = self.target.parent
            raise NoSpace(str(directory), size_bytes - self.size_bytes, free_bytes(directory)) from error
        self._hash.update(chunk)
        self.size_bytes += len(chunk)

    def publish(self, sha256: str | None) -> None:
        """Give the whole file its name. Raises ChecksumMismatch, with the bytes removed, if it is another file's."""
        actual = self._hash.hexdigest()
        if sha256 is not None and actual != sha256.lower():
            self.restart()
            partial_path(self.target).unlink()
            raise ChecksumMismatch(self.target.name, sha256.lower(), actual)
        os.fsync(self._file.fileno())
        partial_path(self.target).replace(self.target)
        sidecar_path(self.target).unlink(missing_ok=True)
        _sync_directory(self.target.parent)


@contextlib.contextmanager
def locked(target: Path, progress: Progress) -> Iterator[PartialFile]:
    """The partial file of `target`, for this process alone. Another process may have finished the target meanwhile.

    Raises DownloadError if the process that holds it has stalled. An empty partial file does not outlive the block.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    while True:
        with _open_partial(partial) as file:
            _lock(file, partial, progress)
            if not _is_at(file, partial):  # whoever held it has renamed or removed it
                continue
            try:
                yield PartialFile(target, file)
            finally:
                if _is_at(file, partial) and partial.stat().st_size == 0:
                    partial.unlink()
                    sidecar_path(target).unlink(missing_ok=True)
            return


def is_locked(target: Path) -> bool:
    """Whether some process is fetching `target` now."""
    try:
        with partial_path(target).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _open_partial(partial: Path) -> FileIO:
    # Unbuffered, so that what a killed process has counted is in the file; no link is followed.
    return FileIO(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+")


def _lock(file: FileIO, partial: Path, progress: Progress) -> None:
    """Take the lock, showing what its holder fetches meanwhile."""
    shown_bytes = 0
    deadline_s = time.monotonic() + LOCK_STALL_S
    waited = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            progress.advance(-shown_bytes)
            return
        except BlockingIOError:
            if not waited:
                progress.message(f"another process is fetching {partial.stem}; waiting for it")
            waited = True
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes != shown_bytes:
            progress.advance(size_bytes - shown_bytes)
            shown_bytes, deadline_s = size_bytes, time.monotonic() + LOCK_STALL_S
        elif time.monotonic() > deadline_s:
            raise DownloadError(f"another process holds {partial} and has written nothing for {LOCK_STALL_S:.0f} s",
                                "End that process, then pull again.")
        time.sleep(LOCK_POLL_S)


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read_sidecar(path: Path) -> Provenance | None:
    try:
        with path.open("rb") as file:
            fields = json.loads(file.read(MAX_SIDECAR_BYTES))
        provenance = Provenance(fields["url"], fields["etag"], fields["size_bytes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    valid = isinstance(provenance.url, str) and isinstance(provenance.etag, str)
    return provenance if valid and isinstance(provenance.size_bytes, int) else None


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
