"""How fast a whole model is on a cluster of this machine's processes, against one and against what is possible.

Told by benchmarks/cluster.py.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

from cluster_models import decode_ms, load, pin, ranks_ms, running
from cluster_processes import TestCluster

from edgert.cpu import usable_cores
from tensorpar.collectives import Algorithm, Group, Network, seconds
from tensorpar.leader import ClusterEngine
from tensorpar.planner import N_CACHED
from tensorpar.workers import ClusterOptions

_MEMORY_SHARE, _N_COMPOSED = 0.6, 24
_DECODE = """
import os, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from cluster_models import decode_ms, load, pin
pin(os.getpid(), 1)
with load(Path(sys.argv[2]), None) as runtime:
    decode_ms(runtime, 4)
    print("computes", flush=True)
    while True:
        decode_ms(runtime, 256)
"""


def pays(args: argparse.Namespace) -> None:
    """Two pinned processes against one; and what two cores give at most: two processes that compute all on their own,
    each beside the other."""
    pin(os.getpid(), 0)
    with load(args.model, None) as one, _neighbour(args.model):
        beside_ms = decode_ms(one, 32)
    with running(1) as made:
        _pin_workers(made)
        with (load(args.model, None) as one,
              load(args.model, ClusterOptions("all", discovery_s=0)) as two):
            pairs = [(decode_ms(one, 32), decode_ms(two, 32)) for _ in range(args.runs)]
            found = ranks_ms(two, made, 32)
            plan = two.plan()["cluster"]
        alone_ms, together_ms = (statistics.median(of_one) for of_one in zip(*pairs, strict=True))
        ratios = [a / b for a, b in pairs]
        most = 2 * alone_ms / beside_ms
        computed = " and ".join(f"{ms:.2f}" for ms in found.compute_ms)
        rows = [sum(end - start for start, end in one["head_rows"]) for one in plan["devices"]]
        print(f"{args.model.name}: alone {1000 / alone_ms:.2f} tokens/s, two processes {1000 / together_ms:.2f}, ratio "
              f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}; goal 1.7); rows of the head "
              f"{rows}; {plan['reason']}\nof {found.token_ms:.2f} ms the ranks are busy for {computed}, half of one's "
              f"time is {alone_ms / 2:.2f}; two that share nothing but memory take {beside_ms:.2f} ms a token each, so "
              f"with sums that cost nothing at most {most:.3f}")


@contextmanager
def _neighbour(model: Path) -> Iterator[None]:
    """Another process decodes the same model on the other core, on and on."""
    process = subprocess.Popen([sys.executable, "-c", _DECODE, str(Path(__file__).parent), str(model)],
                               stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def composition(args: argparse.Namespace) -> None:
    """Devices with memory for 0.6 of the model each, and one disk: one alone streams, two need not."""
    memory_bytes = int(_MEMORY_SHARE * args.model.stat().st_size)
    with running(1, ("--memory", str(memory_bytes))) as made:
        for _ in range(args.runs):  # one after the other: together they would share the disk's cache
            found = []
            for options in (None, ClusterOptions("all", discovery_s=0)):
                with load(args.model, options, memory_bytes=memory_bytes) as runtime:
                    before = runtime.engine.weights.streamed_bytes
                    token_ms = decode_ms(runtime, _N_COMPOSED)
                    read = (runtime.engine.weights.streamed_bytes - before) / (_N_COMPOSED + 1)
                    found.append((token_ms, read / 2**20))
            streams = re.findall(r"streamed_per_pass ([0-9.]+) MiB", made.workers[0].log())
            (alone_ms, alone_mib), (together_ms, together_mib) = found
            print(f"{args.model.name} in {memory_bytes / 2**20:.0f} MiB each: alone {1000 / alone_ms:.2f} tokens/s, "
                  f"{alone_mib:.1f} MiB read a token; two {1000 / together_ms:.2f}, where the leader reads "
                  f"{together_mib:.1f} and the worker {streams[-1] if streams else '0'}; ratio "
                  f"{alone_ms / together_ms:.2f} (goal 3 and nothing read)", flush=True)


def _pin_workers(made: TestCluster) -> None:
    for one in made.workers:
        assert one.process is not None
        pin(one.process.pid, 1)


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
    """Time per token at a delay, against what the slowest rank computes (while the others do, on these cores) and 2L
    sums; by the delay as it is set, and as it is measured through relays that need these cores too."""
    set_s = 1e-3
    for n_ranks in (2, 4):
        with running(n_ranks - 1) as made, ExitStack() as relays:
            _redirect(made, [relays.enter_context(_far(one.port, 1000 * set_s)) for one in made.workers])
            algorithms: tuple[Algorithm, ...] = ("star", "one-shot")
            for algorithm in algorithms:
                with load(args.model, ClusterOptions("all", discovery_s=0, algorithm=algorithm)) as runtime:
                    engine = cast(ClusterEngine, runtime.engine)
                    found = ranks_ms(runtime, made, 32)
                    if len(engine._ranks) != n_ranks - 1:
                        print(f"N={n_ranks}: a worker was lost meanwhile")
                        continue
                    hp, slowest_ms = engine.arch.hp, max(found.compute_ms)
                    network = cast(Group, engine.collective).network
                    limits_ms = [slowest_ms + 2000 * hp.n_layers * seconds(
                        algorithm, 4 * hp.hidden_size, n_ranks, Network(latency_s, 1e9, True))
                        for latency_s in (set_s, network.latency_s)]
                    computed = " ".join(f"{one:.1f}" for one in found.compute_ms)
                    print(f"N={n_ranks} {algorithm:<8} {found.token_ms:7.2f} ms a token; ranks compute {computed} ms; "
                          f"{found.token_ms / limits_ms[0]:.3f}x of the slowest and 2L sums at {1000 * set_s:.2f} ms, "
                          f"{found.token_ms / limits_ms[1]:.3f}x at {1000 * network.latency_s:.2f} ms as measured "
                          f"(goal 1.10x); {usable_cores()} cores", flush=True)


def _redirect(made: TestCluster, ports: Sequence[int]) -> None:
    """Let the leader know the relays' ports as its workers'."""
    from dataclasses import replace

    from tensorpar.members import Membership

    membership = Membership.load(made.leader_paths)
    assert membership is not None
    replace(membership, members=tuple(replace(one, port=port) for one, port in zip(membership.members, ports,
                                                                                    strict=True))).save()


def predicted(args: argparse.Namespace) -> None:
    """Tokens/s as predicted and as measured, alone and together, after as many tokens as predictions are for."""
    prompt = [100 + number % 100 for number in range(N_CACHED - 16)]
    pin(os.getpid(), 0)
    for delay_ms in args.delays:
        with running(1) as made, ExitStack() as relays:
            _pin_workers(made)
            _redirect(made, [relays.enter_context(_far(one.port, delay_ms)) if delay_ms else one.port
                             for one in made.workers])
            for devices in (1, 2):
                with load(args.model, ClusterOptions(devices, discovery_s=0)) as runtime:
                    expected = cast(ClusterEngine, runtime.engine).prediction.tokens_per_s
                    got = 1000 / decode_ms(runtime, 32, prompt)
                    print(f"{delay_ms} ms, {devices} devices: {expected:.2f} tokens/s predicted, {got:.2f} measured "
                          f"({(expected / got - 1) * 100:+.0f} %)", flush=True)
            with load(args.model, ClusterOptions("auto", discovery_s=0)) as runtime:
                print(f"{delay_ms} ms, left to itself: {runtime.plan()['cluster']['reason']}", flush=True)
