"""How fast a whole model is on a cluster of this machine's processes, against one and against what is possible.

Told by benchmarks/cluster.py.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast, get_args

from cluster_models import decode_ms, load, pin, ranks_ms, running
from cluster_processes import TestCluster
from cluster_sums import measure_sum

from edgert.architectures.registry import open_architecture
from edgert.cpu import usable_cores
from edgert.ggml.library import load_libraries
from edgert.gguf.model_file import ModelFile
from tensorpar.collectives import Algorithm, Group, Network, seconds
from tensorpar.identity import Identity
from tensorpar.leader import ClusterEngine
from tensorpar.planner import N_CACHED
from tensorpar.workers import ClusterOptions

_MEMORY_SHARE, _N_COMPOSED = 0.6, 24
# Two programs of one process each: a neighbour on the other core, and one that has one thread and then two.
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
_THREADS = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from cluster_models import decode_ms, load
with load(Path(sys.argv[2]), None) as one, load(Path(sys.argv[2]), None, threads=2) as two:
    print(*(decode_ms(runtime, 32) for _ in range(int(sys.argv[3])) for runtime in (one, two)))
"""


def pays(args: argparse.Namespace) -> None:
    """Two pinned processes against one; and what two cores give at most: two processes that compute all on their own,
    each beside the other, and one process that has a thread on each, which need not talk over sockets."""
    threads = subprocess.run([sys.executable, "-c", _THREADS, str(Path(__file__).parent), str(args.model),
                              str(args.runs)], capture_output=True, text=True, check=True)
    in_turn = [float(word) for word in threads.stdout.split()]
    of_threads = statistics.median(a / b for a, b in zip(in_turn[::2], in_turn[1::2], strict=True))
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
              f"with sums that cost nothing at most {most:.3f}; two threads of one process are {of_threads:.3f} times "
              f"as fast as one")


@contextmanager
def _neighbour(model: Path) -> Iterator[None]:
    """Another process decodes a copy of the model on the other core, on and on: of one file, what one has read from
    memory the other would find in their cache."""
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copy(model, directory)
        os.sync()  # else the copy is written while somebody measures
        process = subprocess.Popen([sys.executable, "-c", _DECODE, str(Path(__file__).parent), copy],
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


def sets(args: argparse.Namespace) -> None:
    """Two pinned processes whose tokens attend to a long text, and to 512 tokens of it. The text is random, so that a
    head has nothing to find in it: for speed alone."""
    prompt = random.Random(0).choices(range(200, 20_000), k=args.context - 128)
    pin(os.getpid(), 0)
    with running(1) as made:
        _pin_workers(made)
        for _ in range(args.runs):
            found = []
            for kv_budget in (None, 512):  # a worker has one leader at a time
                with load(args.model, ClusterOptions("all", discovery_s=0), context=args.context,
                          kv_budget=kv_budget) as runtime:
                    found.append(decode_ms(runtime, 64, prompt))
                    attended = runtime.engine.selected_tokens
            print(f"{args.model.name} on two, {len(prompt)} tokens: {found[0]:.1f} ms a token over all of them, "
                  f"{found[1]:.1f} over {attended}; ratio {found[0] / found[1]:.2f}", flush=True)


def _pin_workers(made: TestCluster) -> None:
    for one in made.workers:
        assert one.process is not None
        pin(one.process.pid, 1)


@contextmanager
def _far(port: int, delay_ms: float) -> Iterator[tuple[int, int]]:
    """A port that reaches another with so much delay, and the process that does it: its own, for it would take the
    interpreter from the leader."""
    process = subprocess.Popen([sys.executable, Path(__file__).with_name("delay_relay.py"), "0", f"127.0.0.1:{port}",
                                "--ms", str(delay_ms)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process.pid
    finally:
        process.kill()
        process.wait()


def near_limit(args: argparse.Namespace) -> None:
    """Time per token at a delay, against what the slowest rank computes (while the others do, on these cores) and 2L
    sums: by the delay as it is set, as it is measured through relays that need these cores too, and as long as sums
    alone take through such relays. And the processor's time of all of them."""
    set_s, algorithms = 1e-3, get_args(Algorithm)[:2]
    load_libraries()
    hp = open_architecture(ModelFile.open(args.model)).hp
    for n_ranks in (2, 4):
        with tempfile.TemporaryDirectory() as directory:
            identity = Identity.load_or_create(Path(directory), "bench")
            sums_s = {one: measure_sum(n_ranks, 1000 * set_s, one, identity, hp.hidden_size)[0] / 1000
                      for one in algorithms}
        with running(n_ranks - 1) as made, ExitStack() as relays:
            far = [relays.enter_context(_far(one.port, 1000 * set_s)) for one in made.workers]
            _redirect(made, [port for port, _ in far])
            for algorithm in algorithms:
                with load(args.model, ClusterOptions("all", discovery_s=0, algorithm=algorithm)) as runtime:
                    engine = cast(ClusterEngine, runtime.engine)
                    found = ranks_ms(runtime, made, 32, [pid for _, pid in far])
                    if len(engine._ranks) != n_ranks - 1:
                        print(f"N={n_ranks}: a worker was lost meanwhile")
                        continue
                    network = cast(Group, engine.collective).network
                    physical_s = [seconds(algorithm, 4 * hp.hidden_size, n_ranks, Network(latency_s, 1e9, True))
                                  for latency_s in (set_s, network.latency_s)]
                    of_set, of_measured, of_sums = (found.token_ms / (max(found.compute_ms) + 2000 * hp.n_layers * one)
                                                    for one in (*physical_s, sums_s[algorithm]))
                    computed, used = (" ".join(f"{one:.1f}" for one in ms) for ms in (found.compute_ms, found.cpu_ms))
                    print(f"N={n_ranks} {algorithm:<8} {found.token_ms:7.2f} ms a token; ranks compute {computed} ms; "
                          f"{of_set:.3f}x of the slowest and 2L sums at {1000 * set_s:.2f} ms (goal 1.10x), "
                          f"{of_measured:.3f}x at {1000 * network.latency_s:.2f} ms as measured, {of_sums:.3f}x at "
                          f"{1000 * sums_s[algorithm]:.2f} ms for a sum alone; processors' time of ranks {used} ms, of "
                          f"relays {found.others_cpu_ms:.1f}; {usable_cores()} cores", flush=True)


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
            _redirect(made, [relays.enter_context(_far(one.port, delay_ms))[0] if delay_ms else one.port
                             for one in made.workers])
            for devices in (1, 2):
                with load(args.model, ClusterOptions(devices, discovery_s=0)) as runtime:
                    expected = cast(ClusterEngine, runtime.engine).prediction.tokens_per_s
                    got = 1000 / decode_ms(runtime, 32, prompt)
                    print(f"{delay_ms} ms, {devices} devices: {expected:.2f} tokens/s predicted, {got:.2f} measured "
                          f"({(expected / got - 1) * 100:+.0f} %)", flush=True)
            with load(args.model, ClusterOptions("auto", discovery_s=0)) as runtime:
                print(f"{delay_ms} ms, left to itself: {runtime.plan()['cluster']['reason']}", flush=True)
