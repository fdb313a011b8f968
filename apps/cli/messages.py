"""What the command says on standard error: log lines and errors, for people or as one JSON object a line.

Knows formats; does not decide what is worth saying (that is each module's log) nor which exit status follows.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from apps.cli.terminal import without_controls

if TYPE_CHECKING:
    from edgert.errors import EdgertError


@contextmanager
def logging_to_stderr(verbosity: int, as_json: bool) -> Iterator[None]:
    """Send log records to standard error: warnings; with 1 what is done; with 2 everything."""
    handler, root = logging.StreamHandler(sys.stderr), logging.getLogger()
    handler.setFormatter(JsonLines() if as_json else KeyValueLines() if verbosity else PlainLines())
    level, before = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)], root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


def complain(error: EdgertError, as_json: bool = False, defect: BaseException | None = None) -> None:
    """Write an error and its next step, for the user to read; with `defect`, where that was raised."""
    trace = "".join(traceback.format_exception(defect)) if defect else ""
    if as_json:
        said = json.dumps({"time": _now(), "level": "error", "message": error.message, "next_step": error.next_step,
                           "exit_code": error.exit_code, **({"traceback": trace} if trace else {})})
    else:
        said = without_controls(f"{trace}edgert: {error.message}" + (f"\n{error.next_step}" if error.next_step else ""))
    with suppress(BrokenPipeError):  # whoever read the messages has gone
        print(said, file=sys.stderr, flush=True)


class PlainLines(logging.Formatter):
    """`edgert: warning: ...`: what a user sees who has not asked for a log."""

    def format(self, record: logging.LogRecord) -> str:
        return without_controls(f"edgert: {record.levelname.lower()}: {record.getMessage()}")


class KeyValueLines(logging.Formatter):
    """`time=12:34:56.789 level=info logger=edgert.runtime msg="..." key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        pairs = {"time": time, "level": record.levelname.lower(), "logger": record.name, "msg": record.getMessage(),
                 **_fields(record)}
        line = " ".join(f"{key}={_value(value)}" for key, value in pairs.items())
        return f"{line}\n{without_controls(self.formatException(record.exc_info))}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        trace = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps({"time": _now(record.created), "level": record.levelname.lower(), "logger": record.name,
                           "message": record.getMessage(), **_fields(record), **trace}, default=str)


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    """What a caller added by `extra={"fields": {...}}`."""
    fields = getattr(record, "fields", {})
    return fields if isinstance(fields, Mapping) else {}


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    needs_quotes = not text or not text.isprintable() or any(char in text for char in ' "=')
    return json.dumps(text) if needs_quotes else text


def _now(seconds: float | None = None) -> str:
    time = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return time.isoformat(timespec="milliseconds")
