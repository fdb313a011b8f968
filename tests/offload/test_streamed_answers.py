"""Answers of a model that streams: guesses change nothing but time, its account is whole, and it leaves nothing."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from engine.engines import random_tokens
from faulty_disk import FaultyDisk
from numpy.typing import NDArray
from streaming import open_streaming, small_pieces, window_of

from edgert import Runtime, SamplingParams
from edgert.architectures.registry import open_architecture
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.trace import OFF, Trace
from edgert.errors import BudgetTooSmall
from edgert.ggml.backend import Backend
from edgert.gguf.model_file import ModelFile
from edgert.memory.planner import Demand, plan_with
from edgert.memory.probe import MemoryProbe
from edgert.memory.sizes import Sizes
from edgert.model_shape import shape_of
from edgert.speculation import MAX_PASS_TOKENS, SHAPES
from edgert.text.tokenizer import Tokenizer
from offload.loading import measure_overheads, open_window
from offload.residency import cut

TinyModel = Callable[..., Path]
GREEDY = SamplingParams(temperature=0)
PROMPT = random_tokens(40)
MIB = 2**20


@pytest.fixture(autouse=True)
def pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)


@contextmanager
def streaming(path: Path, *, speculates: bool = True, **options: Any) -> Iterator[Runtime]:
    """A Runtime over weights that stream. Its passes take no time that counts, so that every guess is worth it."""
    with open_streaming(path, **options) as engine, \
            Runtime(ModelFile.open(path), engine, Tokenizer.open(path), None, OFF, speculates=speculates) as runtime:
        if runtime._draft_length is not None:
            for n_tokens in SHAPES:
                for _ in range(20):
                    runtime._draft_length.measured(n_tokens, 1.0)
            runtime._draft_length.measured = lambda *_: None  # type: ignore[method-assign]
        yield runtime


@pytest.fixture
def path(tiny_model: TinyModel) -> Path:
    # F32: batches of another size then give the same tokens, which 8-bit activations do not promise.
    return tiny_model("llama", quantisation="F32", n_layers=3)


# ------------------------------------------------------------------------------------------------------------- guesses


@pytest.mark.parametrize("options", [{}, {"batch_size": 6}, {"context_length": 100}], ids=str)
def test_an_answer_with_guesses_is_the_answer(path: Path, options: dict[str, Any]) -> None:
    def answers(runtime: Runtime) -> list[list[int]]:
        said = []
        for prompt in (PROMPT * 2, [*PROMPT, *PROMPT[:30]], PROMPT[:7] * 4):
            generation = runtime.generate(prompt, max_tokens=70, sampling=GREEDY)
            generation.result()
            assert runtime._kv_token_ids == [*prompt, *generation.token_ids][:runtime.engine.kv.length]
            said.append(generation.token_ids)
        return said

    with streaming(path, speculates=False, **options) as runtime:
        expected = answers(runtime)
    with streaming(path, **options) as runtime:
        assert answers(runtime) == expected
        assert runtime._running is not None
        timings = runtime._running.timings
        assert 0 < timings.draft_n_accepted <= timings.draft_n


def test_a_token_is_the_best_of_the_pass_that_computed_it(tiny_model: TinyModel) -> None:
    with streaming(tiny_model("qwen3", quantisation="MIXED")) as runtime:
        step, best = runtime.engine.step, list[int]()

        def recorded(token_ids: NDArray[np.int32], n_outputs: int = 1) -> NDArray[np.float32]:
            del best[runtime.engine.kv.length - len(PROMPT * 2) + 1 if best else 0:]  # of guesses that were wrong
            logits = step(token_ids, n_outputs)
            best.extend(logits.argmax(-1).tolist())
            return logits

        runtime.engine.step = recorded  # type: ignore[method-assign]
        generation = runtime.generate(PROMPT * 2, max_tokens=80, sampling=GREEDY)
        generation.result()
        assert generation.timings.draft_n_accepted > 0
        assert generation.token_ids == best[:80]


def test_guesses_take_no_memory_that_was_not_reserved(tiny_model: TinyModel) -> None:
    file = ModelFile.open(tiny_model("llama", n_layers=3, vocab_size=1000, vocabulary=False))
    arch, backend = open_architecture(file), Backend(1)
    kv = DenseKVCache(backend, arch.hp, 512)
    graphs, pieces = BlockwiseGraphs(backend, arch, kv), cut(file, arch)
    overheads = measure_overheads(backend, file, arch, kv, graphs, pieces, batch_size=32, n_logits=MAX_PASS_TOKENS,
                                  probe=MemoryProbe(), budget_bytes=2**32)
    reserved_bytes = graphs.compute_bytes
    assert overheads.compute_bytes[graphs.part_tokens] == reserved_bytes
    demand = Demand(shape_of(file, arch, pieces, "f16"), overheads, 512, 32)
    sizes = Sizes("streamed", demand.shape.small_bytes + demand.shape.large_bytes, part_tokens=graphs.part_tokens)
    weights = open_window(backend, file, arch, pieces, plan_with(demand, 2**32, sizes))
    engine = Engine(arch, weights, kv, backend, batch_size=32, graphs=graphs)
    try:
        for n_tokens in (32, *SHAPES, 300, *SHAPES):
            engine.step(np.array(random_tokens(n_tokens), np.int32), n_tokens if n_tokens in SHAPES else 1)
        assert graphs.compute_bytes == reserved_bytes
    finally:
        engine.close()


@pytest.mark.parametrize(("speculate", "options", "guesses"), [
    ("auto", {}, False), ("on", {}, True), ("off", {}, False), ("on", {"n_experts": 4}, False)], ids=str)
def test_resident_weights_are_guessed_for_when_asked_and_experts_never(tiny_model: TinyModel, speculate: Any,
                                                                       options: dict[str, Any], guesses: bool) -> None:
    path = tiny_model("llama", quantisation="F32", **options)
    with Runtime.load(path, threads=1, layout="plain", context=512, speculate=speculate) as runtime:
        assert (runtime._draft_length is not None) == guesses
        generation = runtime.generate(PROMPT, max_tokens=20, sampling=GREEDY)
        generation.result()
        if not guesses:
            assert generation.timings.draft_n == 0


# ------------------------------------------------------------------------------------------------------- its account


def test_compute_wait_and_the_rest_are_all_the_time_there_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with streaming(path, speculates=False) as runtime:
        weights, disk = window_of(runtime.engine), FaultyDisk(path).install(monkeypatch)
        before = weights.streamed_bytes  # before the answer's account begins: reads ahead go on meanwhile
        generation = runtime.generate(PROMPT, max_tokens=8, sampling=GREEDY)
        disk.stop_answering()
        timer = threading.Timer(0.3, disk.answer)
        timer.start()
        generation.result()
        timer.join(60)
        timings = generation.timings.to_dict()
        for phase in ("prompt", "predicted"):
            parts = [timings[f"{phase}_{part}_ms"] for part in ("compute", "wait", "rest")]
            assert min(parts) >= 0
            assert sum(parts) == pytest.approx(timings[f"{phase}_ms"], rel=0.03)
        assert timings["prompt_compute_ms"] > 0
        assert timings["prompt_wait_ms"] > 100  # the disk's pause was waited for, less what had been read ahead
        read_bytes = timings["prompt_read_bytes"] + timings["predicted_read_bytes"]
        assert 7 * weights.residency.streamed_bytes <= read_bytes <= weights.streamed_bytes - before


def test_a_trace_tells_what_each_step_took_and_read(path: Path, tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    with open_streaming(path, trace=trace) as engine:
        for _ in range(3):
            engine.step(np.array([1], np.int32))
        streamed_bytes = engine.weights.streamed_bytes
    trace.save()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = [event for event in events if event["name"] == "decode 1"]
    waits = [event for event in events if event.get("cat") == "wait"]
    times = [event["args"] for event in events if event["name"] == "step, ms"]
    read = [event["args"]["read"] for event in events if event["name"] == "step, bytes read"]
    assert len(steps) == len(times) == len(read) == 3
    waits_ms = sum(event["dur"] for event in waits) / 1000
    assert sum(one["wait"] for one in times) == pytest.approx(waits_ms, rel=0.5, abs=5)
    for step, one in zip(steps, times, strict=True):
        assert one["compute"] + one["wait"] == pytest.approx(step["dur"] / 1000, abs=5)
    assert 0 < sum(read) <= streamed_bytes


# ------------------------------------------------------------------------------------------------------- what it leaves


def test_twenty_loads_and_answers_leave_nothing(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.loading._fused_bytes", lambda *_: 2**50)  # so that a tiny model streams
    path = tiny_model("llama", quantisation="F32", hidden_size=256, ffn_size=1024, n_layers=8)

    def use() -> None:
        options: dict[str, Any] = {"threads": 1, "layout": "plain", "context": 256, "batch": 64}
        with pytest.raises(BudgetTooSmall) as refusal:
            Runtime.load(path, memory="1M", **options)
        with Runtime.load(path, memory=refusal.value.smallest_bytes + 6 * MIB, **options) as runtime:
            assert runtime.plan()["weights"] == "streamed"
            runtime.generate(PROMPT * 3, max_tokens=6, sampling=GREEDY).result()
            next(iter(runtime.generate(PROMPT)))  # and one that is left alone

    def taken() -> tuple[int, int, int]:
        gc.collect()
        process = psutil.Process()
        return process.memory_info().rss, process.num_fds(), process.num_threads()

    for _ in range(4):
        use()
    before = taken()
    for _ in range(20):
        use()
    n_bytes, n_descriptors, n_threads = (b - a for a, b in zip(before, taken(), strict=True))
    assert n_bytes < 16 * MIB  # one arena is as large
    assert (n_descriptors, n_threads) == (0, 0)


def test_stopping_an_answer_does_not_wait_for_the_disk_and_leaves_nothing(path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threading.active_count()
    with streaming(path) as runtime:
        disk = FaultyDisk(path).install(monkeypatch)
        generation = runtime.generate(PROMPT, sampling=GREEDY)
        pieces = iter(generation)
        next(pieces)
        disk.stop_answering()

        def cancel_when_it_waits() -> None:
            assert disk.is_stuck.wait(60)
            generation.cancel()

        canceller = threading.Thread(target=cancel_when_it_waits)
        canceller.start()
        list(pieces)  # ends, though the disk has not answered
        canceller.join(60)
        assert generation.finish_reason == "cancelled"
        assert not disk._answers.is_set()
        disk.answer()
        again = runtime.generate(PROMPT, max_tokens=4, sampling=GREEDY)
        again.result()
        assert again.token_ids == generation.token_ids[:4] or len(generation.token_ids) < 4
    assert threading.active_count() == threads
