"""What a plan was made for is found again, for this very file; what is damaged counts as not known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from shapes import OVERHEADS, demands, moe_shape

from edgert.memory.demand_store import DemandStore
from edgert.memory.hits import HIT_CURVE
from edgert.memory.planner import Demand

DEMAND = Demand(moe_shape(foresees=True), OVERHEADS, 4096, 512, {"decode": frozenset({2, 12})})


@pytest.fixture
def store(tmp_path: Path) -> DemandStore:
    return DemandStore(tmp_path / "cache" / "demands.json")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(demands())
def test_any_demand_is_found_again(store: DemandStore, model: Path, demand: Demand) -> None:
    store.save(model, demand, "cpu", "8:1")
    assert store.load(model) == (demand, "cpu", "8:1")


def test_what_answers_have_taught_is_not_kept_here(store: DemandStore, model: Path) -> None:
    store.save(model, replace(DEMAND, curve=[(0.0, 0.0), (1.0, 1.0)]), "cpu", "8:1")
    found = store.load(model)
    assert found is not None and found[0].curve == HIT_CURVE


def test_another_file_knows_nothing_of_it(store: DemandStore, model: Path) -> None:
    store.save(model, DEMAND, "cpu", "8:1")
    assert store.load(model.with_name("other.gguf")) is None
    model.write_bytes(b"GGUF2")
    assert store.load(model) is None
    store.save(model.with_name("missing.gguf"), DEMAND, "cpu", "8:1")  # nothing is kept of what is not there
    assert len(json.loads(store._path.read_text())) == 1


def test_the_newest_are_kept(store: DemandStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.memory.demand_store._MAX_MODELS", 2)
    paths = [tmp_path / f"{n}.gguf" for n in range(3)]
    for path in paths:
        path.write_bytes(b"GGUF")
        store.save(path, DEMAND, "cpu", "8:1")
    assert [store.load(path) is not None for path in paths] == [False, True, True]


@pytest.mark.parametrize("change", [
    {"shape": None}, {"shape": {}}, {"overheads": []}, {"context_length": -1}, {"batch_size": "many"}, {"device": 3},
    {"repacked": {"never": [2]}}, {"repacked": {"decode": ["x"]}}, {"version": [4]}, {"repacked": None}], ids=str)
def test_damaged_entries_count_as_nothing(store: DemandStore, model: Path, change: dict[str, Any]) -> None:
    assert damaged(store, model, lambda entry: entry.update(change)) is None


@pytest.mark.parametrize(("part", "name", "value"), [
    ("shape", "n_layers", -1), ("shape", "n_layers", True), ("shape", "n_layers", 2**63), ("shape", "foresees", 1),
    ("shape", "key", "x" * 300), ("shape", "matrix_bytes", {"x": 1}), ("shape", "matrix_bytes", {"2": 1.5}),
    ("shape", "another", 1), ("overheads", "compute_bytes", {}), ("overheads", "process_bytes", None)])
def test_damaged_figures_count_as_nothing(store: DemandStore, model: Path, part: str, name: str, value: Any) -> None:
    assert damaged(store, model, lambda entry: entry[part].update({name: value})) is None


def damaged(store: DemandStore, model: Path, change: Any) -> object:
    """What is found once the entry was changed."""
    store.save(model, DEMAND, "cpu", "8:1")
    known = json.loads(store._path.read_text())
    assert store.load(model) is not None
    change(known[str(model)])
    store._path.write_text(json.dumps(known))
    return store.load(model)
