from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from trees import AGX_ORIN, BATTERY, INTEL, NANO, ORIN_NANO, write_tree

from apps.bench import power_sources
from apps.bench.power_sources import (
    Missing,
    PowerSource,
    battery,
    find_source,
    jetson,
    rapl,
    start_tegrastats,
    tegrastats_watts,
)

DEADLINE_S = 60.0


def _found(source: PowerSource | Missing) -> PowerSource:
    assert not isinstance(source, Missing), source
    return source


@pytest.mark.parametrize(("tree", "rail", "watts"), [
    (ORIN_NANO, "VDD_IN", 5.12), (NANO, "POM_5V_IN", 2.003),
    (AGX_ORIN, "VDDQ_VDD2_1V8AO + VDD_CPU_CV + VDD_GPU_SOC + VIN_SYS_5V0", 1.0 + 2.0 + 4.0 + 3.0),
])
def test_a_jetson_tells_what_its_module_draws(tree: Mapping[str, str], rail: str, watts: float, tmp_path: Path) -> None:
    source = _found(jetson(write_tree(tmp_path, tree)))
    assert (source.name, source.rail, source.kind) == ("INA3221", rail, "watts")
    assert source.read() == pytest.approx(watts)


def test_rapl_counts_packages_and_memory_over_a_wrap(tmp_path: Path) -> None:
    source = _found(rapl(write_tree(tmp_path, INTEL)))
    assert (source.rail, source.kind, source.read()) == ("package-0 + dram", "joules", 0.0)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("1671149\n")  # 328850 to the end, and 0 itself
    (tmp_path / "sys/class/powercap/intel-rapl:0:1/energy_uj").write_text("5500000\n")
    assert source.read() == pytest.approx(2.0 + 0.5)


def test_rapl_that_may_not_be_read_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, INTEL)
    real = power_sources._number

    def refuse(path: Path) -> int:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(power_sources, "_number", refuse)
    missing = rapl(tmp_path)
    assert isinstance(missing, Missing) and "root" in missing.why and "energy_uj" in missing.why


def test_a_battery_tells_its_discharge(tmp_path: Path) -> None:
    source = _found(battery(write_tree(tmp_path, BATTERY)))
    assert (source.name, source.rail, source.read()) == ("battery", "BAT0", pytest.approx(8.45))
    power = tmp_path / "sys/class/power_supply/BAT0"
    (power / "power_now").unlink()
    (power / "current_now").write_text("-700000\n")
    (power / "voltage_now").write_text("12000000\n")
    assert _found(battery(tmp_path)).read() == pytest.approx(8.4)
    (power / "status").write_text("Charging\n")
    missing = battery(tmp_path)
    assert isinstance(missing, Missing) and "unplug" in missing.why


@pytest.mark.parametrize(("line", "rails"), [
    ("RAM 2448/7620MB (lfb 2x4MB) SWAP 0/3810MB (cached 0MB) CPU [9%@729,off] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305] "
     "cpu@48.5C tj@49.7C VDD_IN 4792mW/4651mW VDD_CPU_GPU_CV 553mW/514mW VDD_SOC 1497mW/1480mW",
     {"VDD_IN": 4.792, "VDD_CPU_GPU_CV": 0.553, "VDD_SOC": 1.497}),
    ("RAM 1409/3964MB (lfb 28x4MB) IRAM 0/252kB(lfb 252kB) CPU [22%@518,off] APE 25 PMIC@50C POM_5V_IN 2003/1990 "
     "POM_5V_GPU 0/0 POM_5V_CPU 320/320", {"POM_5V_IN": 2.003, "POM_5V_GPU": 0.0, "POM_5V_CPU": 0.32}),
    ("nothing of the kind", {}),
])
def test_lines_of_tegrastats(line: str, rails: dict[str, float]) -> None:
    assert tegrastats_watts(line) == rails


def test_tegrastats_is_read_as_it_prints(tmp_path: Path) -> None:
    tool = tmp_path / "tegrastats"
    tool.write_text('#!/bin/sh\n[ "$1 $2" = "--interval 100" ] || exit 1\n'
                    "echo 'RAM 1/2MB VDD_IN 4000mW/4000mW'\necho 'RAM 1/2MB VDD_IN 6000mW/5000mW'\nexec sleep 60\n")
    tool.chmod(0o755)
    source = _found(start_tegrastats(str(tool)))
    try:
        deadline, watts = time.monotonic() + DEADLINE_S, 0.0
        while watts != 6.0:
            assert time.monotonic() < deadline
            try:
                watts = source.read()
            except ValueError:
                time.sleep(0.01)
        assert source.rail == "VDD_IN"
    finally:
        source.close()


def test_the_first_source_that_answers_is_taken(tmp_path: Path) -> None:
    assert _found(find_source(write_tree(tmp_path / "a", ORIN_NANO | INTEL | BATTERY), "none")).name == "INA3221"
    assert _found(find_source(write_tree(tmp_path / "b", INTEL | BATTERY), "none")).name == "RAPL"
    assert _found(find_source(write_tree(tmp_path / "c", BATTERY), "none")).name == "battery"
    missing = find_source(tmp_path / "d", "none")
    assert isinstance(missing, Missing)
    assert missing.why == "no INA3221 power sensor; no tegrastats; no RAPL counters; no battery"


def test_a_sensor_that_vanishes_raises_what_a_sampler_expects(tmp_path: Path) -> None:
    source = _found(jetson(write_tree(tmp_path, ORIN_NANO)))
    current = tmp_path / "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/curr1_input"
    current.unlink()
    with pytest.raises(OSError, match="curr1_input"):
        source.read()
    current.write_text("")
    with pytest.raises(ValueError, match="empty"):
        source.read()
