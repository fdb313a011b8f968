"""Choosing layouts: what was measured is kept, and trusted where it is sound; `plain` and `repack` never measure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert.engine import layouts
from edgert.engine.layouts import LayoutChoice, Layouts, can_repack, choose_layouts, repack_buffer_type
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context
from edgert.gguf.types import TENSOR_TYPES

Q4_0, Q4_K, F32, I32 = 2, 12, 0, 26
TYPES = frozenset({Q4_0, Q4_K})


@pytest.fixture
def backend() -> Iterator[Backend]:
    opened = Backend(1)
    yield opened
    opened.close()


class Measurements:
    """Stands in for the stopwatch, and counts."""

    def __init__(self, gains: dict[int, dict[str, float]]) -> None:
        self.gains, self.asked = gains, list[int]()

    def __call__(self, backend: Backend, type_id: int) -> dict[str, float]:
        self.asked.append(type_id)
        return self.gains[type_id]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measurements:
    stand_in = Measurements({Q4_0: {"prefill": 1.5, "decode": 2.0}, Q4_K: {"prefill": 0.6, "decode": 1.3}, F32: {}})
    monkeypatch.setattr(layouts, "_measure", stand_in)
    return stand_in


def test_each_phase_gets_what_is_faster_in_it(backend: Backend, measured: Measurements, tmp_path: Path) -> None:
    chosen = choose_layouts("auto", backend, TYPES, tmp_path / "layouts.json")
    assert chosen.repacked == {"prefill": {Q4_0}, "decode": {Q4_0, Q4_K}}
    assert chosen.of(Q4_K, "prefill") == "plain"
    assert chosen.of(Q4_K, "decode") == "repack"
    assert chosen.of(F32, "decode") == "plain"


def test_a_small_gain_is_not_worth_a_second_copy(backend: Backend, measured: Measurements, tmp_path: Path) -> None:
    measured.gains[Q4_0] = {"prefill": 1.02, "decode": 1.0}
    assert choose_layouts("auto", backend, frozenset({Q4_0}), tmp_path / "l.json").repacked["prefill"] == frozenset()


def test_what_was_measured_is_not_measured_again(backend: Backend, measured: Measurements, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "layouts.json"
    first = choose_layouts("auto", backend, frozenset({Q4_0}), cache)
    assert measured.asked == [Q4_0]
    assert choose_layouts("auto", backend, frozenset({Q4_0}), cache) == first
    assert measured.asked == [Q4_0]
    choose_layouts("auto", backend, TYPES, cache)
    assert measured.asked == [Q4_0, Q4_K]
    choose_layouts("auto", backend, TYPES, cache)
    assert measured.asked == [Q4_0, Q4_K]
    assert [one.name for one in cache.parent.iterdir()] == ["layouts.json"]


def test_another_number_of_threads_is_measured_anew(backend: Backend, measured: Measurements, tmp_path: Path) -> None:
    cache, two = tmp_path / "layouts.json", Backend(2)
    choose_layouts("auto", backend, frozenset({Q4_0}), cache)
    choose_layouts("auto", two, frozenset({Q4_0}), cache)
    assert measured.asked == [Q4_0, Q4_0]
    assert len(json.loads(cache.read_text())) == 2
    two.close()


def _gains_replaced(known: dict[str, Any], gains: object) -> str:
    return json.dumps(dict.fromkeys(known, gains))


@pytest.mark.parametrize("damage", [
    lambda known: "", lambda known: "{", lambda known: "[1, 2]", lambda known: "null", lambda known: "\0" * 100,
    lambda known: "[" * 100_000, lambda known: _gains_replaced(known, None), lambda known: _gains_replaced(known, [2]),
    lambda known: _gains_replaced(known, {"2": 7}), lambda known: _gains_replaced(known, {"2": {"prefill": "fast"}}),
    lambda known: _gains_replaced(known, {"2": {"prefill": None, "decode": []}}),
], ids=["empty", "cut", "list", "null", "zeros", "deep", "no gains", "gains in a list", "a gain for all phases",
        "a gain in words", "no gain"])
def test_a_damaged_cache_file_is_measured_anew(damage: Any, backend: Backend, measured: Measurements,
                                               tmp_path: Path) -> None:
    cache = tmp_path / "layouts.json"
    first = choose_layouts("auto", backend, frozenset({Q4_0}), cache)
    cache.write_text(damage(json.loads(cache.read_text())))
    assert choose_layouts("auto", backend, frozenset({Q4_0}), cache) == first
    assert measured.asked == [Q4_0, Q4_0]
    assert choose_layouts("auto", backend, frozenset({Q4_0}), cache) == first  # and is sound again
    assert measured.asked == [Q4_0, Q4_0]


def test_a_cache_that_cannot_be_written_only_costs_the_measurement(backend: Backend, measured: Measurements,
                                                                   tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file" / "layouts.json", tmp_path):  # no directory, and a directory itself
        assert choose_layouts("auto", backend, frozenset({Q4_0}), cache).of(Q4_0, "decode") == "repack"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file"]


def test_a_full_disk_leaves_no_half_a_file(backend: Backend, measured: Measurements, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def half_of_it(path: Path, text: str) -> None:
        with path.open("w") as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half_of_it)
    choose_layouts("auto", backend, frozenset({Q4_0}), tmp_path / "layouts.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("choice", "expected"), [("plain", frozenset()), ("repack", TYPES)])
def test_a_choice_of_the_users_is_not_measured(choice: LayoutChoice, expected: frozenset[int], backend: Backend,
                                               measured: Measurements, tmp_path: Path) -> None:
    chosen = choose_layouts(choice, backend, TYPES, tmp_path / "layouts.json")
    assert chosen == Layouts({"prefill": expected, "decode": expected})
    assert measured.asked == []
    assert list(tmp_path.iterdir()) == []


# -- on this machine -------------------------------------------------------------------------------------------------
def test_measuring_gives_a_gain_for_each_phase_where_ggml_repacks(backend: Backend,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_N_TOKENS", {"decode": 1, "prefill": 8})
    gains = layouts._measure(backend, Q4_0)
    if repack_buffer_type(backend.device) is None:
        assert gains == {}
    else:
        assert set(gains) <= {"decode", "prefill"}
        assert all(np.isfinite(gain) and gain > 0 for gain in gains.values())


def test_no_type_of_any_file_ends_the_process(backend: Backend) -> None:
    for type_id, kind in TENSOR_TYPES.items():
        for shape in ((1024, 64), (kind.block_size, 1), (kind.block_size * 3, 5), (1024, 64, 4)):
            context = Context(1)
            assert can_repack(backend, context.tensor(type_id, shape)) in (True, False)
            context.close()
    assert layouts._measure(backend, I32) == {}
