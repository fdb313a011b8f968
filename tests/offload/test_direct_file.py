"""Reads past the page cache: the same bytes whichever way, and a typed error for every way in which a file fails."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_disk import FaultyDisk

from edgert.errors import ModelFileError
from edgert.uncached_file import METHODS, Method
from offload.arena import Arena
from offload.direct_file import ALIGN_BYTES, DirectFile, forget_cached
from offload.readers import aligned_range

SIZE_BYTES = 5 * ALIGN_BYTES + 1234  # does not end on a block


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(64 * ALIGN_BYTES)
    yield arena
    arena.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE_BYTES))
    return path


def open_by(path: Path, method: Method, require: Callable[[object, str], None]) -> DirectFile:
    try:
        return DirectFile(path, (method,))
    except ModelFileError:
        require(method == "dontcache", f"{path} cannot be read by {method}")  # RWF_DONTCACHE needs Linux 6.14
        pytest.skip("this kernel has no RWF_DONTCACHE")


def read(file: DirectFile, arena: Arena, offset: int, n_bytes: int) -> bytes:
    ctypes.memset(arena.base, 0xEE, arena.size_bytes)
    start, length = aligned_range(offset, n_bytes)
    file.read_into(arena.base, start, length)
    return ctypes.string_at(arena.base + offset - start, n_bytes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("offset", "n_bytes"), [(0, SIZE_BYTES), (0, 1), (4095, 2), (SIZE_BYTES - 1, 1),
                                                 (SIZE_BYTES - 1235, 1235), (3 * ALIGN_BYTES, ALIGN_BYTES)])
def test_every_method_reads_the_same_bytes(path: Path, arena: Arena, method: Method, offset: int, n_bytes: int,
                                           require: Callable[[object, str], None]) -> None:
    file = open_by(path, method, require)
    assert (file.method, file.size_bytes) == (method, SIZE_BYTES)
    assert read(file, arena, offset, n_bytes) == path.read_bytes()[offset:offset + n_bytes]
    file.close()


def test_direct_is_the_first_choice(path: Path, require: Callable[[object, str], None]) -> None:
    file = DirectFile(path)
    require(file.method == "direct", "the file system of the temporary directory refuses O_DIRECT")
    file.close()


@pytest.mark.parametrize(("refused", "expected"), [(("direct",), "dontcache"), (("direct", "dontcache"), "buffered")])
@pytest.mark.parametrize("when", ["open", "read"])
def test_a_file_system_that_refuses_a_method_is_read_by_the_next(
        path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch, refused: tuple[Method, ...], expected: Method,
        when: str) -> None:
    """Some refuse O_DIRECT when the file is opened, others at the first read; RWF_DONTCACHE always at the read."""
    real_open, real_read = os.open, os.preadv
    direct: set[int] = set()

    def opens(name: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and when == "open":
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        fd = real_open(name, flags & ~os.O_DIRECT, *rest)
        if flags & os.O_DIRECT:
            direct.add(fd)
        else:
            direct.discard(fd)
        return fd

    def reads(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if fd in direct or (flags and "dontcache" in refused):
            raise OSError(errno.EOPNOTSUPP if flags else errno.EINVAL, "refused")
        return real_read(fd, buffers, offset)

    n_open = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(os, "preadv", reads)
    file = DirectFile(path)
    monkeypatch.undo()
    assert file.method == expected
    assert len(list(Path("/proc/self/fd").iterdir())) == n_open + 1
    file.close()


def test_shared_memory_file_systems_are_read_too(arena: Arena, require: Callable[[object, str], None]) -> None:
    directory = Path("/dev/shm")  # knows no RWF_DONTCACHE; O_DIRECT on newer kernels
    require(os.access(directory, os.W_OK), "/dev/shm is not writable")
    path = directory / f"edgert-test-{os.getpid()}"
    try:
        path.write_bytes(bytes(range(256)) * 40)
        for methods in (METHODS, METHODS[1:]):
            file = DirectFile(path, methods)
            assert read(file, arena, 5000, 5240) == path.read_bytes()[5000:]
            file.close()
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("method", METHODS)
def test_short_reads_are_continued(path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch, method: Method,
                                   require: Callable[[object, str], None]) -> None:
    file = open_by(path, method, require)
    disk = FaultyDisk(path).install(monkeypatch)
    disk.most_bytes = 512 if method != "direct" else ALIGN_BYTES
    assert read(file, arena, 0, SIZE_BYTES) == path.read_bytes()
    assert disk.offsets == list(range(0, SIZE_BYTES, disk.most_bytes))
    file.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EBADF])
def test_a_failing_read_is_a_typed_error_that_names_the_file(
        path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch, method: Method, number: int,
        require: Callable[[object, str], None]) -> None:
    file = open_by(path, method, require)
    disk = FaultyDisk(path).install(monkeypatch)
    disk.fails_with = number
    with pytest.raises(ModelFileError, match=os.strerror(number)) as caught:
        read(file, arena, 0, SIZE_BYTES)
    assert caught.value.path == str(path)
    assert caught.value.next_step
    disk.fails_with = None  # a disk that recovers is read again
    assert read(file, arena, 0, SIZE_BYTES) == path.read_bytes()
    file.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("left_bytes", [0, 1, ALIGN_BYTES, 2 * ALIGN_BYTES + 77, SIZE_BYTES - 1])
def test_a_file_that_became_shorter_is_said_to_have(path: Path, arena: Arena, method: Method, left_bytes: int,
                                                    require: Callable[[object, str], None]) -> None:
    file = open_by(path, method, require)
    os.truncate(path, left_bytes)
    for offset in (0, 4 * ALIGN_BYTES):  # a read that begins inside the rest, and one that may begin behind it
        with pytest.raises(ModelFileError, match="shorter"):
            read(file, arena, offset, SIZE_BYTES - offset)
    file.close()


def test_a_disk_that_refuses_to_go_on_behind_a_new_end_is_no_failing_disk(
        path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct reads that begin where the file ends, on no block's border, are invalid on some file systems."""
    file = DirectFile(path)
    disk = FaultyDisk(path).install(monkeypatch)
    os.truncate(path, ALIGN_BYTES + 100)
    disk.fails_with, disk.fails_from = errno.EINVAL, SIZE_BYTES
    with pytest.raises(ModelFileError, match="shorter"):
        read(file, arena, 0, SIZE_BYTES)
    file.close()


