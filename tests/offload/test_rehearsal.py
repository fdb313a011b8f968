"""A rehearsal computes what the model would, without its weights; how long that takes is never asserted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgert.architectures.registry import open_architecture
from edgert.engine.calibration import bytes_like_weights
from edgert.gguf.model_file import ModelFile
from edgert.memory.probe import MemoryProbe
from edgert.memory.profile import Rehearsal
from edgert.paths import Paths
from edgert.planning import EngineOptions, Planning
from offload import rehearsal
from offload.direct_file import DirectFile

TinyModel = Callable[..., Path]
FAMILIES = ["llama", "qwen2", "gemma3", "qwen3moe", "smallthinker"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_LEAST_PASSES": 1, "_PASSES_S": 0.0, "_MOST_PASSES_S": 0.0, "_SLOW_S": 9.0,
                        "_LEAST_RING_BYTES": 2**20, "_MOST_RING_BYTES": 2**20}.items():
        monkeypatch.setattr(rehearsal, name, value)


def rehearse(path: Path, most_bytes: int = 2**30) -> Rehearsal | None:
    with Planning(ModelFile.open(path), Paths.of_user(), EngineOptions(2**30, 512), MemoryProbe()) as planning:
        return rehearsal.rehearse(planning.backend, planning.file, planning.arch, planning.pieces,
                                  planning.demand.shape, "f16", most_bytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_rehearsed_and_only_experts_are_read(tiny_model: TinyModel, family: str,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model(family)
    if family not in ("qwen3moe", "smallthinker"):
        monkeypatch.setattr(DirectFile, "__init__", lambda *_: pytest.fail("the file was opened"))
    found = rehearse(path)
    assert found is not None
    assert min(found.fused_s, found.blocks_s) > 0
    assert found.attend_s.keys() == {0, 255, 1023, 4095}
    assert found.attend_s[0] == 0
    assert bool(found.misses_s) == (family in ("qwen3moe", "smallthinker"))


@pytest.mark.parametrize("family", ["qwen3moe", "smallthinker"])
def test_all_experts_are_found_or_one_of_some_layers_is_missed_or_one_of_each_or_all(
        tiny_model: TinyModel, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pools, missed, make = [], [], rehearsal._pool

    def keep(*given: object) -> object:
        pools.append(make(*given))  # type: ignore[arg-type]
        return pools[-1]

    def count(run: Callable[[], object]) -> float:
        for _ in range(2):  # the first builds graphs and reads; what it wrote to the cache the second reads
            run()
        before = pools[-1].counters.misses
        for _ in range(3):
            run()
        missed.append(pools[-1].counters.misses - before)
        return 0.01

    monkeypatch.setattr(rehearsal, "_pool", keep)
    monkeypatch.setattr(rehearsal, "_typical", count)
    path = tiny_model(family, n_layers=8)
    rehearse(path)
    n_used = open_architecture(ModelFile.open(path)).hp.n_experts_used
    assert n_used > 1
    # With four lengths of the cache; one of every fourth layer, of each, and all; the whole model's graph has no pool.
    assert missed[:4] == [0, 0, 0, 0]
    assert missed[4:7] == [3 * 2, 3 * 8, 3 * 8 * n_used]


def test_logits_are_numbers(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither overflow nor underflow, which some processors compute slowly."""
    seen = []
    monkeypatch.setattr(rehearsal, "_typical", lambda run: seen.append(np.array(run())) or 0.01)
    rehearse(tiny_model("llama", quantisation="Q4_0", n_layers=8))
    assert len(seen) == 5
    assert all(np.isfinite(logits).all() and np.abs(logits).max() > 0 for logits in seen)


def test_bytes_stand_for_numbers_of_every_width() -> None:
    pattern = bytes_like_weights()
    for kind in (np.float16, np.float32):
        assert np.isfinite(pattern.view(kind)).all()
    assert len(np.unique(pattern[::2])) == 256


def test_what_would_take_too_much_is_not_rehearsed(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model("llama")
    assert rehearse(path, most_bytes=2**19) is None
    monkeypatch.setattr(rehearsal, "LONG_S", 0.0)
    assert rehearse(path) is None


def test_a_disturbed_rehearsal_is_repeated_a_few_times(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.neighbours._MOST_SHARE", -1.0)
    seconds, counts = iter([0.03, 0.02, 0.04, 0.01]), []
    with Planning(ModelFile.open(tiny_model("llama")), Paths.of_user(), EngineOptions(2**30, 512),
                  MemoryProbe()) as planning:
        for _ in range(4):
            now = next(seconds)
            monkeypatch.setattr(rehearsal, "_typical", lambda run, now=now: now)
            planning.profile = planning.rehearsed(planning.profile)
            found = planning.profile.rehearsals[planning.demand.shape.key]
            counts.append((found.n_disturbed, found.fused_s, planning.is_rehearsed))
    assert counts == [(1, 0.03, False), (2, 0.02, False), (3, 0.02, True), (3, 0.02, True)]


def test_any_memory_that_is_left_will_do(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_MOST_RING_BYTES", 2**23)
    assert rehearse(tiny_model("llama"), most_bytes=6 * 2**20 + 3) is not None


def test_memory_is_given_back(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, make = [], rehearsal.Stage.__init__

    def keep(stage: rehearsal.Stage, *given: object, **options: object) -> None:
        make(stage, *given, **options)  # type: ignore[arg-type]
        stages.append(stage)

    monkeypatch.setattr(rehearsal.Stage, "__init__", keep)
    rehearse(tiny_model("qwen3moe"))
    assert len(stages) == 3
    assert not any(stage.buffer.handle for stage in stages)
