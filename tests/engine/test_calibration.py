"""Calibration measures what is missing, once, and stops at its deadline. Speeds themselves are never asserted."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from pathlib import Path

import pytest

from edgert.engine import calibration
from edgert.engine.calibration import calibrate
from edgert.ggml.backend import Backend
from edgert.memory.profile import DeviceProfile, DiskSpeed
from offload.disk_speed import disk_key, measure_disk

F16, Q4_0, Q4_K = 1, 2, 12


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_N_COLUMNS": 256, "_N_ROWS": 64, "_SET_BYTES": 2**16, "_COPY_BYTES": 2**20, "_N_CACHED": 256,
                        "_LEAST_RUNS": 1, "_RUNS_S": 0.0}.items():
        monkeypatch.setattr(calibration, name, value)


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend(1)
    yield backend
    backend.close()


def test_every_type_and_head_that_is_asked_for_is_measured(backend: Backend) -> None:
    found = calibrate(backend, None, [Q4_0, F16], 64, 60)
    assert {"1/plain", "2/plain"} <= found.multiply_s.keys() <= {"1/plain", "2/plain", "2/repack"}
    assert found.attend_s.keys() == {64}
    products = [s for table in found.multiply_s.values() for s in table.values()]
    figures = [found.memory_bytes_s, *products]
    assert all(isfinite(figure) and figure > 0 for figure in figures)
    assert found.n_threads == 1


def test_experts_are_measured_as_they_are_chosen(backend: Backend) -> None:
    found = calibrate(backend, None, [Q4_0], 64, 60, [Q4_0, F16])
    assert {"1/experts", "2/experts"} <= found.multiply_s.keys()
    assert found.multiply_s["2/experts"].keys() == found.multiply_s["2/plain"].keys()
    assert found.multiply(F16, "experts", 1, 8) == found.multiply_s["1/experts"][8]
    assert found.multiply(Q4_K, "experts", 1, 8) > 0  # nominal, until it is measured


def test_what_is_known_is_not_measured_again(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    known = calibrate(backend, None, [Q4_0], 64, 60)
    more = calibrate(backend, known, [Q4_0, Q4_K], 128, 60)
    assert {**more.multiply_s, **known.multiply_s} == more.multiply_s
    assert "12/plain" in more.multiply_s
    assert more.attend_s.keys() == {64, 128}
    monkeypatch.setattr(calibration, "_time", lambda run: pytest.fail("measured again"))
    assert calibrate(backend, more, [Q4_0, Q4_K], 128, 60) == more


def test_nothing_begins_after_the_deadline(backend: Backend) -> None:
    found = calibrate(backend, None, [Q4_0, Q4_K], 64, 0.0)
    assert found.multiply_s == {}
    assert found.multiply(Q4_0, "plain", 1e9, 1) > 0  # nominal, until it is measured


def test_the_device_is_told_from_others(backend: Backend) -> None:
    other = Backend(2)
    assert backend.speed_key != other.speed_key
    assert backend.speed_key == Backend(1).speed_key
    other.close()


@pytest.mark.parametrize("size_bytes", [100, 4096, 3 * 2**20, 20 * 2**20])
def test_a_disk_is_measured_by_a_file_of_any_size(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "model"
    path.write_bytes(bytes(size_bytes))
    found = measure_disk(path, 0.02)
    assert isinstance(found, DiskSpeed)
    assert found.bytes_s > 0 < found.latency_s
    assert disk_key(path) == disk_key(tmp_path)


def test_batches_between_measured_sizes_are_interpolated() -> None:
    profile = DeviceProfile({"2/plain": {1: 1.0, 8: 8.0, 128: 68.0}})
    assert [profile.multiply(2, "plain", 2, n) for n in (0.5, 1, 4.5, 8, 68, 128, 256)] == [2, 2, 9, 16, 76, 136, 272]
