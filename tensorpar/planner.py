"""Which devices answer fastest together, predicted from what was measured: pure functions.

time per token = for every block, what the slowest rank computes, for they meet after it; 2L sums over the network; the
head, on the leader alone or by rows on all, whose logits then travel to it. What streams passes memory twice, and a
token takes what its disk does. A device has its part by speed, or what it holds, or what it holds and reads meanwhile.
Sources: TPI-LLM, arXiv 2410.00531, appendix A.1, with speeds per device; what a device takes is the memory manager's
(edgert/memory/).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple, get_args

from edgert.architectures.base import Hyperparameters
from edgert.memory.sizes import MAX_BLOCK_BYTES, comfortable_bytes, least_window
from tensorpar.collectives import Network, choose, seconds
from tensorpar.division import Yields, shard
from tensorpar.profile import Profile
from tensorpar.shares import Bytes, Cut, Shard, length, splits_head

# What a sum costs beside the wire: packing, TLS, adding, and the interpreter (benchmarks/cluster.py).
SOFTWARE_S = 0.05e-3
# What a layer takes beside the arithmetic of its matrices: some 24 small operations.
_LAYER_S = 2e-5
# Of a question and its answer: attention over so many cached tokens.
N_CACHED = 256
# What a layer takes more where its weights are not mapped: two blocks are bound anew for every token.
_BLOCKS_S = 7e-5
# Beside weights and KV cache: what the process grows by, rows of the embedding, the ends of pieces (Qwen2.5-1.5B: 16
# MiB); and compute buffers: so many vectors of the hidden size and of the FFN's, for a part of a batch.
_BESIDE_BYTES, _PART_TOKENS, _HIDDEN_VECTORS, _FFN_VECTORS = 18 * 2**20, 128, 9, 3
# One start leaves a device some MiB less than another.
_SPARE_BYTES = 8 * 2**20
_BISECTIONS = 30
# Where devices read, for so many times as long as they must, or as computing takes.
_READING = (1.0, 1.25, 1.6, 2.5)
# A device this near to the fastest counts as equally fast: two measurements of one differ by as much, and who has more
# than its part is waited for at every sum.
_ALIKE = 0.93
# Subsets of up to this many workers are all looked at: 2**6. Of more, the fastest of every number.
_MAX_SUBSETS_OF = 6


class _Part(NamedTuple):
    """Of a layer, what must be in memory at once."""

    largest_block_bytes: int
    largest_piece_bytes: int


@dataclass(frozen=True, slots=True)
class Device:
    """One device as the leader has measured it. The leader itself has no link."""

    name: str
    profile: Profile
    latency_s: float = 0.0
    bytes_per_s: float = 1e12


@dataclass(frozen=True, slots=True)
class Prediction:
    """What these devices (the leader first) would do together. Times are per token."""

    devices: tuple[str, ...]
    shards: tuple[Shard, ...]
    compute_s: float
    network_s: float
    missing_bytes: int
    """What the devices' memory does not hold, and is read for every token."""
    network: Network

    @property
    def tokens_per_s(self) -> float:
        return 1 / (self.compute_s + self.network_s)


def predictions(cut: Cut, hp: Hyperparameters, devices: Sequence[Device],
                wire_bytes: int | None = None) -> list[Prediction]:
    """One for every useful subset of the devices, of which the first leads; the fastest first."""
    found = [_best(cut, hp, subset, wire_bytes or 4 * hp.hidden_size)
             for subset in _subsets(devices) if len(subset) <= cut.max_ranks]
    return sorted(found, key=lambda one: (-one.tokens_per_s, len(one.devices)))


def _best(cut: Cut, hp: Hyperparameters, devices: Sequence[Device], wire_bytes: int) -> Prediction:
    """What these devices do, divided in the best way: with memory to spare, if nobody streams then."""
    with_less = [replace(one, profile=replace(one.profile, memory_bytes=one.profile.memory_bytes - _SPARE_BYTES))
                 for one in devices]
    for assumed in (with_less, devices):
        best = max((predict(cut, hp, assumed, shards, wire_bytes)
                    for shards in dict.fromkeys(_divisions(cut, hp, assumed))),
                   key=lambda one: (one.tokens_per_s, -one.missing_bytes))
        if best.missing_bytes == 0:
            break
    return predict(cut, hp, devices, best.shards, wire_bytes)


