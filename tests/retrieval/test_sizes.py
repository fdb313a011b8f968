"""What the memory manager counts is what is opened, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from random_head import RandomHead

from edgert import Runtime
from edgert.architectures.registry import open_architecture
from edgert.engine.kv_cache import DenseKVCache
from edgert.errors import KVStoreError, UsageError
from edgert.ggml.backend import Backend
from edgert.gguf.model_file import ModelFile
from edgert.memory.probe import MemoryProbe
from edgert.paths import Paths
from edgert.planning import EngineOptions, Planning
from retrieval.cache import RetrievedKVCache
from retrieval.engine import RetrievalEngine
from retrieval.opening import open_selector
from retrieval.sizes import kv_sizes, policy_for
from retrieval.store import DiskTier, temporary_files

TinyModel = Callable[..., Path]
MIB = 2**20


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "smallthinker"])
@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("has_head", [True, False])
def test_fixed_bytes_and_bytes_for_each_token_are_those_of_the_opened_cache(
        tiny_model: TinyModel, tmp_path: Path, architecture: str, tier: Literal["memory", "disk"],
        has_head: bool) -> None:
    hp = open_architecture(ModelFile.open(tiny_model(architecture))).hp
    head, backend = RandomHead(hp.hidden_size) if has_head else None, Backend(1)
    sizes = kv_sizes(hp, 4096, 128, 1024, tier, head, "resident")
    disk = DiskTier(backend, hp, 4096, temporary_files(tmp_path)) if tier == "disk" else None
    selector = open_selector(hp, head, 4096)
    kv = RetrievedKVCache(backend, hp, DenseKVCache(backend, hp, 4096), selector, policy_for(128), 1024, disk=disk)
    opened = kv.hot.resident_bytes + (disk.resident_bytes if disk else 0)
    assert sizes.fixed_bytes == opened
    assert sizes.selector_bytes_per_token * 4096 == selector.resident_bytes
    assert (sizes.n_beside, sizes.n_late) == (policy_for(128).n_beside, policy_for(128).n_late)
    kv.close()
    backend.close()


@pytest.mark.parametrize("budget", [128, 4096])
def test_a_context_shorter_than_what_is_attended_whole_is_no_defect(tiny_model: TinyModel, tmp_path: Path,
                                                                    budget: int) -> None:
    hp, backend = open_architecture(ModelFile.open(tiny_model("llama"))).hp, Backend(1)
    sizes = kv_sizes(hp, 1000, budget, 2048, "disk", None, "resident")
    disk = DiskTier(backend, hp, 1000, temporary_files(tmp_path))
    kv = RetrievedKVCache(backend, hp, DenseKVCache(backend, hp, 1000), open_selector(hp, None, 1000),
                          policy_for(budget), 2048, disk=disk)
    assert sizes.from_tokens == kv.from_tokens == 1000
    kv.close()
    backend.close()


def planned(path: Path, tmp_path: Path, **options: object) -> Planning:
    settings = EngineOptions(n_threads=1, layout="plain", **options)  # type: ignore[arg-type]
    return Planning(ModelFile.open(path), Paths(tmp_path, tmp_path, tmp_path), settings, MemoryProbe())


def test_kv_is_dense_unless_a_budget_has_no_room_or_somebody_asks(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("llama", n_layers=4, n_kv_heads=4, hidden_size=256)  # 4 KiB of KV a token
    with planned(path, tmp_path, context=65_536) as planning:
        assert planning.demand.shape.kv is None
        process = planning.demand.overheads.process_bytes
    with planned(path, tmp_path, context=4096, memory_bytes=process + 300 * MIB) as planning:
        assert planning.demand.shape.kv is None
    with planned(path, tmp_path, context=65_536, memory_bytes=process + 200 * MIB) as planning:
        sizes = planning.demand.shape.kv
        assert sizes is not None and sizes.tier == "disk"
        assert planning.plan().peak_bytes <= process + 200 * MIB
    with planned(path, tmp_path, context=512, memory_bytes=process + 5 * MIB) as planning:
        assert planning.demand.shape.kv is None  # crowded, but buffers for a set would take more than the whole
    with planned(path, tmp_path, context=65_536, memory_bytes=process + 400 * MIB, kv_budget="full") as planning:
        assert planning.demand.shape.kv is None
    with planned(path, tmp_path, context=4096, kv_budget=256) as planning:
        sizes = planning.demand.shape.kv
        assert sizes is not None and (sizes.tier, sizes.budget) == ("memory", 256)


@pytest.mark.parametrize(("options", "why"), [
    ({"kv_budget": 256, "kv_type": "q8_0"}, "f16"), ({"kv_budget": 8}, "too few"),
])
def test_a_budget_that_cannot_be_is_refused(tiny_model: TinyModel, tmp_path: Path, options: dict[str, object],
                                            why: str) -> None:
    with pytest.raises(UsageError, match=why):
        planned(tiny_model("llama"), tmp_path, **options)


def test_a_runtime_attends_to_the_budget_that_it_was_given_and_says_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("llama")
    with Runtime.load(path, threads=1, layout="plain", context=4096, kv_budget=128) as runtime:
        assert isinstance(runtime.engine, RetrievalEngine)
        answer = runtime.generate([5] * 2500, max_tokens=6)
        answer.result()
        memory, plan = runtime.memory(), runtime.plan()["kv"]
        assert memory["kv_selected_tokens"] == 128
        assert plan["selector"] == "pages" and plan["budget"] == 128 and plan["steps"] >= 4
        held = memory["kv_resident_bytes"]
        runtime.generate([7] * 100, max_tokens=3).result()
        assert runtime.memory()["kv_selected_tokens"] is None
        assert (runtime.memory()["kv_resident_bytes"] or 0) < (held or 0)


def test_a_store_that_cannot_be_written_to_is_told_before_anything_is_computed(tiny_model: TinyModel, tmp_path: Path,
                                                                               ) -> None:
    path, file = tiny_model("llama", n_layers=4, n_kv_heads=4, hidden_size=256), tmp_path / "file"
    file.write_text("in the way")
    probe = MemoryProbe().process_bytes()
    with pytest.raises(KVStoreError, match="cannot be written to"):
        Runtime.load(path, threads=1, context=65_536, memory=probe + 200 * MIB, kv_store=file, kv_budget=512)


@pytest.mark.parametrize("has_head", [True, False])
def test_the_device_that_leads_a_cluster_counts_what_chooses_there(tiny_model: TinyModel, tmp_path: Path,
                                                                   has_head: bool) -> None:
    path, paths = tiny_model("llama"), Paths(tmp_path, tmp_path, tmp_path)
    hp = open_architecture(ModelFile.open(path)).hp
    head, growth = RandomHead(hp.hidden_size) if has_head else None, list[int]()
    for kv_budget in (None, 64):
        options = EngineOptions(2**30, 4096, 1, layout="plain", kv_budget=kv_budget)
        with Planning(ModelFile.open(path), paths, options, MemoryProbe(), is_shard=True, head=head) as planning:
            growth.append(planning.demand.overheads.growth_bytes)
            assert planning.demand.shape.kv is None, "keys and values stay in memory"
    assert growth[1] - growth[0] == open_selector(hp, head, 4096).resident_bytes
