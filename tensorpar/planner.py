"""Which devices answer fastest together, predicted from what was measured: pure functions.

time per token = for every block, what the slowest rank computes, for they meet after it; 2L sums over the network; the
output head, on the leader alone or by rows on all, whose logits then travel to it. Where weights stream, no less than
what the slowest disk reads meanwhile. Sources: TPI-LLM, arXiv 2410.00531, appendix A.1, with speeds per device; what a
device takes is the memory manager's (edgert/memory/).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import get_args

from edgert.architectures.base import Hyperparameters
from tensorpar.collectives import Network, choose, seconds
from tensorpar.profile import Profile
from tensorpar.shares import Balance, Bytes, Cut, Shard, length, shard, splits_head

# What a sum costs beside the wire: packing, TLS, adding, and the interpreter (benchmarks/cluster.py).
SOFTWARE_S = 0.05e-3
# What a layer takes beside the arithmetic of its matrices: some 24 small operations.
_LAYER_S = 2e-5
# Of a question and its answer: attention over so many cached tokens.
N_CACHED = 256
# Beside weights and KV cache: compute buffers, and what the process grows by (Qwen2.5-1.5B: 20 to 22 MiB).
_BESIDE_BYTES = 32 * 2**20
# A device this near to the fastest counts as equally fast: two measurements of one differ by as much, and who has more
# than its part is waited for at every sum.
_ALIKE = 0.93
# Subsets of up to this many workers are all looked at: 2**6. Of more, the fastest of every number.
_MAX_SUBSETS_OF = 6


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
    found = [max((predict(cut, hp, subset, shards, wire_bytes or 4 * hp.hidden_size)
                  for shards in _divisions(cut, subset)), key=lambda one: one.tokens_per_s)
             for subset in _subsets(devices) if len(subset) <= cut.max_ranks]
    return sorted(found, key=lambda one: (-one.tokens_per_s, len(one.devices)))


def _divisions(cut: Cut, devices: Sequence[Device]) -> Iterator[tuple[Shard, ...]]:
    """What is worth a prediction: by each balance, the output head on the leader, and by rows on all."""
    for balance in get_args(Balance):
        for by_rows in (False, True) if 1 < len(devices) <= cut.max_head_ranks else (False,):
            yield shard(cut, _weights(cut, devices, balance, by_rows=by_rows), balance, splits_head=by_rows)


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
    over = [min(cut.read_bytes(one), max(0, cut.kept_bytes(one) + _BESIDE_BYTES - device.profile.memory_bytes))
            for device, one in pairs]
    together_s = (max(_attention_s(cut, hp, device.profile, one) for device, one in pairs)
                  + max(_product_s(device.profile, cut.ffn, length(one.ffn) / cut.ffn_size) for device, one in pairs)
                  + max(_product_s(device.profile, cut.head, length(one.head_rows) / cut.n_head_rows)
                        for device, one in pairs)
                  + _LAYER_S * hp.n_layers)
    read_s = max(n_bytes / device.profile.disk_bytes_s for n_bytes, device in zip(over, devices, strict=True))
    network = network_of(devices[1:])
    network_s = 0.0
    if len(devices) > 1:
        one_sum_s = seconds(choose(wire_bytes, len(devices), network), wire_bytes, len(devices), network)
        network_s = network.latency_s + 2 * hp.n_layers * (one_sum_s + SOFTWARE_S)
        if splits_head(shards):
            network_s += _gather_s(4 * (cut.n_head_rows - length(shards[0].head_rows)), network)
    return Prediction(tuple(one.name for one in devices), tuple(shards), max(together_s, read_s - network_s), network_s,
                      sum(over), network)


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


def _weights(cut: Cut, devices: Sequence[Device], balance: Balance, *, by_rows: bool) -> list[float]:
    """Each device's part of the work: by speed, and no more than its memory holds while another has room."""
    rates = [1 / (_product_s(one.profile, cut.attention) + _product_s(one.profile, cut.ffn)) for one in devices]
    rates = [max(rates) if one > _ALIKE * max(rates) else one for one in rates]
    divided_bytes, leaders_bytes = cut.attention_bytes + cut.stored_ffn_bytes + cut.kv_bytes, 0
    if balance == "bytes" or by_rows:
        divided_bytes += cut.head_bytes
    else:
        leaders_bytes = cut.head_bytes
    beside = [_BESIDE_BYTES + (leaders_bytes if rank == 0 else 0) for rank in range(len(devices))]
    caps = [max(one.profile.memory_bytes - n_bytes, 2**20) / divided_bytes
            for one, n_bytes in zip(devices, beside, strict=True)]
    if sum(caps) <= 1:
        return caps  # everybody streams
    shares, fixed = [0.0] * len(devices), set[int]()
    while len(fixed) < len(devices):
        free = [index for index in range(len(devices)) if index not in fixed]
        left = 1 - sum(shares[index] for index in fixed)
        rate = sum(rates[index] for index in free)
        for index in free:
            shares[index] = left * rates[index] / rate
        full = [index for index in free if shares[index] > caps[index]]
        if not full:
            break
        for index in full:
            shares[index] = caps[index]
            fixed.add(index)
    return shares


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
