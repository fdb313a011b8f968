"""The leading device: it connects to the workers, gives each its part, and computes with them as rank 0.

`ClusterEngine` is an engine like any other. When a worker is lost in a step, the survivors take its part over, the
tokens so far pass once more, and the step goes on; whoever asked for logits sees a pause.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture
from edgert.engine.collective import Collective, Solo
from edgert.engine.engine import Engine
from edgert.errors import OutOfMemory, PeerLost
from edgert.ggml.backend import Cancelled
from edgert.gguf.model_file import ModelFile
from edgert.paths import Paths
from tensorpar.collectives import Group, MeshBroken, Network, PassStart
from tensorpar.members import Membership
from tensorpar.messages import Introduced, Introduction, Settings, Setup
from tensorpar.pace import Pace
from tensorpar.peer import Peer
from tensorpar.planner import Device, Prediction, predict, predictions, reason
from tensorpar.plans import Plans, is_worth_keeping
from tensorpar.profile import Profile
from tensorpar.shares import Cut, Shard, merge, splits_head
from tensorpar.slice_cache import SliceCache
from tensorpar.slice_file import SliceFile
from tensorpar.sum_times import SumTimes
from tensorpar.workers import ClusterOptions, Workers

# One way: from here on, the 2L sums of a pass take longer than what a guess or two cost in computing.
_FAR_S = 3e-4
# Looking for devices that are away takes up to some seconds: not before every answer of a conversation.
_LOOK_AGAIN_S = 10.0
_log = logging.getLogger(__name__)


class OpenRank(Protocol):
    """Opens a model file (the model's own, or a slice) with the user's settings, as rank 0 of a collective."""

    def __call__(self, file: ModelFile, collective: Collective) -> Engine: ...


class ClusterEngine(Engine):
    """Rank 0 of a group of devices, or this device alone where that is faster."""

    def __init__(self, file: ModelFile, arch: Architecture, paths: Paths, profile: Profile, settings: Settings,
                 open_rank: OpenRank, options: ClusterOptions) -> None:
        membership = Membership.leading(paths)
        self._file, self._whole = file, arch
        self._cut = Cut.of(file, arch, settings.context_length, settings.kv_type)
        self._options, self._settings, self._open_rank = options, settings, open_rank
        self._plans = Plans(paths)
        self._cache, self._profile, self._name = SliceCache(paths), profile, membership.name
        self._workers = Workers(membership, options, self._stop_if_cancelled)
        self._ranks: list[Peer] = []  # of the running epoch, rank 1 first
        self._shards: tuple[Shard, ...] = ()
        self._epoch, self._token_ids = 0, list[int]()
        self._reason, self._in_pass, self._may_mesh = "", False, True
        self.prediction: Prediction
        self._inner: Engine | None = None
        self._pace, self._sum_times = Pace(), SumTimes()
        self._slow: int | None = None
        try:
            for problem in self._workers.connect():
                _log.warning("%s", problem)
            self._plan_anew()
        except BaseException:
            self._workers.close()
            raise
        self._looked_s = time.monotonic()

    # -- the engine --------------------------------------------------------------------------------------------
    def step(self, token_ids: NDArray[np.int32], n_outputs: int = 1) -> NDArray[np.float32]:
        del self._token_ids[self.kv.length:]
        if self._inner is None:  # what was to follow a loss could not be opened
            self._plan_anew()
        wanted = [*self._token_ids, *token_ids.tolist()]
        self._leave_behind_slow()
        try:
            return self._whole_step(wanted, n_outputs)
        finally:
            self._token_ids = wanted[:self.kv.length]  # a step that was stopped has whole batches

    def _whole_step(self, wanted: list[int], n_outputs: int) -> NDArray[np.float32]:
        """Until the cache holds all that is wanted, with whoever is left."""
        while True:
            missing = np.array(wanted[self.kv.length:], np.int32)
            try:
                if isinstance(self.collective, Group):
                    self._begin(self.collective, PassStart(self.kv.length, len(missing), n_outputs))
                began_s, waited_s = time.monotonic(), self._waited_s()
                assert self._inner is not None
                logits = self._inner.step(missing, n_outputs)
                if len(missing) == 1:
                    self._slow = self._pace.passed(time.monotonic() - began_s, {
                        rank: now_s - waited_s[rank] for rank, now_s in self._waited_s().items()})
                self._in_pass = False
                return logits
            except PeerLost as lost:
                self._go_on_without(lost)
            except MeshBroken as broken:
                self._go_on_without_mesh(broken)

    @property
    def selected_tokens(self) -> int | None:
        return None if self._inner is None else self._inner.selected_tokens

    def _begin(self, group: Group, start: PassStart) -> None:
        """Ready all ranks for a pass. Refuses a prompt that does not fit before anybody hears of it."""
        self.kv.check_room(start.start + start.n_tokens, self._whole.hp.context_length)
        if self._in_pass:  # the one before was cancelled or has failed
            for peer in self._ranks:
                peer.flush()
        self._in_pass = True
        group.begin(start)

    @property
    def passes_are_costly(self) -> bool:
        is_far = isinstance(self.collective, Group) and self.collective.network.latency_s > _FAR_S
        return is_far or super().passes_are_costly

    def refresh(self) -> None:
        """Between two requests: devices that are back, or new, are used from here on."""
        if self._inner is not None:
            self._inner.refresh()
        n_before, now_s = len(self._workers.connected), time.monotonic()
        if now_s - self._looked_s < _LOOK_AGAIN_S:
            return
        self._workers.connect()
        self._looked_s = time.monotonic()
        if len(self._workers.connected) > n_before:
            self._plan_anew()

    def plan(self) -> dict[str, Any]:
        ranks = [{"name": name, "heads": one.heads, "ffn": one.ffn, "head_rows": one.head_rows,
                  "bytes": self._cut.stored_bytes(one)} for name, one in zip(self._names(), self._shards, strict=True)]
        sent = {one.member.name: one.sent_slice_bytes for one in self._ranks}
        peer_bytes = {one.member.name: (one.link.sent_bytes, one.link.received_bytes) for one in self._ranks}
        return {**super().plan(), "cluster": {"devices": ranks, "epoch": self._epoch, "reason": self._reason,
                                              "sent_slice_bytes": sent, "peer_bytes": peer_bytes,
                                              "wire": self._options.wire, "sums": self._sum_times.to_dict(),
                                              "is_mesh": isinstance(self.collective, Group)
                                              and self.collective.network.is_mesh}}

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None
        self._workers.close()

    def _names(self) -> list[str]:
        return [self._name, *(one.member.name for one in self._ranks)]

    def _stop_if_cancelled(self) -> bool:
        """For whoever waits for a worker, of which nothing says when it is due."""
        if self._inner is not None and self._inner.backend.cancel.is_set:
            raise Cancelled
        return False

    # -- plans -------------------------------------------------------------------------------------------------
    def _plan_anew(self) -> None:
        """Choose among the connected devices, and give each its part. A device that cannot take it is left out."""
        while True:
            plan = self._choose()
            by_name = {one.member.name: one for one in self._workers.connected}
            try:
                self._establish([by_name[name] for name in plan.devices[1:]], plan.shards, plan.network)
                self.prediction = plan
                return
            except PeerLost as lost:
                self._report(lost)
                self._workers.drop(self._peer(lost))

    def _choose(self) -> Prediction:
        devices = [Device(self._name, self._profile), *map(self._device, self._workers.connected)]
        found = predictions(self._cut, self._whole.hp, devices)
        wanted: int | None = None
        if self._options.devices != "auto":
            limit = len(devices) if self._options.devices == "all" else self._options.devices
            wanted = min(limit, len(devices), self._cut.max_ranks)
        chosen = next(one for one in found if wanted is None or len(one.devices) == wanted)
        self._reason = reason(chosen, found)
        _log.info("%s", self._reason)
        return self._as_before(chosen, devices) if len(chosen.devices) > 1 else chosen

    def _as_before(self, chosen: Prediction, devices: Sequence[Device]) -> Prediction:
        """The same devices with the parts that they had at an earlier start, if that is about as fast."""
        by_name = {one.member.name: one.member.fingerprint for one in self._workers.connected}
        key = Plans.key(self._file.fingerprint(), [by_name[name] for name in chosen.devices[1:]])
        kept = self._plans.get(key, self._cut, len(chosen.devices))
        if kept is not None:
            own = [one for one in devices if one.name in chosen.devices]
            before = predict(self._cut, self._whole.hp, own, kept, 4 * self._whole.hp.hidden_size)
            if is_worth_keeping(before, chosen):
                return before
        self._plans.put(key, chosen.shards)
        return chosen

    def _establish(self, peers: list[Peer], shards: tuple[Shard, ...], network: Network) -> None:
        """Open an epoch: every rank gets its slice and opens it, all at once. Raises PeerLost."""
        self._epoch += 1
        self._in_pass, self._pace, self._slow = False, Pace(), None
        self._ranks, self._shards = peers, shards
        for rank, peer in enumerate(peers, start=1):
            peer.assign(rank)
        if not peers:
            self._open(self._file, Solo())
            return
        slices = [SliceFile(self._file, self._whole.hp, one) for one in shards]
        with ThreadPoolExecutor(len(peers), "set up") as pool:
            pending = [pool.submit(peer.set_up, self._setup(rank, slices[rank], network), slices[rank], _notice)
                       for rank, peer in enumerate(peers, start=1)]
            own = self._own_slice(slices[0])
            for one in pending:
                one.result()
        if len(peers) > 1:
            network = self._introduce(peers, network)
        links = {rank: peer.link for rank, peer in enumerate(peers, start=1)}
        for peer in peers:
            peer.link.check_alive = self._check_all  # one may wait for another
        group = Group(0, len(shards), links, epoch=self._epoch, network=network, wire=self._options.wire,
                      algorithm=self._options.algorithm, splits_head=splits_head(shards),
                      head_rows=[one.head_rows for one in shards], times=self._sum_times)
        self._open(own, group)

    def _setup(self, rank: int, slice_file: SliceFile, network: Network) -> Setup:
        if len(self._shards) > 2:
            network = replace(network, is_mesh=False)  # until all have met
        return Setup(self._epoch, rank, len(self._shards), slice_file.key.hex(), slice_file.size_bytes, self._settings,
                     network, self._options.wire, self._options.algorithm, splits_head(self._shards))

    def _introduce(self, peers: Sequence[Peer], network: Network) -> Network:
        """Let the workers connect to each other, so that sums need not pass through here. The network as it then is.
        Raises PeerLost."""
        network = replace(network, is_mesh=False)
        if self._may_mesh and self._options.algorithm != "star":
            meeting = secrets.token_hex(16)
            all_ = [Introduced(rank, one.host, one.port, one.member.certificate)
                    for rank, one in enumerate(peers, start=1)]
            with ThreadPoolExecutor(len(peers), "meet") as pool:
                introduced = [pool.submit(peer.introduce, Introduction(meeting, tuple(
                    one for one in all_ if one.rank != rank))) for rank, peer in enumerate(peers, start=1)]
                for one in introduced:
                    one.result()
                speeds = [one.result() for one in [pool.submit(peer.meet) for peer in peers]]
            if all(speeds):
                found = [one for one in speeds if one is not None]
                network = Network(max(network.latency_s, *(one.latency_s for one in found)),
                                  min(network.bytes_per_s, *(one.bytes_per_s for one in found)), is_mesh=True)
        for peer in peers:
            peer.agree(network)
        return network

    def _check_all(self) -> None:
        for peer in self._ranks:
            peer.check_alive()

    def _own_slice(self, slice_file: SliceFile) -> ModelFile:
        if not self._cache.has(slice_file.key):
            self._cache.make_room(slice_file.key, slice_file.size_bytes)
            slice_file.write(self._cache.path(slice_file.key))
        return ModelFile.open(self._cache.path(slice_file.key))

    def _open(self, file: ModelFile, collective: Collective) -> None:
        """Become the engine of this part. Where there is no room for it beside the one before, that one goes first. A
        request to stop that came meanwhile stays."""
        before, engine = self._inner, None
        try:
            engine = self._open_rank(file, collective)
        except OutOfMemory:
            if before is None:
                raise
        if before is not None:
            self._inner = None
            before.close()
        if engine is None:
            engine = self._open_rank(file, collective)
        if before is not None and before.backend.cancel.is_set:
            engine.cancel()
        self._inner = engine
        self.become(engine)

    # -- who is slow -------------------------------------------------------------------------------------------
    def _waited_s(self) -> dict[int, float]:
        """By rank, how long it was waited for since it is connected."""
        return {rank: peer.link.waited_s for rank, peer in enumerate(self._ranks, start=1)}

    def _leave_behind_slow(self) -> None:
        """Go on without a device that has become slow, where that is predicted to be faster than it is now."""
        rank, self._slow = self._slow, None
        if rank is None:
            return
        own = merge([self._shards[0], self._shards[rank]])
        shards = [own or self._cut.whole(), *(one for index, one in enumerate(self._shards) if index not in (0, rank)
                                               and own is not None)]
        devices = [Device(self._name, self._profile),
                   *(self._device(peer) for index, peer in enumerate(self._ranks, start=1) if index != rank)]
        without = predict(self._cut, self._whole.hp, devices[:len(shards)], shards, 4 * self._whole.hp.hidden_size)
        if without.tokens_per_s * self._pace.pass_s > 1:
            self._go_on_without(PeerLost(rank, "it has become slow"))

    @staticmethod
    def _device(peer: Peer) -> Device:
        return Device(peer.member.name, peer.profile, peer.latency_s, peer.bytes_per_s)

    # -- losses ------------------------------------------------------------------------------------------------
    def _peer(self, lost: PeerLost) -> Peer:
        return self._ranks[lost.rank - 1]

    def _report(self, lost: PeerLost) -> None:
        _log.warning("%s was lost (%s); the answer goes on with the other devices", self._peer(lost).member.name,
                     lost.why)

    def _go_on_without(self, lost: PeerLost) -> None:
        """This device takes the lost one's part over, and the others keep theirs: no weight has to travel."""
        while True:
            self._report(lost)
            gone = self._peer(lost)
            self._workers.drop(gone)
            index = self._ranks.index(gone) + 1
            own = merge([self._shards[0], self._shards[index]])
            peers = [one for one in self._ranks if one is not gone]
            try:
                if own is None or not peers:
                    self._alone()
                    return
                others = [one for rank, one in enumerate(self._shards) if rank not in (0, index)]
                network = replace(self._network(), is_mesh=len(peers) == 1)
                self._establish(peers, (own, *others), network)
                return
            except PeerLost as another:
                lost = another
            except OutOfMemory:
                self._alone()
                return

    def _go_on_without_mesh(self, broken: MeshBroken) -> None:
        """All sums through this device from now on; and without whoever does not answer it either."""
        _log.warning("%s; sums go through this device", broken.message)
        self._may_mesh = False
        try:
            self._establish(self._ranks, self._shards, self._network())
        except PeerLost as lost:
            self._may_mesh = True  # it was not the link
            self._go_on_without(lost)

    def _network(self) -> Network:
        assert isinstance(self.collective, Group)  # something was lost
        return self.collective.network

    def _alone(self) -> None:
        self._establish([], (self._cut.whole(),), Network(1e-6, 1e12, False))


def _notice(text: str) -> None:
    _log.warning("%s", text)
