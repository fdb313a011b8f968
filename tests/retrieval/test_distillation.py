"""A head is distilled from a tiny model: what it learns from, that it learns, that it goes on, what comes out."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from retrieving import open_dense
from tiny_models import write_tiny_model

pytest.importorskip("torch", reason="needs torch: pip install 'edgert[distill]'")

import torch

from edgert.architectures.registry import open_architecture
from edgert.errors import UsageError
from edgert.gguf.model_file import ModelFile
from retrieval.distillation.distil import Options, distil
from retrieval.distillation.examples import HELD_OUT_KINDS, Example, Sequences
from retrieval.distillation.network import Network
from retrieval.distillation.synthetic import ANSWER, FACT, N_KINDS, compose
from retrieval.distillation.targets import N_KEPT, targets_of
from retrieval.distillation.teacher import Teacher
from retrieval.distillation.teacher_weights import bfloat16
from retrieval.distillation.text import Document, documents
from retrieval.distillation.training import Recipe
from retrieval.head import CARD, PROJECT, open_head
from retrieval.head_graphs import NumpyHead

_FILLER = "\n".join(f"Line {i} says that {i * i} follows from {i}, as everybody knows." for i in range(200))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    return ModelFile.open(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama", n_layers=4))


def _encode(text: str) -> list[int]:
    return list(text.encode("ascii", "replace"))


def _texts(directory: Path) -> Path:
    for index in range(40):
        (directory / f"text{index}.{('md', 'py')[index % 2]}").write_text(f"# {index}\n{_FILLER}")
    return directory


def test_answers_repeat_facts_that_stand_before_them() -> None:
    for kind in range(N_KINDS):
        pieces = compose(_FILLER, Random(kind), [kind])
        for index, piece in enumerate(pieces):
            if piece.role == ANSWER:
                facts = "".join(before.text for before in pieces[:index] if before.role == FACT)
                assert piece.text.strip() in facts, piece.text
        assert {ANSWER, FACT} <= {piece.role for piece in pieces}


def test_training_reads_nothing_that_is_kept_for_evaluation(tmp_path: Path) -> None:
    directory = _texts(tmp_path)
    train, kept = ({d.name for d in documents([directory], 0, evaluation=flag)} for flag in (False, True))
    assert train and kept and not train & kept and len(train | kept) == 40


def test_held_out_sequences_ask_for_facts_of_other_kinds() -> None:
    texts = [Document("a", _FILLER, False)]
    kinds = {held: {bytes(Sequences(texts, _encode, 3, held, 2048).make(index)[0].tolist())
                    for index in range(0, 20)} for held in (True, False)}
    only_held = [b"can be reached at extension", b'"token_of"', b"assert("]
    assert len(only_held) == len(HELD_OUT_KINDS)
    for phrase, name in ((phrase, held) for phrase in only_held for held in (True, False)):
        assert any(phrase in sequence for sequence in kinds[name]) == name, (phrase, name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_the_teacher_shows_the_attention_of_every_layer_without_a_window(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", architecture, n_layers=4)
    ids = np.random.default_rng(1).integers(3, 300, 600).astype(np.int32)
    positions = np.array([5, 70, 511, 512, 599], np.int32)
    teacher = Teacher(ModelFile.open(path), 1024, 1)
    seen = teacher.watch(ids, positions)
    found, layers = targets_of(seen, positions), teacher.watched_layers
    teacher.close()
    assert (len(layers) < 4) == (architecture == "gemma3")
    for row, position in enumerate(positions):
        weights = []
        for layer in layers:
            keys, n_heads = seen.keys[layer][:position + 1], seen.queries[layer].shape[1]
            keys = np.repeat(keys, n_heads // keys.shape[1], 1)
            logits = np.einsum("hd,nhd->hn", seen.queries[layer][row], keys) * seen.scale
            weights.append(np.exp(logits - logits.max(1, keepdims=True)))
            weights[-1] /= weights[-1].sum(1, keepdims=True)
        mean = np.concatenate(weights).mean(0)
        dense = np.zeros(600)
        np.add.at(dense, found.tokens[row], found.mean[row].astype(np.float64))
        kept = np.unique(found.tokens[row][found.mean[row] > 0])
        assert np.allclose(dense[kept], mean[kept], atol=1e-3) and kept.max() <= position
        assert len(kept) == min(N_KEPT, position + 1) or mean[kept].sum() > 0.99


def test_the_teachers_features_are_those_of_the_engine(model: ModelFile) -> None:
    """Within what other kernels round: the engine's own residual streams, as retrieval will see them."""
    ids = np.random.default_rng(2).integers(3, 300, 40).astype(np.int32)
    teacher = Teacher(model, 64, 1)
    features = teacher.watch(ids, np.array([39], np.int32)).features
    n_features = (1 + len(teacher.layers)) * teacher.arch.hp.hidden_size
    teacher.close()
    assert features.shape == (40, n_features)
    assert np.allclose(np.square(features).reshape(40, 1 + len(teacher.layers), -1).mean(-1), 1, atol=1e-2)
    with open_dense(model.path) as engine:
        sink = _Sink(teacher.layers)
        engine._features = sink
        engine.step(ids)
    assert np.abs(features - np.concatenate(sink.features)).max() < 0.2


