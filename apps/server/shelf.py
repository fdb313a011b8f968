"""The models that a client may name: those of the catalog, and the one that the server was started with.

A client's name is only ever compared with names that are here; it is never taken as a path.
"""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgert.errors import EdgertError, ModelNotFound
from edgert.models.catalog import Catalog, ModelEntry, matching, near
from edgert.models.describe import Description, describe

T = TypeVar("T")
_FRESH_S = 5.0  # how long a listing of the disk serves


@dataclass(frozen=True, slots=True)
class ShelfModel:
    """A model by the name that clients use. `description` is None where the file cannot be read: `problem` says why."""

    name: str
    path: Path
    size_bytes: int
    modified_s: int
    description: Description | None
    problem: str


class Shelf:
    """What can be served. The disk is read in a thread of its own, at most every five seconds."""

    def __init__(self, catalog: Catalog, served: Path | None = None) -> None:
        """`served` is the file that the server was started with; clients that name no model get it."""
        self._catalog, self._served = catalog, served
        self._described: dict[tuple[Path, int, int], Description | str] = {}
        self._listed_s = -_FRESH_S
        self._lock, self._thread = asyncio.Lock(), ThreadPoolExecutor(1, "shelf")

    @property
    def default_name(self) -> str | None:
        """The name of the model that the server was started with."""
        if self._served is None:
            return None
        entry = next((one for one in self._catalog.entries if one.path == self._served), None)
        return entry.name if entry else self._served.stem

    async def find(self, name: str | None) -> tuple[str, Path]:
        """The model's own name and its file. Without a name, the served one, or the only one there is.

        Raises ModelNotFound, and UsageError for a name that several models have.
        """
        async with self._lock:
            if time.monotonic() - self._listed_s > _FRESH_S:
                await self._in_thread(self._refresh)
            return self._find(name)

    async def list(self) -> builtins.list[ShelfModel]:
        """Every model that is whole, the served one first."""
        async with self._lock:
            return await self._in_thread(self._list)

    def forget(self) -> None:
        """Look at the disk anew next time."""
        self._listed_s = -_FRESH_S

    async def _in_thread(self, look: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, look)

    def _refresh(self) -> None:
        now_s = time.monotonic()
        if now_s - self._listed_s > _FRESH_S:
            self._catalog.refresh()
            self._listed_s = now_s

    def _entries(self) -> builtins.list[ModelEntry]:
        return [entry for entry in self._catalog.entries if not entry.problem]

    def _find(self, name: str | None) -> tuple[str, Path]:
        entries = self._entries()
        served = self.default_name
        if self._served is not None and served is not None and (
                not name or name.lower() in (served.lower(), self._served.stem.lower())):
            return served, self._served
        if not name:
            if len(entries) == 1:
                return entries[0].name, entries[0].path
            raise ModelNotFound("", tuple(entry.name for entry in entries[:3]), "Name a model of /v1/models.")
        entry = matching(entries, name)
        if entry is None:
            raise ModelNotFound(name, near(name, [one.name for one in entries]), "Name a model of /v1/models.")
        return entry.name, entry.path

    def _list(self) -> builtins.list[ShelfModel]:
        self._refresh()
        found = [self._model(entry.name, entry.path, entry.size_bytes) for entry in self._entries()]
        if self._served is not None and all(model.path != self._served for model in found):
            found.insert(0, self._model(self._served.stem, self._served, 0))
        return sorted(found, key=lambda model: model.path != self._served)

    def _model(self, name: str, path: Path, size_bytes: int) -> ShelfModel:
        try:
            stat = path.stat()
        except OSError as error:
            return ShelfModel(name, path, size_bytes, 0, None, error.strerror or str(error))
        key = path, stat.st_size, stat.st_mtime_ns
        if key not in self._described:
            try:
                self._described[key] = describe(path)
            except EdgertError as error:
                self._described[key] = error.message
        known = self._described[key]
        if isinstance(known, str):
            return ShelfModel(name, path, size_bytes, int(stat.st_mtime), None, known)
        return ShelfModel(name, path, size_bytes or known.file_bytes, int(stat.st_mtime), known, "")
