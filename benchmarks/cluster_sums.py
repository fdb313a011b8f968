"""What one sum over devices costs: algorithms, numbers of ranks, delays, in plain text and with TLS, and Gloo's ring.

Ranks are processes of this machine, over real sockets; delays come from a relay. Told by benchmarks/cluster.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import ssl
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from delay_relay import join

from edgert.architectures.registry import open_architecture
from edgert.cpu import usable_cores
from edgert.ggml.library import load_libraries
from edgert.gguf.model_file import ModelFile
from tensorpar import link as link_module
from tensorpar.collectives import Algorithm, Group, Network
from tensorpar.identity import Identity
from tensorpar.link import Link

_HIDDEN, _N_SUMS, _DELAYS_MS = 4096, 200, (0.0, 0.5, 1.0, 5.0)
Ends = dict[int, socket.socket]


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        return a, server.accept()[0]


def _wire(n_ranks: int, delay_ms: float) -> tuple[list[Ends], Callable[[], None]]:
    """Every two ranks connected, and what passes the bytes on (in a process of its own)."""
    ends: list[Ends] = [{} for _ in range(n_ranks)]
    middle = []
    for a, b in combinations(range(n_ranks), 2):
        ends[a][b], left = _tcp_pair()
        if delay_ms:
            right, ends[b][a] = _tcp_pair()
            middle.append((left, right))
        else:
            ends[b][a] = left

    def pass_on() -> None:
        for left, right in middle:
            join(left, right, delay_ms / 1000)
        time.sleep(3600)

    return ends, pass_on


def _tls(identity: Identity, sock: socket.socket, *, serves: bool) -> ssl.SSLSocket:
    side = ssl.PROTOCOL_TLS_SERVER if serves else ssl.PROTOCOL_TLS_CLIENT
    return identity._context(side, [identity.certificate]).wrap_socket(sock, server_side=serves)


def _rank(rank: int, ends: Ends, algorithm: Algorithm, identity: Identity | None, n_values: int, result: Any) -> None:
    from edgert.ggml.abi import TYPE_F32
    from edgert.ggml.backend import Backend
    from edgert.ggml.graph import Context

    links = {other: Link(sock if identity is None else _tls(identity, sock, serves=rank < other), other)
             for other, sock in sorted(ends.items())}
    group = Group(rank, len(ends) + 1, links, network=Network(1e-4, 1e9, True), algorithm=algorithm)
    backend, context = Backend(1), Context(1)
    buffer, tensor = backend.alloc("partial", 4 * n_values), context.tensor(TYPE_F32, (n_values, 1))
    buffer.place(tensor, buffer.base)
    Backend.array(tensor)[...] = 0.0
    times = []
    for _ in range(_N_SUMS):
        began_s = time.perf_counter()
        group.all_reduce(tensor)
        times.append(time.perf_counter() - began_s)
    link_module.SPIN_S, before_s = 0.0, time.process_time()  # waiting is no work
    for _ in range(_N_SUMS):
        group.all_reduce(tensor)
    if rank == 1:
        result.send((_typical(times), (time.process_time() - before_s) / _N_SUMS))


def _typical(times: Sequence[float]) -> float:
    """The median over two sums in a row: ranks that swap at once fall into step a whole latency apart, and each then
    waits for every second sum only."""
    return statistics.median((a + b) / 2 for a, b in pairwise(times[20:]))


def _gloo_rank(rank: int, n_ranks: int, path: str, result: Any) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=n_ranks)
    values, times = torch.ones(_HIDDEN), []
    for _ in range(_N_SUMS):
        began_s = time.perf_counter()
        dist.all_reduce(values)
        times.append(time.perf_counter() - began_s)
    if rank == 1:
        result.send(_typical(times))


def measure_sum(n_ranks: int, delay_ms: float, algorithm: Algorithm, identity: Identity | None,
                 n_values: int = _HIDDEN) -> tuple[float, float]:
    """Milliseconds of a sum, as rank 1 sees it, and of its own processor's time in it."""
    ends, pass_on = _wire(n_ranks, delay_ms)
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(False)
    ranks = [fork.Process(target=_rank, args=(rank, ends[rank], algorithm, identity, n_values, send))
             for rank in range(n_ranks)]
    relays = [fork.Process(target=pass_on)] if delay_ms else []
    for process in (*relays, *ranks):
        process.start()
    try:
        passed_s, own_s = receive.recv() if receive.poll(120) else (float("nan"), float("nan"))
        return passed_s * 1000, own_s * 1000
    finally:
        for process in ranks:
            process.join(20)
        for process in relays:
            process.kill()
            process.join()
        for sock in (one for of_rank in ends for one in of_rank.values()):
            sock.close()


