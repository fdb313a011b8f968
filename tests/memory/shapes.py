"""Random shapes, profiles and overheads for the memory manager's property tests, and a model of round figures."""

from __future__ import annotations

from hypothesis import strategies as st

from edgert.memory.planner import Demand
from edgert.memory.profile import DeviceProfile, DiskSpeed, Rehearsal
from edgert.memory.shape import ModelShape, Overheads

MIB, GIB = 2**20, 2**30
KEY = "llama-1"
OVERHEADS = Overheads(100 * MIB, 5 * MIB, {256: 40 * MIB, 128: 20 * MIB}, 60 * MIB, 2 * MIB)


def shape(**changes: object) -> ModelShape:
    """A model of 1 GiB in 16 layers of two blocks, a layer's FFN twice its attention."""
    values: dict[str, object] = {
        "file_bytes": GIB, "small_bytes": MIB, "large_bytes": 960 * MIB, "largest_block_bytes": 40 * MIB,
        "largest_piece_bytes": 14 * MIB, "matrix_bytes": {2: 900 * MIB}, "head_bytes": {14: 60 * MIB},
        "expert_bytes": {}, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "head_dim": 64,
        "kv_bytes_per_token": 32 * 2**10, "hidden_bytes_per_token": 8192, "context_length": 8192,
        "repackable_bytes": {2: 900 * MIB}, "key": KEY}
    return ModelShape(**{**values, **changes})  # type: ignore[arg-type]


def moe_shape(**changes: object) -> ModelShape:
    """The same size with 16 layers of 32 experts, of which 4 are used."""
    return shape(**{"large_bytes": 224 * MIB, "matrix_bytes": {2: 160 * MIB}, "expert_bytes": {2: 736 * MIB},
                    "n_experts": 32, "n_experts_used": 4, "slot_bytes": 736 * MIB // 512, "least_slots": 5,
                    "kept_bytes_per_token": 40_000, "largest_block_bytes": 10 * MIB, "largest_piece_bytes": 4 * MIB,
                    **changes})


def profile(disk_bytes_s: float = 1e9, speed: float = 1.0) -> DeviceProfile:
    """`speed` times a device whose Q4_0 products read 10 GB/s for one token."""
    table = {1: 1e-10 / speed, 8: 3e-10 / speed, 128: 4e-9 / speed}
    products = {"2/plain": table, "14/plain": table, "2/repack": {n: s / 2 for n, s in table.items()}}
    attention = {64: {1: 1.5e-10 / speed, 128: 5e-11 / speed}}
    return DeviceProfile(products, attention, 2e10, DiskSpeed(disk_bytes_s, 1e-4))


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    """Any model that a file could hold, dense or with experts, with any overheads and context."""
    n_layers = draw(st.integers(1, 64))
    block = draw(st.integers(2**12, 256 * MIB))
    piece = draw(st.integers(2**12, block))
    dense = draw(st.integers(block, block * n_layers))
    n_experts = draw(st.sampled_from([0, 0, 8, 64]))
    slot_bytes = draw(st.integers(4096, 8 * MIB)) if n_experts else 0
    experts = slot_bytes * n_experts * n_layers
    n_used = draw(st.integers(1, n_experts)) if n_experts else 0
    return Demand(
        shape(file_bytes=dense + experts + draw(st.integers(0, GIB)), small_bytes=draw(st.integers(0, 16 * MIB)),
              large_bytes=dense, largest_block_bytes=block, largest_piece_bytes=piece, matrix_bytes={2: dense},
              head_bytes={14: draw(st.integers(0, 512 * MIB))}, expert_bytes={2: experts} if n_experts else {},
              n_layers=n_layers, kv_bytes_per_token=draw(st.integers(64, 2**20)),
              hidden_bytes_per_token=draw(st.integers(64, 2**17)), n_experts=n_experts,
              n_experts_used=n_used, slot_bytes=slot_bytes, least_slots=min(n_experts * n_layers, n_used + 1),
              kept_bytes_per_token=draw(st.integers(0, 2**17)),
              window=draw(st.sampled_from([0, 512])), n_window_layers=draw(st.integers(0, n_layers))),
        draw(overheads()),
        draw(st.integers(8, 2**17)), draw(st.sampled_from([64, 512])),
        draw(st.sampled_from([{}, {"decode": frozenset({2})}])))


@st.composite
def overheads(draw: st.DrawFn) -> Overheads:
    """Any process, with compute buffers that are smaller for smaller parts."""
    process, growth, least, more, fused, rows = (draw(st.integers(0, 512 * MIB)) for _ in range(6))
    return Overheads(process, growth, {256: least + more, 128: least}, fused, rows,
                     prompt_bytes=draw(st.integers(0, least)))


@st.composite
def profiles(draw: st.DrawFn) -> DeviceProfile:
    """Any device, from an SD card to a server, with what answers have taught it, whether it has rehearsed the model or
    not."""
    learnt = {part: draw(st.floats(0.25, 4)) for part in ("disk", "compute")}
    base = profile(draw(st.floats(1e6, 2e10)), draw(st.floats(0.01, 100)))
    return DeviceProfile(base.multiply_s, base.attend_s, draw(st.floats(1e9, 1e12)), base.disk, 2, learnt,
                         {KEY: draw(rehearsals())} if draw(st.booleans()) else {})


@st.composite
def rehearsals(draw: st.DrawFn) -> Rehearsal:
    """Passes of a model on any device: a graph of the whole is no slower than one for each block."""
    fused_s, python_s, one_s, all_s, some_s, more_s = (draw(st.floats(1e-6, 1)) for _ in range(6))
    misses = draw(st.sampled_from([{}, {0: 0.0, 4: one_s, 64: one_s + all_s}]))
    return Rehearsal(fused_s, fused_s + python_s, {0: 0.0, 255: some_s, 1023: some_s + more_s}, misses)
