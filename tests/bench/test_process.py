from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from apps.bench.asked import OURS, Asked, Peer, Work
from apps.bench.contenders import Setup
from apps.bench.power_sources import Missing
from apps.bench.process import ContenderCrashed, ContenderProcess, Stopped
from apps.bench.sampler import Sampler
from apps.bench.session import Session
from apps.bench.speed import Counters, Run, SpeedTest
from edgert.errors import BudgetTooSmall, EdgertError, ModelNotFound

SETUP = Setup(None, 1, 64, "plain", "f16", 256)
DEADLINE_S = 60.0


@pytest.fixture
def process() -> Iterator[ContenderProcess]:
    with ContenderProcess("edgert") as process:
        yield process


def test_a_process_measures_and_tells_its_own_memory(process: ContenderProcess,
                                                     tiny_model: Callable[..., Path]) -> None:
    opened = process.ask("open", engine="edgert", path=str(tiny_model("llama")), setup=asdict(SETUP), cluster=None)
    assert opened["plan"]["weights"] == "resident" and opened["peak_rss_bytes"] > 2**20
    told = process.ask("warm_up", test=asdict(SpeedTest(8, 4, 2)), token_ids=None)
    assert len(told["token_ids"]) == 14 and told["predicted_prompt_ns"] is None
    run = Run.from_dict(process.ask("run"))
    assert len(run.token_ns) == 4 and run.start_ns < run.prompt_end_ns < run.token_ns[0]
    assert abs(run.end_ns - time.monotonic_ns()) < DEADLINE_S * 1e9  # one clock for all processes
    assert "ns" in process.ask("first_token", n_prompt=16)


def test_what_streams_is_counted_token_by_token(process: ContenderProcess, tiny_model: Callable[..., Path]) -> None:
    model = str(tiny_model("llama", n_layers=48, hidden_size=256))  # 32 MiB
    wanted = {"engine": "edgert", "path": model, "cluster": None}
    with ContenderProcess("edgert") as other, pytest.raises(BudgetTooSmall) as refusal:
        other.ask("open", **wanted, setup=asdict(SETUP) | {"memory_bytes": 1})
    budget_bytes = refusal.value.smallest_bytes + 4 * 2**20  # processes differ a little
    opened = process.ask("open", **wanted, setup=asdict(SETUP) | {"memory_bytes": budget_bytes})
    assert opened["plan"]["weights"] == "streamed"
    process.ask("warm_up", test=asdict(SpeedTest(0, 6, 0)), token_ids=None)
    run = Run.from_dict(process.ask("run"))
    per_pass = opened["plan"]["streamed_bytes_per_pass"]
    assert 5 * per_pass <= run.answer.read_bytes <= 7 * per_pass  # the window reads ahead into the next pass
    assert run.answer.wait_ns > 0 and run.prompt == Counters()


def test_errors_keep_their_class_and_their_figures(process: ContenderProcess, tiny_model: Callable[..., Path],
                                                   tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        process.ask("open", engine="edgert", path=str(tmp_path / "none.gguf"), setup=asdict(SETUP), cluster=None)
    with pytest.raises(BudgetTooSmall) as refusal:
        process.ask("open", engine="edgert", path=str(tiny_model("llama")), cluster=None,
                    setup=asdict(SETUP) | {"memory_bytes": 1})
    assert refusal.value.smallest_bytes > 2**20 and refusal.value.budget_bytes == 1
    with pytest.raises(EdgertError, match="the first request opens a model"):
        process.ask("run")


def test_a_process_that_dies_is_named(process: ContenderProcess) -> None:
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ContenderCrashed, match="edgert's process was killed"):
        process.ask("facts")


def test_stopping_ends_a_wait_at_once(process: ContenderProcess, tiny_model: Callable[..., Path]) -> None:
    path = str(tiny_model("llama", n_layers=8, context_length=32768))
    process.ask("open", engine="edgert", path=path, setup=asdict(SETUP) | {"context_length": 32768}, cluster=None)
    threading.Timer(0.05, process.stop).start()
    with pytest.raises(Stopped):
        process.ask("warm_up", test=asdict(SpeedTest(0, 30_000, 0)), token_ids=None)


def test_silence_has_an_end(process: ContenderProcess) -> None:
    with pytest.raises(EdgertError, match="has not answered for 0 s"):
        process.ask("facts", 0.0)


def test_a_process_ends_when_it_is_closed() -> None:
    process = ContenderProcess("edgert")
    process.close()
    process.close()
    assert not psutil.pid_exists(process.pid)


class Quiet:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.doings: list[str] = []
        self.dones: list[Work] = []
        self.warnings: list[str] = []
        self.on_doing: Callable[[str], None] = lambda what: None

    def planned(self, works: Any) -> None:
        self.works = [*works]

    def doing(self, what: str) -> None:
        self.doings.append(what)
        self.on_doing(what)

    def done(self, work: Work, seconds: float) -> None:
        self.dones.append(work)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def _asked(path: Path, **more: Any) -> Asked:
    return Asked(**{"path": path, "parts": (path,), "setups": (SETUP,), "tests": (SpeedTest(8, 4, 0),),
                    "repetitions": 3, "predicts": False, **more})


