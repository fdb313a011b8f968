"""Finds the GGUFs below a place, within bounds, each file once.

Knows directories, links and the hub cache's snapshots. Opens no file: what a model is, `catalog.py` asks for later.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from edgert.models.names import is_model, parse_split, parts_of, stem
from edgert.models.places import Place

MAX_DEPTH = 8  # the hub cache needs 5
MAX_VISITED = 20_000  # directory entries per place: a home directory given by mistake must not take minutes
MAX_REF_BYTES = 256  # a snapshot's commit is 40 characters

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A GGUF on this machine; `parts` in order, `missing` the names of parts that should lie beside them."""

    path: Path
    parts: tuple[Path, ...]
    missing: tuple[str, ...]
    size_bytes: int
    place: Place
    repo: str | None  # user/repo, where the place's layout tells it
    repo_path: str  # the path inside the repository, or inside the place where there is none; without `.partial`
    unfinished: bool = False  # a `.partial` of edgert's own

    @property
    def stem(self) -> str:
        return stem(self.path.name.removesuffix(".partial"))

    @property
    def relative_name(self) -> str:
        """user/repo/path, or the path below the place, without `.gguf` and the part's number."""
        above = "/".join(part for part in (self.repo, self.repo_path.rpartition("/")[0]) if part)
        return f"{above}/{self.stem}" if above else self.stem


def scan(place: Place, seen: set[tuple[int, int]]) -> list[FoundModel]:
    """All models of a place by path. `seen` holds (device, inode) of what was found before, and grows."""
    roots: list[tuple[str | None, Path]] = [(None, place.path)]
    if place.layout == "hub_cache":
        roots = list(_snapshots(place.path))
    found: list[FoundModel] = []
    for repo, root in roots:
        sizes: dict[str, int] = {}
        for entry in _walk(root):
            if not (is_model(entry.path) or (place.ours and _is_partial(entry.name))):
                continue
            try:
                status = entry.stat()
            except OSError:  # a dangling link
                continue
            if status.st_size == 0 and _is_partial(entry.name):  # another process begins, or was killed at it
                continue
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                sizes[entry.path] = status.st_size
        found += _models(sizes, place, root, repo)
    return sorted(found, key=lambda model: str(model.path).lower())


def _models(sizes: dict[str, int], place: Place, root: Path, repo: str | None) -> Iterator[FoundModel]:
    paths = sorted(sizes)
    taken: set[str] = set()
    for path in paths:
        if path in taken:
            continue
        parts, missing = parts_of(path, paths) if parse_split(path) else ([path], [])
        taken.update(parts)
        first = Path(parts[0])
        owner, inside = _inside_repo(first.relative_to(root), place, repo)
        yield FoundModel(first, tuple(map(Path, parts)), tuple(Path(name).name for name in missing),
                         sum(sizes[part] for part in parts), place, owner, inside, _is_partial(path))


def _inside_repo(relative: Path, place: Place, repo: str | None) -> tuple[str | None, str]:
    names = (*relative.parts[:-1], relative.name.removesuffix(".partial"))
    if repo is None and place.layout == "repos" and len(names) > 2:
        return "/".join(names[:2]), "/".join(names[2:])
    return repo, "/".join(names)


def _is_partial(name: str) -> bool:
    return name.endswith(".gguf.partial")


def _snapshots(cache: Path) -> Iterator[tuple[str | None, Path]]:
    """(user/repo, directory) of what `main` points at; of every snapshot where no such pointer is kept."""
    try:
        repositories = sorted(cache.glob("models--*--*"))
    except OSError:
        return
    for directory in repositories[:MAX_VISITED]:
        repo = directory.name.removeprefix("models--").replace("--", "/", 1)
        snapshots = directory / "snapshots"
        try:
            with (directory / "refs" / "main").open("rb") as pointer:
                commit = pointer.read(MAX_REF_BYTES).decode("ascii").strip()
        except (OSError, ValueError):
            commit = ""
        if commit.isalnum() and (snapshots / commit).is_dir():
            yield repo, snapshots / commit
        elif snapshots.is_dir():
            for snapshot in sorted(snapshots.iterdir()):
                yield repo, snapshot


def _walk(root: Path) -> Iterator[os.DirEntry[str]]:
    """The files below `root`, following links but never into a directory twice; hidden directories are left out."""
    visited = 0
    entered: set[tuple[int, int]] = set()
    waiting = [(str(root), 0)]
    while waiting:
        directory, depth = waiting.pop()
        try:
            status = os.stat(directory)  # noqa: PTH116 - os.scandir works on strings
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(directory) as listing:
                entries = sorted(islice(listing, MAX_VISITED - visited + 1), key=lambda entry: entry.name)
        except OSError as error:  # not there, or not ours to read: then it holds no model that could be opened
            _log.debug("%s is left out: %s", directory, error)
            continue
        for entry in entries:
            visited += 1
            if visited > MAX_VISITED:
                _log.warning("%s holds more than %d entries; models beyond them are not listed", root, MAX_VISITED)
                return
            if _is_directory(entry):
                if depth < MAX_DEPTH and not entry.name.startswith("."):
                    waiting.append((entry.path, depth + 1))
            else:
                yield entry


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
