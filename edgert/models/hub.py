"""A client for the Hugging Face hub's HTTP interface: lists a repository's GGUFs, fetches one with resume.

Knows the hub's addresses and its errors. Does not know which file is wanted (names.py), how the bytes of one file
arrive (transfer.py) or how they lie on the disk (partial.py). What the server says is checked, not believed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from edgert.errors import DownloadError
from edgert.models.http import ConnectionLost, HttpClient, Response, joined
from edgert.models.names import safe_relative
from edgert.models.partial import CHUNK_BYTES, is_complete, locked
from edgert.models.progress import Progress
from edgert.models.retry import ServerBusy, Sleep, retry, retry_after_s
from edgert.models.transfer import Transfer, Wanted
from edgert.units import format_bytes

DEFAULT_ENDPOINT = "https://huggingface.co"
REVISION = "main"
MAX_PAGE_BYTES = 8 << 20  # 1,000 files, the hub's own page, have about 0.4 MiB
MAX_PAGES = 20
MAX_FILE_BYTES = 1 << 43  # 8 TiB: a size beyond it is a lie
SHOWN_FILES = 12
_SHA256 = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)
_NEXT_PAGE = re.compile(r'<([^>]{1,4096})>;\s*rel="next"')
_CHECK_ENDPOINT = "Check HF_ENDPOINT, or try again later."


@dataclass(frozen=True, slots=True)
class HubFile:
    """A GGUF of a repository. `path` is safe to join to a directory; `sha256` is None where the hub publishes none."""

    path: str
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubSettings:
    """What the environment says about the hub."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = None
    offline: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> HubSettings:
        """HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, as the hub's own client reads them."""
        return cls(environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT, environ.get("HF_TOKEN", "").strip() or None,
                   environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"))


class Hub:
    """The hub at one endpoint. Holds no connection between calls."""

    def __init__(self, settings: HubSettings, sleep: Sleep = time.sleep, client: HttpClient | None = None) -> None:
        self._offline = settings.offline
        self._client = client or HttpClient(settings.endpoint, settings.token)
        self._sleep = sleep

    def files(self, repo: str, progress: Progress) -> list[HubFile]:
        """The GGUFs of `repo`, in the hub's order. Raises DownloadError if the hub refuses or cannot be asked."""
        self._require_online(repo)
        found: list[HubFile] = []
        url: str | None = f"{self._client.endpoint}/api/models/{quote(repo)}/tree/{REVISION}?recursive=true"
        for _ in range(MAX_PAGES):
            if url is None:
                return found
            page_url = url
            entries, url = retry(lambda: self._page(repo, page_url), progress, self._sleep)  # noqa: B023 - run at once
            found += [file for file in map(_hub_file, entries) if file is not None]
        raise DownloadError(f"{repo}: the hub's list of files has no end", _CHECK_ENDPOINT)

    def fetch(self, repo: str, file: HubFile, target: Path, progress: Progress, others: Sequence[str] = ()) -> None:
        """Bring `file` to `target`, going on where an earlier run stopped; `progress` advances by the file's size.

        `others` are named if the file is gone from the hub. Raises DownloadError (what has arrived is kept),
        ChecksumMismatch (nothing is kept) or NoSpace.
        """
        self._require_online(repo)
        url = f"{self._client.endpoint}/{quote(repo)}/resolve/{REVISION}/{quote(file.path)}"
        with locked(target, progress) as partial:
            if is_complete(target, file.size_bytes):  # by another process, while this one waited
                progress.advance(file.size_bytes)
                return
            known = partial.resume(file.size_bytes)
            if known is not None:
                progress.message(f"{target.name}: going on after {format_bytes(partial.size_bytes)}")
                progress.advance(partial.size_bytes)
            transfer = Transfer(self._client, Wanted(url, file.size_bytes, file.sha256), partial, known=known,
                                progress=progress, check_status=lambda answer: _check(answer, repo, file.path, others))
            retry(transfer.run, progress, self._sleep, lambda: partial.size_bytes)
            if file.sha256 is None:
                progress.message(f"{target.name}: the hub publishes no SHA-256; only the size was checked")
            partial.publish(file.sha256)

    def _page(self, repo: str, url: str) -> tuple[list[object], str | None]:
        """One page of the list of files, and the address of the next."""
        body = bytearray()
        with self._client.get(url) as response:
            _check(response, repo)
            while chunk := response.read(CHUNK_BYTES):
                body += chunk
                if len(body) > MAX_PAGE_BYTES:
                    raise DownloadError(f"{repo}: the hub's list of files is too long", _CHECK_ENDPOINT)
            following = _NEXT_PAGE.search(response.headers.get("Link", ""))
        try:
            entries = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ConnectionLost(f"{repo}: the hub's list of files is damaged", _CHECK_ENDPOINT) from error
        if not isinstance(entries, list):
            raise DownloadError(f"{repo}: the hub's list of files is no list", _CHECK_ENDPOINT)
        return entries, joined(url, following[1]) if following else None

    def _require_online(self, repo: str) -> None:
        if self._offline:
            raise DownloadError(f"{repo} is not here, and HF_HUB_OFFLINE forbids to ask the hub",
                                "Unset HF_HUB_OFFLINE to fetch it.")


def _hub_file(entry: object) -> HubFile | None:
    """The GGUF that an entry of the list describes; None for other files and for what makes no sense."""
    if not isinstance(entry, dict) or entry.get("type") != "file":
        return None
    path = safe_relative(entry.get("path"))
    large = entry.get("lfs")
    stored = large if isinstance(large, dict) else {}
    size_bytes = stored.get("size", entry.get("size"))
    if path is None or type(size_bytes) is not int or not 0 < size_bytes <= MAX_FILE_BYTES:
        return None
    sha256 = stored.get("oid")
    return HubFile(str(path), size_bytes, sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None)


def _check(response: Response, repo: str, path: str = "", others: Sequence[str] = ()) -> None:
    """Raises what an error status means to the user; ServerBusy where another attempt may do better."""
    status = response.status
    what = f"{repo}/{path}" if path else repo
    if status in (200, 206):
        return
    if status in (401, 403):
        raise DownloadError(f"{what}: {response.host} answers {status}: private, under a licence, or not there at all",
                            f"Check the name; set HF_TOKEN to your token; accept the licence on the page of {repo}.")
    if status == 404:
        if not path:
            raise DownloadError(f"{response.host} has no repository {repo}", "Check the name: it is user/repo[:quant].")
        raise DownloadError(f"{repo} has no file {path}", f"It has: {shown(others)}.")
    message = f"{what}: {response.host} answers {status}"
    if status == 429 or status >= 500:
        raise ServerBusy(message, retry_after_s(response.headers.get("Retry-After")))
    raise DownloadError(message, _CHECK_ENDPOINT)


def shown(paths: Sequence[str]) -> str:
    """A list of files for a message, bounded."""
    more = f" and {len(paths) - SHOWN_FILES} more" if len(paths) > SHOWN_FILES else ""
    return ", ".join(paths[:SHOWN_FILES]) + more if paths else "no GGUF"
