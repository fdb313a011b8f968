from __future__ import annotations

from pathlib import Path

import pytest
from trees import INTEL, ORIN_NANO, write_tree

from apps.bench import thermal
from apps.bench.energy import Kind
from apps.bench.power_sources import Missing
from apps.bench.sampler import Sampler
from apps.bench.speed import Run
from apps.bench.thermal import clock_dropped


def test_a_jetson_tells_its_warmest_part_and_its_fastest_core(tmp_path: Path) -> None:
    write_tree(tmp_path, ORIN_NANO)
    assert thermal.warmest_c(thermal.temperature_sensors(tmp_path)) == 49.75  # a sensor that is off tells -256
    assert thermal.fastest_mhz(thermal.clocks(tmp_path)) == 1510.4
    assert (thermal.governor(tmp_path), thermal.throttle_count(tmp_path)) == ("schedutil", None)


def test_a_laptop_tells_its_processor_and_not_its_disk(tmp_path: Path) -> None:
    write_tree(tmp_path, INTEL)
    assert thermal.warmest_c(thermal.temperature_sensors(tmp_path)) == 57.0
    assert (thermal.throttle_count(tmp_path), thermal.fastest_mhz(thermal.clocks(tmp_path))) == (12, None)


def test_what_a_system_does_not_tell_is_none(tmp_path: Path) -> None:
    assert thermal.warmest_c(thermal.temperature_sensors(tmp_path)) is None
    assert thermal.fastest_mhz(thermal.clocks(tmp_path)) is None
    assert thermal.governor(tmp_path) is None and thermal.power_mode("no-such-tool") is None


def test_a_jetsons_power_mode_is_asked_of_its_tool(tmp_path: Path) -> None:
    tool = tmp_path / "nvpmodel"
    tool.write_text("#!/bin/sh\n[ \"$1\" = -q ] && printf 'NV Power Mode: 15W\\n0\\n'\n")
    tool.chmod(0o755)
    assert thermal.power_mode(str(tool)) == "15W"


@pytest.mark.parametrize(("windows", "dropped"), [
    ([[1500.0] * 10], False),
    ([[600.0, 900.0, 1200.0, 1500.0, 1500.0]], False),  # an idle core speeds up with the work
    ([[1500.0] * 5 + [1000.0] * 3], True),
    ([[1500.0] * 5 + [1000.0] + [1500.0] * 5], False),  # a breath
    ([[1500.0] * 6, [800.0, 900.0, 1000.0, 1000.0, 1000.0, 1000.0]], True),  # it does not come back
    ([[1500.0] * 6, [800.0, 1000.0, 1500.0, 1500.0, 1500.0]], False),
    ([[1500.0] * 5 + [1400.0] * 9], False), ([[]], False), ([], False),
])
def test_a_clock_that_drops_while_something_runs_is_noticed(windows: list[list[float]], dropped: bool) -> None:
    assert clock_dropped(windows) is dropped


class FakeSource:
    """Two watts, always."""

    name, rail = "INA3221", "VDD_IN"
    kind: Kind = "watts"

    def read(self) -> float:
        return 2.0

    def close(self) -> None:
        """There is nothing to close."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [0]
    monkeypatch.setattr("apps.bench.sampler.time.monotonic_ns", lambda: now[0])
    return now


def test_a_sampler_tells_energy_by_phase_and_flags_a_dropped_clock(tmp_path: Path, clock: list[int]) -> None:
    sampler = Sampler(FakeSource(), write_tree(tmp_path, ORIN_NANO))
    sampler.forget()
    for number in range(1, 41):
        clock[0] = number * 10**8
        if number == 25:
            for core in (0, 5):
                (tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq").write_text("700000\n")
        sampler.look()
    seen = sampler.observed(4, 10, [Run(0, 10**9, (2 * 10**9, 4 * 10**9))])
    assert (seen.source, seen.rail, seen.avg_watts) == ("INA3221", "VDD_IN", pytest.approx(2.0))
    assert seen.joules_per_prompt_token == pytest.approx(0.5)  # 1 s of 2 W for 4 tokens
    assert seen.joules_per_gen_token == pytest.approx(0.6)  # 3 s of 2 W for 10
    assert (seen.temperature_c, seen.clock_mhz, seen.throttled) == (49.75, 1510.4, True)
    assert seen.why == {}


def test_what_was_not_seen_is_none_with_its_reason(tmp_path: Path, clock: list[int]) -> None:
    sampler = Sampler(Missing("no battery"), tmp_path)
    sampler.forget()
    clock[0] = 10**9
    seen = sampler.observed(4, 0, [Run(0, 10**8)])
    assert (seen.source, seen.avg_watts, seen.joules_per_prompt_token, seen.throttled) == (None, None, None, None)
    assert seen.why["energy"] == "no battery" and {"temperature_c", "clock_mhz", "throttled"} <= seen.why.keys()


def test_a_processor_that_counts_its_throttling_is_believed(tmp_path: Path, clock: list[int]) -> None:
    write_tree(tmp_path, INTEL | {"sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "3000000\n"})
    sampler = Sampler(Missing("none"), tmp_path)
    sampler.forget()
    clock[0] = 10**9
    assert sampler.observed(1, 0, [Run(0, 10**8)]).throttled is False
    (tmp_path / "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count").write_text("13\n")
    assert sampler.observed(1, 0, [Run(0, 10**8)]).throttled is True


def test_a_sampler_samples_by_itself_and_ends(tmp_path: Path) -> None:
    with Sampler(FakeSource(), tmp_path) as sampler:
        sampler.forget()
        sampler.look()
    assert not sampler._thread.is_alive() and len(sampler._power) >= 2
