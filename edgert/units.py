"""Sizes as people write them: bytes inside, K, M and G (powers of 1024) at the edge."""

from __future__ import annotations

import re

from edgert.errors import UsageError

_FACTORS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Up to 18 digits: more than any memory has bytes, and few enough to be exact.
_SIZE = re.compile(r"(\d{1,18})(?:\.(\d{1,18}))?\s*([KMGT]?)(?:I?B)?", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str | int) -> int:
    """Bytes of `600M`, `1.5G`, `64KiB` or a plain number. Raises UsageError for anything else."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size", "Write bytes, or a number with K, M or G, such as 600M or 1.5G.")
    whole, fraction, unit = match[1], match[2] or "", match[3]
    return int(whole + fraction) * _FACTORS[unit.upper()] // int("1" + "0" * len(fraction))


def format_bytes(n_bytes: int) -> str:
    """`104857600` as `100.0 MiB`."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
