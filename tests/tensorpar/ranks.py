"""Every rank of a group in this process, each in a thread of its own, connected by pairs of sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.registry import open_architecture
from edgert.engine.collective import Collective
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.layouts import Layouts
from edgert.engine.resident import ResidentWeights
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Tensor
from edgert.gguf.model_file import ModelFile
from tensorpar.collectives import Group, Network, PassStart
from tensorpar.division import shard
from tensorpar.link import Link
from tensorpar.shares import Cut, Shard, splits_head
from tensorpar.slice_file import SliceFile
from tensorpar.wire import WireName

DEADLINE_S = 120.0
Floats = NDArray[np.float32]
NETWORK = Network(latency_s=1e-4, bytes_per_s=1e9, is_mesh=True)


class Recorder:
    """A Collective that passes on to another and keeps what it sees: every sum, and the hidden state before it.

    With `taught`, each sum is replaced by the next of those, so that every block computes from known inputs.
    """

    def __init__(self, inner: Collective, taught: Sequence[Floats] = ()) -> None:
        self._inner, self._taught = inner, iter(taught)
        self.rank, self.world_size, self.splits_head = inner.rank, inner.world_size, inner.splits_head
        self.sums: list[Floats] = []
        self.hidden: list[Floats] = []

    @property
    def selected(self) -> NDArray[np.int64] | None:
        return self._inner.selected

    @selected.setter
    def selected(self, positions: NDArray[np.int64] | None) -> None:
        self._inner.selected = positions

    def broadcast(self, hidden: Tensor) -> None:
        self._inner.broadcast(hidden)
        self._hidden = hidden

    def all_reduce(self, partial: Tensor) -> Tensor:
        self.hidden.append(np.array(Backend.array(self._hidden)))
        return self._record(self._inner.all_reduce(partial))

    def reduce(self, partial: Tensor) -> Tensor:
        return self._record(self._inner.reduce(partial))

    def gather(self, logits: Floats) -> Floats:
        return self._inner.gather(logits)

    def _record(self, summed: Tensor) -> Tensor:
        values = Backend.array(summed)
        self.sums.append(values.copy())
        taught = next(self._taught, None)
        if taught is not None:
            values[...] = taught
        return summed


@contextmanager
def open_engine(path: Path, *, fused: bool | None = None) -> Iterator[Engine]:
    """An engine over resident weights in the file's own layout, one thread."""
    file = ModelFile.open(path)
    arch, backend = open_architecture(file), Backend(1)
    plain = Layouts({"prefill": frozenset(), "decode": frozenset()})
    kv = DenseKVCache(backend, arch.hp, 1024)
    engine = Engine(arch, ResidentWeights(backend, file, arch, plain), kv, backend, fused=fused)
    try:
        yield engine
    finally:
        engine.close()


def random_tokens(n_tokens: int, seed: int = 0) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).integers(0, 300, n_tokens)]


def shards_of(path: Path, weights: Sequence[float], *, splits_head: bool = False) -> tuple[Shard, ...]:
    model = ModelFile.open(path)
    return shard(Cut.of(model, open_architecture(model)), weights, splits_head=splits_head)


@contextmanager
def open_ranks(path: Path, directory: Path, shards: Sequence[Shard], *, wire: WireName = "f32",
               taught: Sequence[Floats] = ()) -> Iterator[list[Engine]]:
    """An engine for each shard of the model at `path`, with a Recorder each."""
    directory.mkdir(exist_ok=True)
    model = ModelFile.open(path)
    hp, n_ranks = open_architecture(model).hp, len(shards)
    links: list[dict[int, Link]] = [{} for _ in shards]
    for a, b in combinations(range(n_ranks), 2):
        ends = socket.socketpair()
        links[a][b], links[b][a] = Link(ends[0], b), Link(ends[1], a)
    with ExitStack() as opened:
        engines = []
        for rank, one in enumerate(shards):
            part = directory / f"{path.stem}-{n_ranks}-{rank}.gguf"
            SliceFile(model, hp, one).write(part)
            engine = opened.enter_context(open_engine(part, fused=False))
            engine.collective = Recorder(Group(
                rank, n_ranks, links[rank], network=NETWORK, wire=wire, splits_head=splits_head(shards),
                head_rows=[each.head_rows for each in shards]), taught)
            engines.append(engine)
        try:
            yield engines
        finally:
            for link in (one for of_rank in links for one in of_rank.values()):
                link.close()


def step(engines: Sequence[Engine], token_ids: Sequence[int], n_outputs: int = 1) -> Floats:
    """One step of all ranks; the leader's logits."""
    logits: list[Floats] = []
    groups = [engine.collective._inner for engine in engines]

    def run(rank: int) -> None:
        engine, ids = engines[rank], np.array(token_ids, np.int32)
        if rank == 0:
            groups[0].begin(PassStart(engine.kv.length, len(ids), n_outputs))
            logits.append(engine.step(ids, n_outputs).copy())
            return
        start = groups[rank].follow()
        assert start == PassStart(engine.kv.length, len(ids), n_outputs)
        engine.step(np.zeros(start.n_tokens, np.int32), start.n_outputs)

    in_threads(run, len(engines))
    return logits[0]


def in_threads(run: Callable[[int], None], n: int) -> None:
    threads = [threading.Thread(target=run, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
