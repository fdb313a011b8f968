"""What a cluster costs and brings, in tables: processes of this machine, real sockets, TLS, and delays by a relay.

    python benchmarks/cluster.py collectives                   a sum of 4096 values: algorithms, ranks, delays, TLS
    python benchmarks/cluster.py pays MODEL                    two processes on a core each against one on one core
    python benchmarks/cluster.py near-limit MODEL              time per token against compute + 2L sums, 1 ms delay
    python benchmarks/cluster.py equal MODEL                   160 tokens teacher-forced: deviations and KL, every wire
    python benchmarks/cluster.py predicted MODEL               tokens/s as predicted and as measured, at three delays

Every figure is a median; `pays` runs A and B in turn. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from cluster_processes import TestCluster, cluster
from delay_relay import join
from numpy.typing import NDArray

from edgert.cpu import usable_cores
from edgert.runtime import Runtime
from tensorpar import link as link_module
from tensorpar.collectives import Algorithm, Group, Network, seconds
from tensorpar.identity import Identity
from tensorpar.leader import ClusterEngine
from tensorpar.link import Link
from tensorpar.planner import N_CACHED
from tensorpar.workers import ClusterOptions

_HIDDEN, _N_SUMS, _DELAYS_MS = 4096, 200, (0.0, 0.5, 1.0, 5.0)
_PROMPT = list(range(100, 164))
Ends = dict[int, socket.socket]


# -- collectives -----------------------------------------------------------------------------------------------
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


def _rank(rank: int, ends: Ends, algorithm: Algorithm, identity: Identity | None, result: Any) -> None:
    from edgert.ggml.abi import TYPE_F32
    from edgert.ggml.backend import Backend
    from edgert.ggml.graph import Context

    links = {other: Link(sock if identity is None else _tls(identity, sock, serves=rank < other), other)
             for other, sock in sorted(ends.items())}
    group = Group(rank, len(ends) + 1, links, network=Network(1e-4, 1e9, True), algorithm=algorithm)
    backend, context = Backend(1), Context(1)
    buffer, tensor = backend.alloc("partial", 4 * _HIDDEN), context.tensor(TYPE_F32, (_HIDDEN, 1))
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


def _measure_sum(n_ranks: int, delay_ms: float, algorithm: Algorithm,
                 identity: Identity | None) -> tuple[float, float]:
    """Milliseconds of a sum, as rank 1 sees it, and of its own processor's time in it."""
    ends, pass_on = _wire(n_ranks, delay_ms)
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(False)
    ranks = [fork.Process(target=_rank, args=(rank, ends[rank], algorithm, identity, send))
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
                    row = [_measure_sum(n_ranks, delay_ms, one, who) for one in algorithms]
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


# -- whole models ----------------------------------------------------------------------------------------------
def _step(runtime: Runtime, token_ids: Sequence[int], n_outputs: int = 1) -> NDArray[np.float32]:
    return runtime.engine.step(np.array(token_ids, np.int32), n_outputs)


def _decode_ms(runtime: Runtime, n_tokens: int, prompt: Sequence[int] = _PROMPT) -> float:
    """Median milliseconds of a decoded token after a prompt."""
    runtime.engine.kv.truncate(0)
    _step(runtime, prompt)
    times = []
    for token_id in range(200, 200 + n_tokens):
        began_s = time.perf_counter()
        _step(runtime, [token_id])
        times.append(time.perf_counter() - began_s)
    return statistics.median(times) * 1000


def _pin(pid: int, core: int) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


@contextmanager
def _cluster(n_workers: int, options: Sequence[str] = ()) -> Iterator[TestCluster]:
    with tempfile.TemporaryDirectory() as directory, cluster(Path(directory), n_workers, options) as made:
        os.environ["EDGERT_HOME"] = str(made.leader_home)
        yield made


def _load(model: Path, options: ClusterOptions | None) -> Runtime:
    return Runtime.load(model, threads=1, context=1024, layout="plain", cluster=options)


def pays(args: argparse.Namespace) -> None:
    """Two pinned processes against one."""
    _pin(os.getpid(), 0)
    with _cluster(1) as made:
        process = made.workers[0].process
        assert process is not None
        _pin(process.pid, 1)
        with (_load(args.model, None) as one,
              _load(args.model, ClusterOptions("all", discovery_s=0)) as two):
            pairs = [(_decode_ms(one, 32), _decode_ms(two, 32)) for _ in range(args.runs)]
            ratios = [a / b for a, b in pairs]
            reason = two.plan()["cluster"]["reason"]
        print(f"{args.model.name}: alone {1000 / statistics.median(a for a, _ in pairs):.2f} tokens/s, two processes "
              f"{1000 / statistics.median(b for _, b in pairs):.2f}, ratio {statistics.median(ratios):.3f} "
              f"({min(ratios):.3f} to {max(ratios):.3f}; goal 1.7); {reason}")


@contextmanager
def _far(port: int, delay_ms: float) -> Iterator[int]:
    """A port that reaches another with so much delay, in a process of its own: its threads would take the interpreter
    from the leader."""
    process = subprocess.Popen([sys.executable, Path(__file__).with_name("delay_relay.py"), "0", f"127.0.0.1:{port}",
                                "--ms", str(delay_ms)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def near_limit(args: argparse.Namespace) -> None:
    """Time per token at a delay, against the slowest rank's compute and 2L sums."""
    delay_s = 1e-3
    for n_ranks in (2, 4):
        with _cluster(n_ranks - 1) as made, ExitStack() as relays:
            ports = [relays.enter_context(_far(one.port, 1000 * delay_s)) for one in made.workers]
            _redirect(made, ports)
            algorithms: tuple[Algorithm, ...] = ("star", "one-shot")
            for algorithm in algorithms:
                options = ClusterOptions("all", discovery_s=0, algorithm=algorithm)
                with _load(args.model, options) as runtime:
                    engine = cast(ClusterEngine, runtime.engine)
                    waited = [peer.link.waited_s for peer in engine._ranks]
                    measured_ms = _decode_ms(runtime, 32)
                    if len(engine._ranks) != n_ranks - 1:
                        print(f"N={n_ranks}: a worker was lost meanwhile")
                        continue
                    waited_ms = [(peer.link.waited_s - before) / 33 * 1000
                                 for peer, before in zip(engine._ranks, waited, strict=True)]
                    hp = engine.arch.hp
                    network = Network(delay_s, 1e9, True)
                    sums_ms = 2 * hp.n_layers * 1000 * seconds(algorithm, 4 * hp.hidden_size, n_ranks,
                                                               network)
                    limit_ms = measured_ms - sum(waited_ms) + sums_ms
                    print(f"N={n_ranks} {algorithm:<8} {measured_ms:7.2f} ms a token; 2L sums {sums_ms:7.2f} ms by "
                          f"formula, waited {sum(waited_ms):7.2f} ms, so {measured_ms / limit_ms:.3f}x of the leader's "
                          f"own time and the formula (goal 1.10x); {usable_cores()} cores", flush=True)


def _redirect(made: TestCluster, ports: Sequence[int]) -> None:
    """Let the leader know the relays' ports as its workers'."""
    from dataclasses import replace

    from tensorpar.members import Membership

    membership = Membership.load(made.leader_paths)
    assert membership is not None
    replace(membership, members=tuple(replace(one, port=port) for one, port in zip(membership.members, ports,
                                                                                    strict=True))).save()


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def equal(args: argparse.Namespace) -> None:
    """160 tokens of one device's own answer, teacher-forced through every split and wire."""
    with _cluster(3):
        with _load(args.model, None) as runtime:
            generation = runtime.generate(_PROMPT, max_tokens=160)
            generation.result()
            text = [*_PROMPT, *generation.token_ids, *range(100, 260)][:64 + 160]
            runtime.engine.kv.truncate(0)
            expected = _step(runtime, text, 160).copy()
        reference, targets = _log_softmax(expected), np.array(text[-159:])
        perplexity = np.exp(-reference[np.arange(159), targets].mean())
        print(f"{'devices':>7} {'wire':>5} {'worst deviation':>16} {'mean KL':>10} {'perplexity':>11} {'change':>8}")
        for n_devices in (1, 2, 3, 4):
            for wire in ("f32", "f16", "q8") if n_devices > 1 else ("f32",):
                options = ClusterOptions(n_devices, discovery_s=0, wire=cast(Any, wire))
                with _load(args.model, options) as runtime:
                    n_used = len(runtime.plan()["cluster"]["devices"])
                    got = _step(runtime, text, 160).copy()
                ours = _log_softmax(got)
                chosen = expected[np.arange(160), got.argmax(axis=1)]
                deviation = ((expected.max(axis=1) - chosen) / expected.std(axis=1)).max()
                kl = (np.exp(reference) * (reference - ours)).sum(axis=1).mean()
                own = np.exp(-ours[np.arange(159), targets].mean())
                print(f"{n_used:>7} {wire:>5} {deviation:>13.4f} sd {kl:>10.2e} {own:>11.3f} "
                      f"{(own / perplexity - 1) * 100:>7.2f}%", flush=True)


def predicted(args: argparse.Namespace) -> None:
    """Tokens/s as predicted and as measured, alone and together, after as many tokens as predictions are for."""
    prompt = [100 + number % 100 for number in range(N_CACHED - 16)]
    _pin(os.getpid(), 0)
    for delay_ms in (0.0, 1.0, 5.0):
        with _cluster(1) as made, ExitStack() as relays:
            for one in made.workers:
                assert one.process is not None
                _pin(one.process.pid, 1)
            _redirect(made, [relays.enter_context(_far(one.port, delay_ms)) if delay_ms else one.port
                             for one in made.workers])
            for devices in (1, 2):
                with _load(args.model, ClusterOptions(devices, discovery_s=0)) as runtime:
                    expected = cast(ClusterEngine, runtime.engine).prediction.tokens_per_s
                    got = 1000 / _decode_ms(runtime, 32, prompt)
                    print(f"{delay_ms} ms, {devices} devices: {expected:.2f} tokens/s predicted, {got:.2f} measured "
                          f"({(expected / got - 1) * 100:+.0f} %)", flush=True)
            with _load(args.model, ClusterOptions("auto", discovery_s=0)) as runtime:
                print(f"{delay_ms} ms, left to itself: {runtime.plan()['cluster']['reason']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function, n_runs in (("collectives", collectives, 0), ("pays", pays, 5), ("near-limit", near_limit, 0),
                                   ("equal", equal, 0), ("predicted", predicted, 0)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        if function is not collectives:
            command.add_argument("model", type=Path)
        if n_runs:
            command.add_argument("--runs", type=int, default=n_runs)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
