"""The seam through which the engine gets weights.

Contract: inside `with source.lease(block, phase) as weights:` the block's bytes are in memory, at the addresses that
the tensors name; after it they may be overwritten. Leases do not nest. Blocks are leased in the order of `forward`
(edgert/engine/engine.py), so a source knows what to read ahead. A failing read raises a typed error from `lease`,
never from later. `phase` chooses between layouts where a source holds two; it never changes what is computed beyond
what DESIGN.md calls equal.

A source may keep experts on disk. Its `experts` then gives them one by one, and the lease of an FFN block gives the
rest of it (norm and router): the router's choice must be known before the experts are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Block, Weights
from edgert.engine.batch import Phase
from edgert.memory.profile import HitCurve


class Experts(Protocol):
    """Experts in numbered slots, which all layers share. One layer at a time, from `request` to `release`."""

    @property
    def holds_a_layer(self) -> bool:
        """Whether all experts of a layer have room at once."""
        ...

    def request(self, layer: int, last_use: Mapping[int, int]) -> Mapping[int, int] | None:
        """These experts will be wanted: start reading those that are not here, as many as have room. Each comes with
        the position of the last token that uses it. Their slots, when all are here already; else None."""
        ...

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """A guess of what the next layer will ask for, when all that this one wants was requested: may be read ahead,
        in slots of experts that nobody has used for long."""
        ...

    def waves(self, layer: int, last_use: Mapping[int, int]) -> Iterator[Mapping[int, int]]:
        """Each of these experts once, with its slot, as they come; those of one wave stay until the next is asked for.
        Raises what a failed read raises, and Cancelled."""
        ...

    def weights(self, layer: int) -> Weights:
        """Gate, up and down matrices (n_in, n_out, n_slots) of the layer's types."""
        ...

    def release(self) -> None:
        """The layer is done: its experts may make room for others."""
        ...

    def hit_curve(self) -> HitCurve | None:
        """Share of all experts in memory, and of uses that would find theirs, as texts so far have shown."""
        ...


class Leases(Protocol):
    """What one pass through the model asks of a source."""

    n_output_parts: int
    """The output head comes as this many blocks, each some rows of it in order."""
    n_ffn_parts: int
    """A dense FFN comes as this many blocks: first rows of gate and up, then rows of down, each in order. One block
    has everything."""

    @property
    def stay(self) -> bool:
        """Whether all blocks, but for experts that come one by one, lie at one address until the next step."""
        ...

    @property
    def experts(self) -> Experts | None:
        """Where experts come one by one; None where an FFN block's lease has them all."""
        ...

    def lease_embedding(self, token_ids: NDArray[np.int32],
                        phase: Phase) -> AbstractContextManager[tuple[Weights, NDArray[np.int32]]]:
        """The embedding table, or a small one with the rows of these tokens; and each token's row in it. A resident
        source gives the table and the token ids."""
        ...

    def lease(self, block: Block, phase: Phase) -> AbstractContextManager[Weights]: ...


class WeightSource(Leases, Protocol):
    resident: bool
    """Every block stays at one address for as long as the source is open."""

    @property
    def pinned_bytes(self) -> int:
        """Memory of the weights that stay."""
        ...

    @property
    def streamed_bytes(self) -> int:
        """Bytes that were read from disk so far because they do not stay."""
        ...

    @property
    def waited_s(self) -> float:
        """Time that leases have waited for bytes so far."""
        ...

    def plan(self) -> dict[str, Any]:
        """What lies where, for people and for `--json`."""
        ...

    def close(self) -> None: ...
