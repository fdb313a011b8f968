"""What was measured is found again, for this device and this disk only; what is damaged counts as not measured."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from shapes import profile

from edgert.memory.profile import DeviceProfile, DiskSpeed, Rehearsal
from edgert.memory.profile_store import ProfileStore


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(tmp_path / "cache" / "device.json")


REHEARSAL = Rehearsal(0.1, 0.2, {0: 0.0, 255: 0.01}, {0: 0.0, 8: 0.1}, n_disturbed=1)
MEASURED = replace(profile(2e9).learn("disk", 1.5), rehearsals={"llama-1": REHEARSAL}, n_disturbed=2,
                   curves={"llama-1": [(0.0, 0.0), (0.5, 0.8), (1.0, 1.0)]})


def test_a_profile_is_found_again(store: ProfileStore) -> None:
    assert store.load("cpu", "8:1") == (None, None)
    store.save("cpu", "8:1", MEASURED)
    assert store.load("cpu", "8:1") == (MEASURED, MEASURED.disk)


def test_another_device_or_disk_knows_nothing_of_it(store: ProfileStore) -> None:
    store.save("cpu", "8:1", MEASURED)
    assert store.load("other", "8:1") == (None, MEASURED.disk)
    found, disk = store.load("cpu", "8:2")
    assert disk is None
    assert found == replace(MEASURED, disk=DeviceProfile().disk, corrections={}, rehearsals={})
    store.save("cpu", "8:2", replace(MEASURED, disk=DiskSpeed(5.0, 1.0)))
    assert store.load("cpu", "8:1") == (MEASURED, MEASURED.disk)


@pytest.mark.parametrize("change", [
    {"devices": None}, {"devices": {"cpu": 3}}, {"devices": {"cpu": {"multiply_s": {"2/plain": {"one": 1}}}}},
    {"devices": {"cpu": {"memory_bytes_s": -1}}}, {"devices": {"cpu": {"memory_bytes_s": "fast"}}},
    {"devices": {"cpu": {"multiply_s": {"2/plain": {}}}}}, {"devices": {"cpu": {"attend_s": {"x": {"1": 1.0}}}}},
    {"devices": {"cpu": {"n_threads": float("nan")}}}, {"disks": {"8:1": {"bytes_s": 0, "latency_s": 1}}},
    {"disks": {"8:1": []}}], ids=str)
def test_damaged_parts_count_as_nothing(store: ProfileStore, change: dict[str, dict[str, object]]) -> None:
    store.save("cpu", "8:1", MEASURED)
    known = json.loads(store._path.read_text())
    for name, table in change.items():
        entry = None if table is None else {**known[name], **{key: {**known[name][key], **value}
                                            if isinstance(value, dict) else value for key, value in table.items()}}
        known[name] = entry
    store._path.write_text(json.dumps(known))
    found = store.load("cpu", "8:1")
    assert None in found


@pytest.mark.parametrize("change", [
    {"rehearsals": {"llama-1": 3}}, {"rehearsals": {"llama-1": {"fused_s": 1}}},
    {"rehearsals": {"llama-1": {**asdict(REHEARSAL), "fused_s": 0}}},
    {"rehearsals": {"llama-1": {**asdict(REHEARSAL), "attend_s": {"x": 1, "0": 0}}}},
    {"rehearsals": {"llama-1": {**asdict(REHEARSAL), "attend_s": {"255": 1}}}},
    {"rehearsals": {"llama-1": {**asdict(REHEARSAL), "misses_s": {"0": 0, "1": -1}}}},
    {"rehearsals": {"llama-1": {**asdict(REHEARSAL), "misses_s": {"8": 0.1}}}},
    {"curves": {"llama-1": [[0, 0], [1, 2]]}}, {"curves": {"llama-1": [[0, 0], [0.5, 0.9], [1, 0.8]]}},
    {"curves": {"llama-1": [[0, 0]]}}, {"curves": {"llama-1": "high"}}, {"curves": None}, {"rehearsals": []}], ids=str)
def test_a_damaged_figure_of_a_model_is_forgotten_alone(store: ProfileStore, change: dict[str, object]) -> None:
    store.save("cpu", "8:1", MEASURED)
    known = json.loads(store._path.read_text())
    for name, entry in change.items():
        table = known["devices"]["cpu"] if name == "curves" else known["rehearsals"]
        table["cpu 8:1" if name == "rehearsals" else name] = entry
    store._path.write_text(json.dumps(known))
    found, _ = store.load("cpu", "8:1")
    assert found == replace(MEASURED, **{name: {} for name in change})  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [None, -1, "1", 1.5, [1]])
def test_what_does_not_say_whether_it_was_disturbed_was_not(store: ProfileStore, count: object) -> None:
    store.save("cpu", "8:1", MEASURED)
    known = json.loads(store._path.read_text())
    for entry in (known["devices"]["cpu"], known["rehearsals"]["cpu 8:1"]["llama-1"]):
        entry["n_disturbed"] = count
    store._path.write_text(json.dumps(known))
    found, _ = store.load("cpu", "8:1")
    assert found is not None
    assert (found.n_disturbed, found.rehearsals["llama-1"].n_disturbed) == (0, 0)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b"[" * 10**5, b"null"])
def test_a_damaged_file_counts_as_nothing_and_is_replaced(store: ProfileStore, content: bytes) -> None:
    store._path.parent.mkdir()
    store._path.write_bytes(content)
    assert store.load("cpu", "8:1") == (None, None)
    store.save("cpu", "8:1", MEASURED)
    assert store.load("cpu", "8:1")[0] == MEASURED


def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ProfileStore(tmp_path / "file" / "device.json")
    store.save("cpu", "8:1", MEASURED)
    assert store.load("cpu", "8:1") == (None, None)
