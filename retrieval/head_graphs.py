"""A retrieval head's parameters, the two ONNX graphs that they make, and the same arithmetic in numpy.

`project`: features and positions to queries and keys, each a linear map whose first values are rotated by the position
(RoPE, arXiv 2104.09864). `score`: one query times as many keys as there are. Knows no file and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.engine.retrieval_head import Floats, Positions
from retrieval.onnx_file import Node, OnnxGraph

_PROJECTIONS = ("query", "key")


@dataclass(frozen=True, slots=True)
class HeadParameters:
    """Weights (n_features, dim) float16 and biases (dim,) float32 by projection, and the rotation's frequencies
    (n_pairs,) float32: values i and i + n_pairs are a pair. The scale of scores is in the query's."""

    weights: Mapping[str, NDArray[np.float16]]
    biases: Mapping[str, Floats]
    frequencies: Floats

    @property
    def dim(self) -> int:
        return len(self.biases["query"])

    @property
    def n_features(self) -> int:
        return len(self.weights["query"])

    @property
    def n_pairs(self) -> int:
        return len(self.frequencies)

    def initialisers(self) -> dict[str, NDArray[np.generic]]:
        """By their names in the graph."""
        named: dict[str, NDArray[np.generic]] = {"frequencies": self.frequencies}
        for name in _PROJECTIONS:
            named |= {f"{name}_weight": self.weights[name], f"{name}_bias": self.biases[name]}
        return named

    @classmethod
    def of(cls, named: Mapping[str, NDArray[np.generic]], n_features: int, dim: int) -> HeadParameters:
        """From initialisers. Raises ValueError that says what is wrong with them."""
        frequencies = named.get("frequencies")
        if frequencies is None or frequencies.ndim != 1 or not 2 * len(frequencies) <= dim:
            raise ValueError("frequencies are missing, or more than half of the values")
        shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {"frequencies": (frequencies.shape, np.float32)}
        for name in _PROJECTIONS:
            shapes |= {f"{name}_weight": ((n_features, dim), np.float16), f"{name}_bias": ((dim,), np.float32)}
        if set(named) != set(shapes):
            raise ValueError(f"it holds {', '.join(sorted(named))[:200]}")
        for name, (shape, dtype) in shapes.items():
            array = named[name]
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds values that are not finite")
        return cls({name: np.asarray(named[f"{name}_weight"], np.float16) for name in _PROJECTIONS},
                   {name: np.asarray(named[f"{name}_bias"], np.float32) for name in _PROJECTIONS},
                   np.asarray(frequencies, np.float32))


# Up to so many tokens are a step's.
_FEW_TOKENS = 16


class NumpyHead:
    """The reference: what onnxruntime must give.

    In a step nothing is given to BLAS: its threads go on looking for work long after it is done, and keep ggml's from
    their cores (scores of 8192 keys take 1.0 ms instead of 0.15).
    """

    def __init__(self, parameters: HeadParameters) -> None:
        self._parameters = parameters
        self._weights = {name: weight.astype(np.float32) for name, weight in parameters.weights.items()}

    def project(self, name: str, features: Floats, positions: Positions) -> Floats:
        """(n, dim): the "query" or the "key" of each token."""
        weights = self._weights[name]
        product = np.einsum("nf,fd->nd", features, weights) if len(features) <= _FEW_TOKENS else features @ weights
        projected = product + self._parameters.biases[name]
        n = self._parameters.n_pairs
        angles = positions.astype(np.float32)[:, None] * self._parameters.frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        a, b = projected[:, :n], projected[:, n:2 * n]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos, projected[:, 2 * n:]], axis=1, dtype=np.float32)

    def score(self, query: Floats, keys: Floats) -> Floats:
        """(n,) of query (dim,) and keys (n, dim)."""
        return np.asarray(np.einsum("nd,d->n", keys, query), np.float32)


def project_graph(parameters: HeadParameters) -> OnnxGraph:
    """features (n, n_features) and positions (n,) to queries and keys (n, dim)."""
    n, rest = parameters.n_pairs, parameters.dim - 2 * parameters.n_pairs
    column = np.array([1], np.int64)
    nodes = [Node("Unsqueeze", ("positions", "column"), ("positions_column",)),
             Node("Mul", ("positions_column", "frequencies"), ("angles",)),
             Node("Cos", ("angles",), ("cos",)), Node("Sin", ("angles",), ("sin",))]
    for name, out in zip(_PROJECTIONS, ("queries", "keys"), strict=True):
        nodes += _projection(name, out)
    constants: dict[str, NDArray[np.generic]] = {"column": column, "parts": np.array([n, n, rest], np.int64)}
    return OnnxGraph("project", nodes, {**parameters.initialisers(), **constants},
                     {"features": ("n", parameters.n_features), "positions": ("n",)},
                     {"queries": ("n", parameters.dim), "keys": ("n", parameters.dim)})


def _projection(name: str, out: str) -> list[Node]:
    """The linear map of one projection, and its rotation by `cos` and `sin`."""
    def node(op: str, inputs: str, outputs: str, **attributes: int) -> Node:
        return Node(op, tuple(inputs.format(name).split()), tuple(outputs.format(name).split()), attributes)

    return [node("Cast", "{0}_weight", "{0}_matrix", to=1),  # float32
            node("MatMul", "features {0}_matrix", "{0}_product"), node("Add", "{0}_product {0}_bias", "{0}_flat"),
            node("Split", "{0}_flat parts", "{0}_a {0}_b {0}_rest", axis=1),
            node("Mul", "{0}_a cos", "{0}_a_cos"), node("Mul", "{0}_b sin", "{0}_b_sin"),
            node("Mul", "{0}_a sin", "{0}_a_sin"), node("Mul", "{0}_b cos", "{0}_b_cos"),
            node("Sub", "{0}_a_cos {0}_b_sin", "{0}_left"), node("Add", "{0}_a_sin {0}_b_cos", "{0}_right"),
            node("Concat", "{0}_left {0}_right {0}_rest", out, axis=1)]


def score_graph(dim: int) -> OnnxGraph:
    """query (dim,) and keys (n, dim) to scores (n,). The keys are whatever array is handed in: none is copied."""
    return OnnxGraph("score", [Node("MatMul", ("keys", "query"), ("scores",))], {},
                     {"query": (dim,), "keys": ("n", dim)}, {"scores": ("n",)})
