"""How a graph sees a cache of which it attends to a part, and what it tells of the attention that it computes.

A token whose mask is -inf costs ggml's attention one look at the mask: its key and value are not read. Some layers
are *observed* in steps of one token: how their heads divide attention over the cells, and their queries. That is a
product of one query with the keys of a set, under 3 % of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.engine.kv_cache import append
from edgert.ggml.abi import TYPE_F16, TYPE_I64
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Graph, Tensor

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Plane:
    """Where a kind of layer writes a batch, and what it sees: `cells` (n_tokens,) int64 and `mask` (n_cells, n_tokens)
    float16."""

    cells: Tensor
    mask: Tensor

    @classmethod
    def of(cls, g: Context, n_cells: int, n_tokens: int) -> Plane:
        return cls(g.input("cells", TYPE_I64, (n_tokens,)), g.input("mask", TYPE_F16, (n_cells, n_tokens)))


@dataclass(frozen=True, slots=True)
class Observation:
    """Of one layer: `attention` (n_heads, n_cells) sums to 1 for each head; `queries` (n_heads, head_dim) after RoPE,
    times `scale` a logit's."""

    layer: int
    attention: Floats
    queries: Floats
    scale: float


@dataclass(slots=True)
class SelectiveKVGraph:
    """A KVGraph with one plane for layers that see the whole context, and one for those with a window."""

    k: Sequence[Tensor]
    v: Sequence[Tensor]
    full: Plane
    window: Plane | None
    window_layers: frozenset[int]
    observed_layers: frozenset[int] = frozenset()
    arrays: list[NDArray[Any]] = field(default_factory=list)
    _observed: list[tuple[int, Tensor, Tensor, float]] = field(default_factory=list)

    def inputs(self) -> list[Tensor]:
        return [t for plane in (self.full, self.window) if plane is not None for t in (plane.cells, plane.mask)]

    def with_inputs(self, inputs: Sequence[Tensor], k: Tensor, v: Tensor) -> SelectiveKVGraph:
        window = Plane(*inputs[2:]) if self.window is not None else None
        return SelectiveKVGraph([k], [v], Plane(*inputs[:2]), window, self.window_layers)

    def attend(self, g: Graph, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        for tensor in (q, v, k):
            g.expand(tensor)
        plane = self.window if self.window is not None and layer in self.window_layers else self.full
        n_cells = plane.mask.ne[0]
        keys = append(g, self.k[layer % len(self.k)], k, plane.cells, n_cells)
        values = append(g, self.v[layer % len(self.v)], v, plane.cells, n_cells)
        if layer in self.observed_layers and q.ne[2] == 1:
            self._observe(g, layer, q, keys, scale)
        out = g.flash_attention(q, keys, values, plane.mask, scale)  # (head_dim, n_heads, n_tokens)
        head_dim, n_heads, n_tokens, _ = out.ne
        return g.reshape(out, head_dim * n_heads, n_tokens)

    def _observe(self, g: Graph, layer: int, q: Tensor, keys: Tensor, scale: float) -> None:
        logits = g.mul_mat(g.permute(keys, 0, 2, 1, 3), g.permute(q, 0, 2, 1, 3))  # (n_cells, 1, n_heads)
        attention = g.output(g.masked_soft_max(logits, self.full.mask, scale))
        self._observed.append((layer, attention, g.output(q), scale))

    def observations(self) -> list[Observation]:
        """Of the computation that was last; views of the graph's memory. Empty for batches, and block by block."""
        return [Observation(layer, Backend.array(attention).reshape(q.ne[1], -1),
                            Backend.array(q).reshape(q.ne[1], q.ne[0]), scale)
                for layer, attention, q, scale in self._observed]
