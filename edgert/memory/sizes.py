"""What a plan decides, and how wide the window is through which weights stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from edgert.memory.profile import Layout
from edgert.memory.shape import Phase

MAX_BLOCK_BYTES = 32 * 2**20
"""A dense FFN that is larger is cut by rows (offload/residency.py), so that the window stays small."""
_IN_FLIGHT_BYTES = 20 * 2**20


@dataclass(frozen=True, slots=True)
class Sizes:
    """Where the weights' bytes lie, and in which layout they compute."""

    weights: Literal["resident", "streamed"]
    pinned_bytes: int = 0
    window_bytes: int = 0
    pool_slots: int = 0  # experts that have room
    part_tokens: int = 256  # of a batch, computed at once where weights stream: the same bits, smaller buffers
    repacked: Mapping[Phase, frozenset[int]] = field(default_factory=dict)

    def layout(self, type_id: int, phase: Phase) -> Layout:
        return "repack" if type_id in self.repacked.get(phase, ()) else "plain"


class Blocks(Protocol):
    """What passes a window: its largest block, which must be in memory at once, and the largest piece of one."""

    @property
    def largest_block_bytes(self) -> int: ...

    @property
    def largest_piece_bytes(self) -> int: ...


def least_window(blocks: Blocks) -> int:
    """The largest block at once, and the gap that a ring leaves at its end."""
    return blocks.largest_block_bytes + blocks.largest_piece_bytes


def comfortable_bytes(blocks: Blocks) -> int:
    """What should be on its way beyond the least window. More is taken from what could stay: twice as much costs 5 % of
    Qwen2.5-0.5B's speed and 1 % of the 1.5B's, at a half of their sizes (benchmarks/plan_choices.py)."""
    return max(blocks.largest_block_bytes, _IN_FLIGHT_BYTES)


def overlap(blocks: Blocks, window_bytes: int) -> float:
    """The share of the time of the shorter of reading and computing in which the other goes on.

    (window - least window) / max(largest block, 20 MiB), between 0 and 1: the least window reads a block, then
    computes; with another block's worth on its way, the disk is busy meanwhile.
    """
    ahead = window_bytes - least_window(blocks)
    return min(1.0, max(0.0, ahead / comfortable_bytes(blocks)))
