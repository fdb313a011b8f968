"""The theoretical model: how many bytes a plan takes, and how long a token and a prompt take with it.

Pure functions of a model's shape, a device's profile, a plan's sizes and the number of tokens. Each says its formula.
Sources: SpeContext, arXiv 2512.00722, section 6 (memory as a sum of closed terms); TPI-LLM, arXiv 2410.00531, section
3.3 (reading hides behind computing while it takes no longer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from edgert.memory.hits import HIT_CURVE, asked_share, expected_hit_rate, linear
from edgert.memory.profile import DeviceProfile, HitCurve, Layout, Limit
from edgert.memory.shape import ModelShape, Overheads, Phase

# KV takes memory in cells of this many tokens (edgert/engine/kv_cache.py).
CELLS_PER_BUCKET = 256
# Of a model that was not rehearsed: norms, RoPE, residual sums, products, and the threads' meeting after each; and
# Python's part of a block (lease, binding, call), of which a layer has two. Measured on two cores of 2025.
_OPS_PER_LAYER, _OP_S = 24, 4e-6
_BLOCKS_PER_LAYER, _BLOCK_S = 2, 6e-5
_IN_FLIGHT_BYTES = 20 * 2**20
_ROWS_AT_ONCE = 8  # of the embedding, one of which takes as long as the smallest read (offload/window.py)
# Prefill in parts over prefill in whole batches of 512 (measured, edgert/engine/blockwise.py).
_PART_COST = {256: 1.02, 128: 1.09}
# What a prompt takes of one thread beside products and attention, for each value of a hidden state and layer: norms,
# rotations, sums, and rounding for products (27, 22 and 25 ns: SmolLM2-135M, Qwen2.5-0.5B, SmallThinker-4B's shape).
# And for each value of a chosen expert's output: its input gathered, its output put in order, weighed and added.
_VALUE_S, _EXPERT_VALUE_S = 25e-9, 12e-9
# A matrix product that reads memory at this share of the device's bandwidth waits for memory.
_MEMORY_BOUND_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a plan decides: where the weights' bytes lie, and in which layout they compute."""

    weights: Literal["resident", "streamed"]
    pinned_bytes: int = 0
    window_bytes: int = 0
    pool_slots: int = 0  # experts that have room
    part_tokens: int = 256  # of a batch, computed at once where weights stream: the same bits, smaller buffers
    repacked: Mapping[Phase, frozenset[int]] = field(default_factory=dict)

    def layout(self, type_id: int, phase: Phase) -> Layout:
        return "repack" if type_id in self.repacked.get(phase, ()) else "plain"


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of one pass, by what they are spent on, and what would have to be faster."""

    read_s: float
    multiply_s: float
    attend_s: float
    overhead_s: float
    total_s: float
    limit: Limit


def kv_bytes(shape: ModelShape, n_tokens: int) -> int:
    """Memory of the dense cache that holds `n_tokens`.

    n_tokens, up to the next multiple of 256, times 2 (K and V) * n_layers * KV heads * head size * bytes of a value.
    Where steps attend to a set of tokens, as edgert/memory/kv.py says.
    """
    if shape.kv is not None:
        return shape.kv.bytes(shape.kv_bytes_per_token, n_tokens)
    return -(-n_tokens // CELLS_PER_BUCKET) * CELLS_PER_BUCKET * shape.kv_bytes_per_token


def token_bytes(shape: ModelShape, n_tokens: int) -> int:
    """What a text of `n_tokens` takes where weights stream: KV, and n_tokens * the hidden state between two layers
    (which KV on disk has counted for those that pass together)."""
    passing = 0 if shape.kv is not None and shape.kv.tier == "disk" else n_tokens
    return kv_bytes(shape, n_tokens) + passing * shape.hidden_bytes_per_token


def repacked_bytes(shape: ModelShape, sizes: Sizes) -> int:
    """The second copy of what computes faster repacked: each such matrix once more, in the same size."""
    types = frozenset[int]().union(*sizes.repacked.values())
    return sum(n_bytes for type_id, n_bytes in shape.repackable_bytes.items() if type_id in types)


def memory_bytes(shape: ModelShape, overheads: Overheads, sizes: Sizes, n_tokens: int) -> int:
    """Peak memory of the process with `n_tokens` in the cache.

    Resident: process + growth + compute buffer + file + repacked copy + KV.
    Streamed: process + growth + compute buffers + rows of the embedding + pinned + window + slots of experts + KV +
    n_tokens * hidden state; and where not even a layer's experts have room, their outputs for all batches but one.
    With KV on disk, both: + compute buffers of a prompt that passes layer by layer.
    """
    if sizes.weights == "resident":
        return (overheads.resident_bytes + shape.file_bytes + repacked_bytes(shape, sizes) + kv_bytes(shape, n_tokens)
                + staging_bytes(shape, max(overheads.compute_bytes.values())))
    keeps = sizes.pool_slots < shape.n_experts
    kept_bytes = max(0, n_tokens - overheads.batch_size) * shape.kept_bytes_per_token if keeps else 0
    return (overheads.streamed_bytes(sizes.part_tokens) + sizes.pinned_bytes + sizes.window_bytes
            + sizes.pool_slots * shape.slot_bytes + token_bytes(shape, n_tokens) + kept_bytes
            + staging_bytes(shape, overheads.compute_bytes[sizes.part_tokens]))


def staging_bytes(shape: ModelShape, compute_bytes: int) -> int:
    """Compute buffers that a prompt needs once more where KV is on disk: it passes through graphs of its own."""
    return compute_bytes if shape.kv is not None and shape.kv.tier == "disk" else 0


def streamed_bytes(shape: ModelShape, sizes: Sizes) -> int:
    """What every pass reads: large tensors that are not pinned. Each only once, whatever the number of tokens."""
    if sizes.weights == "resident":
        return 0
    return max(0, shape.large_bytes + shape.small_bytes - sizes.pinned_bytes)


def hit_rate(shape: ModelShape, sizes: Sizes, n_tokens: int,
             curve: HitCurve = HIT_CURVE) -> float:
    """Share of a pass's experts that need not be read. A prompt asks for each once, and begins with none. One token: by
    recency; where not even its own have room, (slots - used) / (layers * used - used) of what would be found if they
    had, for a layer's need slots while they compute."""
    if sizes.weights == "resident" or not shape.n_experts:
        return 1.0
    if n_tokens > 1:
        return 0.0
    used, of_token = shape.n_experts_used, shape.n_layers * shape.n_experts_used
    if sizes.pool_slots >= of_token:
        return expected_hit_rate(min(1.0, sizes.pool_slots / shape.n_slots), curve)
    kept = max(0, sizes.pool_slots - used) / max(1, of_token - used)
    return kept * expected_hit_rate(of_token / shape.n_slots, curve)


