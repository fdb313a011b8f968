"""Receives the rest of one file over HTTP, and notices when it is not the rest of what is here.

Knows Range, Content-Range, ETag and lying lengths (RFC 9110, section 14). Does not retry (retry.py) and does not
know what an error status means (hub.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from edgert.errors import DownloadError
from edgert.models.http import ConnectionLost, HttpClient, Response
from edgert.models.partial import PartialFile, Provenance
from edgert.models.progress import Progress

NETWORK_CHUNK_BYTES = 256 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-\d{1,19}/(?:(\d{1,19})|\*)", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)
_CHANGED = "It may have changed on the server just now: pull again."


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file as a list of files promised it; `sha256` is None where none was published."""

    url: str
    size_bytes: int
    sha256: str | None


class Transfer:
    """Brings `partial` to the size of `wanted`. `run` may be called again after ConnectionLost, and goes on."""

    def __init__(self, client: HttpClient, wanted: Wanted, partial: PartialFile, *, known: Provenance | None,
                 progress: Progress, check_status: Callable[[Response], None]) -> None:
        """`known` says what the bytes in `partial` belong to; `check_status` raises for all but 200, 206 and 416."""
        self._client = client
        self._url, self._size_bytes, self._sha256 = wanted.url, wanted.size_bytes, wanted.sha256
        self._partial = partial
        self._known = known
        self._progress = progress
        self._check_status = check_status

    def run(self) -> None:
        """One request, and a second one where the first shows that what is here is of no use."""
        if not self._receive_rest() and not self._receive_rest():
            raise DownloadError(f"{self._name}: the server sends other bytes than were asked for", "Pull again later.")

    @property
    def _name(self) -> str:
        return self._partial.target.name

    def _receive_rest(self) -> bool:
        """False, with what is here thrown away, if the server's answer does not continue it."""
        have_bytes = self._partial.size_bytes
        if have_bytes == self._size_bytes:
            return True
        with self._client.get(self._url, have_bytes) as response:
            if response.status != 416:
                self._check_status(response)
            continues = response.status == 206 and self._continues(response)
            if have_bytes and not continues:
                self._start_over()
            if response.status != 200 and not continues:
                return False
            self._check_file(response)
            self._receive(response)
            return True

    def _continues(self, response: Response) -> bool:
        """Whether a 206 holds the very bytes that follow those that are here."""
        known = self._known
        if known is None or response.etag != known.etag or not (known.etag or known.url == self._url):
            return False
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        return match is not None and int(match[1]) == self._partial.size_bytes and \
            match[2] in (None, str(self._size_bytes))

    def _start_over(self) -> None:
        self._progress.message(f"{self._name}: starting over, the server does not continue what was begun")
        self._progress.advance(-self._partial.size_bytes)
        self._partial.restart()
        self._known = None

    def _check_file(self, response: Response) -> None:
        """Raises, before a byte is written, if these are not the bytes that the list of files promised."""
        announced = response.linked_etag
        if announced and self._sha256 and _SHA256.fullmatch(announced) and announced.lower() != self._sha256.lower():
            raise DownloadError(f"{self._name}: the server offers another file than it listed", _CHANGED)
        rest_bytes = self._size_bytes - self._partial.size_bytes
        if response.length_bytes not in (None, rest_bytes):
            raise ConnectionLost(f"{self._name}: {response.host} announces {response.length_bytes} bytes, "
                                 f"where {rest_bytes} should come", _CHANGED)

    def _receive(self, response: Response) -> None:
        if self._known is None:
            self._known = Provenance(self._url, response.etag, self._size_bytes)
            self._partial.belongs_to(self._known)
        while (rest_bytes := self._size_bytes - self._partial.size_bytes) > 0:
            chunk = response.read_some(min(NETWORK_CHUNK_BYTES, rest_bytes))
            if not chunk:
                raise ConnectionLost(f"{self._name}: {response.host} ended the connection {rest_bytes} bytes too early",
                                     "Check the network; what has arrived is kept, pull again to go on.")
            self._partial.write(chunk, self._size_bytes)
            self._progress.advance(len(chunk))