def _divisions(cut: Cut, hp: Hyperparameters, devices: Sequence[Device]) -> Iterator[tuple[Shard, ...]]:
    """What is worth a prediction: the output head on the leader, and by rows on all; by speed and, where something
    would stream then, by what devices have room for."""
    rates = _rates(cut, devices)
    for by_rows in (False, True) if 1 < len(devices) <= cut.max_head_ranks else (False,):
        fastest = shard(cut, rates, splits_head=by_rows)
        yield fastest
        if any(_missing_bytes(cut, hp, devices, fastest)):
            for rooms in _rooms(cut, hp, devices, 1 / sum(rates)):
                for yields in get_args(Yields):
                    yield shard(cut, rates, rooms, splits_head=by_rows, yields=yields)


def _rooms(cut: Cut, hp: Hyperparameters, devices: Sequence[Device], compute_s: float) -> Iterator[list[float]]:
    """Bytes of weights and cache for each device: what it holds; and what it holds and reads, when all read for equally
    long."""
    held = [one.profile.memory_bytes - _beside_bytes(cut, hp, len(devices), leads=rank == 0)
            for rank, one in enumerate(devices)]
    wanted = cut.attention_bytes + cut.stored_ffn_bytes + cut.head_bytes + cut.kv_bytes
    window_bytes = _window_bytes(cut, hp, len(devices))

    def and_read(seconds_: float) -> list[float]:
        return [max(n_bytes, n_bytes - window_bytes + seconds_ * one.profile.disk_bytes_s, 0.0)
                for n_bytes, one in zip(held, devices, strict=True)]

    yield [*map(float, held)]
    least_s, most_s = 0.0, max(0.0, *((wanted + window_bytes - n_bytes) / one.profile.disk_bytes_s
                                      for n_bytes, one in zip(held, devices, strict=True)))
    for _ in range(_BISECTIONS):
        middle_s = (least_s + most_s) / 2
        if sum(and_read(middle_s)) < wanted:
            least_s = middle_s
        else:
            most_s = middle_s
    yield from (and_read(more * max(most_s, compute_s)) for more in _READING)


def _subsets(devices: Sequence[Device]) -> Iterator[list[Device]]:
    leader, *workers = devices
    if len(workers) <= _MAX_SUBSETS_OF:
        for n in range(len(workers) + 1):
            yield from ([leader, *some] for some in combinations(workers, n))
        return
    fastest = sorted(workers, key=lambda one: -one.profile.bytes_per_s)
    yield from ([leader, *fastest[:n]] for n in range(len(fastest) + 1))


def predict(cut: Cut, hp: Hyperparameters, devices: Sequence[Device], shards: Sequence[Shard],
            wire_bytes: int) -> Prediction:
    """What these devices would do with these shards."""
    pairs = list(zip(devices, shards, strict=True))
    missing = _missing_bytes(cut, hp, devices, shards)
    together_s = (max(_attention_s(cut, hp, device.profile, one) for device, one in pairs)
                  + max(_product_s(device.profile, cut.ffn, length(one.ffn) / cut.ffn_size) for device, one in pairs)
                  + max(_product_s(device.profile, cut.head, length(one.head_rows) / cut.n_head_rows)
                        for device, one in pairs)
                  + max(n_bytes / device.profile.bytes_per_s for n_bytes, device in zip(missing, devices, strict=True))
                  + (_LAYER_S if _are_mapped(cut, hp, devices, shards) else _LAYER_S + _BLOCKS_S) * hp.n_layers)
    read_s = max(n_bytes / device.profile.disk_bytes_s for n_bytes, device in zip(missing, devices, strict=True))
    network = network_of(devices[1:])
    network_s = 0.0
    if len(devices) > 1:
        one_sum_s = seconds(choose(wire_bytes, len(devices), network), wire_bytes, len(devices), network)
        network_s = network.latency_s + 2 * hp.n_layers * (one_sum_s + SOFTWARE_S)
        if splits_head(shards):
            network_s += _gather_s(4 * (cut.n_head_rows - length(shards[0].head_rows)), network)
    return Prediction(tuple(one.name for one in devices), tuple(shards), max(together_s, read_s - network_s), network_s,
                      sum(missing), network)


