"""Files while they arrive: locks, disk space, and what is left behind."""

from __future__ import annotations

import errno
import hashlib
import threading
from pathlib import Path

import pytest
from recorder import Recorder

from edgert.errors import ChecksumMismatch, DownloadError, NoSpace
from edgert.models import partial as partial_module
from edgert.models.partial import (
    SPACE_MARGIN_BYTES,
    PartialFile,
    Provenance,
    free_bytes,
    is_locked,
    locked,
    partial_path,
    require_space,
    sidecar_path,
)

PROVENANCE = Provenance("http://x/m.gguf", "etag", 10)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "user/repo/m.gguf"


def test_a_file_has_its_name_only_when_it_is_whole(target: Path, progress: Recorder) -> None:
    with locked(target, progress) as partial:
        partial.belongs_to(PROVENANCE)
        partial.write(b"0123456789", 10)
        assert not target.exists()
        assert partial_path(target).read_bytes() == b"0123456789"
        partial.publish(hashlib.sha256(b"0123456789").hexdigest().upper())
    assert target.read_bytes() == b"0123456789"
    assert list(target.parent.iterdir()) == [target]


def test_a_wrong_hash_leaves_nothing(target: Path, progress: Recorder) -> None:
    with pytest.raises(ChecksumMismatch), locked(target, progress) as partial:
        partial.belongs_to(PROVENANCE)
        partial.write(b"0123456789", 10)
        partial.publish("0" * 64)
    assert list(target.parent.iterdir()) == []


def test_an_empty_partial_does_not_stay(target: Path, progress: Recorder) -> None:
    with pytest.raises(RuntimeError), locked(target, progress):
        raise RuntimeError
    assert list(target.parent.iterdir()) == []


def test_what_arrived_stays_and_is_taken_over_with_its_hash(target: Path, progress: Recorder) -> None:
    with pytest.raises(RuntimeError), locked(target, progress) as partial:
        partial.belongs_to(PROVENANCE)
        partial.write(b"01234", 10)
        raise RuntimeError
    with locked(target, progress) as partial:
        assert partial.resume(10) == PROVENANCE
        assert partial.size_bytes == 5
        partial.write(b"56789", 10)
        partial.publish(hashlib.sha256(b"0123456789").hexdigest())
    assert target.read_bytes() == b"0123456789"


@pytest.mark.parametrize("sidecar", [
    None, "", "[]", "{}", '{"url": "u", "etag": "e", "size_bytes": "10"}', '{"url": null, "etag": 3, "size_bytes": 10}',
    '{"url": "u", "etag": "e", "size_bytes": 11}', "[" * 100_000,
])
def test_without_a_sound_sidecar_nothing_is_taken_over(target: Path, progress: Recorder, sidecar: str | None) -> None:
    target.parent.mkdir(parents=True)
    partial_path(target).write_bytes(b"01234")
    if sidecar is not None:
        sidecar_path(target).write_text(sidecar)
    with locked(target, progress) as partial:
        assert partial.resume(10) is None
        assert partial.size_bytes == 0
    assert list(target.parent.iterdir()) == []


def test_more_bytes_than_the_file_has_are_not_taken_over(target: Path, progress: Recorder) -> None:
    with locked(target, progress) as partial:
        partial.belongs_to(PROVENANCE)
        partial.write(b"x" * 11, 10)
    with locked(target, progress) as partial:
        assert partial.resume(10) is None


def test_a_full_disk_is_said_with_what_is_missing(target: Path, progress: Recorder,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    target.parent.mkdir(parents=True)
    partial = PartialFile(target, FullDisk())  # type: ignore[arg-type]
    with pytest.raises(NoSpace) as caught:
        partial.write(b"x", 1000)
    assert caught.value.needed_bytes == 1000


def test_space_is_asked_with_a_margin_before_anything_exists(tmp_path: Path) -> None:
    nowhere = tmp_path / "a/b/c"
    require_space(nowhere, 100, lambda directory: 100 + SPACE_MARGIN_BYTES)
    with pytest.raises(NoSpace) as caught:
        require_space(nowhere, 101, lambda directory: 100 + SPACE_MARGIN_BYTES)
    assert caught.value.free_bytes == 100 + SPACE_MARGIN_BYTES
    require_space(nowhere, 0, lambda directory: 0)  # nothing is to be written
    assert free_bytes(nowhere) > 0
    assert not (tmp_path / "a").exists()


def test_the_second_waits_until_the_first_is_done_and_shows_how_far_it_is(target: Path, progress: Recorder) -> None:
    waiting, done = threading.Event(), threading.Event()

    class Watching(Recorder):
        def advance(self, n_bytes: int) -> None:
            super().advance(n_bytes)
            if self.here_bytes == 5:
                waiting.set()

    watching = Watching()

    def second() -> None:
        with locked(target, watching):
            assert target.read_bytes() == b"01234"
            done.set()

    with locked(target, progress) as partial:
        thread = threading.Thread(target=second)
        thread.start()
        partial.write(b"01234", 5)
        assert waiting.wait(10)
        assert is_locked(target)
        assert not done.is_set()
        partial.publish(None)
    thread.join(10)
    assert done.is_set()
    assert watching.messages == ["another process is fetching m.gguf; waiting for it"]
    assert watching.here_bytes == 0  # what the other fetched is the caller's to count
    assert not is_locked(target)


def test_the_second_begins_a_file_of_its_own_when_the_first_removed_its(target: Path, progress: Recorder) -> None:
    waiting = threading.Event()

    class Watching(Recorder):
        def message(self, text: str) -> None:
            waiting.set()

    def second() -> None:
        with locked(target, Watching()) as partial:
            partial.write(b"good", 4)
            partial.publish(None)

    thread = threading.Thread(target=second)
    with pytest.raises(ChecksumMismatch), locked(target, progress) as partial:
        partial.write(b"bad", 4)
        thread.start()
        assert waiting.wait(10)
        partial.publish("0" * 64)
    thread.join(10)
    assert target.read_bytes() == b"good"


def test_a_holder_that_does_nothing_is_not_waited_for_for_ever(target: Path, progress: Recorder,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_module, "LOCK_STALL_S", 0.01)
    monkeypatch.setattr(partial_module, "LOCK_POLL_S", 0.02)
    with locked(target, progress), pytest.raises(DownloadError, match="holds"), locked(target, Recorder()):
        pass


def test_a_link_in_place_of_the_partial_is_not_followed(target: Path, progress: Recorder, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    target.parent.mkdir(parents=True)
    partial_path(target).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), locked(target, progress):
        pass
    assert precious.read_bytes() == b"mine"
