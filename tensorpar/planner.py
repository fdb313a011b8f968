"""Which devices answer fastest together, predicted from what was measured: pure functions.

time per token = the slowest rank's compute (bytes that it reads over its speed, and from its disk what its memory
does not hold) + 2L sums over the network. Source: TPI-LLM, arXiv 2410.00531, appendix A.1, with speeds per device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from edgert.architectures.base import Hyperparameters
from tensorpar.collectives import Network, choose, seconds
from tensorpar.profile import Profile
from tensorpar.shares import Cut, Shard, shard

# What a sum costs beside the wire: packing, TLS, adding, and the interpreter (benchmarks/cluster.py).
SOFTWARE_S = 0.15e-3
# What a block costs each rank beside its weights: small operations, binding of graphs.
BLOCK_S = 0.05e-3
# A small device's SSD or fast card; what streams is bound by it.
_DISK_BYTES_PER_S = 5e8
# Beside the weights: interpreter, libraries, compute buffers, a KV cache of middling length.
_BESIDE_BYTES = 256 * 2**20
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
    found = [predict(cut, hp, subset, shard(cut, _weights(cut, subset)), wire_bytes or 4 * hp.hidden_size)
             for subset in _subsets(devices) if len(subset) <= cut.max_ranks]
    return sorted(found, key=lambda one: (-one.tokens_per_s, len(one.devices)))


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
    slowest_s, missing = 0.0, 0
    for device, one in zip(devices, shards, strict=True):
        over = max(0, cut.stored_bytes(one) + _BESIDE_BYTES - device.profile.memory_bytes)
        over = min(over, cut.read_bytes(one))
        seconds_ = cut.read_bytes(one) / device.profile.bytes_per_s + over / _DISK_BYTES_PER_S
        slowest_s, missing = max(slowest_s, seconds_), missing + over
    slowest_s += 2 * hp.n_layers * BLOCK_S
    network = network_of(devices[1:])
    network_s = 0.0
    if len(devices) > 1:
        one_sum_s = seconds(choose(wire_bytes, len(devices), network), wire_bytes, len(devices), network)
        network_s = network.latency_s + 2 * hp.n_layers * (one_sum_s + SOFTWARE_S)
    return Prediction(tuple(one.name for one in devices), tuple(shards), slowest_s, network_s, missing, network)


def _weights(cut: Cut, devices: Sequence[Device]) -> list[float]:
    """Each device's part of the work: by speed, and no more than its memory holds while another has room."""
    rates = [one.profile.bytes_per_s for one in devices]
    total_bytes = cut.attention_bytes + cut.stored_ffn_bytes + cut.leader_bytes
    beside = [_BESIDE_BYTES + (cut.replicated_bytes if rank == 0 else 0) for rank in range(len(devices))]
    caps = [max(one.profile.memory_bytes - n_bytes, 2**20) / total_bytes
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
    """The links to all workers as one: the slowest decides. Two ranks are a mesh."""
    return Network(max((one.latency_s for one in workers), default=1e-6),
                   min((one.bytes_per_s for one in workers), default=1e12), is_mesh=len(workers) == 1)


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
