"""A relay that holds every byte back for some time, in both directions: latency where the kernel has no netem.

    python benchmarks/delay_relay.py LISTEN_PORT HOST:PORT --ms 5
"""

from __future__ import annotations

import argparse
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_CHUNK_BYTES = 2**16
_MAX_CHUNKS = 4096  # on their way; more is held back by the sender's own socket


def pump(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    """Pass bytes on, each `delay_s` after it came, until the source ends; then end the target."""
    on_their_way: queue.Queue[tuple[float, bytes]] = queue.Queue(_MAX_CHUNKS)
    reader = threading.Thread(target=_read, args=(source, on_their_way, delay_s), daemon=True)
    reader.start()
    with suppress(OSError):
        while True:
            due_s, data = on_their_way.get()
            left_s = due_s - time.perf_counter()
            if left_s > 0.0002:
                time.sleep(left_s - 0.0001)
            while time.perf_counter() < due_s:
                pass  # a sleep ends too late by more than what is to be measured
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(data)
    source.close()


def _read(source: socket.socket, on_their_way: queue.Queue[tuple[float, bytes]], delay_s: float) -> None:
    data = b"x"
    while data:
        try:
            data = source.recv(_CHUNK_BYTES)
        except OSError:
            data = b""
        on_their_way.put((time.perf_counter() + delay_s, data))


def join(a: socket.socket, b: socket.socket, delay_s: float) -> None:
    """Let what comes from `a` go to `b` and back, in two threads."""
    for source, target in ((a, b), (b, a)):
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=pump, args=(source, target, delay_s), daemon=True).start()


@contextmanager
def relay(host: str, port: int, delay_s: float, listen_port: int = 0) -> Iterator[int]:
    """A port whose connections reach host:port with so much delay each way, until the block ends."""
    server = socket.create_server(("127.0.0.1", listen_port))

    def serve() -> None:
        with suppress(OSError):
            while True:
                a = server.accept()[0]
                try:
                    join(a, socket.create_connection((host, port)), delay_s)
                except OSError:
                    a.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("listen_port", type=int)
    parser.add_argument("target")
    parser.add_argument("--ms", type=float, required=True)
    args = parser.parse_args()
    host, _, port = args.target.rpartition(":")
    with relay(host, int(port), args.ms / 1000, args.listen_port) as bound:
        print(bound, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
