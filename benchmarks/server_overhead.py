"""What the server adds: tokens per second and time to the first token over HTTP, beside the same Runtime without it;
and how soon its page can be used.

    python benchmarks/server_overhead.py MODEL.gguf

A (Runtime in this process) and B (`edgert serve`, streamed, from this process) in turn, medians of each. The server's
own memory is what its two processes hold beyond A's. The page is opened in chromium, with nothing cached.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from apps.bench.speed import steady_rate
from edgert import Runtime, SamplingParams

MESSAGES: list[Any] = [{"role": "user", "content": "Write a long story about a lighthouse keeper and the sea."}]
_START = "import sys; from apps.cli.main import main; sys.exit(main(sys.argv[1:]))"


def direct(model: Path, n_tokens: int, n_runs: int) -> dict[str, Any]:
    """In a process of its own, so that both sides begin alike."""
    code = ("import sys, json, pathlib; from benchmarks.server_overhead import measure_runtime; "
            "print(json.dumps(measure_runtime(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))")
    done = subprocess.run([sys.executable, "-c", code, str(model.absolute()), str(n_tokens), str(n_runs)], check=True,
                          stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def measure_runtime(model: Path, n_tokens: int, n_runs: int) -> dict[str, Any]:
    rates, firsts = [], []
    with Runtime.load(model, context=4096) as runtime:
        for run in range(n_runs + 1):  # the first one warms up
            runtime.chat([{"role": "user", "content": f"Forget {run}."}], max_tokens=1).result()
            began = time.perf_counter()
            times = [time.perf_counter() for _ in runtime.chat(
                MESSAGES, max_tokens=n_tokens, sampling=SamplingParams(temperature=0))]
            if run:
                firsts.append(times[0] - began)
                rates.append(steady_rate(times))
        return {"tok_s": statistics.median(rates), "first_s": statistics.median(firsts),
                "rss": psutil.Process().memory_info().rss}


def measure_server(model: Path, n_tokens: int, n_runs: int) -> dict[str, Any]:
    process = subprocess.Popen([sys.executable, "-c", _START, "serve", str(model), "--port", "0", "--context", "4096"],
                               stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stderr is not None
    try:
        port = int((re.search(r"serves on http://[^:]+:(\d+)", process.stderr.readline()) or sys.exit("no server"))[1])
        rates, firsts = [], []
        for run in range(n_runs + 1):
            ask(port, {"messages": [{"role": "user", "content": f"Forget {run}."}], "max_tokens": 1, "stream": True})
            began = time.perf_counter()
            n, first_s, last_s = ask(port, {"messages": MESSAGES, "max_tokens": n_tokens, "temperature": 0,
                                            "stream": True})
            if run:
                firsts.append(first_s - began)
                rates.append((n - 1) / (last_s - first_s))
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        held = sum(one.memory_info().rss for one in tree)
        return {"tok_s": statistics.median(rates), "first_s": statistics.median(firsts), "rss": held,
                "server_rss": tree[0].memory_info().rss, "page_s": page_s(f"http://127.0.0.1:{port}/", n_runs)}
    finally:
        process.terminate()
        process.wait()


def ask(port: int, body: dict[str, Any]) -> tuple[int, float, float]:
    """Tokens of a streamed answer, and when its first and last text came. The first token comes alone."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    reply = connection.getresponse()
    times, n_tokens = [], 0
    for line in reply:
        if b'"content":"' in line and b'"content":""' not in line:
            times.append(time.perf_counter())
        elif b'"timings":' in line:
            n_tokens = json.loads(line.removeprefix(b"data: "))["timings"]["predicted_n"]
    connection.close()
    return n_tokens, times[0], times[-1]


def page_s(url: str, n_runs: int) -> float:
    """Seconds from the address to a page that can be used; the first one, which starts the browser's parts, is left
    out."""
    from playwright.sync_api import sync_playwright

    times = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(n_runs + 1):
            page = browser.new_context().new_page()
            began = time.perf_counter()
            page.goto(url, wait_until="commit")
            page.wait_for_selector("html[data-ready]")
            times.append(time.perf_counter() - began)
        browser.close()
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pairs = [(direct(args.model, args.tokens, args.runs), measure_server(args.model, args.tokens, args.runs))
             for _ in range(args.rounds)]
    rate_a, rate_b = (statistics.median(pair[side]["tok_s"] for pair in pairs) for side in (0, 1))
    first_a, first_b = (statistics.median(pair[side]["first_s"] for pair in pairs) for side in (0, 1))
    print(f"decode      {rate_a:7.1f} tok/s alone, {rate_b:7.1f} tok/s served: {rate_b / rate_a:.3f}x (goal 0.97x)")
    print(f"first token {first_a * 1e3:7.1f} ms alone,    {first_b * 1e3:7.1f} ms served: "
          f"+{(first_b - first_a) * 1e3:.1f} ms (goal under 20)")
    page = statistics.median(pair[1]["page_s"] for pair in pairs)
    print(f"page        usable {page * 1e3:.0f} ms after it was asked for (goal under 1000)")
    more = statistics.median(pair[1]["rss"] - pair[0]["rss"] for pair in pairs)
    print(f"memory      +{more / 2**20:.1f} MiB beyond a Runtime of the same model (goal under 60); the server's own "
          f"process {pairs[-1][1]['server_rss'] / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
