"""Who tells what the device draws: a Jetson's sensors, a processor's counters, a battery. The first that answers wins.

Each reads files below `root`, so that tests bring recorded trees. Sources of the layouts: the kernel's documentation of
ina3221, powercap and power_supply; NVIDIA's developer guide for a Jetson's rails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from apps.bench.energy import Kind, WrappingCounter

# The rail that feeds the whole module, by generation. Where there is none (AGX), all rails together are the module.
_WHOLE = ("VDD_IN", "POM_5V_IN")
_TEGRASTATS_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d{1,9})(?:mW)?/\d{1,9}(?:mW)?(?=\s|$)")
_TEGRASTATS_INTERVAL_MS = 100
_MAX_LINE_BYTES = 2**16


class PowerSource(Protocol):
    """`name` and `rail` say what is measured; `read` gives watts, or joules since the first call. Raises OSError and
    ValueError."""

    name: str
    rail: str
    kind: Kind

    def read(self) -> float: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a source does not answer here."""

    why: str


@dataclass(slots=True)
class Watts:
    """The sum of several sensors that tell power."""

    name: str
    rail: str
    sensors: list[Callable[[], float]]
    kind: Kind = "watts"

    def read(self) -> float:
        return sum(read() for read in self.sensors)

    def close(self) -> None:
        """There is nothing to give back."""


@dataclass(slots=True)
class Joules:
    """The sum of several counters of microjoules."""

    name: str
    rail: str
    counters: list[tuple[Path, WrappingCounter]]
    kind: Kind = "joules"

    def read(self) -> float:
        return sum(counter.advance(_number(path)) for path, counter in self.counters) / 1e6

    def close(self) -> None:
        """There is nothing to give back."""


@dataclass(slots=True)
class Tegrastats:
    """NVIDIA's tool, which prints a line every 100 ms; the newest line counts."""

    process: subprocess.Popen[bytes]
    name: str = "tegrastats"
    rail: str = ""
    kind: Kind = "watts"
    _rest: bytes = b""
    _rails: Mapping[str, float] = field(default_factory=dict)

    def read(self) -> float:
        assert self.process.stdout is not None
        with suppress(BlockingIOError):
            self._rest += os.read(self.process.stdout.fileno(), _MAX_LINE_BYTES)
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self._rails = tegrastats_watts(line.decode(errors="replace")) or self._rails
        names = whole_rails(self._rails)
        self.rail = " + ".join(names)
        if not names:
            raise ValueError("tegrastats has told no rail yet")
        return sum(self._rails[name] for name in names)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def find_source(root: Path = Path("/"), tegrastats: str | None = None) -> PowerSource | Missing:
    """The first source that answers, or why none does. `tegrastats` names the tool, where it is not on the path."""
    whys = []
    for find in (partial(jetson, root), partial(start_tegrastats, tegrastats), partial(rapl, root),
                 partial(battery, root)):
        found = find()
        if not isinstance(found, Missing):
            return found
        whys.append(found.why)
    return Missing("; ".join(whys))


def jetson(root: Path) -> PowerSource | Missing:
    """INA3221 sensors on a Jetson's I2C bus: channels of hwmon (JetPack 5 and 6), or of iio (JetPack 4)."""
    rails: dict[str, Callable[[], float]] = {}
    for device in sorted(root.glob("sys/bus/i2c/devices/*")):
        if "ina3221" not in _text(device / "name"):
            continue
        for directory in sorted((*device.glob("hwmon/hwmon*"), *device.glob("iio:device*"))):
            rails |= _hwmon_rails(directory) | _iio_rails(directory)
    if not rails:
        return Missing("no INA3221 power sensor")
    names = whole_rails(rails)
    return Watts("INA3221", " + ".join(names), [rails[name] for name in names])


def whole_rails(rails: Mapping[str, object]) -> list[str]:
    """The rails that together are the whole module."""
    return next(([name] for name in _WHOLE if name in rails), sorted(rails))


