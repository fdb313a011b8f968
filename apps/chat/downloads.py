"""Models to begin with, and fetching one while the page looks on.

Three suggestions that suit the device: the smallest, the best that stays in memory, the best that streams well.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

from apps.server.forecast import Forecast, Shape, Speeds, forecast
from edgert.errors import EdgertError, InvalidRequest
from edgert.models.catalog import Catalog
from edgert.models.known import known_model
from edgert.models.names import parse_reference
from edgert.models.pull import pull

_ENOUGH_TOK_S = 2.0  # slower than this is nothing to begin with
_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A model that can be fetched; bytes are its file's, rounded."""

    model: str
    title: str
    about: str
    file_bytes: int
    kv_bytes_per_token: int

    @property
    def shape(self) -> Shape:
        return Shape(self.file_bytes, self.file_bytes, self.kv_bytes_per_token, None)


# From small to large; each with the figures of its file.
_ALL = (
    Suggestion("smollm2-135m", "SmolLM2 135M", "Tiny and quick. Good for trying edgert out, not for facts.",
               98_362_432, 23_040),
    Suggestion("Qwen/Qwen2.5-0.5B-Instruct-GGUF:q4_k_m", "Qwen2.5 0.5B", "Small, many languages, short tasks.",
               491_400_032, 12_288),
    Suggestion("Qwen/Qwen2.5-1.5B-Instruct-GGUF:q4_k_m", "Qwen2.5 1.5B", "A helper for everyday questions.",
               1_117_320_736, 28_672),
    Suggestion("Qwen/Qwen2.5-3B-Instruct-GGUF:q4_k_m", "Qwen2.5 3B", "Writes and explains well.",
               2_104_932_768, 36_864),
    Suggestion("Qwen/Qwen2.5-7B-Instruct-GGUF:q4_k_m", "Qwen2.5 7B", "Knows a lot; wants memory or patience.",
               4_683_073_536, 57_344),
    Suggestion("Qwen/Qwen2.5-14B-Instruct-GGUF:q4_k_m", "Qwen2.5 14B", "Strong; for large devices.",
               8_988_110_976, 196_608),
)


def suggest(budget_bytes: int, speeds: Speeds) -> list[tuple[Suggestion, Forecast]]:
    """Three models, from small to large, with their forecasts within the budget."""
    told = [(one, forecast(one.shape, budget_bytes, _CONTEXT, speeds)) for one in _ALL]
    usable = [pair for pair in told if pair[1].tokens_per_s >= _ENOUGH_TOK_S and pair[1].verdict != "too slow"]
    fitting = [pair for pair in usable if pair[1].verdict == "fits"]
    chosen = {pair[0].model: pair for pair in (told[0], *fitting[-1:], *usable[-1:], *fitting[-2:], *told[:3])}
    three = list(chosen.values())[:3]
    return sorted(three, key=lambda pair: pair[0].file_bytes)


class Download:
    """A Progress for one model, read by the page. Raising from `advance` is how a pull is stopped."""

    def __init__(self, model: str) -> None:
        self.model, self.total_bytes, self.done_bytes = model, 0, 0
        self.text, self.error = "", ""
        self.finished = False
        self.stopped = threading.Event()

    def start(self, total_bytes: int) -> None:
        self.total_bytes, self.done_bytes = total_bytes, 0

    def advance(self, n_bytes: int) -> None:
        if self.stopped.is_set():
            raise _Stopped
        self.done_bytes += n_bytes

    def message(self, text: str) -> None:
        self.text = text

    def finish(self) -> None:
        """Another stage may follow; `finished` is set when the pull returns."""

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "total_bytes": self.total_bytes, "done_bytes": self.done_bytes,
                "text": self.text, "error": self.error or None, "finished": self.finished}


class _Stopped(EdgertError):
    """The user has stopped a download."""

    def __init__(self) -> None:
        super().__init__("the download was stopped", "What has arrived is kept.")


class Downloads:
    """One download at a time."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.current: Download | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, model: str) -> Download:
        """Fetch a known name or user/repo[:quant]. Raises InvalidRequest for anything else, or when one runs."""
        if known_model(model) is None and parse_reference(model) is None:
            raise InvalidRequest(f"{model[:100]!r} names no model that can be fetched",
                                 "Give smollm2-135m, or user/repo:quant.", "model")
        if self.current is not None and not self.current.finished:
            raise InvalidRequest("a download is running already", "Wait for it, or stop it.")
        download = self.current = Download(model)
        self._task = asyncio.create_task(self._fetch(download), name="download")
        return download

    async def _fetch(self, download: Download) -> None:
        catalog = Catalog(self._catalog.paths)  # of its own: this one runs in a thread beside others
        try:
            await asyncio.to_thread(pull, download.model, catalog, download)
        except EdgertError as error:
            download.error = str(error)
        finally:
            download.finished = True

    def stop(self) -> None:
        if self.current is not None:
            self.current.stopped.set()

    async def close(self) -> None:
        self.stop()
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=5)
