"""Many clients at once, a third of them leaving in the middle: does anything leak, is the order fair, is /health quick?

    python benchmarks/server_load.py MODEL.gguf --clients 50 --seconds 300
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

_START = "import sys; from apps.cli.main import main; sys.exit(main(sys.argv[1:]))"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 16, "temperature": 0}


class Load:
    """What the clients saw."""

    def __init__(self, port: int, right: str) -> None:
        self.port, self.right = port, right
        self.counts: Counter[str] = Counter()
        self.health_ms: list[float] = []
        self.served: Counter[int] = Counter()
        self.stopped = threading.Event()

    def client(self, number: int) -> None:
        leaves = number % 3 == 0
        while not self.stopped.is_set():
            try:
                self._ask(number, leaves)
            except OSError as error:
                self.counts[f"failed: {type(error).__name__}"] += 1

    def _ask(self, number: int, leaves: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", "/v1/chat/completions", json.dumps({**BODY, "stream": leaves, "user": str(number)}))
        reply = connection.getresponse()
        if reply.status == 429:
            self.counts["429"] += 1
            reply.read()
            self.stopped.wait(float(reply.headers["retry-after"]))
        elif leaves:
            for n_chunks, line in enumerate(filter(lambda line: line.startswith(b"data: "), reply)):
                if n_chunks == 5 or line == b"data: [DONE]\n":  # after the role, some words
                    break
            self.counts["left"] += 1
        else:
            text = json.loads(reply.read())["choices"][0]["message"]["content"]
            self.counts["right" if text == self.right else "WRONG"] += 1
            self.served[number] += 1
        connection.close()

    def health(self) -> None:
        while not self.stopped.wait(0.2):
            began = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            connection.request("GET", "/health")
            connection.getresponse().read()
            connection.close()
            self.health_ms.append((time.perf_counter() - began) * 1e3)


def held(pid: int) -> dict[str, float]:
    tree = [psutil.Process(pid), *psutil.Process(pid).children()]
    return {"rss_mib": sum(one.memory_info().rss for one in tree) / 2**20,
            "fds": sum(one.num_fds() for one in tree), "threads": sum(one.num_threads() for one in tree)}


def answer(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(BODY))
    text: str = json.loads(connection.getresponse().read())["choices"][0]["message"]["content"]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args()
    process = subprocess.Popen([sys.executable, "-c", _START, "serve", str(args.model), "--port", "0"],
                               stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stderr is not None
    port = int((re.search(r"serves on http://[^:]+:(\d+)", process.stderr.readline()) or sys.exit("no server"))[1])
    try:
        right = answer(port)
        for _ in range(3):
            answer(port)
        before, load = held(process.pid), Load(port, right)
        threads = [threading.Thread(target=load.client, args=(number,)) for number in range(args.clients)]
        threads.append(threading.Thread(target=load.health))
        for thread in threads:
            thread.start()
        time.sleep(args.seconds)
        load.stopped.set()
        for thread in threads:
            thread.join()
        answer(port)
        time.sleep(2)
        print("before", before, "\nafter ", held(process.pid))
        print("answers", dict(load.counts))
        stayed = [load.served[number] for number in range(args.clients) if number % 3]
        print(f"fairness: each client that stayed was answered {min(stayed)} to {max(stayed)} times")
        slow = sum(one > 50 for one in load.health_ms)
        print(f"/health: median {statistics.median(load.health_ms):.1f} ms, worst {max(load.health_ms):.1f} ms; "
              f"{slow} of {len(load.health_ms)} above 50 ms")
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
