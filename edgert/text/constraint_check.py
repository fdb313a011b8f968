"""Makes sure that llguidance survives a grammar, by compiling it in a throw-away process first (constraint_probe.py).

Costs 80 ms, which pass while the vocabulary is prepared. Knows processes, not grammars.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from edgert.errors import GrammarError, NativeLibraryError
from edgert.text.constraint_probe import DEADLINE_S, REFUSED_STATUS

_PROBE_MODULE = "edgert.text.constraint_probe"
_SIMPLIFY = "Simplify it: shorter chains of references, fewer patterns that must hold at once."
_MAX_REASON_CHARS = 600


class GrammarCheck:
    """A check that has begun. `wait` ends it; closing it early kills the process."""

    def __init__(self, grammar: str) -> None:
        # The child finds edgert where this process found it, and nothing in a directory where it happens to be started.
        search_path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        with tempfile.TemporaryFile() as text:  # a pipe would have to be fed while the child reads
            text.write(grammar.encode())
            text.seek(0)
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-P", "-m", _PROBE_MODULE], stdin=text, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": search_path})
        self._deadline = time.monotonic() + DEADLINE_S

    def wait(self) -> None:
        """Return once the grammar may be compiled here. Raises GrammarError when it had better not."""
        if self._process is None:
            return
        try:
            _, output = self._process.communicate(timeout=max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.close()
            raise GrammarError(f"compiling the grammar takes more than {DEADLINE_S} s", _SIMPLIFY) from None
        status = self._process.returncode
        self._process = None
        said = output.decode("utf-8", errors="replace").strip().splitlines() or [""]
        if status < 0:
            raise GrammarError("the grammar is too deep or too large for its compiler", _SIMPLIFY)
        if status == REFUSED_STATUS:
            problem, next_step = said[-2:] if len(said) > 1 else (said[-1], _SIMPLIFY)
            raise GrammarError(problem[:_MAX_REASON_CHARS], next_step[:_MAX_REASON_CHARS])
        if status != 0:
            raise NativeLibraryError(f"the check of a grammar does not run: {said[-1][:_MAX_REASON_CHARS]}",
                                     "Make sure that edgert is installed completely (`make install`).")

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
