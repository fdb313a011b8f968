"""Steps that attend to a set of tokens beside dense ones, token after token of one text: speed, closeness, memory.

    python benchmarks/sparse_decode.py MODEL.gguf [--context 8192] [--budget 512] [--threads 1] [--steps 40]
        [--tier memory|disk] [--store DIR] [--snapshot FILE.npz | --synthetic] [--text FILE ...] [--head auto|none]

The text (Python's own sources where none is given) is prefilled once, densely; with --snapshot its keys and values are
kept for the next run; with --synthetic they are random, for speed alone without the minutes of a prefill. Each step is
taken by both engines in turn; medians, and ratios of medians. The ceiling is Amdahl's: a dense step over as few tokens
as the set has. Where the model has a retrieval head, it needs features of the text, so both engines prefill.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.registry import open_architecture
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.layouts import Layouts
from edgert.engine.resident import ResidentWeights
from edgert.ggml.backend import Backend
from edgert.gguf.model_file import ModelFile
from edgert.kv_tiers import head_of
from edgert.paths import Paths
from edgert.text.tokenizer import Tokenizer
from retrieval.engine import RetrievalEngine
from retrieval.opening import open_retrieval
from retrieval.sizes import kv_sizes

Floats = NDArray[np.float32]
_SPARE = 64  # tokens beyond the context's measured length


@dataclass(slots=True)
class Times:
    dense_s: list[float] = field(default_factory=list)
    sparse_s: list[float] = field(default_factory=list)
    floor_s: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same_best: list[bool] = field(default_factory=list)


def main() -> None:
    args = arguments()
    token_ids = text_of(args)
    dense, sparse = open_dense(args), open_sparse(args)
    fill(args, dense, sparse, token_ids[:args.context])
    times = measure(args, dense, sparse, token_ids[args.context:])
    report(args, times, sparse)
    dense.close()
    sparse.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tier", choices=("memory", "disk"), default="memory")
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--snapshot", type=Path)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--head", choices=("auto", "none"), default="auto")
    return parser.parse_args()


def text_of(args: argparse.Namespace) -> NDArray[np.int32]:
    """As many tokens as are prefilled and then measured."""
    n = args.context + args.steps + 1
    if args.synthetic:
        return np.asarray(np.random.default_rng(0).integers(0, 30_000, n), np.int32)
    if args.snapshot and args.snapshot.exists():
        return np.asarray(np.load(args.snapshot)["ids"], np.int32)[:n]
    files = args.text or sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py"))
    tokenizer = Tokenizer.open(args.model)
    token_ids: list[int] = []
    for file in files:
        token_ids += tokenizer.encode(file.read_text(errors="replace"), add_special=False, parse_special=False)
        if len(token_ids) >= n:
            break
    tokenizer.close()
    if len(token_ids) < n:
        raise SystemExit(f"the text has {len(token_ids)} tokens, {n} are needed")
    return np.array(token_ids[:n], np.int32)


def _parts(args: argparse.Namespace) -> tuple[Any, ResidentWeights, DenseKVCache, Backend, ModelFile]:
    file, backend = ModelFile.open(args.model), Backend(args.threads)
    arch = open_architecture(file)
    plain = Layouts({"prefill": frozenset(), "decode": frozenset()})
    kv = DenseKVCache(backend, arch.hp, args.context + args.steps + _SPARE)
    return arch, ResidentWeights(backend, file, arch, plain), kv, backend, file


def open_dense(args: argparse.Namespace) -> Engine:
    arch, weights, kv, backend, _ = _parts(args)
    return Engine(arch, weights, kv, backend)


def open_sparse(args: argparse.Namespace) -> RetrievalEngine:
    arch, weights, kv, backend, file = _parts(args)
    head = None if args.head == "none" else head_of(file, arch, Paths.of_user())
    sizes = kv_sizes(arch.hp, kv.context_length, args.budget, min(2048, args.context // 2), args.tier, head, "resident")
    return open_retrieval(arch, weights, kv, backend, sizes, head, args.store)


def fill(args: argparse.Namespace, dense: Engine, sparse: RetrievalEngine, token_ids: NDArray[np.int32]) -> None:
    """Both engines hold the text, the sparse one as if it had prefilled it."""
    assert isinstance(dense.kv, DenseKVCache)
    arrays = [Backend.array(t)[:len(token_ids)] for t in (*dense.kv.k, *dense.kv.v)]
    if args.synthetic:
        rows = np.random.default_rng(1).standard_normal(arrays[0].shape, np.float32).astype(np.float16)
        for array in arrays:
            array[:] = rows
        dense.kv.length = len(token_ids)
    elif args.snapshot and args.snapshot.exists():
        kept = np.load(args.snapshot)
        for array, rows in zip(arrays, (*kept["k"], *kept["v"]), strict=True):
            array[:] = rows[:len(token_ids)]
        dense.kv.length = len(token_ids)
    else:
        dense.step(token_ids)
        if args.snapshot:
            k, v = np.stack(arrays[:len(dense.kv.k)]), np.stack(arrays[len(dense.kv.k):])
            np.savez(args.snapshot, ids=text_of(args), k=k, v=v)
    if sparse._retrieved.selector.name == "head" and not args.synthetic:  # it must see the text's features
        sparse.step(token_ids)
        return
    kv = sparse._retrieved
    n = len(token_ids) - 1
    for source, target in zip((*dense.kv.k, *dense.kv.v), (*kv.dense.k, *kv.dense.v), strict=True):
        Backend.array(target)[:n] = Backend.array(source)[:n]
    kv.dense.length = kv.length = n
    kv.show_keys(0, {layer: kv._near.keys(layer, 0, n) for layer in kv.selector.key_layers})
    sparse.step(token_ids[n:])


def measure(args: argparse.Namespace, dense: Engine, sparse: RetrievalEngine, token_ids: NDArray[np.int32]) -> Times:
    times, n = Times(), dense.kv.length
    for token_id in token_ids[:args.steps]:
        step = np.array([token_id], np.int32)
        rows = []
        for engine, taken in ((dense, times.dense_s), (sparse, times.sparse_s)):
            start = time.perf_counter()
            logits = engine.step(step)[0]
            taken.append(time.perf_counter() - start)
            rows.append(log_softmax(logits))
        times.kl.append(float((np.exp(rows[0]) * (rows[0] - rows[1])).sum()))
        times.same_best.append(bool(rows[0].argmax() == rows[1].argmax()))
    dense.kv.truncate(args.budget - args.steps)
    for token_id in token_ids[:args.steps]:
        start = time.perf_counter()
        dense.step(np.array([token_id], np.int32))
        times.floor_s.append(time.perf_counter() - start)
    assert n == args.context
    return times


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max()
    return np.asarray(x - np.log(np.exp(x).sum()))


def report(args: argparse.Namespace, times: Times, sparse: RetrievalEngine) -> None:
    settled = times.sparse_s[2:]  # the first builds its graph and fills the buffer
    dense_ms, sparse_ms, floor_ms = (1000 * median(one) for one in (times.dense_s, settled, times.floor_s))
    kv = sparse.plan()["kv"]
    n_steps = max(1, kv["steps"])
    figures = {
        "model": args.model.name, "context": args.context, "budget": args.budget, "threads": args.threads,
        "tier": kv["tier"], "selector": kv["selector"],
        "dense_ms": round(dense_ms, 2), "sparse_ms": round(sparse_ms, 2),
        "speedup": round(dense_ms / sparse_ms, 2), "ceiling": round(dense_ms / floor_ms, 2),
        "slowest_over_median": round(max(settled) * 1000 / sparse_ms, 2),
        "select_share": round(kv["select_ms"] / n_steps / sparse_ms, 3),
        "fetch_share": round(kv["fetch_ms"] / n_steps / sparse_ms, 3),
        "resident_share_of_needed": round(1 - kv["fetched"] / max(1, kv["selected"]), 3),
        "reads_per_token": round(kv["reads"] / n_steps, 1), "read_bytes_per_token": round(kv["read_bytes"] / n_steps),
        "kv_resident_bytes": sparse.kv.resident_bytes, "kl": round(float(np.mean(times.kl)), 4),
        "top1": round(float(np.mean(times.same_best)), 3)}
    for name, value in figures.items():
        print(f"{name:26} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