def test_contenders_are_measured_in_turn_and_compared(tiny_model: Callable[..., Path]) -> None:
    watcher = Quiet()
    asked = _asked(tiny_model("llama"), peers=(OURS, Peer("llama.cpp", "llama.cpp"),
                                               Peer("llama.cpp, repacked", "llama.cpp", "repack")))
    session = Session(asked, watcher, Sampler(Missing("none")))
    (found,) = session.results()
    assert [(one.engine, one.setup.layout, len(one.runs)) for one in found] == [
        ("edgert", "plain", 3), ("llama.cpp", "plain", 3), ("llama.cpp", "repack", 3)]
    turns = [what.split(": ")[1].rsplit(" ", 3)[0] for what in watcher.doings if what.endswith("of 3")]
    assert turns == [peer.name for peer in asked.peers] + [peer.name for peer in asked.peers[::-1]] \
        + [peer.name for peer in asked.peers]
    best = max(found[1:], key=lambda one: one.median_ts)
    ratios = sorted(a / b for a, b in zip(found[0].samples_ts, best.samples_ts, strict=True))
    assert found[0].ratio_to_baseline == ratios[1] and found[1].ratio_to_baseline is None
    assert sorted(map(str, watcher.dones)) == sorted(map(str, watcher.works))  # what was planned was done
    assert found[0].load_ns > 10**6 and found[0].cached_share is not None


def test_a_budget_that_is_too_small_ends_its_own_setup(tiny_model: Callable[..., Path]) -> None:
    watcher, path = Quiet(), tiny_model("llama")
    setups = tuple(Setup(memory, 1, 64, "plain", "f16", 256) for memory in (2**20, 2**30))
    found = [*Session(_asked(path, setups=setups), watcher, Sampler(Missing("none"))).results()]
    assert [group[0].setup.memory_bytes for group in found] == [2**30]
    assert "the smallest that works" in watcher.warnings[0]
    with pytest.raises(BudgetTooSmall):
        [*Session(_asked(path, setups=setups[:1]), Quiet(), Sampler(Missing("none"))).results()]


def test_a_baseline_that_dies_is_left_out(tiny_model: Callable[..., Path]) -> None:
    watcher = Quiet()
    session = Session(_asked(tiny_model("llama"), peers=(OURS, Peer("llama.cpp", "llama.cpp"))), watcher,
                      Sampler(Missing("none")))
    watcher.on_doing = lambda what: (os.kill(session._processes[-1].pid, signal.SIGKILL)
                                     if "llama.cpp warms up" in what else None)
    ((only,),) = session.results()
    assert (only.engine, len(only.runs), only.ratio_to_baseline) == ("edgert", 3, None)
    assert watcher.warnings == ["llama.cpp is left out: llama.cpp's process was killed (out of memory?)"]


def test_a_session_stops_wherever_it_is(tiny_model: Callable[..., Path]) -> None:
    for moment in ("opening", "warms up", "1 of 3", "waiting"):
        watcher = Quiet()
        session = Session(_asked(tiny_model("llama"), delay_s=600.0 if moment == "waiting" else 0.0), watcher,
                          Sampler(Missing("none")))
        watcher.on_doing = lambda what, moment=moment, session=session: (  # type: ignore[misc]
            session.stop() if moment in what else None)
        with pytest.raises(Stopped):
            [*session.results()]


def test_a_device_is_waited_for_until_it_is_cool(tiny_model: Callable[..., Path],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([71.0, 63.0, 52.0, *[49.5] * 10_000])  # the sampler looks too
    monkeypatch.setattr("apps.bench.session.thermal.warmest_c", lambda sensors: next(readings))
    monkeypatch.setattr("apps.bench.session._COOL_LOOK_S", 0.001)
    watcher = Quiet()
    [*Session(_asked(tiny_model("llama"), cool_to_c=50.0), watcher, Sampler(Missing("none"))).results()]
    cooling = [what for what in watcher.doings if "cooling" in what]
    assert cooling == [f"cooling down: {now} °C, until 50 °C" for now in (71, 63, 52)]
    assert "warms up" in watcher.doings[watcher.doings.index(cooling[-1]) + 1]


def test_a_control_group_of_the_budgets_size_holds_each_contender(
        tiny_model: Callable[..., Path], require: Callable[[object, str], None]) -> None:
    from apps.bench.control_group import why_impossible

    require(why_impossible() is None, str(why_impossible()))
    setup = Setup(200 * 2**20, 1, 64, "plain", "f16", 256)
    asked = _asked(tiny_model("llama"), setups=(setup,), is_limited=True, repetitions=1)
    (found,) = Session(asked, Quiet(), Sampler(Missing("none"))).results()
    assert found[0].limit_bytes == 200 * 2**20
    assert 2**20 < (found[0].group_peak_bytes or 0) <= 200 * 2**20
