"""Models larger than memory: edgert beside llama.cpp, each in a control group of the budget's size. Needs root.

    python benchmarks/beyond_memory.py decode MODEL.gguf --ratios 1.5,2,2.8     speed, bytes and disk use of one token
    python benchmarks/beyond_memory.py prefill MODEL.gguf --ratios 2,4 --prompts 64,512,2048
    python benchmarks/beyond_memory.py budgets MODEL.gguf --steps 8             from the smallest budget that works up
    python benchmarks/beyond_memory.py decode MOE.gguf --residency 61,25   budgets for so many percent of its experts
    python benchmarks/beyond_memory.py tpi 7B.gguf      TPI-LLM's own case (arXiv 2410.00531): a 7B in 1.7 GB, in 600 MB

For each ratio of model to budget, in turn and from a cold page cache, with the disk's raw bandwidth of the same
minutes. The peer is llama.cpp with mmap and without repacking, which is its best beyond memory; the limits are what
the disk could do (streamed bytes over raw bandwidth) and what the processor does with everything in memory. Prints a
table, what is asked for beside each figure, and a JSON line per row. For a model with experts, the limit is what its
misses were: time per token over the larger of the processor's and missed bytes over raw bandwidth. Beside its share
of the speed in memory stands SmallThinker's own (arXiv 2507.20984, table 4: 67 % with 61 % of the 21B's experts, 38 %
with 25 % of the 4B's).
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

from apps.bench.control_group import drop_page_cache, is_possible, run_limited
from apps.bench.speed import percentile, steady_rate

_TIMEOUT_S = 900.0
_RAW_S = 0.35  # of each number of threads; about 1 GB
_UNLIMITED = 1 << 40
_MAX_REFUSALS = 6
_LEAST_BYTES = 128 * 2**20  # less ends the interpreter before it can refuse
_PAGES_BYTES = 2**20  # what one start of a process takes more than another
# What is asked for: multiples of llama.cpp's speed by architecture and ratio, and bounds on the others.
_FLOORS = {"qwen2": {1.5: 4.0, 2.0: 3.3, 2.8: 3.2}, "llama": {1.0: 7.0, 2.0: 2.4, 4.0: 1.6, 8.0: 1.5},
           "smallthinker": {2.0: 2.0, 4.0: 3.0}, "qwen3moe": {2.0: 2.0, 4.0: 3.0}}
_LEAST_OF_DISK, _MOST_OVER_LIMIT, _MOST_P99 = 0.90, {"decode": 1.15, "prefill": 1.10}, 1.5
# SmallThinker's share of the speed in memory, by percent of experts in memory (arXiv 2507.20984, table 4).
_PUBLISHED_SHARE = {61.0: 0.67, 25.0: 0.38}
# TPI-LLM, table 2: Llama 2 7B on eight devices of 1.7 GB each, seconds for a token.
_TPI_BUDGETS, _TPI_TOKEN_S = (1_700_000_000, 600_000_000), 2.6
_TPI_CONTEXT = 512  # 256 MiB of keys and values; a longer one would be looked at in part, in 600 MB
Row = dict[str, Any]


def child(args: argparse.Namespace) -> Row:
    """One run in the limited process: greedy tokens after a synthetic prompt."""
    prompt = [(i * 7) % 5000 + 100 for i in range(args.prompt)]
    start = time.perf_counter()
    if args.child == "llama.cpp":
        from apps.bench.llamacpp import LlamaCpp

        peer = LlamaCpp(Path(args.model), context_length=args.context)
        loaded, times, ids = time.perf_counter(), list[float](), list[int]()
        logits = peer.step(prompt)
        for _ in range(args.tokens):
            times.append(time.perf_counter())
            ids.append(int(logits.argmax()))
            logits = peer.step(ids[-1:]) if len(ids) < args.tokens else logits
        facts: Row = {"token_ids": ids}
    else:
        from edgert import Runtime, SamplingParams

        budget = None if args.child == "resident" else args.memory
        with Runtime.load(args.model, memory=budget, context=args.context, layout="plain",
                          speculate="off") as runtime:
            loaded, times = time.perf_counter(), []
            before = runtime.memory()["streamed_bytes"] or 0
            generation = runtime.generate(prompt, max_tokens=args.tokens, sampling=SamplingParams(temperature=0))
            after_prompt, experts = 0, Row()
            for _ in generation:
                times.append(time.perf_counter())
                after_prompt = after_prompt or (runtime.memory()["streamed_bytes"] or 0)
                experts = experts or runtime.plan()
            after = runtime.memory()["streamed_bytes"] or 0
            facts = {**runtime.memory(), **runtime.plan(), "token_ids": generation.token_ids,
                     "prompt_bytes": after_prompt - before,
                     "bytes_per_token": (after - after_prompt) / max(1, len(times) - 1),
                     **_experts_in_decode(experts, runtime.plan(), max(1, len(times) - 1))}
    gaps = [b - a for a, b in pairwise(times)] or [float("nan")]
    return {"load_s": loaded - start, "ttft_s": times[0] - loaded,
            "tok_s": steady_rate(times) if len(times) > 1 else float("nan"),
            "p99_over_median": percentile(gaps, 99) / statistics.median(gaps), **facts}


def _experts_in_decode(before: Row, after: Row, n_tokens: int) -> Row:
    """What decoding `n_tokens` changed in the experts' account; nothing for a model without a pool."""
    if "expert_slots" not in after:
        return {}
    hits, misses, read, waited, guesses, wrong = (
        after[f"expert_{what}"] - before[f"expert_{what}"]
        for what in ("hits", "misses", "read_bytes", "waited_s", "guesses", "wrong_guesses"))
    missed = read - wrong * after["expert_slot_bytes"]  # what was read in vain is no miss
    return {"expert_hit_rate": hits / max(1, hits + misses), "missed_bytes_per_token": missed / n_tokens,
            "waited_s_per_token": waited / n_tokens, "guesses_per_token": guesses / n_tokens,
            "wrong_guesses": wrong / max(1, guesses)}


