"""The theoretical model: how many bytes a plan takes, and how long a token and a prompt take with it.

Pure functions of a model's shape, a device's profile, a plan's sizes and the number of tokens. Each says its formula.
Sources: SpeContext, arXiv 2512.00722, section 6 (memory as a sum of closed terms); TPI-LLM, arXiv 2410.00531, section
3.3 (reading hides behind computing while it takes no longer).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgert.memory.computing import attention, expert_layers, expert_products, overhead, products, touched_bytes
from edgert.memory.hits import HIT_CURVE, asked_share, expected_hit_rate, linear
from edgert.memory.kv import CELLS_PER_BUCKET
from edgert.memory.profile import DeviceProfile, HitCurve, Limit
from edgert.memory.shape import ModelShape, Overheads
from edgert.memory.sizes import Sizes, overlap

_ROWS_AT_ONCE = 8  # of the embedding, one of which takes as long as the smallest read (offload/window.py)
# A matrix product that reads memory at this share of the device's bandwidth waits for memory.
_MEMORY_BOUND_SHARE = 0.6


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
                + staging_bytes(shape, overheads, sizes))
    keeps = sizes.pool_slots < shape.n_experts
    kept_bytes = max(0, n_tokens - overheads.batch_size) * shape.kept_bytes_per_token if keeps else 0
    return (overheads.streamed_bytes(sizes.part_tokens) + sizes.pinned_bytes + sizes.window_bytes
            + sizes.pool_slots * shape.slot_bytes + token_bytes(shape, n_tokens) + kept_bytes
            + staging_bytes(shape, overheads, sizes))


def resident_set_bytes(shape: ModelShape, overheads: Overheads, sizes: Sizes, n_tokens: int) -> int:
    """What of `memory_bytes` is resident with `n_tokens` in the cache: it without the cells and buffers that are
    reserved for a longer text, which are no memory before they are written to."""
    planned, reserved = memory_bytes(shape, overheads, sizes, n_tokens), kv_bytes(shape, n_tokens)
    if shape.kv is None:
        return planned - reserved + n_tokens * shape.kv_bytes_per_token
    if n_tokens <= shape.kv.from_tokens:
        reserved += staging_bytes(shape, overheads, sizes)
    return planned - reserved + shape.kv.touched_bytes(shape.kv_bytes_per_token, n_tokens)


def staging_bytes(shape: ModelShape, overheads: Overheads, sizes: Sizes) -> int:
    """Compute buffers that a prompt needs once more where KV is on disk: it passes through graphs of its own."""
    if shape.kv is None or shape.kv.tier != "disk":
        return 0
    by_part = overheads.compute_bytes
    return max(by_part.values()) if sizes.weights == "resident" else by_part[sizes.part_tokens]


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
    asked = asked_share(shape.n_experts_used / shape.n_experts, n_tokens, curve) * expert_layers(shape, n_tokens)
    return (1 - hit_rate(shape, sizes, n_tokens, curve)) * asked * shape.n_slots * shape.slot_bytes


def predict(shape: ModelShape, profile: DeviceProfile, sizes: Sizes, n_tokens: int, n_cached: int = 0, *,
            batch_size: int = 512, curve: HitCurve = HIT_CURVE) -> Prediction:
    """One pass of `n_tokens` over a cache of `n_cached`: a token of an answer, or a prompt.

    reading = bytes / disk bandwidth; computing = products + attention + overhead; both times what answers before have
    taught; total = rows of the embedding + longer + (1 - hidden) * shorter + what experts add + the wait for a set of
    cached tokens. While experts are waited for, the disk is not theirs alone: of what streams, as much as waits are of
    the time is read then, and delays them. And nothing is quicker than its reads.
    """
    disk_s, learnt = profile.corrected("disk"), profile.corrected("compute")
    read_byte_s = disk_s / profile.disk.bytes_s
    read_s = streamed_bytes(shape, sizes) * read_byte_s
    multiply_s = products(shape, profile, sizes, n_tokens, batch_size) * learnt
    expert_s = expert_products(shape, profile, sizes, n_tokens, batch_size, curve) * learnt
    attend_s = attention(shape, profile, n_tokens, n_cached) * learnt
    retrieved = shape.kv if n_tokens == 1 else None
    choose_s = retrieved.choose_s(n_cached) if retrieved else 0.0
    overhead_s = (overhead(shape, profile, sizes, n_tokens, batch_size) + choose_s) * learnt
    compute_s = multiply_s + attend_s + overhead_s
    expert_read_s = missed_expert_bytes(shape, sizes, n_tokens, curve) * read_byte_s \
        + _expert_waits(shape, sizes, n_tokens, curve) * profile.disk.latency_s * disk_s
    rows_s = _rows(sizes, n_tokens) * profile.disk.latency_s * disk_s
    experts_s = _experts(shape, profile, hit_rate(shape, sizes, n_tokens, curve), n_tokens, expert_s, expert_read_s,
                         max(0.0, compute_s - read_s) * shape.foresees)
    waits_s = max(0.0, experts_s - expert_s)
    delay_s = read_s * waits_s / (compute_s + experts_s) if waits_s else 0.0
    beside_s = read_s - delay_s
    hidden = _hidden_share(shape, profile, sizes)
    total_s = rows_s + max(beside_s, compute_s) + (1 - hidden) * min(beside_s, compute_s) + experts_s + delay_s
    all_read_s = rows_s + read_s + expert_read_s
    total_s = max(total_s, all_read_s)
    if retrieved:
        total_s += retrieved.wait_s(n_cached, shape.kv_bytes_per_token, profile.disk, total_s) * disk_s
    limit = _limit(shape, profile, all_read_s, compute_s + expert_s, multiply_s + expert_s, n_tokens)
    return Prediction(all_read_s, multiply_s + expert_s, attend_s, overhead_s, total_s, limit)


def _hidden_share(shape: ModelShape, profile: DeviceProfile, sizes: Sizes) -> float:
    """The share of the shorter of reading and computing that hides behind the longer.

    overlap * (1 - 2 * disk bandwidth / memory bandwidth), at least 0: a streamed byte takes memory from computing for
    as long as a copy of it would. (Two cores of 2025, 32 ps: beside computing, a byte took 19 ps of a prompt's
    products, 25 of a token's, and 15 and 47 of Qwen2.5-1.5B's and 0.5B's tokens, of which 99 and 53 MB streamed.)
    """
    disk_bytes_s = profile.disk.bytes_s / profile.corrected("disk")
    return overlap(shape, sizes.window_bytes) * max(0.0, 1 - 2 * disk_bytes_s / profile.memory_bytes_s)


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


def _limit(shape: ModelShape, profile: DeviceProfile, read_s: float, compute_s: float, multiply_s: float,
           n_tokens: int) -> Limit:
    if read_s > compute_s:
        return "disk"
    waits = n_tokens == 1 and multiply_s > 0 \
        and touched_bytes(shape) / multiply_s > _MEMORY_BOUND_SHARE * profile.memory_bytes_s
    return "memory bandwidth" if waits else "compute"
