"""How long a server may make the client wait."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from edgert.models.retry import retry_after_s

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(("header", "seconds"), [
    (None, 0.0), ("7", 7.0), ("0", 0.0), ("-3", 0.0), ("soon", 0.0), ("1" * 100, 0.0), ("٣", 3.0),
    ("Fri, 02 Jan 2026 03:04:35 GMT", 30.0), ("Fri, 02 Jan 2026 03:00:00 GMT", 0.0), ("Fri, 99 Foo 2026", 0.0),
])
def test_retry_after_is_a_number_or_a_date_and_nonsense_is_no_wait(header: str | None, seconds: float) -> None:
    assert retry_after_s(header, NOW) == seconds
