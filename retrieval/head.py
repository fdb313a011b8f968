"""Retrieval heads from files: found by the model's fingerprint, checked whole, then run.

A file is hostile. It is read up to the size that its card allows, its parameters are taken out, and the graph that
edgert would write of them must be the file, byte for byte: nothing else ever reaches onnxruntime. numpy computes the
same sets, in 20 MiB less memory and without a package of 78 MB, so onnxruntime (the extra `onnx`) is for who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from edgert.architectures.base import Hyperparameters
from edgert.engine.retrieval_head import Floats, Positions
from edgert.errors import HeadRefused
from edgert.gguf.model_file import ModelFile
from retrieval.head_card import MAX_CARD_BYTES, HeadCard
from retrieval.head_graphs import HeadParameters, NumpyHead, project_graph, score_graph
from retrieval.onnx_file import read_initialisers
from retrieval.protobuf import Malformed

Runner = Literal["numpy", "onnxruntime"]
PROJECT, SCORE, CARD = "project.onnx", "score.onnx", "card.json"
SHIPPED = Path(__file__).parent / "heads"
_OVERHEAD_BYTES = 16 * 2**10  # names, nodes and sizes beside the values


class Head:
    """A RetrievalHead of one group. Raises ImportError where `runner` is not installed."""

    n_groups = 1

    def __init__(self, card: HeadCard, parameters: HeadParameters, runner: Runner = "numpy") -> None:
        self.card, self.runner = card, runner
        self._arithmetic = NumpyHead(parameters) if runner == "numpy" else _OnnxHead(parameters)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.card.feature_layers

    @property
    def dim(self) -> int:
        return self.card.dim

    def project_queries(self, features: Floats, positions: Positions) -> Floats:
        return self._arithmetic.project("query", features, positions)[:, None]

    def project_keys(self, features: Floats, positions: Positions) -> Floats:
        return self._arithmetic.project("key", features, positions)[:, None]

    def scores(self, query: Floats, keys: Floats) -> Floats:
        return self._arithmetic.score(query, keys)


class _OnnxHead:
    """The two graphs in sessions of one thread: a step is two products of a vector, which no second thread would
    quicken."""

    def __init__(self, parameters: HeadParameters) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # an arena keeps a long prompt's memory for ever
        self._project, self._score = (
            onnxruntime.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
            for graph in (project_graph(parameters), score_graph(parameters.dim)))

    def project(self, name: str, features: Floats, positions: Positions) -> Floats:
        output = {"query": "queries", "key": "keys"}[name]
        inputs = {"features": features, "positions": positions.astype(np.float32)}
        return np.asarray(self._project.run([output], inputs)[0], np.float32)

    def score(self, query: Floats, keys: Floats) -> Floats:
        return np.asarray(self._score.run(["scores"], {"query": query, "keys": keys})[0], np.float32)


def find_head(model: ModelFile, hp: Hyperparameters, directories: Sequence[Path] = (),
              runner: Runner = "numpy") -> Head | None:
    """The head that was distilled from this very file: of `directories` first, then those that come with edgert. None
    where there is none. Raises HeadRefused for one that says that it is, and is not sound."""
    fingerprint = model.fingerprint()
    for directory in (*directories, SHIPPED):
        for card_path in sorted(directory.glob(f"*/{CARD}")):
            if fingerprint.encode() in _read(card_path, MAX_CARD_BYTES):
                return open_head(card_path.parent, model, hp, runner)
    return None


def open_head(directory: Path, model: ModelFile, hp: Hyperparameters, runner: Runner = "numpy") -> Head:
    """The head in `directory`. Raises HeadRefused with the reason: another model's, damaged, or none that edgert
    writes."""
    card_path, project_path, score_path = (directory / name for name in (CARD, PROJECT, SCORE))
    try:
        card = HeadCard.of_json(_read(card_path, MAX_CARD_BYTES))
    except ValueError as error:
        raise HeadRefused(str(card_path), str(error)) from None
    if card.fingerprint != model.fingerprint():
        raise HeadRefused(str(card_path), f"it was distilled from another file ({card.model[:80]!r})")
    if (card.hidden_size, card.n_layers) != (hp.hidden_size, hp.n_layers):
        raise HeadRefused(str(card_path), f"it is for {card.n_layers} layers of {card.hidden_size}, the model has "
                          f"{hp.n_layers} of {hp.hidden_size}")
    n_value_bytes = 2 * card.dim * (2 * card.n_features + 4) + 4 * card.dim
    raw = _read(project_path, n_value_bytes + _OVERHEAD_BYTES)
    try:
        named = {name: array for name, array in read_initialisers(raw).items() if name not in ("column", "parts")}
        parameters = HeadParameters.of(named, card.n_features, card.dim)
    except (Malformed, ValueError) as error:
        raise HeadRefused(str(project_path), str(error)) from None
    for path, expected in ((project_path, project_graph(parameters)), (score_path, score_graph(card.dim))):
        if _read(path, len(raw)) != expected.to_bytes():
            raise HeadRefused(str(path), "it is not the graph that edgert writes (its opset, its nodes or its sizes)")
    return Head(card, parameters, runner)


def save_head(directory: Path, card: HeadCard, parameters: HeadParameters) -> None:
    """Write the graphs and, last, the card that makes them a head."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CARD).unlink(missing_ok=True)
    (directory / PROJECT).write_bytes(project_graph(parameters).to_bytes())
    (directory / SCORE).write_bytes(score_graph(parameters.dim).to_bytes())
    partial = directory / f"{CARD}.partial"
    partial.write_text(card.to_json(), "utf-8")
    partial.replace(directory / CARD)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise HeadRefused(str(path), f"cannot be read: {error.strerror}") from error
    if len(raw) > max_bytes:
        raise HeadRefused(str(path), f"it has more than the {max_bytes} bytes that its sizes allow")
    return raw
