"""Clients that connect and say nothing, or too slowly: their connections end, and the others are answered."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from served import DEADLINE_S
from starlette.responses import PlainTextResponse

from apps.server.connections import BoundedProtocol
from apps.server.serving import listen, run

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Impatient(BoundedProtocol):
    head_s = 0.05


class Few(BoundedProtocol):
    max_connections, head_s = 3, 600


@contextmanager
def serving(protocol: type[BoundedProtocol]) -> Iterator[int]:
    """The port of a server that keeps to the bounds of `protocol`."""
    ready = threading.Event()
    with listen("127.0.0.1", 0) as listening:
        server = run(PlainTextResponse("hello"), listening, ready.set)
        server.config.http, server.config.lifespan = protocol, "off"
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
        thread.start()
        try:
            assert ready.wait(DEADLINE_S)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(DEADLINE_S)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)


def is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost:"])
def test_whoever_does_not_come_to_a_request_is_let_go(said: bytes) -> None:
    with serving(Impatient) as port, connect(port) as sock:
        sock.sendall(said)
        assert is_closed(sock)


def test_a_second_request_must_come_to_an_end_as_well() -> None:
    with serving(Impatient) as port, connect(port) as sock:
        sock.sendall(GET)
        reply = b""
        while not reply.endswith(b"hello"):
            reply += sock.recv(4096)
        sock.sendall(b"GET /")
        assert is_closed(sock)


def test_too_many_connections_at_once_are_refused() -> None:
    with serving(Few) as port, ExitStack() as stack:
        socks = [stack.enter_context(connect(port)) for _ in range(3)]
        assert is_closed(stack.enter_context(connect(port)))
        socks[0].close()
        while not is_answered(port):  # once the server has seen that
            pass


def is_answered(port: int) -> bool:
    with connect(port) as sock:
        try:
            sock.sendall(GET)
            return sock.recv(4) == b"HTTP"
        except ConnectionError:
            return False