def limited(args: argparse.Namespace, name: str, budget: int, prompt: int, tokens: int) -> Row:
    """A child in a control group of the budget's size, from a cold page cache; a resident one from a warm cache."""
    drop_page_cache()
    if name == "resident":
        with args.model.open("rb") as file:
            while file.read(1 << 24):
                pass
    outcome = run_limited(_command(args, name, budget, prompt, tokens), budget, _TIMEOUT_S)
    if outcome.returncode:
        raise SystemExit(f"{name} at {budget} bytes ended with status {outcome.returncode}")
    return {**json.loads(outcome.stdout.splitlines()[-1]), "peak_bytes": outcome.peak_bytes,
            "limit_hits": outcome.limit_hits, "oom_kills": outcome.oom_kills, "read_bytes": outcome.read_bytes}


def _command(args: argparse.Namespace, name: str, budget: int, prompt: int, tokens: int) -> list[str]:
    return [sys.executable, __file__, args.what, str(args.model), "--child", name, "--memory", str(budget),
            "--context", str(args.context), "--prompt", str(prompt), "--tokens", str(tokens)]


def raw_bandwidth(path: Path) -> float:
    """Bytes/s of direct reads into huge pages, the best of several thread counts."""
    from offload.disk_speed import measure_bandwidth

    return max(measure_bandwidth(path, n_threads, _RAW_S) for n_threads in (1, 2, 4, 8))


