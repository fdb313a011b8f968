"""One or several operations of a block as a graph that is built once and bound to other memory for each use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgert.architectures.base import Weights
from edgert.engine.batch import Phase
from edgert.ggml.graph import Graph, Tensor


@dataclass(frozen=True, slots=True)
class Operation:
    """`function(graph, weights, *sources)` gives results that are copied to `into`, or only handed to the operations
    after it, where `is_kept` is False. Equal `kind`s make equal graphs but for the forms of their weights."""

    function: Callable[..., Sequence[Tensor]]
    kind: tuple[object, ...]
    weights: Weights
    sources: Sequence[Tensor]
    into: Sequence[Tensor]
    is_kept: bool = True


@dataclass(slots=True)
class BlockGraph:
    """A graph over placeholders. By operation: for its weights, and for its sources and targets in their order; None
    stands where a source comes from the operation before, or a result is not kept."""

    graph: Graph
    phase: Phase
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    arguments: list[list[Tensor | None]] = field(default_factory=list)

    @classmethod
    def of(cls, operations: Sequence[Operation], phase: Phase, n_nodes: int) -> BlockGraph:
        """What one operation gives, those after it read without a copy. The graph still has to be placed."""
        built, given = cls(Graph(n_nodes), phase), dict[int, Tensor]()  # results, by the tensor that they go to
        for operation in operations:
            built._append(operation, given)
        return built

    def _append(self, operation: Operation, given: dict[int, Tensor]) -> None:
        g = self.graph
        weights = {k: g.placeholder(t) for k, t in operation.weights.items()}
        stand_ins = [None if t.address in given else g.placeholder(t) for t in operation.sources]
        sources = [stand_in or given[t.address] for stand_in, t in zip(stand_ins, operation.sources, strict=True)]
        targets = [g.placeholder(t) if operation.is_kept else None for t in operation.into]
        results = operation.function(g, weights, *sources)
        for result, target, into in zip(results, targets, operation.into, strict=True):
            given[into.address] = result
            if target is not None:
                g.expand(g.copy(result, target))
        self.weights.append(weights)
        self.arguments.append([*stand_ins, *targets])

    def bind(self, operations: Sequence[Operation]) -> None:
        """Mean the memory of these operations, which are of the kinds that the graph was built for."""
        rebind = self.graph.rebind
        for operation, weights, arguments in zip(operations, self.weights, self.arguments, strict=True):
            for key, placeholder in weights.items():
                rebind(placeholder, operation.weights[key])
            for argument, tensor in zip(arguments, (*operation.sources, *operation.into), strict=True):
                if argument is not None:
                    rebind(argument, tensor)

    def close(self) -> None:
        self.graph.close()
