"""Sizes as people write them, the places of the user's files, and the cores that may be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.cpu import largest_cache_bytes, usable_cores
from edgert.errors import UsageError
from edgert.paths import Paths
from edgert.units import format_bytes, parse_bytes

GIB = 2**30


# -- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "n_bytes"), [
    ("0", 0), ("123", 123), (600, 600), ("600M", 600 * 2**20), ("1.5G", 3 * GIB // 2), ("64KiB", 65536),
    ("2 GB", 2 * GIB), ("2gb", 2 * GIB), ("1T", 2**40), ("10B", 10), (" 5k ", 5120), ("0.1K", 102),
    ("4503599627370497.5G", 4503599627370497 * GIB + GIB // 2),
    ("9007199254740993", 9007199254740993),  # more than a float holds exactly
])
def test_sizes_are_powers_of_1024(text: str | int, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "M", "-1", "1e9", "1,5G", "600X", "1.G", ".5G", "0x10", "1 2", "nan", "inf", "٣G",
                                  "9" * 400, "1." + "1" * 5000, "6 0 0M", "600MM"])
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(("n_bytes", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (100 * 2**20, "100.0 MiB"), (5 * GIB, "5.00 GiB"),
    (2**40, "1024.00 GiB"),
])
def test_sizes_are_shown_in_the_unit_that_suits_them(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@settings(derandomize=True)
@given(st.integers(0, 2**50))
def test_a_shown_size_is_read_back_nearly(n_bytes: int) -> None:
    read = parse_bytes(format_bytes(n_bytes))
    assert abs(read - n_bytes) <= max(0.5, 0.051 * 2**10, 0.051 * n_bytes)


# -- places ----------------------------------------------------------------------------------------------------------
def test_one_variable_moves_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "home"))
    paths = Paths.of_user()
    assert paths == Paths(tmp_path / "home/models", tmp_path / "home/config", tmp_path / "home/cache")
    assert not (tmp_path / "home").exists()  # nothing is created until something is written


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_HOME", "~/somewhere")
    assert Paths.of_user().models == Path.home() / "somewhere/models"


@pytest.mark.parametrize("home", [None, ""])
def test_without_it_the_platforms_places_are_used(home: str | None, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGERT_HOME")
    if home is not None:
        monkeypatch.setenv("EDGERT_HOME", home)
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr("sys.platform", "linux")
    paths = Paths.of_user()
    assert all("edgert" in str(one) for one in (paths.models, paths.config, paths.cache))
    assert len({paths.models, paths.config, paths.cache}) == 3


# -- cores -----------------------------------------------------------------------------------------------------------
def _topology(directory: Path, cores: list[tuple[int, int]]) -> Path:
    """A /sys/devices/system/cpu with one CPU for each (package, core)."""
    for cpu, (package, core) in enumerate(cores):
        here = directory / f"cpu{cpu}" / "topology"
        here.mkdir(parents=True)
        (here / "physical_package_id").write_text(f"{package}\n")
        (here / "core_id").write_text(f"{core}\n")
    return directory


@pytest.mark.parametrize(("cores", "allowed", "expected"), [
    ([(0, 0), (0, 1), (0, 2), (0, 3)], {0, 1, 2, 3}, 4),
    ([(0, 0), (0, 1), (0, 0), (0, 1)], {0, 1, 2, 3}, 2),  # two threads on each core
    ([(0, 0), (1, 0), (0, 1), (1, 1)], {0, 1, 2, 3}, 4),  # two packages number their cores alike
    ([(0, 0), (0, 1), (0, 2), (0, 3)], {1, 3}, 2),  # an affinity mask
    ([(0, 0), (0, 0), (0, 1), (0, 1)], {0, 1}, 1),
    ([], {0, 1, 2}, 3),  # nothing is known: each CPU is a core
])
def test_one_thread_for_each_physical_core_that_is_allowed(
        cores: list[tuple[int, int]], allowed: set[int], expected: int, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    assert usable_cores(_topology(tmp_path / "cpu", cores), tmp_path / "missing") == expected


@pytest.mark.parametrize(("limit", "expected"), [
    ("max 100000\n", 4), ("200000 100000\n", 2), ("150000 100000\n", 1), ("50000 100000\n", 1), ("900000 100000\n", 4),
    ("", 4), ("garbage\n", 4), ("a b\n", 4), ("1 2 3\n", 4), ("200000 0\n", 4), ("0 100000", 1),
])
def test_a_control_groups_limit_counts(limit: str, expected: int, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    (tmp_path / "cpu.max").write_text(limit)
    topology = _topology(tmp_path / "cpu", [(0, core) for core in range(4)])
    assert usable_cores(topology, tmp_path / "cpu.max") == expected


@pytest.mark.parametrize(("sizes", "expected"), [
    ((), 0), (("48K\n", "1024K\n", "32M\n"), 2**25), (("512K\n", ""), 2**19), (("4096\n", "huge\n"), 4096)])
def test_the_largest_cache_is_the_processors(sizes: tuple[str, ...], expected: int, tmp_path: Path) -> None:
    for index, size in enumerate(sizes):
        directory = tmp_path / f"cpu0/cache/index{index}"
        directory.mkdir(parents=True)
        (directory / "size").write_text(size)
    assert largest_cache_bytes(tmp_path) == expected


def test_this_machine_has_a_core() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
