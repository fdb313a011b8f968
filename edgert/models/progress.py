"""How a download tells what it is doing. The core never prints; apps/cli shows it on the terminal."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told in this order: start, advances, finish, perhaps several times (fetch, then unpack); messages at any time.

    An advance outside a stage counts for nothing.
    """

    def start(self, total_bytes: int) -> None:
        """A stage of `total_bytes` begins."""

    def advance(self, n_bytes: int) -> None:
        """`n_bytes` more are here; negative where bytes that were counted are thrown away."""

    def message(self, text: str) -> None:
        """One line for the user: where the bytes come from, why it waits."""

    def finish(self) -> None:
        """The stage is over, whether it went well or not."""


class Silent:
    """A Progress that nobody watches."""

    def start(self, total_bytes: int) -> None:
        pass

    def advance(self, n_bytes: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def finish(self) -> None:
        pass
