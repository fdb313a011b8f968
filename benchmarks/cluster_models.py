"""A whole model on a cluster of this machine's processes: what benchmarks/cluster.py's measurements have in common."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import psutil
from cluster_processes import TestCluster, cluster
from numpy.typing import NDArray

from edgert.runtime import Runtime
from tensorpar.collectives import Group
from tensorpar.leader import ClusterEngine
from tensorpar.members import Membership
from tensorpar.peer import ask_status
from tensorpar.workers import ClusterOptions

PROMPT = list(range(100, 164))


def step(runtime: Runtime, token_ids: Sequence[int], n_outputs: int = 1) -> NDArray[np.float32]:
    return runtime.engine.step(np.array(token_ids, np.int32), n_outputs)


def decode_ms(runtime: Runtime, n_tokens: int, prompt: Sequence[int] = PROMPT) -> float:
    """Median milliseconds of a decoded token after a prompt."""
    prefill(runtime, prompt)
    times = []
    for token_id in range(200, 200 + n_tokens):
        began_s = time.perf_counter()
        step(runtime, [token_id])
        times.append(time.perf_counter() - began_s)
    return statistics.median(times) * 1000


def prefill(runtime: Runtime, prompt: Sequence[int] = PROMPT) -> None:
    runtime.engine.kv.truncate(0)
    step(runtime, prompt)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Mean milliseconds of a decoded token: in all; what each rank (the leader first) computed of it while the others
    did; and the processor's time of each rank, what waiting takes included, and of others who were named."""

    token_ms: float
    compute_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...]
    others_cpu_ms: float


def ranks_ms(runtime: Runtime, made: TestCluster, n_tokens: int, others: Sequence[int] = ()) -> Ranks:
    """Where a token's time goes on every rank, and in other processes."""
    engine, membership = cast(ClusterEngine, runtime.engine), Membership.load(made.leader_paths)
    assert membership is not None
    group = cast(Group, engine.collective)

    def workers_s() -> NDArray[np.float64]:
        return np.array([ask_status(one.member, membership.identity, one.host, one.port)["session"]["compute_s"]
                         for one in engine._ranks])

    pids = [os.getpid(), *(one.process.pid for one in made.workers if one.process is not None), *others]

    def processors_s() -> NDArray[np.float64]:
        return np.array([cpu_s(pid) for pid in pids])

    prefill(runtime)
    before_s, used_s, waited_s, began_s = workers_s(), processors_s(), group.waited_s, time.perf_counter()
    for token_id in range(200, 200 + n_tokens):
        step(runtime, [token_id])
    token_s = time.perf_counter() - began_s
    own_s = token_s - (group.waited_s - waited_s)
    per_token_ms = 1000 / n_tokens
    used_ms = (processors_s() - used_s) * per_token_ms
    n_ranks = len(pids) - len(others)
    return Ranks(token_s * per_token_ms, (own_s * per_token_ms, *((workers_s() - before_s) * per_token_ms)),
                 tuple(used_ms[:n_ranks]), float(used_ms[n_ranks:].sum()))


def cpu_s(pid: int) -> float:
    """Processor time of a process so far, those of its threads that have ended included."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def pin(pid: int, core: int) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


@contextmanager
def running(n_workers: int, options: Sequence[str] = ()) -> Iterator[TestCluster]:
    with tempfile.TemporaryDirectory() as directory, cluster(Path(directory), n_workers, options) as made:
        os.environ["EDGERT_HOME"] = str(made.leader_home)
        yield made


def load(model: Path, options: ClusterOptions | None, *, memory_bytes: int | None = None, threads: int = 1,
         context: int = 1024, kv_budget: int | None = None) -> Runtime:
    return Runtime.load(model, threads=threads, context=context, layout="plain", memory=memory_bytes, cluster=options,
                        kv_budget=kv_budget)