def rounds(args: argparse.Namespace, names: tuple[str, ...], budget: int, prompt: int,
           tokens: int) -> tuple[dict[str, Row], float]:
    """Every name's median run (by speed), in turn, and the raw bandwidth's median."""
    runs: dict[str, list[Row]] = {name: [] for name in names}
    raw = []
    for _ in range(args.rounds):
        raw.append(raw_bandwidth(args.model))
        for name, results in runs.items():
            results.append(limited(args, name, _UNLIMITED if name == "resident" else budget, prompt, tokens))
    key = "tok_s" if tokens > 1 else "ttft_s"
    return {name: sorted(results, key=lambda r: float(r[key]))[len(results) // 2] for name, results in runs.items()}, \
        statistics.median(raw)


def budget_of_residency(args: argparse.Namespace, percent: float) -> int:
    """The budget that holds so many percent of the experts: what a first run at half the model's size says."""
    from edgert.architectures.registry import open_architecture
    from edgert.gguf.model_file import ModelFile

    hp, budget = open_architecture(ModelFile.open(args.model)).hp, int(args.model.stat().st_size / 2)
    plan = limited(args, "edgert", budget, 8, 2)  # a prompt and a token: experts have more room then
    wanted = round(hp.n_layers * hp.n_experts * percent / 100)
    return int(budget + (wanted - plan["expert_slots"]) * plan["expert_slot_bytes"])


def _expert_row(ours: Row, resident: Row, raw: float) -> Row:
    if "expert_slots" not in ours:
        return {}
    disk_s, compute_s = ours["missed_bytes_per_token"] / raw, 1 / resident["tok_s"]
    row = {"expert_slots": ours["expert_slots"], "hit_rate": ours["expert_hit_rate"],
           "missed_mib_per_token": ours["missed_bytes_per_token"] / 2**20, "waited_s_per_token":
           ours["waited_s_per_token"], "guesses_per_token": ours["guesses_per_token"],
           "wrong_guesses": ours["wrong_guesses"], "disk_s": disk_s, "compute_s": compute_s,
           "over_limit": 1 / ours["tok_s"] / max(disk_s, compute_s)}
    print(f"      {ours['expert_slots']} slots, hit rate {row['hit_rate']:.3f}, {row['missed_mib_per_token']:.1f} MiB "
          f"missed per token; {1000 / ours['tok_s']:.1f} ms, x{row['over_limit']:.2f} of the limit (at most "
          f"{_MOST_OVER_LIMIT['decode']}; disk "
          f"{1000 * disk_s:.1f}, in memory {1000 * compute_s:.1f}), waited {1000 * ours['waited_s_per_token']:.1f} ms; "
          f"{ours['guesses_per_token']:.1f} read ahead by guess, {ours['wrong_guesses']:.0%} in vain")
    return row


def decode(args: argparse.Namespace, ratio: float, budget: int | None = None) -> Row:
    """Speed of single tokens at one ratio, beside the disk's limit and the processor's."""
    size = args.model.stat().st_size
    budget = budget or int(size / ratio)
    names = ("edgert", "resident", *(("llama.cpp",) if args.peer else ()))
    runs, raw = rounds(args, names, budget, args.prompt, args.tokens)
    ours, resident, peer = runs["edgert"], runs["resident"], runs.get("llama.cpp", {"tok_s": float("nan")})
    streamed = ours.get("streamed_bytes_per_pass", 0)
    held = ours["pinned_bytes"] + ours.get("window_bytes", 0)
    row = {"ratio": ratio, "budget_mib": budget >> 20, "tok_s": ours["tok_s"], "resident_tok_s": resident["tok_s"],
           "peer_tok_s": peer["tok_s"], "multiple": ours["tok_s"] / peer["tok_s"], "raw_gb_s": raw / 1e9,
           "of_disk_limit": ours["tok_s"] * streamed / raw, "of_resident": ours["tok_s"] / resident["tok_s"],
           "bytes_over_streamed": ours["bytes_per_token"] / streamed if streamed else 0.0,
           "bytes_over_unpinned": ours["bytes_per_token"] / max(1, size - ours["pinned_bytes"]),
           "held_mib": held >> 20, "pinned_mib": ours["pinned_bytes"] >> 20, "streamed_mib": streamed >> 20,
           "kv_mib": ours.get("kv_bytes", 0) >> 20, "compute_mib": ours["compute_bytes"] >> 20,
           "p99_over_median": ours["p99_over_median"], "ttft_s": ours["ttft_s"], "limit_hits": ours["limit_hits"],
           "oom_kills": ours["oom_kills"], "peak_mib": ours["peak_bytes"] >> 20,
           "peak_rss_mib": ours["peak_rss_bytes"] >> 20,
           "same_tokens": ours["token_ids"] == resident["token_ids"] == peer.get("token_ids", ours["token_ids"])}
    row |= {"floor": _FLOORS.get(architecture_of(args.model), {}).get(ratio)}
    of_disk = (f"{row['of_disk_limit']:.0%} of {row['raw_gb_s']:.2f} GB/s (floor {_LEAST_OF_DISK:.0%})  bytes "
               f"x{row['bytes_over_unpinned']:.3f} (at most 1.02)  ") if streamed else ""
    print(f"r={ratio:<4} {row['budget_mib']:5} MiB  edgert {row['tok_s']:6.2f} tok/s  llama.cpp {peer['tok_s']:5.2f}"
          f"  x{row['multiple']:.1f} (floor {row['floor'] or '-'})  {of_disk}{row['of_resident']:.0%} of in memory  "
          f"p99 x{row['p99_over_median']:.2f} (at most {_MOST_P99})", flush=True)
    return {**row, **_expert_row(ours, resident, raw)}


def prefill(args: argparse.Namespace, ratio: float, prompt: int) -> Row:
    """Time to the first token of one prompt, beside the larger of the two limits."""
    size, budget = args.model.stat().st_size, int(args.model.stat().st_size / ratio)
    names = ("edgert", "resident", *(("llama.cpp",) if args.peer else ()))
    runs, raw = rounds(args, names, budget, prompt, 1)
    ours, resident, peer = runs["edgert"], runs["resident"], runs.get("llama.cpp", {"ttft_s": float("nan")})
    limit = max(resident["ttft_s"], ours.get("streamed_bytes_per_pass", 0) / raw)
    row = {"ratio": ratio, "prompt": prompt, "budget_mib": budget >> 20, "ttft_s": ours["ttft_s"], "limit_s": limit,
           "over_limit": ours["ttft_s"] / limit, "resident_ttft_s": resident["ttft_s"], "peer_ttft_s": peer["ttft_s"],
           "disk_s": ours.get("streamed_bytes_per_pass", 0) / raw, "raw_gb_s": raw / 1e9,
           "bytes_over_unpinned": ours["prompt_bytes"] / (size - ours["pinned_bytes"]),
           "peer_bytes_over_model": peer.get("read_bytes", 0) / size, "limit_hits": ours["limit_hits"]}
    print(f"r={ratio:<4} {prompt:5} tokens  first after {row['ttft_s']:6.2f} s, x{row['over_limit']:.2f} of the limit "
          f"{limit:5.2f} s (at most {_MOST_OVER_LIMIT['prefill']}; in memory {resident['ttft_s']:.2f}, disk "
          f"{row['disk_s']:.2f})  llama.cpp "
          f"{row['peer_ttft_s']:6.2f} s  bytes x{row['bytes_over_unpinned']:.3f} (at most 1.05), "
          f"llama.cpp's x{row['peer_bytes_over_model']:.2f} of the model", flush=True)
    return row


def retention(args: argparse.Namespace, percent: float, budget: int) -> Row:
    """The share of the speed in memory with so many percent of the experts there, beside SmallThinker's."""
    row = decode(args, round(args.model.stat().st_size / budget, 2), budget)
    published = _PUBLISHED_SHARE.get(percent)
    print(f"      {percent:g} % of the experts in memory: {row['of_resident']:.0%} of the speed in memory"
          + (f" (SmallThinker's own: {published:.0%})" if published else ""), flush=True)
    return {"residency_pct": percent, "published_share": published, **row}


def tpi(args: argparse.Namespace, budget: int) -> Row:
    """Speed, time to the first token and memory of a 7B on one device, beside the paper's on eight."""
    args = argparse.Namespace(**{**vars(args), "context": _TPI_CONTEXT})
    ours = rounds(args, ("edgert",), budget, args.prompt, args.tokens)[0]["edgert"]
    row = {"budget_bytes": budget, "tok_s": ours["tok_s"], "token_s": 1 / ours["tok_s"], "ttft_s": ours["ttft_s"],
           "prompt": args.prompt, "peak_bytes": ours["peak_bytes"], "peak_rss_bytes": ours["peak_rss_bytes"],
           "limit_hits": ours["limit_hits"], "oom_kills": ours["oom_kills"], "paper_token_s": _TPI_TOKEN_S}
    print(f"{budget / 1e9:.1f} GB  {row['token_s']:.2f} s/token ({row['tok_s']:.2f} tok/s; TPI-LLM {_TPI_TOKEN_S} s on "
          f"8 devices of 1.7 GB)  first of {args.prompt} after {row['ttft_s']:.2f} s  peak "
          f"{row['peak_bytes'] / 1e9:.2f} GB, RSS {row['peak_rss_bytes'] / 1e9:.2f} GB  limit hits {row['limit_hits']}",
          flush=True)
    return row


def architecture_of(path: Path) -> str:
    from edgert.gguf.model_file import ModelFile

    return ModelFile.open(path).architecture


def budgets(args: argparse.Namespace) -> list[Row]:
    """Every step between the smallest budget that works and the model's size keeps inside its control group."""
    smallest, rows = _smallest_budget(args), []
    for step in range(args.steps):
        budget = smallest + (args.model.stat().st_size - smallest) * step // max(1, args.steps - 1)
        ours = limited(args, "edgert", budget, args.prompt, args.tokens)
        rows.append({"budget_bytes": budget, "peak_bytes": ours["peak_bytes"], "peak_rss_bytes": ours["peak_rss_bytes"],
                     "limit_hits": ours["limit_hits"], "oom_kills": ours["oom_kills"], "tok_s": ours["tok_s"]})
        print(f"{budget / 2**20:7.1f} MiB  peak {ours['peak_bytes'] / 2**20:7.1f}, RSS "
              f"{ours['peak_rss_bytes'] / 2**20:7.1f} MiB  limit hits {ours['limit_hits']}  OOM kills "
              f"{ours['oom_kills']}  {ours['tok_s']:6.2f} tok/s", flush=True)
    return rows


def _smallest_budget(args: argparse.Namespace) -> int:
    """What a process under a limit says that it needs, when it is asked again with what it said."""
    budget = _LEAST_BYTES
    for _ in range(_MAX_REFUSALS):
        drop_page_cache()  # libraries' pages count where they are read
        outcome = run_limited(_command(args, "edgert", budget, args.prompt, 1), budget, _TIMEOUT_S)
        answer = json.loads(outcome.stdout.splitlines()[-1]) if outcome.returncode == 0 else Row()
        if "refused" not in answer:
            break
        print(f"{budget / 2**20:7.1f} MiB  refused: {answer['refused']}", flush=True)
        budget = answer["smallest_bytes"] + _PAGES_BYTES
    return int(budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "prefill", "budgets", "tpi"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--ratios", default="1.5,2,2.8")
    parser.add_argument("--residency", help="percent of a model's experts, instead of ratios, for decode")
    parser.add_argument("--prompts", default="64,512,2048", help="lengths, for prefill")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=64, help="length, for decode")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave llama.cpp out")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("edgert", "resident", "llama.cpp"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        from edgert.errors import BudgetTooSmall

        try:
            print(json.dumps(child(args)))
        except BudgetTooSmall as refusal:
            print(json.dumps({"refused": refusal.message, "smallest_bytes": refusal.smallest_bytes}))
        return
    if not is_possible():
        raise SystemExit("this needs root and a writable memory control group")
    ratios = [float(text) for text in args.ratios.split(",")]
    if args.what == "budgets":
        rows = budgets(args)
    elif args.what == "tpi":
        rows = [tpi(args, budget) for budget in _TPI_BUDGETS]
    elif args.what == "decode" and args.residency:
        shares = [(float(text), budget_of_residency(args, float(text))) for text in args.residency.split(",")]
        rows = [retention(args, percent, budget) for percent, budget in shares]
    elif args.what == "decode":
        rows = [decode(args, ratio) for ratio in ratios]
    else:
        rows = [prefill(args, ratio, int(n)) for ratio in ratios for n in args.prompts.split(",")]
    for row in rows:
        print(json.dumps({"model": args.model.name, "what": args.what, **row}), flush=True)


if __name__ == "__main__":
    main()