def missed_expert_bytes(shape: ModelShape, sizes: Sizes, n_tokens: int,
                        curve: HitCurve = HIT_CURVE) -> float:
    """What one pass reads of the experts: (1 - hit rate) * share of the experts asked for * bytes of all of them."""
    if not shape.n_experts:
        return 0.0
    asked = asked_share(shape.n_experts_used / shape.n_experts, n_tokens, curve) * _expert_layers(shape, n_tokens)
    return (1 - hit_rate(shape, sizes, n_tokens, curve)) * asked * shape.n_slots * shape.slot_bytes


def overlap(shape: ModelShape, sizes: Sizes) -> float:
    """The share of the shorter of reading and computing that hides behind the longer.

    (window - least window) / max(largest block, 20 MiB), between 0 and 1: the least window reads a block, then
    computes; with another block's worth on its way, the disk is busy meanwhile.
    """
    ahead = sizes.window_bytes - least_window(shape)
    return min(1.0, max(0.0, ahead / comfortable_bytes(shape)))


def least_window(shape: ModelShape) -> int:
    """The largest block at once, and the gap that a ring leaves at its end."""
    return shape.largest_block_bytes + shape.largest_piece_bytes


def comfortable_bytes(shape: ModelShape) -> int:
    """What should be on its way beyond the least window. More is taken from what could stay: twice as much costs 5 % of
    Qwen2.5-0.5B's speed and 1 % of the 1.5B's, at a half of their sizes (benchmarks/plan_choices.py)."""
    return max(shape.largest_block_bytes, _IN_FLIGHT_BYTES)


