"""Loses a worker at a random moment of an answer, again and again: what the user sees, and how long it takes.

    python benchmarks/cluster_failures.py MODEL.gguf --runs 50            kill -9, SIGSTOP, and a cable that is cut

A leader and two workers on hosts of their own (network namespaces; needs root). Every answer must end, without a token
lost or repeated, and go on from the loss as a fresh run of the survivors does; then the worker comes back and takes
part again. A fifth of the losses happen while the prompt is computed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_N_TOKENS, _PROMPT = 48, list(range(100, 400))
_KINDS = ("kill", "stop", "cut")
_DEADLINE_S = 300.0


# -- the leader's process ----------------------------------------------------------------------------------------
def lead(model: Path, n_runs: int) -> None:
    """Answer as often as asked; a line of JSON for each thing that happens, with the machine's clock."""
    from edgert.runtime import Runtime
    from edgert.text.sampler import SamplingParams
    from tensorpar import leader
    from tensorpar.workers import ClusterOptions

    leader._LOOK_AGAIN_S = 0.0
    greedy, options = SamplingParams(temperature=0), ClusterOptions("all", discovery_s=0)
    with Runtime.load(model, threads=1, context=1024, layout="plain", cluster=options) as runtime:
        for _ in range(n_runs):
            sys.stdin.readline()
            runtime.engine.refresh()
            runtime.engine.kv.truncate(0)
            answer = runtime.generate(_PROMPT, max_tokens=_N_TOKENS, sampling=greedy)
            n_said_at: list[int] = []

            class Heard(logging.Handler):
                def emit(self, record: logging.LogRecord) -> None:
                    if "was lost" in record.getMessage():
                        n_said_at.append(len(answer.token_ids))  # noqa: B023 - it ends with this answer
                        say("lost", why=record.getMessage())

            handler = Heard()
            logging.getLogger("tensorpar").addHandler(handler)
            devices = [one["name"] for one in runtime.plan()["cluster"]["devices"]]
            say("begun", devices=devices)
            for piece in answer:
                say("token", id=piece.token_id)
            logging.getLogger("tensorpar").removeHandler(handler)
            token_ids = list(answer.token_ids)
            n_before = n_said_at[-1] if n_said_at else 0
            runtime.engine.kv.truncate(0)
            again = runtime.generate([*_PROMPT, *token_ids[:n_before]], max_tokens=_N_TOKENS - n_before,
                                     sampling=greedy)
            again.result()
            say("done", token_ids=token_ids, n_before=n_before, equal=again.token_ids == token_ids[n_before:])


def say(what: str, **more: Any) -> None:
    print(json.dumps({"what": what, "at_s": time.monotonic(), **more}), flush=True)


# -- the observer's process --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer that lost a worker. Seconds from the loss. `also_lost` is what was said of others, who were there."""

    devices: int
    is_whole: bool
    is_that_of_the_survivors: bool
    detected_s: float
    pause_s: float
    also_lost: tuple[str, ...]


class Leader:
    def __init__(self, prefix: Sequence[str], home: Path, model: Path, n_runs: int) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, __file__, str(model), "--runs", str(n_runs), "--lead"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=(home / "leader-log").open("ab"), text=True,
            env={**os.environ, "EDGERT_HOME": str(home)})

    def ask(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the leader has ended")
        heard: dict[str, Any] = json.loads(line)
        return heard


def lose_once(leader: Leader, lose: Callable[[], None], rng: random.Random) -> Outcome:
    moment = rng.choice([0, *rng.sample(range(1, _N_TOKENS - 4), 4)])
    lost_s = detected_s = begun_s = 0.0
    times: list[float] = []
    losses: list[str] = []
    leader.ask()
    while True:
        heard = leader.hear()
        match heard["what"]:
            case "begun":
                devices, begun_s = len(heard["devices"]), heard["at_s"]
                if moment == 0:
                    time.sleep(rng.uniform(0, 0.3))
                    lost_s = time.monotonic()
                    lose()
            case "token":
                times.append(heard["at_s"])
                if len(times) == moment:
                    lost_s = time.monotonic()
                    lose()
            case "lost":
                detected_s = detected_s or heard["at_s"]
                losses.append(heard["why"])
            case "done":
                gaps = [b - a for a, b in zip([begun_s, *times], times, strict=False) if b > lost_s]
                return Outcome(devices, len(heard["token_ids"]) == _N_TOKENS == len(times), heard["equal"],
                               detected_s - lost_s, max(gaps, default=0.0), tuple(losses[1:]))


def observe(model: Path, n_runs: int, kinds: Sequence[str], seed: int) -> None:
    from cluster_processes import WorkerProcess, as_if_measured, pair
    from namespaces import hosts

    rng = random.Random(seed)
    with ExitStack() as opened:
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        laptop, *others = opened.enter_context(hosts(3))
        home, workers = directory / "leader", []
        for number, host in enumerate(others, start=1):
            own = directory / f"worker{number}"
            pair(home, own, f"worker{number}", host.address, 7440)
            as_if_measured(own)
            workers.append(WorkerProcess(f"worker{number}", own, 7440, ("--no-mdns",), host.prefix).start())
            opened.callback(workers[-1].kill)
        as_if_measured(home)
        leader = Leader(laptop.prefix, home, model, n_runs * len(kinds))
        opened.callback(leader.process.kill)
        for kind in kinds:
            outcomes = []
            for _ in range(n_runs):
                index = rng.randrange(len(workers))
                worker, host = workers[index], others[index]
                lose: dict[str, Callable[[], None]] = {
                    "kill": partial(worker.signal, signal.SIGKILL), "stop": partial(worker.signal, signal.SIGSTOP),
                    "cut": host.cut}
                outcomes.append(lose_once(leader, lose[kind], rng))
                if kind == "cut":
                    host.mend()
                worker.kill()
                worker.start()
            report(kind, outcomes)
        assert leader.process.wait(_DEADLINE_S) == 0


def report(kind: str, outcomes: Sequence[Outcome]) -> None:
    noticed = sorted(one.detected_s for one in outcomes if one.detected_s > 0)
    pauses = sorted(one.pause_s for one in outcomes)
    print(f"{kind}: {len(outcomes)} answers, {sum(one.is_whole for one in outcomes)} whole, "
          f"{sum(one.is_that_of_the_survivors for one in outcomes)} as the survivors' own from there; "
          f"of 3 devices {sum(one.devices == 3 for one in outcomes)}; noticed {len(noticed)}, after median "
          f"{statistics.median(noticed or [0]):.3f} s, worst {max(noticed, default=0):.3f} s; longest pause median "
          f"{statistics.median(pauses):.2f} s, nine of ten {pauses[len(pauses) * 9 // 10]:.2f} s, worst "
          f"{pauses[-1]:.2f} s", flush=True)
    for one in outcomes:
        for why in one.also_lost:
            print(f"    then, {one.pause_s:.2f} s of pause: {why}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lead", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.lead:
        lead(args.model, args.runs)
    else:
        observe(args.model, args.runs, args.kinds, args.seed)


if __name__ == "__main__":
    main()
