"""Experts that come one by one compute what resident ones compute, bit for bit, however few have room; and each is read
no more often than it must. Faults are in test_expert_faults.py, the policy in test_eviction.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.engines import assert_same_answer, open_engine, open_oracle, random_tokens
from faulty_disk import FaultyDisk
from numpy.typing import NDArray
from streaming import logits_of, open_streaming, pool_of, small_pieces, window_of

from edgert import Runtime
from edgert.architectures.base import Weights
from edgert.architectures.registry import open_architecture
from edgert.engine.block_state import BlockState
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.errors import BudgetTooSmall
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Graph, Tensor
from edgert.gguf.model_file import ModelFile
from offload import residency
from offload.expert_layout import PoolShape, is_expert
from offload.experts import ExpertPool
from offload.readers import aligned_range
from offload.residency import cut

TinyModel = Callable[..., Path]
N_LAYERS, N_EXPERTS = 2, 8
# Two batches, then single tokens, then a batch that is a prompt's next part.
STEPS = [random_tokens(600), *([t] for t in random_tokens(5, seed=1)), random_tokens(40, seed=2), [7]]
FAMILIES = ("llama", "qwen3moe", "olmoe", "smallthinker")
SHAPES: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {"quantisation": "MIXED", "n_experts": N_EXPERTS}) for name in FAMILIES),
    *((name, {"n_experts": N_EXPERTS, "split_parts": 3}) for name in ("llama", "smallthinker")),
    ("llama", {"n_experts": N_EXPERTS, "n_experts_used": 1, "quantisation": "Q4_0"}),
    ("qwen3moe", {"n_experts": 64, "n_experts_used": 8, "hidden_size": 64, "ffn_size": 96}),  # begin anywhere
    ("smallthinker", {"sliding_window": 4096, "n_layers": 5, "quantisation": "Q4_K"}),
)


@cache
def resident_logits(path: Path) -> list[NDArray[np.float32]]:
    with open_engine(path) as engine:
        return logits_of(engine, STEPS)


@pytest.fixture(autouse=True)
def pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)


@pytest.mark.parametrize("room", ["one", "few", "one, all else here", "few, all else here", "a layer", "half",
                                  "all but one", "all"])
@pytest.mark.parametrize(("architecture", "options"), SHAPES, ids=str)
def test_logits_are_those_of_resident_weights(tiny_model: TinyModel, architecture: str, options: dict[str, Any],
                                              room: str) -> None:
    path = tiny_model(architecture, **options)
    n_experts = options.get("n_experts", N_EXPERTS)
    n_all = n_experts * options.get("n_layers", N_LAYERS)
    n_slots = {"one": 1, "few": 3, "a layer": n_experts, "half": n_all // 2 + 1, "all but one": n_all - 1,
               "all": n_all}[room.removesuffix(", all else here")]
    share = {"one": 0.0, "few": 0.5}.get(room, 1.0)
    with open_streaming(path, share, n_slots=n_slots) as engine:
        for expected, logits in zip(resident_logits(path), logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(expected, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_llama_cpps(tiny_model: TinyModel, family: str) -> None:
    path = tiny_model(family, quantisation="MIXED", n_experts=N_EXPERTS)
    with open_oracle(path) as oracle, open_streaming(path, 0.5, n_slots=5) as engine:
        assert_same_answer(oracle, engine, random_tokens(600), 12)


@pytest.mark.parametrize("n_slots", [3, N_EXPERTS])
def test_two_threads_and_small_batches_change_nothing(tiny_model: TinyModel, n_slots: int) -> None:
    path = tiny_model("smallthinker", quantisation="MIXED")
    with open_engine(path, n_threads=2, batch_size=96) as resident:
        expected = logits_of(resident, STEPS)
    with open_streaming(path, n_threads=2, batch_size=96, n_slots=n_slots) as engine:
        for a, b in zip(expected, logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(a, b)


def test_graphs_over_a_part_of_the_pairs_change_nothing(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the pool is so large that ggml's lists of rows would be."""
    monkeypatch.setattr("edgert.engine.expert_graphs._MAX_ROW_LIST_BYTES", 0)
    path = tiny_model("olmoe", quantisation="MIXED")
    with open_streaming(path, n_slots=2 * N_EXPERTS) as engine:
        for expected, logits in zip(resident_logits(path), logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(expected, logits)


@pytest.mark.parametrize("family", ["qwen3moe", "smallthinker"])
def test_a_pool_that_gives_memory_back_and_takes_it_again_changes_nothing(tiny_model: TinyModel, family: str) -> None:
    path = tiny_model(family, quantisation="MIXED", n_experts=N_EXPERTS)
    with open_streaming(path, 1.0, n_slots=2 * N_EXPERTS) as engine:
        pool, shares = pool_of(engine), cycle((0.0, 1.0, 0.4, 9.0, 0.0))
        spare_bytes = pool.spare_bytes(2 * N_EXPERTS)
        assert spare_bytes == N_EXPERTS * pool.shape.slot_bytes

        def move(n_tokens: int, leaves_buffers: bool) -> None:
            share = next(shares)
            pool.keep(2 * N_EXPERTS, int(share * spare_bytes))
            n_slots = 2 * N_EXPERTS - ceil(min(share, 1.0) * N_EXPERTS)
            assert pool.plan()["expert_slots"] == n_slots

        engine.between_steps = move
        for expected, logits in zip(resident_logits(path), logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(expected, logits)


@pytest.mark.parametrize("family", ["qwen3moe", "smallthinker"])
def test_a_pool_that_holds_a_layer_between_prompts_alone_changes_nothing(tiny_model: TinyModel, family: str) -> None:
    """Its prompts keep the outputs of all batches, its tokens compute in graphs of their own, and prompts in new ones
    each time."""
    path, n_slots = tiny_model(family, quantisation="MIXED", n_experts=N_EXPERTS), list[int]()
    with open_streaming(path, 1.0, n_slots=2 * N_EXPERTS) as engine:
        pool, graphs = pool_of(engine), engine._graphs
        assert isinstance(graphs, BlockwiseGraphs)

        def lend(n_tokens: int, leaves_buffers: bool) -> None:
            if leaves_buffers:
                graphs.give_back()
                assert graphs.compute_bytes == 0
            n_slots.append(2 * N_EXPERTS if leaves_buffers else 3)
            pool.keep(n_slots[-1])
            assert pool.holds_a_layer == leaves_buffers

        engine.between_steps = lend
        for expected, logits in zip(resident_logits(path), logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(expected, logits)
        assert n_slots == [2 * N_EXPERTS if len(step) == 1 else 3 for step in STEPS]


@pytest.mark.parametrize("family", ["qwen3moe", "smallthinker"])
def test_another_text_after_a_common_beginning(tiny_model: TinyModel, family: str) -> None:
    path = tiny_model(family, quantisation="MIXED")
    with open_engine(path) as resident, open_streaming(path, 0.5, n_slots=5) as engine:
        for n_kept, n_tokens, n_outputs in ((0, 600, 1), (270, 300, 7), (500, 1, 1), (0, 40, 40)):
            token_ids = np.array(random_tokens(n_tokens, seed=n_kept), np.int32)
            for one in (resident, engine):
                one.kv.truncate(n_kept)
            np.testing.assert_array_equal(resident.step(token_ids, n_outputs), engine.step(token_ids, n_outputs))


@pytest.mark.parametrize("family", ["qwen3moe", "smallthinker"])
@pytest.mark.parametrize("n_slots", [1, 3, N_EXPERTS, 3 * N_EXPERTS])
def test_a_prompt_reads_every_expert_once_whatever_its_length(tiny_model: TinyModel, family: str, n_slots: int) -> None:
    path = tiny_model(family, quantisation="MIXED", n_layers=3)
    with open_streaming(path, 1.0, n_slots=n_slots, batch_size=64) as engine:
        pool = pool_of(engine)
        for n_tokens in (700, 300):  # eleven batches, five batches
            engine.kv.truncate(0)
            misses, n_bytes = pool.counters.misses, pool.bytes_read
            engine.step(np.array(random_tokens(n_tokens, seed=n_tokens), np.int32))
            # The last layer computes one token only.
            n_read = pool.counters.misses - misses
            assert n_read <= 2 * N_EXPERTS + 2
            assert pool.bytes_read - n_bytes <= n_read * pool.shape.slot_bytes


def test_the_account_says_what_was_here_and_what_was_read(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3moe", n_layers=2)
    with open_streaming(path, 1.0, n_slots=2 * N_EXPERTS) as engine:
        pool = pool_of(engine)
        engine.step(np.array([5], np.int32))
        assert (pool.counters.hits, pool.counters.misses) == (0, 4)  # two experts in each of two layers
        engine.kv.truncate(0)
        engine.step(np.array([5], np.int32))
        assert (pool.counters.hits, pool.counters.misses) == (4, 4)
        plan = engine.weights.plan()
        assert (plan["expert_slots"], plan["expert_hits"], plan["expert_misses"]) == (16, 4, 4)
        assert plan["expert_read_bytes"] == pool.bytes_read <= 4 * pool.shape.slot_bytes


def test_waiting_for_experts_is_in_the_account_of_a_step(tiny_model: TinyModel,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """As what it is: waiting, not computing."""
    path = tiny_model("qwen3moe", n_layers=2)
    with open_streaming(path, 1.0, n_slots=2) as engine:  # a token needs four
        disk = FaultyDisk(path).install(monkeypatch)
        engine.step(np.array([5], np.int32))  # the row of its embedding stays
        disk.stop_answering()
        threading.Timer(0.3, disk.answer).start()
        before, before_experts = engine.weights.waited_s, pool_of(engine).counters.waited_s
        engine.step(np.array([5], np.int32))
        waited_s = pool_of(engine).counters.waited_s - before_experts
        assert 0.02 < waited_s <= engine.weights.waited_s - before


def test_a_router_before_attention_has_its_experts_read_meanwhile(tiny_model: TinyModel,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[str] = []
    request, attention = ExpertPool.request, BlockState.attention

    def recorded_request(pool: ExpertPool, layer: int, last_use: Mapping[int, int]) -> Mapping[int, int] | None:
        requested.append(f"request {layer} {sorted(last_use)}")
        return request(pool, layer, last_use)

    def recorded_attention(state: BlockState, layer: int, w: Weights) -> Tensor:
        requested.append(f"attention {layer}")
        return attention(state, layer, w)

    monkeypatch.setattr(ExpertPool, "request", recorded_request)
    monkeypatch.setattr(BlockState, "attention", recorded_attention)
    with open_streaming(tiny_model("smallthinker"), 0.5, n_slots=5) as engine:
        engine.step(np.array([5], np.int32))
    for layer in range(N_LAYERS):
        before, during, after = requested[3 * layer:3 * layer + 3]
        assert during == f"attention {layer}"
        assert before == after  # what was foreseen is what was chosen


def test_of_a_token_alone_too(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all else stays, a graph of attention comes between the request and the wait."""
    events: list[str] = []
    request, waves, compute = ExpertPool.request, ExpertPool.waves, Backend.compute

    def recorded_request(pool: ExpertPool, layer: int, last_use: Mapping[int, int]) -> Mapping[int, int] | None:
        events.append(f"request {layer} {sorted(last_use)}")
        return request(pool, layer, last_use)

    def recorded_waves(pool: ExpertPool, layer: int, last_use: Mapping[int, int]) -> Iterator[Mapping[int, int]]:
        events.append(f"await {layer} {sorted(last_use)}")
        return waves(pool, layer, last_use)

    def recorded_compute(backend: Backend, graph: Graph) -> None:
        events.append("compute")
        compute(backend, graph)

    monkeypatch.setattr(ExpertPool, "request", recorded_request)
    monkeypatch.setattr(ExpertPool, "waves", recorded_waves)
    monkeypatch.setattr(Backend, "compute", recorded_compute)
    with open_streaming(tiny_model("smallthinker"), 1.0, n_slots=5) as engine:
        engine.step(np.array([5], np.int32))
    for layer in range(N_LAYERS):
        start = next(i for i, event in enumerate(events) if event.startswith(f"request {layer} "))
        assert events[start + 1:start + 3] == ["compute", events[start].replace("request", "await")]


@pytest.mark.parametrize("family", ["qwen3moe", "smallthinker"])
def test_tokens_go_on_where_attention_reads_more_cells(tiny_model: TinyModel, family: str) -> None:
    path, steps = tiny_model(family), [random_tokens(254), *([t] for t in random_tokens(4))]
    with open_engine(path) as resident, open_streaming(path, 1.0, n_slots=5) as engine:
        for expected, logits in zip(logits_of(resident, steps), logits_of(engine, steps), strict=True):
            np.testing.assert_array_equal(expected, logits)


def test_weights_that_begin_to_stream_and_stay_again_change_nothing(tiny_model: TinyModel) -> None:
    path = tiny_model("smallthinker", quantisation="MIXED")
    with open_streaming(path, 1.0, n_slots=5) as engine:
        window, budgets = window_of(engine), cycle((2**40, 0, 2**40))
        engine.between_steps = lambda n_tokens, leaves_buffers: window.pin(next(budgets))
        for expected, logits in zip(resident_logits(path), logits_of(engine, STEPS), strict=True):
            np.testing.assert_array_equal(expected, logits)


# ------------------------------------------------------------------------------------------------------------- planning


def test_a_slot_has_room_for_every_layers_types_and_places(tiny_model: TinyModel) -> None:
    model = ModelFile.open(tiny_model("qwen3moe", quantisation="MIXED", ffn_size=256, n_layers=3))
    shape = PoolShape.of([p for p in cut(model, open_architecture(model)) if is_expert(p)])
    assert set(shape.layers) == {0, 1, 2}
    for matrices in shape.layers.values():
        ends = [m.slot_offset + m.shift + m.expert_bytes for m in matrices]
        starts = [m.slot_offset for m in matrices]
        assert starts[0] == 0
        assert all(end <= start for end, start in zip(ends, [*starts[1:], shape.slot_bytes], strict=True))
        for matrix in matrices:
            for expert in range(N_EXPERTS):
                _, n_bytes = aligned_range(matrix.offset(expert), matrix.expert_bytes)
                assert matrix.slot_offset + n_bytes <= [*starts, shape.slot_bytes][starts.index(matrix.slot_offset) + 1]


def test_a_budget_pins_everything_else_first_and_leaves_the_rest_to_experts(tiny_model: TinyModel,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_SMALL_BYTES", 128 * 2**10)
    path = tiny_model("qwen3moe", n_experts=64, n_layers=4, hidden_size=256, ffn_size=512, quantisation="F32",
                      vocabulary=False)
    with pytest.raises(BudgetTooSmall) as refusal:
        Runtime.load(path, memory=1, context=256)
    least = refusal.value.smallest_bytes
    n_slots = []
    for more in (0, 16 * 2**20, 48 * 2**20):
        # What the process takes is not the same to the byte each time.
        with Runtime.load(path, memory=least + more + 4 * 2**20, context=256) as runtime:
            plan = runtime.plan()
            n_slots.append(plan["expert_slots"])
            assert plan["streamed_bytes_per_pass"] == 0
            for prompt in ([1, 2, 3], [4, 5]):  # for a prompt some give way to what it computes in, then return
                answer, during = runtime.generate(prompt, max_tokens=3), list[int]()
                assert runtime.forecast is not None
                stage = runtime.forecast.plan.stages[0]
                for _ in answer:
                    during.append(runtime.plan()["expert_slots"])
                assert during == [stage.prompt_slots, stage.token_slots, stage.token_slots]
                assert stage.prompt_slots < stage.token_slots == plan["expert_slots"]
    assert n_slots[0] >= 2
    assert n_slots == sorted(set(n_slots))
    slot_bytes = plan["expert_slot_bytes"]
    assert abs((n_slots[2] - n_slots[1]) * slot_bytes - 32 * 2**20) < 4 * 2**20 + slot_bytes