def predict(shape: ModelShape, profile: DeviceProfile, sizes: Sizes, n_tokens: int, n_cached: int = 0, *,
            batch_size: int = 512, curve: HitCurve = HIT_CURVE) -> Prediction:
    """One pass of `n_tokens` over a cache of `n_cached`: a token of an answer, or a prompt.

    reading = bytes / disk bandwidth; computing = products + attention + overhead; both times what answers before have
    taught; total = rows of the embedding + longer + (1 - overlap) * shorter + what experts add + the wait for a set of
    cached tokens. While experts are waited for, the disk is not theirs alone: of what streams, as much as waits are of
    the time is read then, and delays them. And nothing is quicker than its reads.
    """
    byte_s, learnt = profile.corrected("disk") / profile.disk.bytes_s, profile.corrected("compute")
    read_s = streamed_bytes(shape, sizes) * byte_s
    multiply_s = _multiply(shape, profile, sizes, n_tokens, batch_size) * learnt
    expert_s = _multiply_experts(shape, profile, sizes, n_tokens, batch_size, curve) * learnt
    attend_s = _attend(shape, profile, n_tokens, n_cached) * learnt
    retrieved = shape.kv if n_tokens == 1 else None
    choose_s = retrieved.choose_s(n_cached) if retrieved else 0.0
    overhead_s = (_overhead(shape, profile, sizes, n_tokens, batch_size) + choose_s) * learnt
    compute_s = multiply_s + attend_s + overhead_s
    expert_read_s = missed_expert_bytes(shape, sizes, n_tokens, curve) * byte_s \
        + _expert_waits(shape, sizes, n_tokens, curve) * profile.disk.latency_s * profile.corrected("disk")
    rows_s = _rows(sizes, n_tokens) * profile.disk.latency_s * profile.corrected("disk")
    experts_s = _experts(shape, profile, hit_rate(shape, sizes, n_tokens, curve), n_tokens, expert_s, expert_read_s,
                         max(0.0, compute_s - read_s) * shape.foresees)
    waits_s = max(0.0, experts_s - expert_s)
    delay_s = read_s * waits_s / (compute_s + experts_s) if waits_s else 0.0
    beside_s = read_s - delay_s
    total_s = rows_s + max(beside_s, compute_s) + (1 - overlap(shape, sizes)) * min(beside_s, compute_s) + experts_s \
        + delay_s
    all_read_s = rows_s + read_s + expert_read_s
    total_s = max(total_s, all_read_s)
    if retrieved:
        wait_s = retrieved.wait_s(n_cached, shape.kv_bytes_per_token, profile.disk, total_s)
        total_s += wait_s * profile.corrected("disk")
    limit = _limit(shape, profile, all_read_s, compute_s + expert_s, multiply_s + expert_s, n_tokens)
    return Prediction(all_read_s, multiply_s + expert_s, attend_s, overhead_s, total_s, limit)


