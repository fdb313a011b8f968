"""One HTTP GET as a stream of bytes: redirects, timeouts, proxies, and a token that only its own server sees.

Knows nothing of models or repositories, and never retries: hub.py decides that. http.client bounds the number (100)
and length (64 KiB) of headers.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from edgert.errors import DownloadError, UsageError
from edgert.models.names import printable

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0  # between two reads, not for the whole
MAX_REDIRECTS = 5
MAX_URL_CHARS = 8192  # signed addresses have about 2,000
MAX_TOKEN_CHARS = 512
_REDIRECTS = (301, 302, 303, 307, 308)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_IN_URL = "%/:=&?~#+!$,;'@()*[]"  # what a redirect's address may hold unquoted


class ConnectionLost(DownloadError):
    """The server did not answer, or stopped in the middle. Another attempt may do better."""


@dataclass(frozen=True, slots=True)
class Response:
    """The final answer to a GET. `linked_etag` is what a server on the way said of the file behind its redirect."""

    status: int
    headers: Message
    linked_etag: str | None
    stream: http.client.HTTPResponse
    host: str

    @property
    def etag(self) -> str:
        """The identity of the file's bytes; empty where no server tells one."""
        return self.linked_etag or _unquoted(self.headers.get("ETag")) or ""

    def read(self, n_bytes: int) -> bytes:
        """`n_bytes`, fewer at the end. A connection that is lost looks like the end: count. Raises ConnectionLost."""
        return self._call(self.stream.read, n_bytes)

    def read_some(self, n_bytes: int) -> bytes:
        """Up to `n_bytes`, as soon as some are here; ask for no more than the body has left (as `read` otherwise)."""
        return self._call(self.stream.read1, n_bytes)

    def _call(self, read: Callable[[int], bytes], n_bytes: int) -> bytes:
        try:
            return read(n_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise _lost(self.host, error) from error

    @property
    def length_bytes(self) -> int | None:
        """The length that the server announces for the body, if it does."""
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


class HttpClient:
    """GETs from `endpoint` and from wherever it redirects to. `token` goes to the endpoint's own origin only."""

    def __init__(self, endpoint: str, token: str | None = None, *, connect_timeout_s: float = CONNECT_TIMEOUT_S,
                 read_timeout_s: float = READ_TIMEOUT_S) -> None:
        """Raises UsageError if the endpoint is no http(s) address or the token cannot be a header."""
        own = _parsed(endpoint)
        if own is None:
            raise UsageError(f"{endpoint!r} is no address of a server", "Set HF_ENDPOINT to https://HOST, or unset it.")
        if token is not None and (len(token) > MAX_TOKEN_CHARS or not token.isascii() or not token.isprintable()):
            raise UsageError("the token is no token", "Set HF_TOKEN to the token alone, on one line.")
        self.endpoint = endpoint.rstrip("/")
        self._own = own
        self._token = token
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s

    @contextlib.contextmanager
    def get(self, url: str, first_byte: int = 0) -> Iterator[Response]:
        """The answer to GET `url` from `first_byte` on, whatever its status, after redirects; closed with the block.

        Raises ConnectionLost, or DownloadError for a redirect that must not be followed.
        """
        linked_etag: str | None = None
        for _ in range(MAX_REDIRECTS + 1):
            target = self._allowed(url)
            connection = self._connection(target)
            # A response outlives its connection: both are closed.
            with contextlib.closing(connection), contextlib.closing(
                    self._request(connection, target, first_byte)) as stream:
                linked_etag = linked_etag or _unquoted(stream.headers.get("X-Linked-Etag"))
                if stream.status not in _REDIRECTS:
                    yield Response(stream.status, stream.headers, linked_etag, stream, target.netloc)
                    return
            url = joined(url, quote(stream.headers.get("Location", ""), safe=_IN_URL))
        raise DownloadError(f"{self._own.netloc}: more than {MAX_REDIRECTS} redirects", "Check HF_ENDPOINT.")

    def _allowed(self, url: str) -> SplitResult:
        """Where `url` points. Plain http only on the loopback, or where the endpoint itself was given as http."""
        target, own = _parsed(url), self._own
        if target is None or len(url) > MAX_URL_CHARS:
            raise DownloadError(f"{own.netloc} redirects to what is no address", "Check HF_ENDPOINT.")
        to_loopback = target.hostname in _LOOPBACK
        if to_loopback and own.hostname not in _LOOPBACK:
            raise DownloadError(f"{own.netloc} redirects to this very machine", "Check HF_ENDPOINT.")
        if target.scheme == "http" and not to_loopback and (own.scheme, own.hostname) != ("http", target.hostname):
            raise DownloadError(f"{own.netloc} redirects to {target.netloc} without encryption", "Check HF_ENDPOINT.")
        return target

    def _connection(self, target: SplitResult) -> http.client.HTTPConnection:
        host = target.hostname or ""
        if target.scheme == "http":
            return http.client.HTTPConnection(host, target.port, timeout=self._connect_timeout_s)
        proxy = _proxy(host)
        context = ssl.create_default_context()
        if proxy is None:
            return http.client.HTTPSConnection(host, target.port, timeout=self._connect_timeout_s, context=context)
        connection = http.client.HTTPSConnection(proxy.hostname or "", proxy.port, timeout=self._connect_timeout_s,
                                                 context=context)
        connection.set_tunnel(host, target.port or 443)
        return connection

    def _request(self, connection: http.client.HTTPConnection, target: SplitResult,
                 first_byte: int) -> http.client.HTTPResponse:
        headers = {"User-Agent": "edgert", "Accept-Encoding": "identity", "Connection": "close"}
        if first_byte:
            headers["Range"] = f"bytes={first_byte}-"
        if self._token and _origin(target) == _origin(self._own):
            headers["Authorization"] = f"Bearer {self._token}"
        path = target._replace(scheme="", netloc="", fragment="").geturl() or "/"
        try:
            connection.connect()
            connection.sock.settimeout(self._read_timeout_s)
            connection.request("GET", path, headers=headers)
            return connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            raise DownloadError(f"{target.netloc}: its certificate is not trusted: {error.verify_message}",
                                "Set SSL_CERT_FILE if your network has a certificate of its own.") from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise _lost(target.netloc, error) from error


def joined(url: str, reference: str) -> str:
    """What a server's `reference` means, seen from `url`; empty if it means nothing."""
    try:
        return urljoin(url, reference)
    except ValueError:
        return ""


def _parsed(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError if it is no number
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname else None


def _origin(parts: SplitResult) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _unquoted(etag: str | None) -> str | None:
    return etag.removeprefix("W/").strip('"') if etag else None


def _lost(host: str, error: Exception) -> ConnectionLost:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ConnectionLost(f"{host}: {printable(reason)}",
                          "Check the network; what has arrived is kept, pull again to go on.")


def _proxy(host: str) -> SplitResult | None:
    """The proxy that the environment names for https."""
    from urllib.request import getproxies, proxy_bypass

    address = getproxies().get("https")
    if not address or proxy_bypass(host):
        return None
    return _parsed(address if "://" in address else f"http://{address}")
