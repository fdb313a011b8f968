"""Who is next: a bounded queue that serves clients in turn, and each client's requests in order.

Pure and synchronous; does not know what waits in it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """At most `limit` waiting items. A client with many requests waits behind each other client's first one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # clients in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def is_full(self) -> bool:
        return len(self) >= self._limit

    def add(self, client: str, item: T) -> None:
        """Queue an item. The caller has looked at `is_full`."""
        self._waiting.setdefault(client, deque()).append(item)

    def take(self) -> T | None:
        """The next item, or None."""
        for client, items in self._waiting.items():
            item = items.popleft()
            if items:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            return item
        return None

    def remove(self, item: T) -> bool:
        """Forget an item that waits; whether it did."""
        for client, items in self._waiting.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._waiting[client]
                return True
        return False

    def in_order(self) -> list[T]:
        """All items, as they would be served if nobody else came."""
        rows = [list(items) for items in self._waiting.values()]
        longest = max(map(len, rows), default=0)
        return [row[turn] for turn in range(longest) for row in rows if turn < len(row)]
