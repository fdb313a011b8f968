"""Steps that attend to a set of tokens beside dense ones, token after token of one text: speed, closeness, memory.

    python benchmarks/sparse_decode.py MODEL.gguf [--context 8192] [--budget 512] [--threads 1] [--steps 40]
        [--tier memory|disk] [--store DIR] [--snapshot FILE.npz | --synthetic] [--text FILE ...] [--head auto|none]
        [--read-mb-s 250] [--from-tokens 2048]

The text (Python's own sources where none is given) is prefilled by both engines, since a retrieval head needs features
of it; with --snapshot its keys and values, and the head's keys, are kept for the next run; with --synthetic they are
random, for speed alone without the minutes of a prefill. Both engines take some steps in turn; medians, and ratios of
medians. The ceiling is Amdahl's: a dense step over as few tokens as the set has. With --read-mb-s (root), the steps are
taken from a disk that is held to so much. A --context below --from-tokens is attended whole by both: what retrieval
costs then.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import tempfile
import time
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.bench.control_group import slow_disk
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
from retrieval.arrays import Floats
from retrieval.counts import Counts
from retrieval.engine import RetrievalEngine
from retrieval.opening import open_retrieval
from retrieval.sizes import kv_sizes

_SPARE = 64  # tokens beyond the context's measured length
_IN_TURN = 8  # steps of one engine, then of the other; what comes first after the other is not counted


@dataclass(slots=True)
class Times:
    dense_s: list[float] = field(default_factory=list)
    sparse_s: list[float] = field(default_factory=list)
    floor_s: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same_best: list[bool] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)  # of the counted sparse steps


def main() -> None:
    args = arguments()
    token_ids = text_of(args)
    dense, sparse = open_dense(args), open_sparse(args)
    fill(args, dense, sparse, token_ids[:args.context])
    with slow_disk(args.store, args.read_mb_s * 10**6) if args.read_mb_s else nullcontext() as group:
        if group is not None:
            group.write_text(str(os.getpid()))
        times = measure(args, dense, sparse, token_ids[args.context:])
        if group is not None:
            (group.parent.parent / group.name).write_text(str(os.getpid()))
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
    parser.add_argument("--read-mb-s", type=int, default=0)
    parser.add_argument("--from-tokens", type=int, help="default: 2048, or half the context")
    return parser.parse_args()


def text_of(args: argparse.Namespace) -> NDArray[np.int32]:
    """As many tokens as are prefilled and then measured."""
    n = args.context + args.steps + 1
    if args.synthetic:
        return np.asarray(np.random.default_rng(0).integers(0, 30_000, n), np.int32)
    if args.snapshot and args.snapshot.exists():
        ids = np.asarray(np.load(args.snapshot)["ids"], np.int32)[:n]
        if len(ids) < n:
            raise SystemExit(f"{args.snapshot} was made for fewer --steps or a shorter --context: name another file")
        return ids
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
    from_tokens = min(args.from_tokens or min(2048, args.context // 2), kv.context_length)
    sizes = kv_sizes(arch.hp, kv.context_length, args.budget, from_tokens, args.tier, head, "resident")
    return open_retrieval(arch, weights, kv, backend, sizes, head, args.store)


def fill(args: argparse.Namespace, dense: Engine, sparse: RetrievalEngine, token_ids: NDArray[np.int32]) -> None:
    """Both engines hold the text, the sparse one as if it had prefilled it."""
    assert isinstance(dense.kv, DenseKVCache)
    kv, n = sparse._retrieved, len(token_ids)
    arrays = [Backend.array(t)[:n] for t in (*dense.kv.k, *dense.kv.v)]
    kept: dict[str, Any] = {}
    if args.snapshot and args.snapshot.exists():
        with np.load(args.snapshot) as file:
            kept = dict(file)
    if args.synthetic:
        rows = np.random.default_rng(1).standard_normal(arrays[0].shape, np.float32).astype(np.float16)
        for array in arrays:
            array[:] = rows
        dense.kv.length = n
    elif "k" in kept:
        for array, rows in zip(arrays, (*kept["k"], *kept["v"]), strict=True):
            array[:] = rows[:n]
        dense.kv.length = n
    else:
        dense.step(token_ids)
        if args.snapshot:
            k, v = np.stack(arrays[:len(dense.kv.k)]), np.stack(arrays[len(dense.kv.k):])
            kept = {"ids": text_of(args), "k": k, "v": v}
            np.savez(args.snapshot, **kept)
    state = None
    if kv.selector.name == "head" and not args.synthetic:  # it must see the text's features
        state = kept.get(kv.selector.identity)
        if state is None:
            sparse.step(token_ids)
            if args.snapshot:
                kept[kv.selector.identity] = kv.selector.state(n)
                np.savez(args.snapshot, **kept)
            return
    for source, target in zip((*dense.kv.k, *dense.kv.v), (*kv.dense.k, *kv.dense.v), strict=True):
        Backend.array(target)[:n - 1] = Backend.array(source)[:n - 1]
    kv.dense.length = kv.length = n - 1
    kv.token_ids.extend(token_ids[:n - 1].tolist())
    kv.show_keys(0, {layer: kv._near.keys(layer, 0, n - 1) for layer in kv.selector.key_layers})
    if state is not None:
        kv.selector.restore(state, n)
    sparse.step(token_ids[n - 1:])


def measure(args: argparse.Namespace, dense: Engine, sparse: RetrievalEngine, token_ids: NDArray[np.int32]) -> Times:
    times, n = Times(), dense.kv.length
    for first in range(0, args.steps, _IN_TURN):
        some = token_ids[first:min(first + _IN_TURN, args.steps)]
        expected = [timed(dense, token_id, times.dense_s) for token_id in some]
        got = [timed(sparse, some[0], [])]
        before = astuple(sparse._retrieved.counts)
        got += [timed(sparse, token_id, times.sparse_s) for token_id in some[1:]]
        changes = [b - a for a, b in zip(before, astuple(sparse._retrieved.counts), strict=True)]
        times.counts = Counts(*(a + b for a, b in zip(astuple(times.counts), changes, strict=True)))
        for a, b in zip(expected, got, strict=True):
            times.kl.append(float((np.exp(a) * (a - b)).sum()))
            times.same_best.append(bool(a.argmax() == b.argmax()))
    dense.kv.truncate(args.budget - args.steps)
    for token_id in token_ids[:args.steps]:
        start = time.perf_counter()
        dense.step(np.array([token_id], np.int32))
        times.floor_s.append(time.perf_counter() - start)
    assert n == args.context
    return times


def timed(engine: Engine, token_id: int, taken: list[float]) -> NDArray[np.float64]:
    start = time.perf_counter()
    logits = engine.step(np.array([token_id], np.int32))[0]
    taken.append(time.perf_counter() - start)
    return log_softmax(logits)


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max()
    return np.asarray(x - np.log(np.exp(x).sum()))


def report(args: argparse.Namespace, times: Times, sparse: RetrievalEngine) -> None:
    settled, counts = times.sparse_s, times.counts
    dense_ms, sparse_ms, floor_ms = (1000 * median(one) for one in (times.dense_s, settled, times.floor_s))
    kv = sparse.plan()["kv"]
    n_steps = max(1, counts.n_steps)
    figures = {
        "model": args.model.name, "context": args.context, "budget": args.budget, "threads": args.threads,
        "tier": kv["tier"], "selector": kv["selector"],
        "dense_ms": round(dense_ms, 2), "sparse_ms": round(sparse_ms, 2),
        "speedup": round(dense_ms / sparse_ms, 2), "ceiling": round(dense_ms / floor_ms, 2),
        "slowest_over_median": round(max(settled) * 1000 / sparse_ms, 2),
        "select_share": round(1000 * counts.select_s / n_steps / sparse_ms, 3),
        "select_ms_beside": round(1000 * counts.aside_s / n_steps, 3),
        "stall_share": round(1000 * counts.fetch_s / n_steps / sparse_ms, 3),
        "there_before_its_layer": round(1 - counts.n_late / max(1, counts.n_selected), 4),
        "kept_from_the_step_before": round(1 - counts.n_fetched / max(1, counts.n_selected), 3),
        "reads_per_token": round(counts.n_reads / n_steps, 1),
        "read_bytes_per_token": round(counts.read_bytes / n_steps),
        "kv_resident_bytes": sparse.kv.resident_bytes, "kl": round(float(np.mean(times.kl)), 4),
        "top1": round(float(np.mean(times.same_best)), 3)}
    for name, value in figures.items():
        print(f"{name:26} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