class _Sink:
    def __init__(self, layers: tuple[int, ...]) -> None:
        self.feature_layers, self.features = frozenset(layers), list[np.ndarray]()

    def take(self, batch: object, streams: list[np.ndarray]) -> None:
        from edgert.engine.retrieval_head import features_of

        self.features.append(features_of(streams))


def test_a_head_is_distilled_and_stopping_in_the_middle_changes_nothing(model: ModelFile, tmp_path: Path) -> None:
    lines = list[str]()

    def options(name: str, n_epochs: int, minutes: float = 10) -> Options:
        return Options(minutes, tmp_path / "work", tmp_path / name, [_texts_once(tmp_path)], n_examples=3, n_held_out=2,
                       n_tokens=384, recipe=Recipe(dim=16, n_epochs=n_epochs))

    card = distil(model, _encode, options("whole", 3), lines.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines if line.startswith("epoch")]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert sum(line.startswith("captured") for line in lines) == 5
    head = open_head(tmp_path / "whole", model, open_architecture(model).hp)
    assert head.dim == 16 and head.card.data["examples"] == 3 and 0 < card.quality["coverage_at_128"] <= 1
    whole = (tmp_path / "whole" / PROJECT).read_bytes()

    again = list[str]()
    work = next((tmp_path / "work").iterdir())
    (work / "train-00001.npz").unlink()  # as if stopped before it was captured
    (work / "training.checkpoint").unlink()
    distil(model, _encode, options("again", 3), again.append)
    assert sum(line.startswith("captured") for line in again) == 1
    assert (tmp_path / "again" / PROJECT).read_bytes() == whole
    (work / "training.checkpoint").unlink()
    for _ in range(3):  # the time is over after each epoch
        distil(model, _encode, options("resumed", 3, minutes=0), again.append)
    assert sum(line.startswith("epoch") for line in again) == 6
    assert (tmp_path / "resumed" / PROJECT).read_bytes() == whole and (tmp_path / "resumed" / CARD).exists()


def test_a_head_sees_the_layers_that_it_was_asked_to_see(model: ModelFile, tmp_path: Path) -> None:
    """One after the other in the same work directory: what was captured for a head is not taken for the next."""
    for layers in ((0, 1), (0, 2)):
        options = Options(10, tmp_path / "work", tmp_path / "out", [_texts_once(tmp_path)], n_examples=2, n_held_out=1,
                          n_tokens=384, recipe=Recipe(dim=16, n_epochs=1), feature_layers=layers)
        lines = list[str]()
        assert distil(model, _encode, options, lines.append).feature_layers == layers
        assert sum(line.startswith("captured") for line in lines) == 3
        assert open_head(tmp_path / "out", model, open_architecture(model).hp).feature_layers == layers


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (-1,), (3,), (0, 3)])
def test_layers_that_no_head_can_see_are_refused(model: ModelFile, tmp_path: Path, layers: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="cannot see"):
        distil(model, _encode, Options(1, tmp_path, tmp_path, feature_layers=layers), lambda _: None)


def _texts_once(tmp_path: Path) -> Path:
    directory = tmp_path / "texts"
    if not directory.exists():
        directory.mkdir()
        _texts(directory)
    return directory


def test_too_little_text_is_refused_before_the_model_is_opened(model: ModelFile, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few"):
        distil(model, _encode, Options(1, tmp_path / "work", tmp_path / "out", [tmp_path]), lambda _: None)


def test_a_half_written_example_is_no_example(tmp_path: Path) -> None:
    example = Example(np.zeros((4, 2), np.float16), np.zeros(4, np.uint8), np.array([3], np.int32),
                      np.zeros((1, N_KEPT), np.uint16), np.zeros((1, N_KEPT), np.float16),
                      np.zeros((1, N_KEPT), np.float16))
    example.save(tmp_path / "one.npz")
    assert np.array_equal(Example.load(tmp_path / "one.npz").features, example.features)
    assert [path.name for path in tmp_path.iterdir()] == ["one.npz"]


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.5, 1 + 2**-8 + 2**-20], np.float32)
    restored = (bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    assert restored.tolist() == [1.0, 1.0, 1 + 4 * 2**-8, -2.5, 1 + 2 * 2**-8]


def test_the_written_head_scores_as_the_network_did() -> None:
    rng = np.random.default_rng(4)
    mean, spread = rng.normal(0, 3, 48).astype(np.float32), rng.uniform(0.1, 2, 48).astype(np.float32)
    network = Network(48, 16, 1, torch.from_numpy(mean), torch.from_numpy(spread))
    features = (mean + spread * rng.normal(0, 1, (20, 48))).astype(np.float32)
    positions = np.arange(20, dtype=np.int64)
    tensor, at = torch.from_numpy(features), torch.from_numpy(positions.astype(np.float32))
    with torch.no_grad():
        expected = network(tensor, at, tensor, at).numpy()
    head = NumpyHead(network.parameters_of_head())
    queries, keys = (head.project(name, features, positions) for name in ("query", "key"))
    found = np.stack([head.score(query, keys) for query in queries])
    assert np.abs(found - expected).max() < 0.02 * expected.std() + 0.01
