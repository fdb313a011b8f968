"""A real `edgert serve` in a process of its own, for tests: started on a port of its choice, ended with the test."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, Self

DEADLINE_S = 120.0
# One thread: two would wait for each other at every operation whenever another program runs.
QUICK = ("--threads", "1", "--layout", "plain")
_START = "import sys; from apps.cli.main import main; sys.exit(main(sys.argv[1:]))"


class Served:
    """The server; `url` once it listens. `home` is its EDGERT_HOME."""

    def __init__(self, home: Path, *words: object, port: int = 0, **environment: str) -> None:
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, "serve", *map(str, words), *QUICK, "--port", str(port)],
            stderr=subprocess.PIPE, env={**os.environ, "EDGERT_HOME": str(home), **environment})
        self.said = ""
        self.url = self._wait_for(r"serves on (\S+)")
        self.port = int(self.url.rpartition(":")[2])

    def _wait_for(self, pattern: str) -> str:
        assert self.process.stderr is not None
        deadline = time.monotonic() + DEADLINE_S
        while (found := re.search(pattern, self.said)) is None:
            assert time.monotonic() < deadline, self.said
            if select.select([self.process.stderr], [], [], 1)[0]:
                part = os.read(self.process.stderr.fileno(), 4096)
                assert part, f"it ended: {self.said}"
                self.said += part.decode()
        return found[1]

    def open(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPResponse:
        """The reply, its body not yet read. `body` is bytes, or becomes JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        return connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON (or text) of the reply."""
        reply = self.open(method, path, body, headers)
        data = reply.read()
        is_json = "json" in reply.headers.get("content-type", "") and "ndjson" not in reply.headers["content-type"]
        return reply.status, json.loads(data) if is_json else data.decode()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.ask("GET", "/edgert/state")[1]
        return state

    def until(self, holds: Any, what: str) -> dict[str, Any]:
        """The first state for which `holds` is true."""
        deadline = time.monotonic() + DEADLINE_S
        while not holds(state := self.state()):
            assert time.monotonic() < deadline, f"{what}: {state}"
            time.sleep(0.02)
        return state

    def kill(self) -> None:
        """As a power cut: no chance to tidy up."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        if self.process.stderr is not None:
            self.process.stderr.close()


def events(reply: HTTPResponse) -> Any:
    """The data of a reply's server-sent events, one by one, as JSON where they are; comments are passed over."""
    for line in reply:
        text = line.decode().rstrip("\n")
        if text.startswith("data: "):
            data = text.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
