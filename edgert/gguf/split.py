"""Models split over several files, as llama.cpp's gguf-split writes them: `name-00001-of-00003.gguf`.

The first part holds all metadata; every part holds some tensors, its number and the count. Knows how the parts are
named and what they must agree on, nothing of their contents.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgert.errors import ModelFileError, ModelNotFound
from edgert.gguf.reader import MAX_TENSORS, Header, TensorInfo, read_header

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
# A model of 1 TiB in parts of 4 GiB has 256. Every part is opened, so their number is bounded.
MAX_PARTS = 1024


def part_paths(path: Path, first: Header) -> tuple[Path, ...]:
    """The paths of all parts of the model whose first part is `path`; just `path` for a whole model.

    Raises ModelFileError when `path` is another part than the first, or is not named as a part must be.
    """
    count = _split_number(path, first, "split.count", default=1)
    if count <= 1:
        return (path,)
    if count > MAX_PARTS:
        raise ModelFileError(str(path), f"claims to have {count} parts; at most {MAX_PARTS} are accepted")
    number = _split_number(path, first, "split.no")
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != number + 1:
        wanted = f"NAME-{number + 1:05}-of-{count:05}.gguf"
        raise ModelFileError(str(path), f"is part {number + 1} of {count}, but is not named {wanted}",
                             "Give all parts their original names.")
    parts = tuple(path.with_name(f"{match['stem']}-{one:05}-of-{count:05}.gguf") for one in range(1, count + 1))
    if number != 0:
        there = "" if parts[0].exists() else ", which is missing"
        raise ModelFileError(str(path), f"is part {number + 1} of {count}; the model begins in {parts[0].name}{there}",
                             f"Give the path of {parts[0].name}.")
    return parts


def read_parts(first: Header, parts: Sequence[Path]) -> list[Header]:
    """The headers of all parts, the first given; of the others' metadata nothing is kept.

    Raises ModelFileError when a part is missing or another's, and when all together have too many tensors (checked
    part by part: a thousand crafted headers must not fill the memory first).
    """
    headers, n_tensors = [first], len(first.tensors)
    for number in range(1, len(parts)):
        header = _read_part(parts, number)
        n_tensors += len(header.tensors)
        if n_tensors > MAX_TENSORS:
            raise ModelFileError(str(parts[0]), f"its parts hold over {MAX_TENSORS} tensors")
        headers.append(replace(header, metadata={}))
    return headers


def _read_part(parts: Sequence[Path], number: int) -> Header:
    path = parts[number]
    try:
        header = read_header(path, number)
    except ModelNotFound as error:
        raise ModelFileError(str(parts[0]), f"its part {path.name} is missing",
                             f"Fetch {path.name} into the same directory.") from error
    found = _split_number(path, header, "split.no"), _split_number(path, header, "split.count")
    if found != (number, len(parts)):
        raise ModelFileError(str(path), f"says that it is part {found[0] + 1} of {found[1]}, "
                             f"its name says {number + 1} of {len(parts)}")
    return header


def joined_tensors(path: Path, headers: Sequence[Header]) -> dict[str, TensorInfo]:
    """All parts' tensors in one table. Raises ModelFileError when two share a name or the sum is not as promised."""
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.tensors.items():
            if name in tensors:
                raise ModelFileError(str(path), f"tensor {name!r} is in two of its parts")
            tensors[name] = info
    if len(headers) > 1:
        promised = _split_number(path, headers[0], "split.tensors.count")
        if promised != len(tensors):
            raise ModelFileError(str(path), f"promises {promised} tensors, its parts hold {len(tensors)}")
    return tensors


def _split_number(path: Path, header: Header, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise ModelFileError(str(path), f"key {key!r} is missing or no whole number")
    return value