def _measure_gloo(n_ranks: int) -> float:
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(False)
    with tempfile.TemporaryDirectory() as directory:
        ranks = [fork.Process(target=_gloo_rank, args=(rank, n_ranks, f"{directory}/rendezvous", send))
                 for rank in range(n_ranks)]
        for process in ranks:
            process.start()
        milliseconds = float(receive.recv()) * 1000 if receive.poll(60) else float("nan")
        for process in ranks:
            process.join(20)
    return milliseconds


def collectives(_: argparse.Namespace) -> None:
    print(f"one sum of {_HIDDEN} float32, median ms at rank 1 (physical: star 2a, one-shot a, scatter 2a), and ms of "
          f"its processor's time; {usable_cores()} cores\n")
    print(f"{'ranks':>5} {'delay ms':>8} {'wire':>6} {'star':>8} {'one-shot':>9} {'scatter':>8}   {'own: star':>9} "
          f"{'one-shot':>9} {'scatter':>8}")
    algorithms: tuple[Algorithm, ...] = ("star", "one-shot", "scatter")
    with tempfile.TemporaryDirectory() as directory:
        identity = Identity.load_or_create(Path(directory), "bench")
        for n_ranks in (2, 4):
            for delay_ms in _DELAYS_MS:
                for name, who in (("plain", None), ("TLS", identity)):
                    row = [measure_sum(n_ranks, delay_ms, one, who) for one in algorithms]
                    passed, own = zip(*row, strict=True)
                    print(f"{n_ranks:>5} {delay_ms:>8} {name:>6} {passed[0]:>8.3f} {passed[1]:>9.3f} {passed[2]:>8.3f}"
                          f"   {own[0]:>9.3f} {own[1]:>9.3f} {own[2]:>8.3f}", flush=True)
    try:
        import torch  # noqa: F401
    except ImportError:
        print("\nPyTorch is not installed: no ring of Gloo beside these")
        return
    for n_ranks in (2, 4):
        print(f"{n_ranks:>5} {0.0:>8} {'plain':>6} Gloo's ring {_measure_gloo(n_ranks):>8.3f}", flush=True)


def tls(args: argparse.Namespace) -> None:
    """What encryption costs each token of a model: its 2L sums, in turn in plain text and with mutual TLS."""
    load_libraries()
    hp = open_architecture(ModelFile.open(args.model)).hp
    ways: tuple[Algorithm, ...] = ("star", "one-shot")
    with tempfile.TemporaryDirectory() as directory:
        identity = Identity.load_or_create(Path(directory), "bench")
        for n_ranks in (2, 4):
            for way in ways:
                rounds = [[measure_sum(n_ranks, 0.0, way, who, hp.hidden_size)[0] for who in (None, identity)]
                          for _ in range(args.runs)]
                plain_ms, tls_ms = (2 * hp.n_layers * statistics.median(one) for one in zip(*rounds, strict=True))
                print(f"N={n_ranks} {way:<8} {2 * hp.n_layers} sums of {hp.hidden_size} float32: plain {plain_ms:.2f} "
                      f"ms a token, TLS {tls_ms:.2f}, so {tls_ms - plain_ms:.2f} ms more (goal 2); "
                      f"{usable_cores()} cores", flush=True)
