"""JSON files that spare a measurement or a transfer: read without being believed, written whole or not at all.

Losing one costs time, so nothing here raises: what is missing, damaged or too large counts as nothing, and a home that
cannot be written to is left as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MAX_FILE_BYTES = 2**20


def read_cache(path: Path) -> dict[str, Any]:
    """The object in the file; empty for anything else. Its values are the caller's to check."""
    try:
        with path.open("rb") as file:
            known = json.loads(file.read(_MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def write_cache(path: Path, known: Mapping[str, Any]) -> None:
    """Replace the file in one step, so that another process reads the old or the new one."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known))
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # what a full disk has taken of it
