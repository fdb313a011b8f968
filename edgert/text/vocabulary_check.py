"""Makes sure that libllama survives a file's vocabulary, by loading it in a throw-away process first, once per file.

libllama ends the process on some hostile vocabularies (a token twice, for example). A check costs 0.2-0.8 s beside
the loading of the weights; files that passed are remembered, and some that everybody has are known. Knows files and
processes; what is tried out is in vocabulary_probe.py, what a header must say in vocabulary_header.py.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import Self

from edgert.errors import ModelFileError, ModelNotFound, NativeLibraryError
from edgert.ggml.library import load_libraries
from edgert.gguf.cursor import open_cursor
from edgert.gguf.model_file import ModelFile
from edgert.paths import Paths
from edgert.text.vocabulary_header import check_header
from edgert.text.vocabulary_probe import REFUSED_STATUS

DEADLINE_S = 30.0
_PROBE_MODULE = "edgert.text.vocabulary_probe"
_PROBE_VERSION = 1  # to be raised when the probe tries more: everything is checked again
# Headers that passed, by the file's size (so that other files are not hashed at all): length and SHA-256.
_KNOWN_HEADERS = MappingProxyType({
    # SmolLM2-135M-Instruct.Q4_1, the default model
    98_362_432: (1_785_664, "cd2d87a25589b59f222688858608478fd7ed55b0cefdc3e96076591029713ce4"),
})
_MAX_REMEMBERED = 1024
_MAX_REASON_CHARS = 300
_SOURCE_DIRECTORY = re.compile(r"\S+/(?=[^/\s]+\.(?:cpp|c|h):)")  # where libllama was built says nothing
_logger = logging.getLogger(__name__)


class Check:
    """A check that may be running. `wait` ends it; closing it early kills the process."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes] | None = None, mark: Path | None = None) -> None:
        self.path, self._process, self._mark = path, process, mark
        self._deadline = time.monotonic() + DEADLINE_S

    def wait(self) -> None:
        """Return once libllama may load the vocabulary. Raises ModelFileError when it had better not."""
        if self._process is None:
            return
        try:
            _, output = self._process.communicate(timeout=max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.close()
            raise self._refused(f"loading it takes more than {DEADLINE_S:.0f} s") from None
        status, said = self._process.returncode, _last_line(output)
        self._process = None
        if status < 0:
            raise self._refused(f"libllama ends with {signal.Signals(-status).name}: {said or 'it says nothing'}")
        if status == REFUSED_STATUS:
            raise self._refused(said or "libllama cannot load it")
        if status != 0:
            raise NativeLibraryError(f"the check of a vocabulary does not run: {said}",
                                     "Make sure that edgert is installed completely (`make install`).")
        if self._mark is not None:
            _remember(self._mark)

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refused(self, reason: str) -> ModelFileError:
        return ModelFileError(str(self.path), f"vocabulary: {reason}")


def start_check(path: Path) -> Check:
    """Begin to check the vocabulary of `path`; the caller may do other things until `wait`.

    A file that passed before, or is known, needs no process. Raises ModelNotFound, ModelFileError, and UsageError for
    a file without a vocabulary.
    """
    mark = _mark(path)
    if _passed_before(mark) or _is_known(path):
        return Check(path)
    check_header(ModelFile.open(path))
    return Check(path, _start_probe(path), mark)


def _start_probe(path: Path) -> subprocess.Popen[bytes]:
    # The child finds edgert where this process found it, and nothing in a directory where it happens to be started.
    search_path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _PROBE_MODULE, os.fspath(path.absolute())],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": search_path})


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", errors="replace").strip().splitlines()
    line = _SOURCE_DIRECTORY.sub("", lines[-1][:4 * _MAX_REASON_CHARS]) if lines else ""
    return "".join(filter(str.isprintable, line))[:_MAX_REASON_CHARS]


def _is_known(path: Path) -> bool:
    known = _KNOWN_HEADERS.get(path.stat().st_size)
    if known is None:
        return False
    n_bytes, sha256 = known
    with open_cursor(path) as cursor:
        return hashlib.sha256(cursor.read_at(0, n_bytes)).hexdigest() == sha256


def _mark(path: Path) -> Path:
    """The empty file that exists when `path`, as it is now, passed with these libraries."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise ModelNotFound(str(path)) from error
    facts = (_PROBE_VERSION, load_libraries().version, str(path.absolute()), status.st_size, status.st_mtime_ns,
             status.st_ctime_ns, status.st_ino)
    return Paths.of_user().cache / "vocabularies" / hashlib.sha256(repr(facts).encode()).hexdigest()


def _passed_before(mark: Path) -> bool:
    try:
        return mark.exists()
    except OSError:  # the cache may not be read: the file is checked again
        return False


def _remember(mark: Path) -> None:
    # Best effort: without the mark the file is checked again next time.
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        marks = list(mark.parent.iterdir())
        if len(marks) >= _MAX_REMEMBERED:
            for old in marks:
                old.unlink(missing_ok=True)
        mark.touch()
    except OSError as error:
        _logger.debug("the passed check of a vocabulary is not remembered: %s", error)
