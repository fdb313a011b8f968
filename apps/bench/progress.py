"""How far a measurement is, on standard error: a line with the time that is left, where that is a terminal.

The estimate is arithmetic over what was done: seconds a token by contender, of prompts and of answers.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self, TextIO

from apps.bench.asked import Work

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class TimeLeft:
    """Guesses how long the rest of some work takes, from how long its like took."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._left = Counter(works)
        self._took: dict[Work, list[float]] = defaultdict(list)
        self._token_s: dict[bool, list[float]] = {True: [], False: []}  # of answers, of prompts

    def done(self, work: Work, took_s: float) -> None:
        if self._left[work] > 0:
            self._left[work] -= 1
        self._took[work].append(took_s)
        if not (work.n_prompt and work.n_gen):
            self._token_s[bool(work.n_gen)].append(took_s / max(1, work.n_gen or work.n_prompt))

    def seconds(self) -> float | None:
        """None until enough is known to say anything."""
        guesses = [self._guess(work) for work, count in self._left.items() if count]
        if any(guess is None for guess in guesses):
            return None
        counts = [count for count in self._left.values() if count]
        return sum(guess * count for guess, count in zip(guesses, counts, strict=True) if guess is not None)

    def _guess(self, work: Work) -> float | None:
        if self._took[work]:
            return self._took[work][-1]
        total_s = 0.0
        for is_answer, n_tokens in ((False, work.n_prompt), (True, work.n_gen)):
            if n_tokens and not self._token_s[is_answer]:
                return None
            total_s += n_tokens * self._token_s[is_answer][-1] if n_tokens else 0.0
        return total_s


class Progress:
    """A Watcher for `stream`: a bar by rich on a terminal, nothing but warnings elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._left = TimeLeft(())
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        if self._stream is not None and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(SpinnerColumn(), TextColumn("{task.description}", markup=False),
                                     BarColumn(bar_width=16),
                                     TextColumn("{task.fields[left]}"), transient=True, refresh_per_second=2,
                                     redirect_stdout=False, redirect_stderr=False,
                                     console=Console(file=self._stream))
            self._bar.add_task("", total=None, left="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def planned(self, works: Sequence[Work]) -> None:
        self._left = TimeLeft(works)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=len(works))

    def doing(self, what: str) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=what, left=shown(self._left.seconds()))

    def done(self, work: Work, seconds: float) -> None:
        self._left.done(work, seconds)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, left=shown(self._left.seconds()))

    def warn(self, message: str) -> None:
        self.print(f"edgert: {message}")

    def print(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._stream is not None:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while something else is printed."""
        if self._bar is None:
            yield
            return
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()


def shown(seconds: float | None) -> str:
    """`about 3:20 left`."""
    return "" if seconds is None else f"about {int(seconds) // 60}:{int(seconds) % 60:02} left"
