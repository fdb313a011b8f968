"""When a failed transfer is tried again, and how long to wait before it.

Pure but for the `sleep` that is passed in. Does not know what is transferred.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from edgert.errors import DownloadError
from edgert.models.http import ConnectionLost
from edgert.models.progress import Progress

MAX_ATTEMPTS = 5  # in a row without PROGRESS_BYTES arriving: 15 s of waiting in all
PROGRESS_BYTES = 1 << 20
FIRST_DELAY_S = 1.0  # doubled each time
MAX_DELAY_S = 60.0  # a server that asks for more is obeyed by stopping

T = TypeVar("T")
Sleep = Callable[[float], None]


class ServerBusy(ConnectionLost):
    """The server answered 429 or 5xx; `wait_s` is how long it asks to wait, 0 if it does not say."""

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message, "Pull again later; what has arrived is kept.")
        self.wait_s = wait_s


def retry_after_s(header: str | None, now: datetime | None = None) -> float:
    """The seconds that a Retry-After header asks for (RFC 9110, 10.2.3: a number or a date); 0 if it makes no sense."""
    if header is None or len(header) > 64:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())


def retry(action: Callable[[], T], progress: Progress, sleep: Sleep = time.sleep,
          arrived_bytes: Callable[[], int] = lambda: 0) -> T:
    """The result of `action`, run again after every ConnectionLost until it gets nowhere MAX_ATTEMPTS times in a row.

    Raises the last ConnectionLost, or DownloadError if the server asks to wait longer than MAX_DELAY_S.
    """
    failures, most_bytes = 0, arrived_bytes()
    while True:
        try:
            return action()
        except ConnectionLost as error:
            arrived = arrived_bytes()
            failures = 1 if arrived >= most_bytes + PROGRESS_BYTES else failures + 1
            most_bytes = max(most_bytes, arrived)
            if failures >= MAX_ATTEMPTS:
                raise
            asked_s = error.wait_s if isinstance(error, ServerBusy) else 0.0
            if asked_s > MAX_DELAY_S:
                raise DownloadError(error.message, f"Pull again in {asked_s:.0f} s: the server asks for it.") from error
            delay_s = max(asked_s, FIRST_DELAY_S * 2 ** (failures - 1))
            progress.message(f"{error.message}; trying again in {delay_s:.0f} s")
        sleep(delay_s)
