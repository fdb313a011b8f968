"""What the server adds: tokens per second and time to the first token over HTTP, beside the same Runtime without it.

    python benchmarks/server_overhead.py MODEL.gguf

A (Runtime in this process) and B (`edgert serve`, streamed, from this process) in turn, medians of each. The server's
own memory is what its two processes hold beyond A's.
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
    code = ("import sys, json, pathlib; sys.path.insert(0, 'benchmarks'); import server_overhead as one; "
            "print(json.dumps(one.measure_runtime(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))")
    done = subprocess.run([sys.executable, "-c", code, str(model), str(n_tokens), str(n_runs)], check=True,
                          capture_output=True, text=True)
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
            times = ask(port, {"messages": MESSAGES, "max_tokens": n_tokens, "temperature": 0, "stream": True})
            if run:
                firsts.append(times[0] - began)
                rates.append(steady_rate(times))
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        return {"tok_s": statistics.median(rates), "first_s": statistics.median(firsts),
                "rss": sum(one.memory_info().rss for one in tree), "server_rss": tree[0].memory_info().rss}
    finally:
        process.terminate()
        process.wait()


def ask(port: int, body: dict[str, Any]) -> list[float]:
    """When each piece of a streamed answer came."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    reply = connection.getresponse()
    times = [time.perf_counter() for line in reply if b'"content":"' in line and b'"content":""' not in line]
    connection.close()
    return times


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
    more = statistics.median(pair[1]["rss"] - pair[0]["rss"] for pair in pairs)
    print(f"memory      +{more / 2**20:.1f} MiB beyond a Runtime of the same model (goal under 60); the server's own "
          f"process {pairs[-1][1]['server_rss'] / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
