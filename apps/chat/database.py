"""Runs a Store in a thread of its own, so that the disk never holds up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from apps.chat.store import Store

T = TypeVar("T")


class Database:
    """Open while the server runs. `do` takes what is to be done with the store, one at a time, in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "chat-database")
        self._store: Store | None = None

    async def open(self) -> None:
        """Raises EdgertError when the file is not a database, or cannot be written."""
        self._store = await self._in_thread(lambda: Store(self._path))

    async def do(self, work: Callable[[Store], T]) -> T:
        store = self._store
        assert store is not None  # the server opens it before it answers
        return await self._in_thread(lambda: work(store))

    async def close(self) -> None:
        if self._store is not None:
            await self._in_thread(self._store.close)
        self._thread.shutdown()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