def test_a_read_beyond_the_end_is_refused(path: Path, arena: Arena) -> None:
    """A header that was read before the file was cut promises more than there is."""
    file = DirectFile(path)
    for offset, n_bytes in ((0, SIZE_BYTES + ALIGN_BYTES), (8 * ALIGN_BYTES, ALIGN_BYTES)):
        with pytest.raises(ModelFileError, match="shorter"):
            file.read_into(arena.base, offset, aligned_range(offset, n_bytes)[1])
    file.close()


@pytest.mark.parametrize("change", ["written", "longer", "shorter"])
def test_a_file_that_was_written_to_is_noticed(path: Path, change: str) -> None:
    file = DirectFile(path)
    file.check_unchanged()
    with path.open("r+b") as writer:
        if change == "written":
            writer.write(b"other")
        else:
            writer.truncate(SIZE_BYTES + (4096 if change == "longer" else -1))
    os.utime(path, ns=(1, 1))  # clocks of file systems are coarse
    with pytest.raises(ModelFileError, match="changed"):
        file.check_unchanged()
    file.close()


def test_a_file_that_was_replaced_or_removed_is_read_as_it_was(path: Path, arena: Arena) -> None:
    expected = path.read_bytes()
    file = DirectFile(path)
    path.unlink()
    path.write_bytes(bytes(SIZE_BYTES))
    file.check_unchanged()
    assert read(file, arena, 0, SIZE_BYTES) == expected
    file.close()


def test_what_cannot_be_read_is_refused_at_once(tmp_path: Path) -> None:
    n_open = len(list(Path("/proc/self/fd").iterdir()))
    (tmp_path / "empty").touch()
    for path in (tmp_path / "none", tmp_path / "empty", tmp_path):
        with pytest.raises(ModelFileError):
            DirectFile(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == n_open


def test_reads_leave_nothing_in_the_page_cache(tmp_path: Path, arena: Arena,
                                               require: Callable[[object, str], None]) -> None:
    """Within a control group, cached pages of the model would count against the budget."""
    path = tmp_path / "large"
    path.write_bytes(bytes(4 << 20))
    for method in METHODS:
        file = open_by(path, method, require)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        deadline = time.monotonic() + 60
        while cached_bytes(path) and time.monotonic() < deadline:  # a page that is just being written stays
            forget_cached(path, 4 << 20)
        for offset in range(0, 1 << 20, arena.size_bytes):
            file.read_into(arena.base, offset, arena.size_bytes)
        assert cached_bytes(path) <= 1 << 20, method
        file.close()


def cached_bytes(path: Path) -> int:
    """How much of a file the page cache holds (mincore)."""
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        array = np.frombuffer(mapped, np.uint8)
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        assert libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(len(mapped)), pages) == 0
        del array
    return sum(page & 1 for page in pages) * mmap.PAGESIZE
