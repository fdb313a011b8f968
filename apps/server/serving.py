"""Runs a server on a socket until it is told to stop: the only part that knows uvicorn, signals and API keys' files."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from apps.server.connections import BoundedProtocol
from apps.server.settings import is_loopback
from edgert.errors import UsageError

_CLOSE_S = 3  # streamed answers get this long to end when the server stops
_BACKLOG = 128
_MAX_KEY_BYTES = 4096


class Server(uvicorn.Server):
    """Stops on Ctrl-C and SIGTERM, which are its ordinary end; `on_listening` is called once it answers."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # beside a window, which is closed instead
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(app: ASGIApp, listening: socket.socket, on_listening: Callable[[], None]) -> Server:
    """A server over `app`, ready for `.run(sockets=[listening])`."""
    config = uvicorn.Config(app, lifespan="on", log_config=None, access_log=False, server_header=False,
                            timeout_graceful_shutdown=_CLOSE_S, h11_max_incomplete_event_size=64 * 2**10,
                            http=BoundedProtocol, ws="none")
    return Server(config, on_listening)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any. Raises UsageError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}",
                         "Another server may be running there; choose another --port.") from error


def url_of(host: str, listening: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    port = listening.getsockname()[1]
    name = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def api_key(host: str, config: Path, insecure: bool) -> tuple[str | None, str]:
    """The key that clients must send, and what to tell the user of it; no key where only this machine can ask.

    EDGERT_API_KEY, or one that is made once and kept in the user's configuration. Raises UsageError.
    """
    given = os.environ.get("EDGERT_API_KEY", "")
    if given:
        return given, "clients must send the key of EDGERT_API_KEY"
    if is_loopback(host):
        return None, ""
    if insecure:
        return None, "anybody who reaches this address may use the server (--insecure)"
    path = config / "api-key"
    try:
        if path.exists():
            key = path.read_bytes()[:_MAX_KEY_BYTES].decode().strip()
            if key:
                return key, f"clients must send the API key that lies in {path}"
        config.mkdir(parents=True, exist_ok=True)
        key = secrets.token_urlsafe(24)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(f"{key}\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", "Set EDGERT_API_KEY instead.") from error
    return key, f"API key (shown once, kept in {path}): {key}"