def _hwmon_rails(directory: Path) -> dict[str, Callable[[], float]]:
    """Millivolts in `inN_input`, milliamperes in `currN_input`. A sum of shunt voltages and NC are no rails."""
    rails = {}
    for label in sorted(directory.glob("in*_label")):
        name, number = _text(label), label.name[2:-len("_label")]
        if name and name != "NC" and "shunt" not in name and (directory / f"curr{number}_input").exists():
            rails[name] = _product(directory / f"in{number}_input", directory / f"curr{number}_input", 1e-6)
    return rails


def _iio_rails(directory: Path) -> dict[str, Callable[[], float]]:
    """Milliwatts in `in_powerN_input`."""
    return {_text(label): _scaled(directory / f"in_power{label.name.rpartition('_')[2]}_input", 1e-3)
            for label in sorted(directory.glob("rail_name_*")) if _text(label) not in ("", "NC")}


def start_tegrastats(tool: str | None = None) -> PowerSource | Missing:
    """NVIDIA's own tool, for boards whose sensors sysfs does not show."""
    path = shutil.which(tool or "tegrastats")
    if path is None:
        return Missing("no tegrastats")
    process = subprocess.Popen([path, "--interval", str(_TEGRASTATS_INTERVAL_MS)], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return Tegrastats(process)


def tegrastats_watts(line: str) -> dict[str, float]:
    """Watts of each rail in a line: `VDD_IN 4792mW/4651mW` (now/average) or, on older boards, `POM_5V_IN 2003/2003`."""
    return {name: int(milliwatts) / 1000 for name, milliwatts in _TEGRASTATS_RAIL.findall(line)
            if name.startswith(("VDD", "POM", "VIN", "CPU", "GPU", "SOC", "CV", "SYS5V", "VDDRQ"))}


def rapl(root: Path) -> PowerSource | Missing:
    """Counters of Intel's and AMD's processors: every package, and memory where it counts apart."""
    zones = sorted(root.glob("sys/class/powercap/intel-rapl:*"))
    wanted = [zone for zone in zones if _text(zone / "name").startswith("package") or _text(zone / "name") == "dram"]
    if not wanted:
        return Missing("no RAPL counters")
    try:
        counters = [(zone / "energy_uj", WrappingCounter(_number(zone / "max_energy_range_uj"))) for zone in wanted]
        source = Joules("RAPL", " + ".join(_text(zone / "name") for zone in wanted), counters)
        source.read()
    except PermissionError:
        return Missing(f"RAPL counters are root's to read ({wanted[0] / 'energy_uj'}): run as root, or let root say "
                       f"`chmod a+r` to them")
    except (OSError, ValueError) as error:
        return Missing(f"RAPL counters cannot be read: {error}")
    return source


def battery(root: Path) -> PowerSource | Missing:
    """What a laptop's battery gives: `power_now` in microwatts, or `current_now` times `voltage_now`."""
    supplies = [supply for supply in sorted(root.glob("sys/class/power_supply/*"))
                if _text(supply / "type") == "Battery" and _text(supply / "scope") != "Device"]
    if not supplies:
        return Missing("no battery")
    supply = next((one for one in supplies if _text(one / "status") == "Discharging"), None)
    if supply is None:
        return Missing("the battery is not discharging: unplug the charger to measure")
    if (supply / "power_now").exists():
        return Watts("battery", supply.name, [_scaled(supply / "power_now", 1e-6)])
    if (supply / "current_now").exists() and (supply / "voltage_now").exists():
        return Watts("battery", supply.name, [_product(supply / "current_now", supply / "voltage_now", 1e-12)])
    return Missing("the battery does not tell its power")


def _scaled(path: Path, factor: float) -> Callable[[], float]:
    return lambda: abs(_number(path)) * factor  # some batteries tell a discharge as negative


def _product(a: Path, b: Path, factor: float) -> Callable[[], float]:
    return lambda: abs(_number(a) * _number(b)) * factor


def _number(path: Path) -> int:
    """The first word of a file; JetPack 4 writes units behind it. Raises OSError, ValueError."""
    words = path.read_text().split()
    if not words:
        raise ValueError(f"{path} is empty")
    return int(words[0])


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
