"""A measurement from beginning to end: setups, tests, contenders in turn, repetitions.

Knows the order in which things are measured. Contenders are processes (process.py); who watches is told what goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from apps.bench import page_cache, thermal
from apps.bench.asked import OURS, Asked, Peer, Watcher, Work
from apps.bench.contenders import Setup
from apps.bench.control_group import MemoryGroup, memory_group
from apps.bench.process import ContenderCrashed, ContenderProcess, Stopped
from apps.bench.results import FirstTokens, Result
from apps.bench.sampler import Sampler
from apps.bench.speed import Run, SpeedTest, paired_ratio
from edgert.errors import BudgetTooSmall, EdgertError
from edgert.memory.probe import MemoryProbe

_log = logging.getLogger(__name__)
_SURVEY_DEADLINE_S = 600.0
_DISK_S = 1.0
_MAX_FIRST_TOKENS = 3  # as many as repetitions, but a prompt is long
_COOL_DEADLINE_S, _COOL_LOOK_S = 900.0, 0.5
_COLD_SHARE = 0.05  # of a file that may be left in the page cache when it was to be forgotten


@dataclass(slots=True)
class _Opened:
    """A contender that is there."""

    peer: Peer
    process: ContenderProcess
    group: MemoryGroup | None
    load_ns: int
    cached_share: float | None
    runs: list[Run] = field(default_factory=list)
    predicted: Mapping[str, Any] = field(default_factory=dict)


class Session:
    """`results` measures; `stop`, from any thread, ends it with Stopped."""

    def __init__(self, asked: Asked, watcher: Watcher, sampler: Sampler) -> None:
        self._asked, self._watcher, self._sampler = asked, watcher, sampler
        self._stopping = threading.Event()
        self._processes: list[ContenderProcess] = []
        watcher.planned([work for setup in asked.setups for test in asked.tests for work in self._works(setup, test)])

    def stop(self) -> None:
        self._stopping.set()
        for process in [*self._processes]:
            process.stop()

    def survey(self) -> dict[str, Any]:
        """The environment block, and the device calibrated. Raises what planning raises."""
        self._watcher.doing("looking at the device")
        with ExitStack() as opened:
            process = self._start(OURS, opened, None)
            by_threads = {setup.n_threads: asdict(setup) for setup in self._asked.setups}
            return process.ask("survey", _SURVEY_DEADLINE_S, path=str(self._asked.path), seconds=_DISK_S,
                               calibrated=[*by_threads.values()] if self._asked.predicts else [])

    def results(self) -> Iterator[list[Result]]:
        """The results of each test, one for each contender. Raises what opening and computing raise, Stopped; a budget
        that is too small ends a single setup, and only says so in a sweep."""
        n_refused = 0
        for setup in self._asked.setups:
            try:
                yield from self._of_setup(setup)
            except BudgetTooSmall as refusal:
                n_refused += 1
                if n_refused == len(self._asked.setups):
                    raise
                self._watcher.warn(str(refusal).replace("\n", ". "))

    def _of_setup(self, setup: Setup) -> Iterator[list[Result]]:
        with ExitStack() as opened:
            contenders = [self._open(self._asked.peers[0], setup, opened)]
            for peer in self._asked.peers[1:]:
                try:
                    contenders.append(self._open(peer, setup, opened))
                except EdgertError as error:
                    self._leave_out(peer, error)
            for test in self._asked.tests:
                self._rest()
                yield self._measure(setup, test, contenders)

    def _start(self, peer: Peer, opened: ExitStack, group: MemoryGroup | None) -> ContenderProcess:
        process = ContenderProcess(peer.name, groups=[group.processes] if group else [],
                                   verbosity=self._asked.verbosity, log_json=self._asked.log_json)
        self._processes.append(process)
        opened.callback(self._processes.remove, process)
        opened.callback(process.close)
        if self._stopping.is_set():
            raise Stopped
        return process

    def _open(self, peer: Peer, setup: Setup, opened: ExitStack) -> _Opened:
        """A contender with the model loaded, from a cold page cache where that was asked for: under a limit always,
        since pages that are there already are charged to nobody."""
        asked, group = self._asked, None
        self._watcher.doing(f"{peer.name}: opening the model")
        if asked.is_limited:
            assert setup.memory_bytes is not None
            group = opened.enter_context(memory_group(setup.memory_bytes))
        if asked.is_cold or asked.is_limited:
            page_cache.forget(asked.parts)
        elif sum(path.stat().st_size for path in asked.parts) < MemoryProbe().available_bytes() // 2:
            page_cache.warm(asked.parts)  # larger models would only push each other's pages out
        share = page_cache.cached_share(asked.parts)
        if (asked.is_cold or asked.is_limited) and (share or 0.0) > _COLD_SHARE:
            self._watcher.warn(f"{share:.0%} of the model stay in the page cache, where another program holds them: a "
                               "limit does not count them")
        process = self._start(peer, opened, group)
        start_ns = time.monotonic_ns()
        process.ask("open", engine=peer.engine, path=str(asked.path), setup=asdict(peer.of(setup)),
                    cluster=None if asked.cluster is None else dict(asked.cluster))
        return _Opened(peer, process, group, time.monotonic_ns() - start_ns, share)

    def _measure(self, setup: Setup, test: SpeedTest, contenders: list[_Opened]) -> list[Result]:
        _log.info("measuring", extra={"fields": {"test": test.name}})
        began = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        self._warm_up(setup, test, contenders)
        self._sampler.forget()
        cpu_s, start_s = time.process_time(), time.monotonic()
        for number in range(self._asked.repetitions):
            for one in contenders if number % 2 == 0 else contenders[::-1]:  # now the one first, now the other
                self._watcher.doing(f"{test.name}: {one.peer.name} {number + 1} of {self._asked.repetitions}")
                with _Timing(Work(_key(one.peer, setup), test.n_prompt, test.n_gen), self._watcher):
                    one.runs.append(Run.from_dict(one.process.ask("run")))
        share = (time.process_time() - cpu_s) / max(1e-9, time.monotonic() - start_s)
        found = [self._result(one, setup, test, began, share) for one in contenders]
        return _compared(found, [one.peer.name for one in contenders])

    def _warm_up(self, setup: Setup, test: SpeedTest, contenders: list[_Opened]) -> None:
        """Every contender once; the first chooses the tokens of the answer for all."""
        token_ids = None
        for one in [*contenders]:
            self._watcher.doing(f"{test.name}: {one.peer.name} warms up")
            try:
                with _Timing(Work(_key(one.peer, setup), test.n_depth + test.n_prompt, test.n_gen), self._watcher):
                    one.predicted = one.process.ask("warm_up", test=asdict(test), token_ids=token_ids)
            except ContenderCrashed as crash:
                if one is contenders[0]:
                    raise
                self._leave_out(one.peer, crash)
                contenders.remove(one)
            token_ids, one.runs = contenders[0].predicted["token_ids"], []

    def _leave_out(self, peer: Peer, error: EdgertError) -> None:
        """A baseline that cannot go on does not end the measurement of edgert."""
        self._watcher.warn(f"{peer.name} is left out: {error.message}")

    def _result(self, one: _Opened, setup: Setup, test: SpeedTest, began: str, share: float) -> Result:
        observed = self._sampler.observed(test.n_prompt, test.n_gen, one.runs)
        first_tokens = self._first_tokens(one, setup, test)
        facts = one.process.ask("facts")
        return Result(
            one.peer.engine, one.peer.of(setup), test, began, tuple(one.runs), first_tokens, facts, observed,
            one.load_ns, one.cached_share, setup.memory_bytes if one.group else None,
            one.group.peak_bytes if one.group else None,
            one.predicted["predicted_prompt_ns"], one.predicted["predicted_token_ns"], share,
            self._asked.cluster is not None)

    def _first_tokens(self, one: _Opened, setup: Setup, test: SpeedTest) -> FirstTokens:
        if not _asks_for_first_tokens(one.peer, test):
            return FirstTokens(None, ())
        samples, n_prompt = [], None
        for _ in range(min(_MAX_FIRST_TOKENS, self._asked.repetitions)):
            self._watcher.doing(f"{test.name}: time to the first token")
            with _Timing(Work(_key(one.peer, setup), test.n_prompt, 0), self._watcher):
                told = one.process.ask("first_token", n_prompt=test.n_prompt)
            if "reason" in told:
                return FirstTokens(None, (), told["reason"])
            samples.append(told["ns"])
            n_prompt = told["n_prompt"]
        return FirstTokens(n_prompt, tuple(samples))

    def _works(self, setup: Setup, test: SpeedTest) -> Iterator[Work]:
        """All that a test takes."""
        asked = self._asked
        for peer in asked.peers:
            key = _key(peer, setup)
            yield Work(key, test.n_depth + test.n_prompt, test.n_gen)
            yield from [Work(key, test.n_prompt, test.n_gen)] * asked.repetitions
            if _asks_for_first_tokens(peer, test):
                yield from [Work(key, test.n_prompt, 0)] * min(_MAX_FIRST_TOKENS, asked.repetitions)

    def _rest(self) -> None:
        """Wait as was asked for, and until the device is as cool as was asked for."""
        asked = self._asked
        if asked.delay_s:
            self._watcher.doing(f"waiting {asked.delay_s:g} s")
            self._wait(asked.delay_s)
        if asked.cool_to_c is None:
            return
        deadline, sensors = time.monotonic() + _COOL_DEADLINE_S, thermal.temperature_sensors()
        while (now_c := thermal.warmest_c(sensors)) is not None and now_c > asked.cool_to_c:
            if time.monotonic() > deadline:
                self._watcher.warn(f"still at {now_c:.0f} °C after {_COOL_DEADLINE_S / 60:.0f} minutes; going on")
                return
            self._watcher.doing(f"cooling down: {now_c:.0f} °C, until {asked.cool_to_c:.0f} °C")
            self._wait(_COOL_LOOK_S)

    def _wait(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise Stopped


@dataclass(slots=True)
class _Timing:
    """Tells the watcher how long a piece of work took."""

    work: Work
    watcher: Watcher
    start_s: float = 0.0

    def __enter__(self) -> None:
        self.start_s = time.monotonic()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.watcher.done(self.work, time.monotonic() - self.start_s)


def _key(peer: Peer, setup: Setup) -> str:
    return f"{peer.name} {setup}"


def _asks_for_first_tokens(peer: Peer, test: SpeedTest) -> bool:
    return peer.engine == "edgert" and not test.n_gen and not test.n_depth


def _compared(found: list[Result], names: list[str]) -> list[Result]:
    """The first with its ratio to the best of the others, repetition by repetition."""
    if len(found) < 2:
        return found
    best = max(range(1, len(found)), key=lambda number: found[number].median_ts)
    ratio = paired_ratio(found[0].samples_ts, found[best].samples_ts)
    return [found[0].beside(names[best], ratio), *found[1:]]