def _rows(sizes: Sizes, n_tokens: int) -> int:
    """How often a pass waits for rows of the embedding, which come before its first block: several at a time."""
    return -(-n_tokens // _ROWS_AT_ONCE) if sizes.weights == "streamed" else 0


def _experts(shape: ModelShape, profile: DeviceProfile, hits: float, n_tokens: int, expert_s: float, read_s: float,
             before_s: float) -> float:
    """Seconds that experts add, which nobody knows before their layer: those that are here compute while the others are
    read, as does what comes before them where they are known earlier (`before_s`: as long as the disk reads no blocks
    meanwhile); then the others compute.

    max(0, reading - before, hits * products) + (1 - hits) * products. For one token of a model that was rehearsed:
    products + what as many misses added, layers * used * (1 - hits), linear between the numbers that were tried. For a
    prompt, whose experts compute as they come: max(products, reading - before).
    """
    if n_tokens > 1:
        return max(expert_s, read_s - before_s)
    rehearsal = profile.rehearsals.get(shape.key)
    if rehearsal is None or not rehearsal.misses_s:
        return max(read_s - before_s, hits * expert_s) + (1 - hits) * expert_s
    n_missed = shape.n_layers * shape.n_experts_used * (1 - hits)
    return expert_s + linear(sorted(rehearsal.misses_s.items()), n_missed) * profile.corrected("disk")


def _expert_waits(shape: ModelShape, sizes: Sizes, n_tokens: int, curve: HitCurve) -> float:
    """How often a pass waits for a disk that is idle: in each layer that misses any of its experts, 1 - hits ** used.
    A prompt asks for so many at once that the disk is never idle."""
    if n_tokens > 1 or not shape.n_experts:
        return 0.0
    return shape.n_layers * (1 - hit_rate(shape, sizes, n_tokens, curve) ** shape.n_experts_used)


def _multiply(shape: ModelShape, profile: DeviceProfile, sizes: Sizes, n_tokens: int, batch_size: int) -> float:
    """Sum over batches and types: bytes of the matrices * seconds per byte at the batch's size; the head once, for the
    last token."""
    phase: Phase = "decode" if n_tokens <= 4 else "prefill"
    total_s = sum(profile.multiply(t, sizes.layout(t, phase), n_bytes, 1) for t, n_bytes in shape.head_bytes.items())
    for n in _batches(n_tokens, batch_size):
        total_s += sum(profile.multiply(t, sizes.layout(t, phase), n_bytes, n)
                       for t, n_bytes in shape.matrix_bytes.items())
    in_parts = sizes.weights == "streamed" and n_tokens > sizes.part_tokens and not shape.n_experts
    return total_s * (_PART_COST.get(sizes.part_tokens, 1.0) if in_parts else 1.0)


def _multiply_experts(shape: ModelShape, profile: DeviceProfile, sizes: Sizes, n_tokens: int, batch_size: int,
                      curve: HitCurve = HIT_CURVE) -> float:
    """Those that a batch asks for, each by its share of the tokens; and for more than one token, what they move."""
    if not shape.n_experts:
        return 0.0
    phase: Phase = "decode" if n_tokens <= 4 else "prefill"
    used, total_s = shape.n_experts_used / shape.n_experts, 0.0
    for n, (type_id, n_bytes) in product(_batches(n_tokens, batch_size), shape.expert_bytes.items()):
        layout: Layout = "experts" if sizes.layout(type_id, phase) == "plain" else "repack"
        asked = asked_share(used, n, curve)
        total_s += profile.multiply(type_id, layout, n_bytes * asked, n * used / asked)
    n_values = (n_tokens > 1) * n_tokens * shape.n_experts_used * shape.n_layers * shape.hidden_size
    return _expert_layers(shape, n_tokens) * (total_s + n_values * _EXPERT_VALUE_S / profile.n_threads)


def _expert_layers(shape: ModelShape, n_tokens: int) -> float:
    """The share of the layers whose experts a pass needs: of a prompt, the last layer's are for one token alone."""
    return 1.0 if n_tokens == 1 else 1 - 1 / shape.n_layers


def _batches(n_tokens: int, batch_size: int) -> list[int]:
    full, rest = divmod(n_tokens, batch_size)
    return [batch_size] * full + [rest] * (rest > 0)


def attention_products(shape: ModelShape, n_tokens: int, n_cached: int) -> float:
    """2 (K and V) * heads * head size * cached tokens that each token sees, summed over layers."""
    n_seen = n_cached if shape.kv is None or n_tokens > 1 else shape.kv.attended(n_cached)
    seen = n_tokens * (n_seen + (n_tokens + 1) / 2)
    n_full = shape.n_layers - shape.n_window_layers
    in_window = min(seen, n_tokens * shape.window)
    return 2 * shape.n_heads * shape.head_dim * (n_full * seen + shape.n_window_layers * in_window)


def _attend(shape: ModelShape, profile: DeviceProfile, n_tokens: int, n_cached: int) -> float:
    """Products * seconds for each, as heads of this size were measured. For one token of a model that was rehearsed:
    what its attention took over as many products, linear between the lengths that were tried and beyond."""
    rehearsal, products = profile.rehearsals.get(shape.key), attention_products(shape, n_tokens, n_cached)
    if rehearsal is None or n_tokens > 1:
        return profile.attend(shape.head_dim, products, n_tokens)
    points = [(attention_products(shape, 1, n), seconds) for n, seconds in sorted(rehearsal.attend_s.items())]
    return linear(points, products)


def _overhead(shape: ModelShape, profile: DeviceProfile, sizes: Sizes, n_tokens: int, batch_size: int) -> float:
    """What the pass of one token takes beyond its products, as it was rehearsed; else layers * 24 small operations and,
    where blocks come one by one, 2 blocks a layer of Python's time. More tokens add what each value takes."""
    rehearsal, streams = profile.rehearsals.get(shape.key), sizes.weights == "streamed"
    n_batches = -(-n_tokens // batch_size)
    values_s = (n_tokens - 1) * shape.n_layers * shape.hidden_size * _VALUE_S / profile.n_threads
    if rehearsal is None:
        blocks_s = (shape.n_layers * _BLOCKS_PER_LAYER + 1) * _BLOCK_S * streams
        return n_batches * (shape.n_layers * _OPS_PER_LAYER * _OP_S + blocks_s) + values_s
    plain = replace(sizes, repacked={})
    products_s = _multiply(shape, profile, plain, 1, 1) + _multiply_experts(shape, profile, plain, 1, 1)
    beyond_s = (rehearsal.blocks_s if streams else rehearsal.fused_s) - products_s
    # A rehearsal can be quicker than the products alone were measured to be: that is right for one token, not for more.
    return n_batches * (beyond_s if n_tokens == 1 else max(0.0, beyond_s)) + values_s


def _limit(shape: ModelShape, profile: DeviceProfile, read_s: float, compute_s: float, multiply_s: float,
           n_tokens: int) -> Limit:
    if read_s > compute_s:
        return "disk"
    used = shape.n_experts_used / shape.n_experts if shape.n_experts else 0.0
    touched = sum((*shape.matrix_bytes.values(), *shape.head_bytes.values())) + used * sum(shape.expert_bytes.values())
    waits = n_tokens == 1 and multiply_s > 0 and touched / multiply_s > _MEMORY_BOUND_SHARE * profile.memory_bytes_s
    return "memory bandwidth" if waits else "compute"
