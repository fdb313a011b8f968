"""A server that speaks the hub's HTTP interface on the loopback, and misbehaves as it is told.

`hub.faults` is a queue: each request for a file takes one and does that instead of serving properly. What was asked
for and how many bytes were served is recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Callable[["Handler", bytes, int], None]  # the handler, the whole file, the first byte that was asked for


@dataclass
class Request:
    path: str
    headers: dict[str, str]


@dataclass
class FakeHub:
    """`repos` maps user/repo to its files. With `cdn`, files are redirected to that second server."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    cdn: FakeHub | None = None
    token: str | None = None  # if set, whoever does not send it gets 401
    listing: object = None  # sent as it is, in place of the true list of files
    listing_status: deque[tuple[int, dict[str, str]]] = field(default_factory=deque)
    sha256: dict[str, str] = field(default_factory=dict)  # lies, by file
    size_bytes: dict[str, int] = field(default_factory=dict)  # lies, by file
    etag: str | None = None  # in place of the content's hash
    page_size: int = 1000
    faults: deque[Fault] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)
    served_bytes: int = 0
    ranges: bool = True
    url: str = ""

    @property
    def file_requests(self) -> list[Request]:
        return [request for request in self.requests if "/resolve/" in request.path]

    def entry(self, path: str, content: bytes) -> dict[str, object]:
        size = self.size_bytes.get(path, len(content))
        sha256 = self.sha256.get(path, hashlib.sha256(content).hexdigest())
        return {"type": "file", "oid": "0" * 40, "size": size, "path": path,
                "lfs": {"oid": sha256, "size": size, "pointerSize": 134}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self.close_connection = True
        self.hub.requests.append(Request(self.path, {key.lower(): value for key, value in self.headers.items()}))
        if self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401)
        url = urlsplit(self.path)
        with contextlib.suppress(ConnectionError):
            if url.path.startswith("/api/models/"):
                self._list(url.path, int(parse_qs(url.query).get("page", ["0"])[0]))
            else:
                self._file(unquote(url.path))

    def _list(self, path: str, page: int) -> None:
        if self.hub.listing_status:
            status, headers = self.hub.listing_status.popleft()
            return self.answer(status, headers)
        repo = path.removeprefix("/api/models/").partition("/tree/")[0]
        if repo not in self.hub.repos:
            return self.answer(404)
        entries = [self.hub.entry(*item) for item in self.hub.repos[repo].items()]
        first, after = page * self.hub.page_size, (page + 1) * self.hub.page_size
        body = json.dumps(entries[first:after] if self.hub.listing is None else self.hub.listing).encode()
        following = f'<{self.hub.url}{path}?page={page + 1}>; rel="next"'
        self.answer(200, {"Link": following} if after < len(entries) else {}, body)

    def _file(self, path: str) -> None:
        repo, _, name = path.removeprefix("/").partition("/resolve/main/")
        content = self.hub.repos.get(repo, {}).get(name)
        if content is None:
            return self.answer(404)
        if self.hub.cdn is not None:
            self.hub.cdn.repos = self.hub.repos
            return self.answer(302, {"Location": f"{self.hub.cdn.url}{self.path}", "X-Linked-Size": str(len(content)),
                                     "X-Linked-Etag": f'"{self.etag(content)}"'})
        start = int((self.headers.get("Range") or "bytes=0-")[len("bytes="):].rstrip("-"))
        if self.hub.faults:
            return self.hub.faults.popleft()(self, content, start)
        self.serve(content, start)

    def etag(self, content: bytes) -> str:
        return self.hub.etag or hashlib.sha256(content).hexdigest()

    def serve(self, content: bytes, start: int) -> None:
        """As it should be."""
        if start and not self.hub.ranges:
            start = 0
        if start >= len(content) > 0:
            return self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
        self.begin(content, start, len(content) - start)
        self.send(content[start:])

    def begin(self, content: bytes, start: int, length: int | None) -> None:
        """Status and headers only."""
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{self.etag(content)}"')
        self.end_headers()

    def send(self, piece: bytes) -> None:
        self.wfile.write(piece)
        self.wfile.flush()
        self.hub.served_bytes += len(piece)

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        pass


def status(code: int, headers: dict[str, str] | None = None) -> Fault:
    """Answer with an error."""
    return lambda handler, content, start: handler.answer(code, headers)


def drop_after(n_bytes: int) -> Fault:
    """Serve so many bytes, then drop the connection."""

    def fault(handler: Handler, content: bytes, start: int) -> None:
        handler.begin(content, start, len(content) - start)
        handler.send(content[start:start + n_bytes])
        handler.drop()

    return fault


def announce(extra_bytes: int) -> Fault:
    """Serve the rest of the file under a Content-Length that lies by so many bytes."""

    def fault(handler: Handler, content: bytes, start: int) -> None:
        handler.begin(content, start, len(content) - start + extra_bytes)
        handler.send(content[start:])

    return fault


def endless(handler: Handler, content: bytes, start: int) -> None:
    """No Content-Length, and more bytes than the file has."""
    handler.begin(content, start, None)
    handler.send(content[start:] + b"x" * 100_000)


def ignore_the_range_start(handler: Handler, content: bytes, start: int) -> None:
    """A 206 of the right length that begins elsewhere than was asked."""
    rest = len(content) - start
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 0-{rest - 1}/{len(content)}")
    handler.send_header("Content-Length", str(rest))
    handler.send_header("ETag", f'"{handler.etag(content)}"')
    handler.end_headers()
    handler.send(content[:rest])


def gate(n_bytes: int, reached: threading.Event, go_on: threading.Event) -> Fault:
    """Serve so many bytes, tell that they are out, and wait before the rest (or give up after 20 s)."""

    def fault(handler: Handler, content: bytes, start: int) -> None:
        handler.begin(content, start, len(content) - start)
        handler.send(content[start:start + n_bytes])
        reached.set()
        go_on.wait(20)
        handler.send(content[start + n_bytes:])

    return fault


@contextlib.contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
