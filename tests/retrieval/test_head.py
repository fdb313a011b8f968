"""The head's two runners agree, and a file that is not exactly a head's is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_model

from edgert.architectures.base import Hyperparameters
from edgert.architectures.registry import open_architecture
from edgert.errors import HeadRefused
from edgert.gguf.model_file import ModelFile
from retrieval.head import CARD, PROJECT, SCORE, Head, find_head, open_head, save_head
from retrieval.head_card import HeadCard
from retrieval.head_graphs import HeadParameters, score_graph
from retrieval.onnx_file import Node, OnnxGraph
from retrieval.selection import Policy, merits, select

_DIM, _PAIRS = 16, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFile, Hyperparameters]:
    file = ModelFile.open(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama", n_layers=4))
    return file, open_architecture(file).hp


def _parameters(n_features: int, seed: int = 0) -> HeadParameters:
    rng = np.random.default_rng(seed)
    return HeadParameters(
        {name: rng.normal(0, 0.1, (n_features, _DIM)).astype(np.float16) for name in ("query", "key")},
        {name: rng.normal(0, 0.1, _DIM).astype(np.float32) for name in ("query", "key")},
        (10000.0 ** (-np.arange(_PAIRS) / _PAIRS)).astype(np.float32))


def _card(model: ModelFile, hp: Hyperparameters, **changed: object) -> HeadCard:
    fields: dict[str, object] = {
        "model": "tiny", "fingerprint": model.fingerprint(), "hidden_size": hp.hidden_size, "n_layers": hp.n_layers,
        "feature_layers": (1, 2), "dim": _DIM, "seed": 1, "recipe": {}, "data": {}, "quality": {}}
    return HeadCard(**(fields | changed))  # type: ignore[arg-type]


@pytest.fixture
def saved(model: tuple[ModelFile, Hyperparameters], tmp_path: Path) -> Path:
    card = _card(*model)
    save_head(tmp_path / "head", card, _parameters(card.n_features))
    return tmp_path / "head"


def test_onnxruntime_and_numpy_choose_the_same_set(saved: Path, model: tuple[ModelFile, Hyperparameters]) -> None:
    heads = [open_head(saved, *model, runner) for runner in ("onnxruntime", "numpy")]
    assert [head.runner for head in heads] == ["onnxruntime", "numpy"]
    rng, n = np.random.default_rng(3), 3000
    features = rng.normal(0, 1, (n, heads[0].card.n_features)).astype(np.float32)
    positions = np.arange(n, dtype=np.int64) + 100_000  # a rotation by large angles too
    chosen = []
    for head in heads:
        keys = np.zeros((2 * n, head.dim), np.float32)  # a buffer with room, as a cache has
        keys[:n] = head.project_keys(features, positions)[:, 0]
        query = head.project_queries(features[-1:], positions[-1:])[0, 0]
        chosen.append(select(merits(head.scores(query, keys[:n]), None, Policy(256)), None, Policy(256)).positions)
    assert np.array_equal(*chosen)


def test_a_query_and_a_key_depend_on_how_far_apart_they_are_alone(model: tuple[ModelFile, Hyperparameters]) -> None:
    card = _card(*model)
    head = Head(card, _parameters(card.n_features), "numpy")
    features = np.random.default_rng(0).normal(0, 1, (2, card.n_features)).astype(np.float32)
    scores = [float(head.scores(head.project_queries(features[:1], np.array([at + 300]))[0, 0],
                                head.project_keys(features[1:], np.array([at]))[:, 0])[0]) for at in (0, 5000, 300)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    unrotated = float(head.scores(head.project_queries(features[:1], np.array([300]))[0, 0],
                                  head.project_keys(features[1:], np.array([300]))[:, 0])[0])
    assert abs(unrotated - scores[0]) > 1e-3


def test_a_head_is_found_by_the_models_fingerprint(saved: Path, model: tuple[ModelFile, Hyperparameters],
                                                   tmp_path: Path) -> None:
    found = find_head(*model, [saved.parent])
    assert found is not None and found.feature_layers == (1, 2) and found.dim == _DIM and found.n_groups == 1
    other = ModelFile.open(write_tiny_model(tmp_path / "other.gguf", "llama", n_layers=4, seed=5))
    assert find_head(other, model[1], [saved.parent]) is None


def _edit_card(**changed: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        card = json.loads((directory / CARD).read_text())
        (directory / CARD).write_text(json.dumps(card | changed))
    return edit


def _edit_graph(change: Callable[[bytes], bytes], name: str = PROJECT) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes())) and None


def _nan(raw: bytes) -> bytes:
    at = raw.rindex(b"query_bias") + len(b"query_bias") + 2  # behind the field's tag and its length
    return raw[:at] + b"\xff" * 4 + raw[at + 4:]


_EVIL = OnnxGraph("score", [Node("Loop", ("keys", "query"), ("scores",))], {}, {"query": (_DIM,), "keys": ("n", _DIM)},
                  {"scores": ("n",)}).to_bytes()


@pytest.mark.parametrize(("damage", "reason"), [
    (_edit_card(fingerprint="0" * 64), "another file"),
    (_edit_card(hidden_size=64), "layers of 64"),
    (_edit_card(format=2), "format"),
    (_edit_card(dim=1 << 30), "impossible"),
    (_edit_card(dim="16"), "dim is no int"),
    (_edit_card(feature_layers=[2, 1]), "feature layers"),
    (_edit_card(feature_layers=[1, 3]), "feature layers"),
    (_edit_card(feature_layers=[1]), "expected float16"),
    (_edit_card(dim=8), "expected float16"),
    (_edit_card(more=1), "fields"),
    (lambda d: (d / CARD).write_bytes(b"[" * 60_000), "no JSON"),
    (lambda d: (d / CARD).write_bytes(b" " * 100_000), "more than"),
    (lambda d: (d / PROJECT).unlink(), "cannot be read"),
    (_edit_graph(lambda raw: raw[:-40]), "retrieval head"),
    (_edit_graph(lambda raw: raw[:len(raw) // 2]), "retrieval head"),
    (_edit_graph(lambda raw: raw + b"\0" * 40_000), "more than"),
    (_edit_graph(lambda raw: b""), "no model"),
    (_edit_graph(_nan), "not finite"),
    (_edit_graph(lambda raw: raw[:-1] + b"\x12"), "not the graph"),  # another opset
    (_edit_graph(lambda raw: raw.replace(b"Sin", b"Cos")), "not the graph"),
    (_edit_graph(lambda raw: _EVIL, SCORE), "not the graph"),
    (_edit_graph(lambda raw: score_graph(8).to_bytes(), SCORE), "not the graph"),
])
def test_what_is_not_exactly_a_head_is_refused(saved: Path, model: tuple[ModelFile, Hyperparameters],
                                               damage: Callable[[Path], None], reason: str) -> None:
    damage(saved)
    with pytest.raises(HeadRefused, match=reason) as refused:
        open_head(saved, *model, "numpy")
    assert refused.value.exit_code == 4 and "distill" in refused.value.next_step


def test_no_damaged_byte_reaches_the_runner(saved: Path, model: tuple[ModelFile, Hyperparameters]) -> None:
    """Flip bytes all over the graph: either refused, or only a parameter's value differs."""
    raw, rng = (saved / PROJECT).read_bytes(), np.random.default_rng(1)
    sound = open_head(saved, *model, "numpy")
    n_refused = 0
    for at in [*range(0, 40), *range(len(raw) - 300, len(raw), 3), *rng.integers(0, len(raw), 40).tolist()]:
        (saved / PROJECT).write_bytes(raw[:at] + bytes([raw[at] ^ int(rng.integers(1, 256))]) + raw[at + 1:])
        try:
            assert open_head(saved, *model, "numpy").card == sound.card
        except HeadRefused:
            n_refused += 1
    assert n_refused > 100


def test_every_head_that_ships_is_found_by_its_model(real_model: Callable[[str], Path]) -> None:
    for name in ("smollm2-135m",):
        file = ModelFile.open(real_model(name))
        head = find_head(file, open_architecture(file).hp)
        assert head is not None and head.card.data["examples"] > 0 and head.card.quality["coverage_at_128"] > 0.8
