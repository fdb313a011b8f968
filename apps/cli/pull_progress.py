"""How `edgert pull` shows a download: a bar on a terminal, a line now and then elsewhere.

Implements edgert.models.progress.Progress; knows nothing of what is fetched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from edgert.models.progress import Progress
from edgert.units import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


LINE_INTERVAL_S = 1.0  # a fast download is one line, not ten


def progress_for(stream: TextIO) -> Progress:
    """The one that suits `stream`."""
    return BarProgress(stream) if stream.isatty() else LineProgress(stream)


class LineProgress:
    """Whole lines, for logs and pipes."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._total_bytes = 0
        self._here_bytes = 0
        self._told_tenths = 0
        self._told_at_s = 0.0

    def start(self, total_bytes: int) -> None:
        self._total_bytes, self._here_bytes, self._told_tenths = total_bytes, 0, 0
        self._told_at_s = self._clock()

    def advance(self, n_bytes: int) -> None:
        self._here_bytes += n_bytes
        tenths = 10 * self._here_bytes // self._total_bytes if self._total_bytes else 0
        now_s = self._clock()
        if tenths > self._told_tenths and (tenths == 10 or now_s >= self._told_at_s + LINE_INTERVAL_S):
            self._told_tenths, self._told_at_s = tenths, now_s
            self.message(f"{10 * tenths:3} % of {format_bytes(self._total_bytes)}")

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def finish(self) -> None:
        self._total_bytes = 0


class BarProgress:
    """A bar with bytes, speed and the time that is left, redrawn by rich; messages scroll above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream)
        self._bar: Bar | None = None

    def start(self, total_bytes: int) -> None:
        from rich import progress as columns

        self.finish()
        self._bar = columns.Progress(
            columns.SpinnerColumn(finished_text=" "), columns.BarColumn(bar_width=None),
            columns.DownloadColumn(binary_units=True), columns.TransferSpeedColumn(), columns.TimeElapsedColumn(),
            columns.TimeRemainingColumn(), console=self._console, expand=True)
        self._bar.add_task("", total=total_bytes)
        self._bar.start()

    def advance(self, n_bytes: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], n_bytes)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
