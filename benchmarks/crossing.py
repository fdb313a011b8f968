"""Tokens around the length from which steps attend to a set: how much longer than the others the longest takes.

    python benchmarks/crossing.py MODEL.gguf [--budget 512] [--threads 1] [--rounds 5] [--store DIR]

Keys and values are random, so that no prompt need be computed but its last token, which is the first here and does not
count. In memory and on disk, prints the slowest token's time over the median of the tokens before, and which it was,
counted from the first that attends to a set.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from sparse_decode import open_sparse

from edgert.ggml.backend import Backend
from retrieval.engine import RetrievalEngine

_FROM_TOKENS, _BEFORE, _AFTER = 2048, 140, 24


def filled(args: argparse.Namespace) -> RetrievalEngine:
    """An engine that holds a text which is a few tokens shorter than what is attended whole."""
    engine = open_sparse(args)
    kv, n = engine._retrieved, _FROM_TOKENS - _BEFORE
    rng = np.random.default_rng(0)
    for tensor in (*kv.dense.k, *kv.dense.v):
        array = Backend.array(tensor)
        array[:n] = rng.standard_normal((n, array.shape[1]), np.float32)
    kv.dense.length = kv.length = n
    kv.show_keys(0, {layer: kv._near.keys(layer, 0, n) for layer in kv.selector.key_layers})
    return engine


def times_of(engine: RetrievalEngine) -> list[float]:
    taken = []
    for token_id in range(_BEFORE + _AFTER):
        start = time.perf_counter()
        engine.step(np.array([token_id + 100], np.int32))
        taken.append(1000 * (time.perf_counter() - start))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    args.head, args.context, args.steps, args.from_tokens = "none", 2 * _FROM_TOKENS, 0, _FROM_TOKENS
    for args.tier in ("memory", "disk"):
        rounds = []
        for _ in range(args.rounds):
            engine = filled(args)
            rounds.append(times_of(engine))
            engine.close()
        typical = np.median(rounds, axis=0)  # of each token, over the rounds
        before = median(typical[8:_BEFORE - 8])
        worst = int(typical[8:].argmax()) + 8
        print(json.dumps({"tier": args.tier, "median_before_ms": round(before, 2),
                          "median_after_ms": round(median(typical[_BEFORE + 4:]), 2),
                          "worst_over_median": round(typical[worst] / before, 2), "worst_at": worst - _BEFORE,
                          "around_ms": [round(one, 1) for one in typical[_BEFORE - 3:_BEFORE + 5]]}), flush=True)


if __name__ == "__main__":
    main()
