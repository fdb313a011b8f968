"""How a graph sees a cache of which it attends to a part, and what it tells of the attention that it computes.

A token whose mask is -inf costs ggml's attention one look at the mask: its key and value are not read. Some layers
are *observed* in steps of one token: how their heads divide attention over the cells, and their queries. That is a
product of one query with the keys of a set, under 3 % of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from edgert.architectures.base import Hyperparameters
from edgert.engine.kv_cache import append
from edgert.ggml.abi import TYPE_F16, TYPE_F32, TYPE_I64
from edgert.ggml.graph import Context, Graph, Tensor
from retrieval.arrays import Floats


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
class Observed:
    """Where one layer's observation goes: `attention` (n_cells, 1, n_heads) and `queries` (head_dim, n_heads, 1)
    float32; and what its attention is scaled with, once a graph was built."""

    attention: Tensor
    queries: Tensor
    scale: list[float] = field(default_factory=list)


@dataclass(slots=True)
class SelectiveKVGraph:
    """A KVGraph with one plane for layers that see the whole context, and one for those with a window."""

    k: Sequence[Tensor]
    v: Sequence[Tensor]
    full: Plane
    window: Plane | None
    window_layers: frozenset[int]
    observed: dict[int, Observed]  # by layer
    arrays: list[NDArray[Any]] = field(default_factory=list)

    @classmethod
    def of(cls, g: Context, hp: Hyperparameters, k: Sequence[Tensor], v: Sequence[Tensor], n_tokens: int, n_cells: int,
           n_window_cells: int, observed_layers: frozenset[int]) -> SelectiveKVGraph:
        """Observed where the batch is one token."""
        window = Plane.of(g, n_window_cells, n_tokens) if hp.window_layers else None
        observed = {layer: Observed(g.input("attention", TYPE_F32, (n_cells, 1, hp.n_heads)),
                                    g.input("queries", TYPE_F32, (hp.head_dim, hp.n_heads)))
                    for layer in sorted(observed_layers) if n_tokens == 1}
        return cls(k, v, Plane.of(g, n_cells, n_tokens), window, hp.window_layers, observed)

    def inputs(self) -> list[Tensor]:
        planes = [t for plane in (self.full, self.window) if plane is not None for t in (plane.cells, plane.mask)]
        return [*planes, *(t for one in self.observed.values() for t in (one.attention, one.queries))]

    def variant(self, layer: int) -> int | None:
        return layer if layer in self.observed else None

    def with_inputs(self, inputs: Sequence[Tensor], k: Tensor, v: Tensor) -> SelectiveKVGraph:
        given = iter(inputs)
        full = Plane(next(given), next(given))
        window = None if self.window is None else Plane(next(given), next(given))
        observed = {layer: Observed(next(given), next(given), own.scale) for layer, own in self.observed.items()}
        return SelectiveKVGraph([k], [v], full, window, self.window_layers, observed)

    def attend(self, g: Graph, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        for tensor in (q, v, k):
            g.expand(tensor)
        plane = self.window if self.window is not None and layer in self.window_layers else self.full
        n_cells = plane.mask.ne[0]
        keys = append(g, self.k[layer % len(self.k)], k, plane.cells, n_cells)
        values = append(g, self.v[layer % len(self.v)], v, plane.cells, n_cells)
        if layer in self.observed:
            self._observe(g, self.observed[layer], q, keys, scale)
        out = g.flash_attention(q, keys, values, plane.mask, scale)  # (head_dim, n_heads, n_tokens)
        head_dim, n_heads, n_tokens, _ = out.ne
        return g.reshape(out, head_dim * n_heads, n_tokens)

    def _observe(self, g: Graph, into: Observed, q: Tensor, keys: Tensor, scale: float) -> None:
        logits = g.mul_mat(g.permute(keys, 0, 2, 1, 3), g.permute(q, 0, 2, 1, 3))  # (n_cells, 1, n_heads)
        g.expand(g.copy(g.masked_soft_max(logits, self.full.mask, scale), into.attention))
        g.expand(g.copy(g.reshape(q, *into.queries.ne[:2]), into.queries))
        into.scale[:] = [scale]

    def observations(self) -> list[Observation]:
        """Of the computation that was last; views of its memory. Empty for batches."""
        arrays = self.arrays[4 if self.window is not None else 2:]
        found = zip(self.observed.items(), arrays[::2], arrays[1::2], strict=True)
        return [Observation(layer, attention.reshape(one.queries.ne[1], -1), queries.reshape(one.queries.ne[1], -1),
                            one.scale[0]) for (layer, one), attention, queries in found if one.scale]
