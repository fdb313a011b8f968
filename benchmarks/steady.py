"""Whether streaming is steady: latency, a disk of 50 MB/s, Ctrl-C in the middle of a read, 200 loads. Needs root.

    python benchmarks/steady.py MODEL.gguf [--memory 540M] [--tokens 200] [--loads 200] [--read-mb-s 50]

Without --memory the budget is half the model. Prints a JSON line per check:
  tokens    median and p99 of the time between tokens, and their quotient
  throttled speed with the disk held to --read-mb-s, over what the bytes of a token allow
  ctrl-c    milliseconds from the signal to the end of the process, during a throttled read; several times
  loads     what --loads loads and unloads, each with an answer, have left: bytes, descriptors and threads
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from apps.bench.control_group import is_possible, slow_disk
from apps.bench.speed import percentile
from edgert import Runtime, SamplingParams

_PROMPT = [(i * 7) % 5000 + 100 for i in range(64)]
_GREEDY = SamplingParams(temperature=0)
_TIMEOUT_S = 900.0
_N_INTERRUPTS = 5


def gaps_of(args: argparse.Namespace, n_tokens: int) -> tuple[list[float], int]:
    """Seconds between tokens, and the bytes that each of them streams."""
    with Runtime.load(args.model, memory=args.memory, context=1024, speculate="off") as runtime:
        generation = runtime.generate(_PROMPT, max_tokens=n_tokens, sampling=_GREEDY)
        times = [time.perf_counter() for _ in generation]
        return [b - a for a, b in pairwise(times)], int(runtime.plan().get("streamed_bytes_per_pass", 0))


def tokens(args: argparse.Namespace) -> dict[str, Any]:
    gaps, _ = gaps_of(args, args.tokens)
    median, p99 = statistics.median(gaps), percentile(gaps, 99)
    return {"n_tokens": len(gaps), "median_ms": median * 1000, "p99_ms": p99 * 1000, "p99_over_median": p99 / median,
            "worst_ms": max(gaps) * 1000}


def throttled(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own, which the group holds."""
    command = [sys.executable, __file__, str(args.model), "--memory", str(args.memory), "--child"]
    with slow_disk(args.model, args.read_mb_s * 10**6) as group:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=_TIMEOUT_S, check=True,
                              preexec_fn=lambda: group.write_text(str(os.getpid())) and None)
    gaps, streamed_bytes = json.loads(done.stdout)
    allowed_s = streamed_bytes / (args.read_mb_s * 1e6)
    return {"read_mb_s": args.read_mb_s, "seconds_a_token": statistics.median(gaps), "allowed_s": allowed_s,
            "speed_over_allowed": allowed_s / statistics.median(gaps)}


def interrupted(args: argparse.Namespace) -> dict[str, Any]:
    """The command as a user has it, loaded at full speed and throttled once it computes."""
    ends_ms, statuses = [], []
    for number in range(_N_INTERRUPTS):
        command = [sys.executable, "-c", "import sys; from apps.cli.main import main; sys.exit(main())", "run",
                   str(args.model), "--memory", str(args.memory), "--raw", "--context", "1024", "Once upon a time"]
        with slow_disk(args.model, args.read_mb_s * 10**6) as group, \
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            group.write_text(str(process.pid))
            time.sleep(1.0 + 0.07 * number)  # at another place in a token each time
            start = time.perf_counter()
            process.send_signal(signal.SIGINT)
            statuses.append(process.wait(_TIMEOUT_S))
            ends_ms.append((time.perf_counter() - start) * 1000)
    return {"worst_ms": max(ends_ms), "ms": [round(end_ms) for end_ms in ends_ms], "statuses": statuses}


def loads(args: argparse.Namespace) -> dict[str, Any]:
    def taken() -> tuple[int, int, int]:
        gc.collect()
        process = psutil.Process()
        return process.memory_info().rss, process.num_fds(), process.num_threads()

    def use() -> None:
        with Runtime.load(args.model, memory=args.memory, context=1024) as runtime:
            runtime.generate(_PROMPT, max_tokens=2, sampling=_GREEDY).result()

    for _ in range(5):
        use()
    before, halfway = taken(), (0, 0, 0)
    for number in range(args.loads):
        use()
        if number == args.loads // 2:
            halfway = taken()
    after = taken()
    return {"loads": args.loads, "rss_growth_bytes": after[0] - before[0], "of_them_late_bytes": after[0] - halfway[0],
            "descriptors": after[1] - before[1], "threads": after[2] - before[2]}


CHECKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tokens": tokens, "throttled": throttled, "ctrl-c": interrupted, "loads": loads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", help="the budget (default: half the model)")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--loads", type=int, default=200)
    parser.add_argument("--read-mb-s", type=int, default=50)
    parser.add_argument("--checks", default=",".join(CHECKS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.memory = args.memory or args.model.stat().st_size // 2
    if args.child:
        print(json.dumps(gaps_of(args, 4)))
        return
    if not is_possible():
        raise SystemExit("this needs root and writable control groups")
    for name in args.checks.split(","):
        print(json.dumps({"check": name, **CHECKS[name](args)}), flush=True)


if __name__ == "__main__":
    main()
