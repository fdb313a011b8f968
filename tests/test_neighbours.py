"""Others are seen by what processors did beyond this process; a profile that they disturbed is measured again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil
import pytest

from edgert import device, neighbours
from edgert.device import calibrated
from edgert.engine import calibration
from edgert.ggml.backend import Backend
from edgert.memory.profile import DeviceProfile, Rehearsal
from edgert.memory.profile_store import ProfileStore
from edgert.neighbours import Neighbours, Times


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_N_COLUMNS": 256, "_N_ROWS": 64, "_SET_BYTES": 2**16, "_COPY_BYTES": 2**20, "_N_CACHED": 256,
                        "_LEAST_RUNS": 1, "_RUNS_S": 0.0}.items():
        monkeypatch.setattr(calibration, name, value)
    monkeypatch.setattr(device, "_DISK_S", 0.01)


def processors(busy_s: float, idle_s: float, stolen_s: float = 0.0) -> list[Times]:
    """Each of this process's processors has computed, waited for the disk half of `idle_s`, and been idle; the others,
    which it may not use, are always busy."""
    mine = {"user": busy_s, "nice": 0.0, "idle": idle_s / 2, "iowait": idle_s / 2, "steal": stolen_s, "guest": busy_s}
    n_cpus = max(os.sched_getaffinity(0)) + 2
    return [mine if cpu in os.sched_getaffinity(0) else {"user": 1e7 + 99 * busy_s} for cpu in range(n_cpus)]


def in_turn(*readings: list[Times]) -> Callable[[], list[Times]]:
    left = iter(readings)
    return lambda: next(left)


@pytest.mark.parametrize(("busy_s", "stolen_s", "own_share", "share"), [
    (5, 0, 1, 0.0), (5, 0, 0.5, 0.25), (0, 0, 0, 0.0), (10, 0, 0, 1.0), (5, 5, 1, 0.5), (5, 0, 1.5, 0.0)])
def test_others_have_what_this_process_has_not(busy_s: float, stolen_s: float, own_share: float, share: float) -> None:
    own = iter([3.0, 3.0 + own_share * busy_s * len(os.sched_getaffinity(0))])
    now = processors(100 + busy_s, 100 + 10 - busy_s - stolen_s, stolen_s)
    assert Neighbours(in_turn(processors(100, 100), now), lambda: next(own)).share == pytest.approx(share)


def test_a_tenth_of_the_processors_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_MOST_SHARE", 0.1)
    for busy_s, disturbs in ((5, False), (20, True)):
        now = processors(100 + busy_s, 100 + 100 - busy_s)
        assert Neighbours(in_turn(processors(100, 100), now), lambda: 0.0).disturb == disturbs


@pytest.mark.parametrize("error", [OSError, psutil.AccessDenied])
def test_a_system_that_does_not_tell_shows_nobody(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_times", mock.Mock(side_effect=error))
    assert Neighbours().share == 0.0
    assert not Neighbours().disturb


def test_this_system_tells_of_each_processor() -> None:
    told = neighbours._processors()
    assert len(told) == os.cpu_count()
    assert all(times["user"] > 0 and "idle" in times for times in told)


def test_a_disturbed_device_is_measured_again_at_the_next_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    store, backend = ProfileStore(tmp_path / "device.json"), Backend(1)
    (tmp_path / "disk").write_bytes(bytes(2**20))
    seconds = iter([3e-3, 2e-3, 4e-3, 1e-3])

    def start() -> DeviceProfile:
        now = next(seconds)
        monkeypatch.setattr(calibration, "_best", lambda run: now)
        return calibrated(store, ("cpu", "8:1"), backend, [0], 64, 60, tmp_path / "disk")

    monkeypatch.setattr(neighbours, "_MOST_SHARE", -1.0)
    first = start()
    learnt = {"curves": {"m": ((0.0, 0.0), (1.0, 1.0))}, "rehearsals": {"m": Rehearsal(1.0, 1.0, {0: 0.0, 255: 1.0})}}
    store.save("cpu", "8:1", replace(first, corrections={"disk": 2.0}, **learnt))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        second, third = start(), start()
    assert len(caplog.records) == 2
    assert [one.n_disturbed for one in (first, second, third)] == [1, 2, 3]
    assert second.multiply_s["0/plain"][1] == pytest.approx(first.multiply_s["0/plain"][1] * 2 / 3)
    assert third.multiply_s == second.multiply_s  # the best of all
    assert not third.corrections and third.rehearsals == learnt["rehearsals"] and [*third.curves] == ["m"]
    assert start() == third  # a device that is never idle is as slow as it is
    backend.close()


def test_once_nobody_disturbs_what_was_measured_then_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, backend = ProfileStore(tmp_path / "device.json"), Backend(1)
    for most_share, n_disturbed, seconds in ((-1.0, 1, 1e-3), (1.0, 0, 2e-3), (-1.0, 0, 3e-3)):
        monkeypatch.setattr(neighbours, "_MOST_SHARE", most_share)
        monkeypatch.setattr(calibration, "_best", lambda run, now=seconds: now)
        found = calibrated(store, ("cpu", "8:1"), backend, [0], 64, 60, None)
        assert found.n_disturbed == n_disturbed
    assert found.memory_bytes_s == 2 * 2**20 / 2e-3
    backend.close()
