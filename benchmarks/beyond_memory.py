"""Models larger than memory: edgert beside llama.cpp, each in a control group of the budget's size. Needs root.

    python benchmarks/beyond_memory.py MODEL.gguf --ratios 1.5,2,2.8 [--context 1024] [--prompt 64] [--rounds 3]

For each ratio of model to budget, in turn and from a cold page cache: decode speed, time to first token, bytes read,
and how the disk's raw bandwidth of the same minutes was used. The peer is llama.cpp with mmap and without repacking,
which is its best beyond memory. Prints a table, and a JSON line per ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from control_group import drop_page_cache, is_possible, run_limited

_TIMEOUT_S = 600.0
_RAW_BYTES = 1 << 30


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One run in the limited process: greedy tokens after a synthetic prompt."""
    prompt = [(i * 7) % 5000 + 100 for i in range(args.prompt)]
    start = time.perf_counter()
    times: list[float] = []
    if args.child == "edgert":
        from edgert import Runtime, SamplingParams

        with Runtime.load(args.model, memory=args.memory, context=args.context) as runtime:
            loaded = time.perf_counter()
            generation = runtime.generate(prompt, max_tokens=args.tokens, sampling=SamplingParams(temperature=0))
            before = 0
            for _ in generation:
                times.append(time.perf_counter())
                before = before or (runtime.memory()["streamed_bytes"] or 0)
            facts = {**runtime.memory(), **runtime.plan(), "token_ids": generation.token_ids,
                     "bytes_per_token": ((runtime.memory()["streamed_bytes"] or 0) - before) / max(1, len(times) - 1)}
    else:
        from llamacpp import LlamaCpp

        peer = LlamaCpp(Path(args.model), context_length=args.context)
        loaded = time.perf_counter()
        logits, ids = peer.step(prompt), []
        for _ in range(args.tokens):
            times.append(time.perf_counter())
            ids.append(int(logits.argmax()))
            logits = peer.step(ids[-1:])
        facts = {"token_ids": ids}
    gaps = [b - a for a, b in pairwise(times)]
    return {"load_s": loaded - start, "ttft_s": times[0] - loaded, "tok_s": len(gaps) / sum(gaps),
            "p99_over_median": sorted(gaps)[int(len(gaps) * 0.99)] / statistics.median(gaps), **facts}


def raw_bandwidth(path: Path) -> float:
    """Bytes/s of direct reads into huge pages, the best of several thread counts."""
    from offload.arena import Arena
    from offload.direct_file import DirectFile
    from offload.readers import Read, Readers

    file, slot = DirectFile(path), 32 * 2**20
    arena = Arena(8 * slot)
    best = 0.0
    for n_threads in (1, 2, 4, 8):
        readers, reads = Readers(n_threads), list[Read]()
        start = time.perf_counter()
        n_bytes = min(_RAW_BYTES, file.size_bytes // slot * slot)
        for number, offset in enumerate(range(0, n_bytes, slot)):
            if number >= 8:
                reads[number - 8].wait(lambda: False)
            reads.append(Read(file, offset, slot, arena.base + number % 8 * slot))
            readers.submit(reads[-1])
        for read in reads:
            read.wait(lambda: False)
        best = max(best, n_bytes / (time.perf_counter() - start))
        readers.close()
    file.close()
    arena.close()
    return best


def measure(args: argparse.Namespace, ratio: float) -> dict[str, Any]:
    """Both runtimes in turn at one ratio."""
    budget = int(Path(args.model).stat().st_size / ratio)
    runs: dict[str, list[dict[str, Any]]] = {"edgert": [], "llama.cpp": []}
    raw = []
    for _ in range(args.rounds):
        raw.append(raw_bandwidth(Path(args.model)))
        for name, results in runs.items():
            drop_page_cache()
            command = [sys.executable, __file__, str(args.model), "--child", name, "--memory", str(budget), "--context",
                       str(args.context), "--prompt", str(args.prompt), "--tokens", str(args.tokens)]
            outcome = run_limited(command, budget, _TIMEOUT_S)
            if outcome.returncode:
                raise SystemExit(f"{name} at {budget} bytes ended with status {outcome.returncode}")
            results.append({**json.loads(outcome.stdout.splitlines()[-1]), "peak_bytes": outcome.peak_bytes,
                            "limit_hits": outcome.limit_hits, "oom_kills": outcome.oom_kills})
    ours, peer = (min(results, key=lambda r: abs(r["tok_s"] - statistics.median(x["tok_s"] for x in results)))
                  for results in runs.values())
    raw_s = statistics.median(raw)
    streamed = ours.get("streamed_bytes_per_pass", 0)
    return {"ratio": ratio, "budget_mib": budget >> 20, "tok_s": ours["tok_s"], "peer_tok_s": peer["tok_s"],
            "multiple": ours["tok_s"] / peer["tok_s"], "ttft_s": ours["ttft_s"], "peer_ttft_s": peer["ttft_s"],
            "bytes_per_token_over_streamed": ours["bytes_per_token"] / streamed if streamed else 0.0,
            "disk_utilisation": ours["tok_s"] * streamed / raw_s, "raw_gb_s": raw_s / 1e9,
            "pinned_mib": ours["pinned_bytes"] >> 20, "streamed_mib": streamed >> 20,
            "p99_over_median": ours["p99_over_median"], "limit_hits": ours["limit_hits"],
            "peak_mib": ours["peak_bytes"] >> 20, "peak_rss_mib": ours["peak_rss_bytes"] >> 20,
            "same_tokens": ours["token_ids"] == peer["token_ids"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ratios", default="1.5,2,2.8")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("edgert", "llama.cpp"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args)))
        return
    if not is_possible():
        raise SystemExit("this needs root and a writable memory control group")
    for ratio in (float(text) for text in args.ratios.split(",")):
        result = measure(args, ratio)
        print(f"r={ratio:<4} {result['budget_mib']:5} MiB  edgert {result['tok_s']:6.2f} tok/s  llama.cpp "
              f"{result['peer_tok_s']:5.2f}  x{result['multiple']:.1f}  disk {result['disk_utilisation']:.0%} of "
              f"{result['raw_gb_s']:.2f} GB/s  ttft {result['ttft_s']:.2f} / {result['peer_ttft_s']:.2f} s", flush=True)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
