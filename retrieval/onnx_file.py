"""ONNX models, as small as a retrieval head needs them: nodes over initialisers, float32 in and out.

Source: onnx.proto3 (IR version 8). Knows how a graph is written and how its initialisers are found again; which graph
is a head's is head_graphs.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from retrieval.protobuf import Malformed, data, fields, number

IR_VERSION, OPSET = 8, 17  # what every onnxruntime since 1.12 reads
_FLOAT, _INT64, _FLOAT16 = 1, 7, 10
_TYPES: dict[int, np.dtype[np.generic]] = {_FLOAT: np.dtype("<f4"), _INT64: np.dtype("<i8"), _FLOAT16: np.dtype("<f2")}
_MAX_FIELDS, _MAX_DIMS, _MAX_NAME_BYTES = 256, 2, 64
_ATTRIBUTE_INT, _ATTRIBUTE_INTS = 2, 7
_GRAPH, _INITIALISER = 7, 5  # ModelProto.graph, GraphProto.initializer


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: names of what it takes and gives, and its whole-number attributes."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OnnxGraph:
    """Inputs and outputs are float32, with sizes, or a name for a size that varies."""

    name: str
    nodes: Sequence[Node]
    initialisers: Mapping[str, NDArray[np.generic]]
    inputs: Mapping[str, Sequence[int | str]]
    outputs: Mapping[str, Sequence[int | str]]

    def to_bytes(self) -> bytes:
        """The file. Equal graphs have equal bytes."""
        graph = b"".join([*[data(1, _node(node)) for node in self.nodes], data(2, self.name),
                          *[data(_INITIALISER, _tensor(name, a)) for name, a in self.initialisers.items()],
                          *[data(11, _value(name, shape)) for name, shape in self.inputs.items()],
                          *[data(12, _value(name, shape)) for name, shape in self.outputs.items()]])
        return b"".join([number(1, IR_VERSION), data(2, "edgert"), data(_GRAPH, graph),
                         data(8, data(1, "") + number(2, OPSET))])


def read_initialisers(raw: bytes) -> dict[str, NDArray[np.generic]]:
    """The initialisers of a file, as copies. Raises Malformed; nothing larger than the file is allocated."""
    graphs = [value for number_, value in fields(memoryview(raw), _MAX_FIELDS) if number_ == _GRAPH]
    if len(graphs) != 1 or isinstance(graphs[0], int):
        raise Malformed("no model of one graph")
    tensors = [value for number_, value in fields(graphs[0], _MAX_FIELDS) if number_ == _INITIALISER]
    return dict(_read_tensor(tensor) for tensor in tensors)


def _read_tensor(message: int | memoryview) -> tuple[str, NDArray[np.generic]]:
    if isinstance(message, int):
        raise Malformed("an initialiser that is a number")
    dims, type_id, name, raw = list[int](), 0, b"", memoryview(b"")
    for number_, value in fields(message, _MAX_FIELDS):
        match number_, value:
            case 1, int():
                dims.append(value)
            case 2, int():
                type_id = value
            case 8, memoryview() if len(value) <= _MAX_NAME_BYTES:
                name = bytes(value)
            case 9, memoryview():
                raw = value
            case _:
                raise Malformed(f"an initialiser with field {number_}")
    dtype = _TYPES.get(type_id)
    n_values = int(np.prod([int(d) for d in dims], dtype=object)) if dims else 1
    if dtype is None or len(dims) > _MAX_DIMS or n_values * dtype.itemsize != len(raw):
        raise Malformed(f"an initialiser of type {type_id}, {dims} and {len(raw)} bytes")
    return name.decode("ascii", "replace"), np.frombuffer(raw, dtype).reshape(dims).copy()


def _node(node: Node) -> bytes:
    return b"".join([*[data(1, name) for name in node.inputs], *[data(2, name) for name in node.outputs],
                     data(4, node.op), *[data(5, _attribute(*one)) for one in node.attributes.items()]])


def _attribute(name: str, value: int | tuple[int, ...]) -> bytes:
    if isinstance(value, int):
        return data(1, name) + number(3, value) + number(20, _ATTRIBUTE_INT)
    return data(1, name) + b"".join(number(8, one) for one in value) + number(20, _ATTRIBUTE_INTS)


def _tensor(name: str, array: NDArray[np.generic]) -> bytes:
    type_id = next(key for key, dtype in _TYPES.items() if dtype == array.dtype)
    return b"".join([*[number(1, size) for size in array.shape], number(2, type_id), data(8, name),
                     data(9, np.ascontiguousarray(array).tobytes())])


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(data(1, number(1, size) if isinstance(size, int) else data(2, size)) for size in shape)
    return data(1, name) + data(2, data(1, number(1, _FLOAT) + data(2, dims)))
