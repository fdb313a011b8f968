"""A thread that looks at power, temperature and clocks ten times a second while contenders run in their processes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from apps.bench import thermal
from apps.bench.energy import Sample, energy_j
from apps.bench.power_sources import Missing, PowerSource, find_source
from apps.bench.speed import Run

INTERVAL_S = 0.1
_MAX_SAMPLES = 600_000  # 17 hours
_JOIN_DEADLINE_S = 15.0


@dataclass(frozen=True, slots=True)
class Observed:
    """What the device did during a test's runs. `why` says of each None what was missing."""

    source: str | None
    rail: str | None
    avg_watts: float | None
    joules_per_prompt_token: float | None
    joules_per_gen_token: float | None
    temperature_c: float | None
    clock_mhz: float | None
    throttled: bool | None
    why: dict[str, str]


class Sampler:
    """Samples from `start` to `close`. `source` None looks for one."""

    def __init__(self, source: PowerSource | Missing | None = None, root: Path = Path("/")) -> None:
        self.source = find_source(root) if source is None else source
        self._root, self._stopping = root, threading.Event()
        self._temperature_sensors, self._clock_sensors = thermal.temperature_sensors(root), thermal.clocks(root)
        self._power, self._clocks, self._temperatures = (deque[Sample](maxlen=_MAX_SAMPLES) for _ in range(3))
        self._throttles = thermal.throttle_count(root)
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def forget(self) -> None:
        """Another test begins."""
        with self._looking:
            for samples in (self._power, self._clocks, self._temperatures):
                samples.clear()
            self._throttles = thermal.throttle_count(self._root)
        self.look()

    def look(self) -> None:
        """Take a sample now."""
        with self._looking:
            now_ns = time.monotonic_ns()
            for samples, value in ((self._clocks, thermal.fastest_mhz(self._clock_sensors)),
                                   (self._temperatures, thermal.warmest_c(self._temperature_sensors)),
                                   (self._power, self._read_power())):
                if value is not None:
                    samples.append(Sample(now_ns, value))

    def _read_power(self) -> float | None:
        if isinstance(self.source, Missing):
            return None
        try:
            return self.source.read()
        except (OSError, ValueError):
            return None  # a window without samples is said to be not measured

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            self.look()

    def observed(self, n_prompt: int, n_gen: int, runs: Sequence[Run]) -> Observed:
        """What was seen during these runs."""
        self.look()
        with self._looking:
            power, clocks, warm = [*self._power], [*self._clocks], [*self._temperatures]
        prompt_j = self._energy(power, [(run.start_ns, run.prompt_end_ns) for run in runs]) if n_prompt else None
        answer_j = self._energy(power, [(run.prompt_end_ns, run.end_ns) for run in runs]) if n_gen else None
        took_s = sum((run.prompt_end_ns - run.start_ns) * (prompt_j is not None)
                     + (run.end_ns - run.prompt_end_ns) * (answer_j is not None) for run in runs) / 1e9
        windows = [[s.value for s in clocks if run.start_ns <= s.time_ns <= run.end_ns] for run in runs]
        return Observed(
            *self._names(), ((prompt_j or 0.0) + (answer_j or 0.0)) / took_s if took_s else None,
            None if prompt_j is None else prompt_j / (n_prompt * len(runs)),
            None if answer_j is None else answer_j / (n_gen * len(runs)),
            max((s.value for s in warm), default=None),
            max((clock for window in windows for clock in window), default=None),
            self._is_throttled(windows) if clocks else None, self._why(power, clocks, warm))

    def _names(self) -> tuple[str | None, str | None]:
        return (None, None) if isinstance(self.source, Missing) else (self.source.name, self.source.rail)

    def _energy(self, samples: list[Sample], windows: list[tuple[int, int]]) -> float | None:
        if isinstance(self.source, Missing):
            return None
        parts = [energy_j(samples, self.source.kind, start_ns, end_ns) for start_ns, end_ns in windows]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def _is_throttled(self, windows: list[list[float]]) -> bool:
        after = thermal.throttle_count(self._root)
        return thermal.clock_dropped(windows) or (after is not None and after > (self._throttles or 0))

    def _why(self, power: list[Sample], clocks: list[Sample], warm: list[Sample]) -> dict[str, str]:
        why = {}
        if isinstance(self.source, Missing):
            why["energy"] = self.source.why
        elif len(power) < 2:
            why["energy"] = f"{self.source.name} told nothing while the test ran"
        if not warm:
            why["temperature_c"] = "the system shows no temperature sensor"
        if not clocks:
            why["clock_mhz"] = why["throttled"] = "the system does not show its clocks"
        return why

    def close(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_DEADLINE_S)
        if not isinstance(self.source, Missing):
            self.source.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
