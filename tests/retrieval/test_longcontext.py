"""The long-context comparison computes what the engine computes, and asks what can be answered."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from retrieving import random_tokens
from tiny_models import write_tiny_model

pytest.importorskip("torch", reason="needs torch: pip install 'edgert[distill]'")

from edgert.architectures.registry import open_architecture
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.layouts import Layouts
from edgert.engine.resident import ResidentWeights
from edgert.ggml.abi import TYPE_F16
from edgert.ggml.backend import Backend
from edgert.gguf.model_file import ModelFile
from retrieval.distillation import synthetic, teacher_weights
from retrieval.distillation.text import Document
from retrieval.masked import MaskedKVCache

_BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, _BENCHMARKS)
try:
    import longcontext
    import longcontext_items as items
    from longcontext_model import Snapshot, SparseModel
    from longcontext_results import Journal, Outcome, Place, summary
    from longcontext_selectors import Chance, Full, OneSet, Oracle, Quest, SnapKV, Streaming, with_best
finally:
    sys.path.remove(_BENCHMARKS)

_PROSE = [Document(f"d{i}", " ".join(f"word{(i * 37 + j * 11) % 900}" for j in range(600)), False) for i in range(5)]


def _encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return write_tiny_model(target, request.param, n_layers=4, quantisation="F16")


def test_steps_over_a_set_are_those_of_the_engine_with_a_mask(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_weights, "_speed", lambda _, type_id: float(type_id == TYPE_F16))  # as in the file
    prompt, steps = random_tokens(300, 1), random_tokens(6, 2)
    model = SparseModel(ModelFile.open(path), 400, 1)
    snapshot = model.prefill(np.array(prompt, np.int32))
    chance = Chance(60)
    full, sparse = model.run(snapshot, steps, Full()), model.run(snapshot, steps, chance)
    model.close()
    file = ModelFile.open(path)
    arch, backend = open_architecture(file), Backend(1)
    dense = DenseKVCache(backend, arch.hp, 400)
    weights = ResidentWeights(backend, file, arch, Layouts({"prefill": frozenset(), "decode": frozenset()}))
    for expected, sets in ((full, None), (sparse, chance.sets)):
        engine = Engine(arch, weights, dense, backend, fused=True)
        dense.truncate(0)
        engine.step(np.array(prompt, np.int32))
        masked = MaskedKVCache(dense, arch.hp, frozenset())
        over_a_set = Engine(arch, weights, masked, backend, fused=True)  # type: ignore[arg-type]
        for number, token in enumerate(steps):
            masked.visible = None if sets is None else sets[number]
            logits = over_a_set.step(np.array([token], np.int32))[0]
            assert np.abs(logits - expected[number]).max() < 0.03 * logits.std(), number
    assert np.abs(full - sparse).max() > 0.3 * full.std()  # the mask matters
    weights.close()


def test_every_method_keeps_to_its_budget_and_one_set_of_everything_is_full_attention(path: Path) -> None:
    model, budget = SparseModel(ModelFile.open(path), 400, 1), 64
    snapshot, steps = model.prefill(np.array(random_tokens(300, 1), np.int32)), random_tokens(4, 2)
    full = Full()
    logits = model.run(snapshot, steps, full)
    widths = dict[str, set[int]]()
    for selector in (Oracle(budget, full), Quest(budget), SnapKV(budget), Streaming(budget), Chance(budget)):
        inner, seen = selector.choose, widths.setdefault(type(selector).__name__, set())

        def choose(layer: int, queries: np.ndarray, n: int, inner=inner, seen=seen) -> np.ndarray:  # type: ignore
            chosen = inner(layer, queries, n)
            assert (np.diff(np.sort(chosen, -1), axis=-1) > 0).all() and chosen.max() < n
            seen.add(chosen.shape[-1])
            return chosen

        selector.choose = choose  # type: ignore[method-assign]
        model.run(snapshot, steps, selector)
    assert all(max(seen) <= budget and min(seen) >= budget - 16 for seen in widths.values()), widths
    everything = model.run(snapshot, steps, Oracle(1000, full))
    assert np.allclose(everything, logits, atol=1e-4 * logits.std())
    model.close()


def test_the_oracle_holds_the_tokens_that_were_attended_most() -> None:
    scores = np.zeros(200, np.float32)
    scores[[50, 60, 70]] = 1
    assert {50, 60, 70, 0, 3, 199, 168} <= set(with_best(scores, 40).tolist())
    assert len(with_best(scores, 40)) == 40


def test_snapkv_keeps_what_was_voted_for_most_while_tokens_are_appended() -> None:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 120, 8)).astype(np.float32)
    queries = rng.standard_normal((64, 4, 8)).astype(np.float32)
    keys[:, 5] = 20 * queries.mean((0, 1))  # a sink: every query that has anything of it looks there
    queries += queries.mean((0, 1)) * 20
    snapkv, zeros = SnapKV(50), np.zeros((120, 1), np.float32)
    snapkv.start(Snapshot(100, [keys], [keys], zeros, [queries], 0.35))
    for n_cached in (100, 101, 108):
        chosen = snapkv.choose(0, queries[0], n_cached)
        assert chosen is not None and chosen.shape == (2, 50)
        assert (chosen == 5).any(-1).all() and (chosen == n_cached - 1).any(-1).all()


@pytest.mark.parametrize("task", ["needle1", "needle4", "needle8", "values", "queries", "turns", "variables",
                                  "passkey"])
def test_what_is_asked_stands_in_the_context(task: str) -> None:
    texts = items.Texts(_PROSE, _PROSE)
    for index in range(3):
        item = longcontext.item_of(task, texts, _encode, 2500, 1, index)
        assert len(item.context) + len(item.steps) == pytest.approx(2500, abs=12)
        context = bytes(item.context.tolist())
        said = {bytes([item.context[at]]) for at in item.critical}
        assert item.answers and item.critical and said
        run = [item.answers[0]]
        for at in item.answers[1:]:
            if at != run[-1] + 1:
                break
            run.append(at)
        value = bytes(item.steps[at + 1] for at in run)
        assert context.count(value) == 1  # the first judged answer, word for word, once
        start = context.index(value)
        assert set(range(start, start + len(value))) <= set(item.critical)


def test_items_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    texts = items.Texts(_PROSE, _PROSE)
    first, again, other = (longcontext.item_of("needle4", texts, _encode, 2500, seed, 0) for seed in (1, 1, 2))
    assert first.steps == again.steps and np.array_equal(first.context, again.context)
    assert first.steps != other.steps


def test_no_template_is_one_that_heads_are_trained_with() -> None:
    """No run of four words of an evaluated question or fact stands in what training says."""
    rng = Random(0)
    trained = " ".join(piece.text for kind in range(synthetic.N_KINDS) for _ in range(3)
                       for item in [synthetic._KINDS[kind](rng)] for piece in (*item.fact, *item.question)).split()
    fact = items._fact(rng, "harbour", "vault")
    for text in (fact.text, fact.question, "Question: what is the value of VAR A? Answer: the value of VAR A is"):
        words = text.split()
        for at in range(len(words) - 3):
            assert not any(trained[i:i + 4] == words[at:at + 4] for i in range(len(trained)))
    words = {word for name in ("_THINGS", "_PLACES", "_COLOURS") for word in getattr(synthetic, name)}
    assert not words & {*items._KEYS, *items._KINDS}


def test_intervals_and_cells_without_figures() -> None:
    assert summary([1.0, 1.0, 1.0]) == (1.0, 0.0)
    mean, half = summary([0.0, 1.0, float("nan")])
    assert mean == 0.5 and half == pytest.approx(0.98, abs=0.01)
    assert np.isnan(summary([float("nan")])[0])
    assert issubclass(Oracle, OneSet)


def test_questions_about_one_context_differ_and_the_context_does_not() -> None:
    texts = items.Texts(_PROSE, _PROSE)
    asked = [longcontext.item_of("shared", texts, _encode, 2500, 1, index) for index in range(11)]
    assert all(np.array_equal(one.context, asked[0].context) for one in asked[:10])
    assert len({one.steps for one in asked[:10]}) == 10
    assert len({one.critical for one in asked[:10]}) == 10
    assert not np.array_equal(asked[10].context, asked[0].context)


def test_a_comparison_goes_on_where_its_file_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, settings = tmp_path / "found.jsonl", {"context": 4096}
    found = Outcome(0.25, 0.5, 0.01, float("nan"), 1.0, 256.0)
    Journal(file, settings).add(Place("prose", 0, 3), {("ours", 256): found})
    again = Journal(file, settings)
    again.add(Place("prose", 1, 3), {("ours", 256): found, ("quest", 256): found})
    assert set(Journal(file, settings).outcomes) == {Place("prose", 0, 3), Place("prose", 1, 3)}
    Journal(file, settings).print_task("prose", ["ours", "quest"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[-2][:4] == ["ours", "256", "2", "0.250"] and rows[-1][:4] == ["quest", "256", "1", "0.250"]
    assert "+1.01" in rows[-2] and "-" in rows[-2]  # perplexity in per cent; no answer was asked for
    with pytest.raises(SystemExit, match="another comparison"):
        Journal(file, {"context": 8192})


def test_every_task_has_items_soon_and_contexts_are_not_torn() -> None:
    ordered = longcontext.places(["prose", "shared"], 2, 20)
    assert {(one.task, one.seed) for one in ordered[:40]} == {(t, s) for t in ("prose", "shared") for s in (0, 1)}
    assert [one.index for one in ordered if one.task == "shared" and one.seed == 1] == [*range(20)]
    assert len({*ordered}) == 80