def _beside_bytes(cut: Cut, hp: Hyperparameters, n_ranks: int, *, leads: bool) -> int:
    """What a device needs beside weights and cache. A leader that has no room for the table keeps hidden states: a
    prompt passes it layer by layer."""
    values = _HIDDEN_VECTORS * hp.hidden_size + _FFN_VECTORS * cut.ffn_size // n_ranks
    return _BESIDE_BYTES + 4 * _PART_TOKENS * values + (cut.hidden_bytes if leads else 0)


def _are_mapped(cut: Cut, hp: Hyperparameters, devices: Sequence[Device], shards: Sequence[Shard]) -> bool:
    """Whether all have room for their part as a file, with the table."""
    return all(cut.kept_bytes(one) + (cut.replicated_bytes if one.leads else 0)
               + _beside_bytes(cut, hp, len(devices), leads=one.leads) <= device.profile.memory_bytes
               for device, one in zip(devices, shards, strict=True))


def _missing_bytes(cut: Cut, hp: Hyperparameters, devices: Sequence[Device], shards: Sequence[Shard]) -> list[int]:
    """What each device reads for every token: what it has no room for, and what makes place for the window."""
    missing, window_bytes = [], _window_bytes(cut, hp, len(devices))
    for device, one in zip(devices, shards, strict=True):
        beside_bytes = _beside_bytes(cut, hp, len(devices), leads=one.leads)
        short = cut.kept_bytes(one) + beside_bytes - device.profile.memory_bytes
        beside_window = 0 if one.leads else cut.hidden_bytes
        missing.append(min(cut.read_bytes(one), short + window_bytes + beside_window) if short > 0 else 0)
    return missing


def _window_bytes(cut: Cut, hp: Hyperparameters, n_ranks: int) -> int:
    """What streams passes a window as wide as the memory manager makes it, for an equal part of a layer's attention or
    of its FFN; experts have slots."""
    of_layer = max(cut.attention_bytes, 0 if hp.n_experts else cut.ffn_bytes) // (hp.n_layers * n_ranks)
    block_bytes = min(of_layer, MAX_BLOCK_BYTES)
    part = _Part(block_bytes, block_bytes // 2)  # gate and up, or gate, up and down
    return least_window(part) + comfortable_bytes(part)


def _gather_s(n_bytes: int, network: Network) -> float:
    """What it costs that the other ranks' logits come to the leader, beside the sum that ends a pass anyhow."""
    return network.latency_s + n_bytes / network.bytes_per_s + SOFTWARE_S


def _attention_s(cut: Cut, hp: Hyperparameters, profile: Profile, one: Shard) -> float:
    """All layers' attention on one device: its part of the matrices, and its heads over what is cached."""
    share = length(one.heads) / cut.n_heads
    products = 2 * length(one.heads) * hp.head_dim * N_CACHED * hp.n_layers
    return _product_s(profile, cut.attention, share) + products * profile.attend_s


def _product_s(profile: Profile, matrices: Bytes, share: float = 1.0) -> float:
    return share * sum(profile.multiply(type_id, n_bytes) for type_id, n_bytes in matrices.items())


def _rates(cut: Cut, devices: Sequence[Device]) -> list[float]:
    """Layers that each device computes in a second, alone."""
    rates = [1 / (_product_s(one.profile, cut.attention) + _product_s(one.profile, cut.ffn)) for one in devices]
    return [max(rates) if one > _ALIKE * max(rates) else one for one in rates]


def network_of(workers: Sequence[Device]) -> Network:
    """The links to all workers as one: the slowest decides. Workers are expected to reach each other."""
    return Network(max((one.latency_s for one in workers), default=1e-6),
                   min((one.bytes_per_s for one in workers), default=1e12), is_mesh=True)


def reason(chosen: Prediction, others: Sequence[Prediction]) -> str:
    """Why these devices, in one sentence."""
    alone = next((one for one in others if len(one.devices) == 1), chosen)
    together = max((one for one in others if len(one.devices) > 1), key=lambda one: one.tokens_per_s, default=None)
    if len(chosen.devices) > 1:
        return (f"{len(chosen.devices)} devices: {chosen.tokens_per_s:.1f} tokens/s predicted, "
                f"{alone.tokens_per_s:.1f} alone")
    if together is None:
        return "this device alone: no other is there"
    return (f"this device alone: {chosen.tokens_per_s:.1f} tokens/s predicted; with {', '.join(together.devices[1:])} "
            f"{together.tokens_per_s:.1f}, of each token {together.network_s * 1000:.1f} ms on the network")
