"""Where the time of a request goes, in Chrome's trace format (chrome://tracing, Perfetto).

Spans are `load`, `compute` or `wait`; counters tell how each step's time divides and what it read. A trace that is
off costs one call for each and keeps nothing.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from edgert.errors import UsageError

Category = Literal["load", "compute", "wait", "text"]
# A span takes some 250 bytes; this many hold an hour of block-wise decoding and end before memory does.
_MAX_SPANS = 1_000_000
_MAX_COUNTS = 100_000  # two a step
_NOTHING = nullcontext()


class Trace:
    """Spans and counters in memory, written by `save`."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._spans: list[tuple[str, Category, float, float, int]] = []
        self._counts: list[tuple[str, float, dict[str, float]]] = []
        if path is not None:
            try:
                path.open("a").close()  # say now, not after the answer, that it cannot be written
            except OSError as error:
                raise UsageError(f"--trace {path}: {error.strerror}", "Name a file that can be written.") from error

    def span(self, name: str, category: Category) -> AbstractContextManager[None]:
        """`with trace.span(...)`: how long the block takes, and in which thread."""
        return _NOTHING if self._path is None else self._timed(name, category)

    @contextmanager
    def _timed(self, name: str, category: Category) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if len(self._spans) < _MAX_SPANS:
                self._spans.append((name, category, start, time.perf_counter(), threading.get_native_id()))

    def count(self, name: str, **values: float) -> None:
        """A counter's values from now on."""
        if self._path is not None and len(self._counts) < _MAX_COUNTS:
            self._counts.append((name, time.perf_counter(), values))

    def save(self) -> None:
        """Write the file; nothing when the trace is off."""
        if self._path is None:
            return
        events: list[dict[str, Any]] = [
            {"name": name, "cat": category, "ph": "X", "ts": start * 1e6, "dur": (end - start) * 1e6, "pid": 1,
             "tid": thread} for name, category, start, end, thread in self._spans]
        events += [{"name": name, "ph": "C", "ts": at * 1e6, "pid": 1, "args": values}
                   for name, at, values in self._counts]
        try:
            self._path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        except OSError as error:
            raise UsageError(f"--trace {self._path}: {error.strerror}", "Name a file on a disk with space.") from error


OFF = Trace()
