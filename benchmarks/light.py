"""How light edgert is: start-up, the first token, and memory beside weights, beside llama.cpp's own process.

    python benchmarks/light.py MODEL.gguf [--rounds 7]

Whole processes, timed from outside, edgert and llama.cpp in turn; medians. The file is in the page cache. Prints a
line per figure and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_EDGERT = [sys.executable, "-c", "import sys; from apps.cli.main import main; sys.exit(main())"]
_CONTEXT, _N_TOKENS, _PROMPT = 2048, 32, "Why is the sky blue?"


def peer(path: Path) -> dict[str, Any]:
    """llama.cpp in this process: its peak RSS after a prompt and some tokens."""
    from apps.bench.llamacpp import LlamaCpp

    runner = LlamaCpp(path, context_length=_CONTEXT)
    runner.step(list(range(100, 140)))
    for i in range(_N_TOKENS):
        runner.step([100 + i])
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def seconds(command: list[str]) -> float:
    """How long a command takes, from its start to its end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_text_s(command: list[str]) -> float:
    """From the command's start until its first byte of answer arrives."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        took = time.perf_counter() - start
        process.stdout.read()
    return took


def last_json(command: list[str]) -> dict[str, Any]:
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(json.loads(lines[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        print(json.dumps(peer(args.model)))
        return
    answer = [*_EDGERT, "run", str(args.model), _PROMPT, "--context", str(_CONTEXT), "--max-tokens", str(_N_TOKENS),
              "--temp", "0"]
    first_text_s(answer)  # the page cache, the layouts' calibration
    helps, firsts, ours, theirs = [], [], list[dict[str, Any]](), list[int]()
    for _ in range(args.rounds):
        helps.append(seconds([*_EDGERT, "run", "--help"]))
        firsts.append(first_text_s(answer))
        ours.append(last_json([*answer, "--json"])["memory"])
        theirs.append(last_json([sys.executable, __file__, str(args.model), "--peer"])["peak_rss_bytes"])
    peak = statistics.median(one["peak_rss_bytes"] for one in ours)
    beside = statistics.median(one["peak_rss_bytes"] - one["pinned_bytes"] - one["kv_resident_bytes"]
                               - one["compute_bytes"] for one in ours)
    figures = {"help_s": statistics.median(helps), "first_token_s": statistics.median(firsts),
               "peak_rss_mib": peak / 2**20, "llama_cpp_peak_rss_mib": statistics.median(theirs) / 2**20,
               "beside_weights_kv_compute_mib": beside / 2**20}
    for name, figure in figures.items():
        print(f"{name:32} {figure:8.3f}")
    print(json.dumps({"model": args.model.name, **figures}))


if __name__ == "__main__":
    main()
