"""A streaming Runtime as its surroundings change: a growing context and a greedy neighbour never change an answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgert import Runtime, SamplingParams
from edgert.errors import BudgetTooSmall
from edgert.gguf.model_file import ModelFile
from edgert.memory.planner import smallest_budget
from edgert.memory.probe import MemoryProbe
from edgert.paths import Paths
from edgert.planning import EngineOptions, Planning
from offload import residency

TinyModel = Callable[..., Path]
GREEDY = SamplingParams(temperature=0)
CONTEXT = 1100


class EmptyMachine(MemoryProbe):
    """A process that takes nothing, on a machine with plenty: budgets are then about the model alone."""

    def process_bytes(self) -> int:
        return 0

    def available_bytes(self) -> int:
        return 2**40

    def stalled_percent(self) -> float:
        return 0.0


@pytest.fixture
def path(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(residency, "_SMALL_BYTES", 0)
    monkeypatch.setattr("edgert.runtime.MemoryProbe", EmptyMachine)
    return tiny_model("llama", quantisation="F32", n_layers=4, hidden_size=256, ffn_size=1024, n_kv_heads=4)


def budget_of(path: Path, share: float) -> int:
    """Bytes between the smallest budget (0.0) and one that pins everything while KV is full (1.0)."""
    options = EngineOptions(2**30, CONTEXT)
    with Planning(ModelFile.open(path), Paths.of_user(), options, EmptyMachine()) as planning:
        return smallest_budget(planning.demand) + int(share * planning.demand.shape.large_bytes)


def test_a_context_that_grows_past_thresholds_gets_room_and_the_answer_is_the_same(path: Path,
                                                                                   tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    prompt = [int(n) for n in np.random.default_rng(0).integers(0, 256, 200)]
    with Runtime.load(path, threads=1, context=CONTEXT, memory=2**40, speculate="off") as resident:
        assert resident.plan()["weights"] == "resident"
        expected = [*resident.generate(prompt, max_tokens=340, sampling=GREEDY)]
    # Guesses would reach a threshold early, and go back from it: when, depends on how long passes take.
    with Runtime.load(path, threads=1, context=CONTEXT, memory=budget_of(path, 0.2), trace=trace,
                      speculate="off") as runtime:
        assert runtime.plan()["weights"] == "streamed"
        pinned = [runtime.memory()["pinned_bytes"]]
        generation = runtime.generate(prompt, max_tokens=340, sampling=GREEDY)
        for piece, wanted in zip(generation, expected, strict=True):
            assert piece.token_id == wanted.token_id
            pinned.append(runtime.memory()["pinned_bytes"])
        assert len(set(pinned)) == 3  # of up to 256, 512 and 768 tokens
        assert pinned == sorted(pinned, key=lambda n: -(n or 0))
        runtime.generate(prompt[:3], max_tokens=2, sampling=GREEDY).result()  # another text: weights return
        assert runtime.memory()["pinned_bytes"] == pinned[0]
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"].startswith("pin ") for event in events) == 3


def test_a_budget_that_is_too_small_is_refused_before_a_weight_is_read(path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.window.WindowWeights.__init__", lambda *_, **__: pytest.fail("weights were opened"))
    with pytest.raises(BudgetTooSmall) as refusal:
        Runtime.load(path, threads=1, context=CONTEXT, memory=budget_of(path, 0.0) - 2**20)
    assert abs(refusal.value.smallest_bytes - budget_of(path, 0.0)) < 2 * 2**20


def test_an_answer_teaches_how_often_experts_are_found(tiny_model: TinyModel, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    monkeypatch.setattr("edgert.runtime.MemoryProbe", EmptyMachine)
    path = tiny_model("qwen3moe", n_experts=16, n_layers=3)
    options = EngineOptions(2**30, CONTEXT)
    with Planning(ModelFile.open(path), Paths.of_user(), options, EmptyMachine()) as planning:
        budget, key = smallest_budget(planning.demand), planning.demand.shape.key
    with Runtime.load(path, threads=1, context=CONTEXT, memory=budget) as runtime:
        assert runtime.engine.weights.experts is not None
        runtime.generate([1, 2, 3], max_tokens=60, sampling=GREEDY).result()
    with Planning(ModelFile.open(path), Paths.of_user(), options, EmptyMachine()) as planning:
        curve = planning.profile.curves[key]
        assert planning.demand.curve == curve
    assert (tuple(curve[0]), tuple(curve[-1])) == ((0, 0), (1, 1))
    assert 0 < curve[1][1] <= 1  # tokens share experts


_BUDGET = 320 * 2**20
# Runs in a control group: greedy tokens, while a neighbour grows by 30 % of the budget in steps and then leaves.
_IN_A_GROUP = """
import json, subprocess, sys, time
import numpy as np
from edgert import Runtime
model, budget, greedy = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "greedy"
grow = "import sys; held = []\\nfor line in sys.stdin:\\n held.append(b'x' * int(line)); print(len(held), flush=True)"
neighbour = subprocess.Popen([sys.executable, "-c", grow], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
with Runtime.load(model, memory=budget, context=1024, threads=1, learn=False) as runtime:
    engine, given, tokens, n_steps, last, left = runtime.engine, [0], [], 0, time.monotonic(), None
    logits = engine.step(np.array([(i * 7) % 5000 + 100 for i in range(64)], np.int32))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and len(tokens) < 900 and (
            len(tokens) < 100 or greedy and (left is None or given[-1])):
        tokens.append(int(logits[-1].argmax()))
        logits = engine.step(np.array(tokens[-1:], np.int32))
        given.append(runtime.forecast.governor.given_bytes)
        if greedy and n_steps < 30 and time.monotonic() - last > 0.2:
            neighbour.stdin.write(f"{budget // 100}\\n"); neighbour.stdin.flush(); neighbour.stdout.readline()
            n_steps, last = n_steps + 1, time.monotonic()
        elif n_steps == 30 and left is None and time.monotonic() - last > 0.2:
            neighbour.kill(); neighbour.wait(); left = len(tokens)
print(json.dumps({"tokens": tokens[:100], "given": given, "n_steps": n_steps}))
"""


def test_a_neighbour_that_grows_in_the_same_control_group_kills_nobody(
        real_model: Callable[[str], Path], require: Callable[[object, str], None]) -> None:
    from apps.bench.control_group import is_possible, run_limited

    require(is_possible(), "only root makes control groups, where they can be written")
    path = real_model("gemma3-270m")
    found = {}
    for kind in ("alone", "greedy"):
        command = [sys.executable, "-c", _IN_A_GROUP, str(path), str(_BUDGET), kind]
        outcome = run_limited(command, int(_BUDGET * 1.1), 280)
        assert (outcome.returncode, outcome.oom_kills) == (0, 0)
        found[kind] = json.loads(outcome.stdout.splitlines()[-1])
    alone, greedy = found["alone"], found["greedy"]
    assert greedy["n_steps"] == 30
    assert greedy["tokens"] == alone["tokens"]
    assert max(alone["given"]) == 0
    assert max(greedy["given"]) > 0.05 * _BUDGET
    assert greedy["given"][-1] == 0  # and taken again when the neighbour had left
