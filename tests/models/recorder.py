"""A Progress that remembers what it was told."""

from __future__ import annotations


class Recorder:
    def __init__(self) -> None:
        self.totals: list[int] = []
        self.here_bytes = 0  # of the current stage
        self.here_at_finish: list[int] = []
        self.messages: list[str] = []

    def start(self, total_bytes: int) -> None:
        self.totals.append(total_bytes)
        self.here_bytes = 0

    def advance(self, n_bytes: int) -> None:
        self.here_bytes += n_bytes

    def message(self, text: str) -> None:
        self.messages.append(text)

    def finish(self) -> None:
        self.here_at_finish.append(self.here_bytes)

    def said(self, piece: str) -> bool:
        return any(piece in message for message in self.messages)
