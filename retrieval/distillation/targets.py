"""What attention looks at, averaged over layers and heads, kept sparse: the distribution that a head learns.

Sources: the indexer of DeepSeek-V3.2 (sum over heads, normalised), and SeerAttention-R (max-pool, so that a rare
sharp head counts).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.distillation.teacher import Pass

N_KEPT = 512  # of each query's targets; what is left is spread over the others
_CHUNK_QUERIES = 128  # scores of one chunk stay in a core's cache


@dataclass(frozen=True, slots=True)
class Targets:
    """For each query its N_KEPT most attended tokens (padded with weight 0)."""

    tokens: NDArray[np.uint16]  # (n_queries, N_KEPT)
    mean: NDArray[np.float16]  # their attention, averaged over layers and heads
    peak: NDArray[np.float16]  # their largest attention in any layer and head


def targets_of(seen: Pass, positions: NDArray[np.int32]) -> Targets:
    """The targets of the queries at `positions` (ascending), whose queries `seen` holds in that order."""
    keys = {layer: torch.from_numpy(k).permute(1, 2, 0).contiguous() for layer, k in seen.keys.items()}
    parts = [_chunk(seen, keys, positions, start) for start in range(0, len(positions), _CHUNK_QUERIES)]
    tokens, mean, peak = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Targets(tokens, mean, peak)


def _chunk(seen: Pass, keys: dict[int, torch.Tensor], positions: NDArray[np.int32],
           start: int) -> tuple[NDArray[np.uint16], NDArray[np.float16], NDArray[np.float16]]:
    chosen = torch.from_numpy(positions[start:start + _CHUNK_QUERIES].astype(np.int64))
    n_tokens, n_queries, n_heads = int(chosen[-1]) + 1, len(chosen), 0
    mean, peak = torch.zeros(n_queries, n_tokens), torch.zeros(n_queries, n_tokens)
    future = torch.arange(n_tokens)[None, :] > chosen[:, None]
    for layer, key in keys.items():
        q = torch.from_numpy(seen.queries[layer][start:start + _CHUNK_QUERIES]) * seen.scale
        group = q.shape[1] // len(key)
        for kv_head, of_head in enumerate(key):
            for head in range(kv_head * group, (kv_head + 1) * group):
                weights = (q[:, head] @ of_head[:, :n_tokens]).masked_fill_(future, -torch.inf).softmax(-1)
                mean += weights
                torch.maximum(peak, weights, out=peak)
                n_heads += 1
    mean /= n_heads
    n_kept = min(N_KEPT, n_tokens)
    tokens = (mean + peak / peak.sum(-1, keepdim=True)).topk(n_kept).indices
    padded = [torch.nn.functional.pad(t, (0, N_KEPT - n_kept)).numpy()
              for t in (tokens, mean.gather(1, tokens), peak.gather(1, tokens))]
    return padded[0].astype(np.uint16), padded[1].astype(np.float16), padded[2].astype(np.float16)
