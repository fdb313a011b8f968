"""Routing and experts, where llama.cpp is no oracle: damaged routers, and the two steps of an expert FFN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.architectures import moe
from edgert.architectures.base import Block
from edgert.architectures.registry import open_architecture
from edgert.engine.layouts import choose_layouts
from edgert.engine.resident import ResidentWeights
from edgert.ggml.abi import TYPE_F32, TYPE_I32
from edgert.ggml.backend import Allocator, Backend
from edgert.ggml.graph import Context, Graph, Tensor
from edgert.gguf.model_file import ModelFile

N_EXPERTS, N_USED = 64, 4


def routed(logits: NDArray[np.float32], gating: moe.Gating, *, normalise: bool = True,
           ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Weights and ids (n_tokens, n_used) of logits (n_tokens, n_experts)."""
    g, backend = Graph(64), Backend(1)
    allocator = Allocator(backend)
    given = g.input("logits", TYPE_F32, logits.shape[::-1])
    routing = moe.route(g, given, given, N_USED, gating, normalise=normalise)
    weights, ids = g.output(routing.weights), g.output(g.contiguous(routing.ids))
    allocator.alloc(g)
    backend.array(given)[:] = logits
    backend.compute(g)
    result = backend.array(weights).reshape(len(logits), N_USED).copy(), backend.array(ids).copy()
    for resource in (g, allocator, backend):
        resource.close()
    return result


@pytest.fixture
def logits() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((50, N_EXPERTS), dtype=np.float32)


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", "softmax_chosen"])
def test_the_best_experts_are_chosen_in_order(logits: NDArray[np.float32], gating: moe.Gating) -> None:
    weights, ids = routed(logits, gating)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1)[:, :N_USED])
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert (np.diff(weights, axis=1) <= 0).all()


def test_softmax_over_all_is_normalised_only_when_asked(logits: NDArray[np.float32]) -> None:
    plain, ids = routed(logits, "softmax", normalise=False)
    everything = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(plain, np.take_along_axis(everything, ids, 1), rtol=1e-5)
    np.testing.assert_allclose(routed(logits, "softmax")[0], plain / plain.sum(1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", "softmax_chosen"])
@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_a_damaged_router_still_names_experts(logits: NDArray[np.float32], gating: moe.Gating, damage: float) -> None:
    logits[np.random.default_rng(1).random(logits.shape) < 0.3] = damage
    _, ids = routed(logits, gating)
    assert ((ids >= 0) & (ids < N_EXPERTS)).all()
    assert all(len(set(row)) == N_USED for row in ids.tolist())


def test_outputs_are_weighed_where_they_lie() -> None:
    """Or a prompt would need the memory of all its experts' outputs once more."""
    hidden, n_tokens = 256, 32
    rng, backend, g = np.random.default_rng(0), Backend(1), Graph(64)
    held, allocator = Context(2), Allocator(backend)
    shapes = (hidden, N_USED, n_tokens), (1, N_USED, n_tokens)
    given = [held.tensor(TYPE_F32, shape) for shape in shapes]
    values = [rng.standard_normal(shape[::-1], dtype=np.float32) for shape in shapes]
    buffers = [backend.alloc("given", t.n_bytes) for t in given]
    for tensor, buffer, value in zip(given, buffers, values, strict=True):
        buffer.place(tensor, buffer.base)
        backend.array(tensor)[:] = value.reshape(backend.array(tensor).shape)
    found = g.output(moe.weigh(g, *given))
    allocator.alloc(g)
    backend.compute(g)
    np.testing.assert_allclose(backend.array(found), (values[0] * values[1]).sum(1), rtol=1e-4, atol=1e-5)
    assert allocator.size_bytes < given[0].n_bytes
    for resource in (g, allocator, held, *buffers, backend):
        resource.close()


def test_scores_are_all_comparable_before_they_are_sorted(logits: NDArray[np.float32]) -> None:
    logits[:, ::3] = np.nan
    for gating in ("sigmoid", "softmax_chosen"):  # NaN counts as the largest number, so the sort is a sort
        _, ids = routed(logits, gating)
        assert (ids % 3 == 0).all()


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "olmoe", "smallthinker"])
def test_router_and_experts_one_after_the_other_are_the_ffn(tiny_model: Callable[..., Path], architecture: str) -> None:
    # Whoever streams experts computes the router, reads the ids, brings the experts, and computes them.
    file = ModelFile.open(tiny_model(architecture, quantisation="Q4_0", n_experts=8))
    arch: Any = open_architecture(file)
    backend = Backend(1)
    source = ResidentWeights(backend, file, arch, choose_layouts("plain", backend, frozenset(), Path("unused")))
    rng = np.random.default_rng(0)
    x, logits = (rng.standard_normal((5, n), dtype=np.float32) for n in (arch.hp.hidden_size, 8))
    with source.lease(Block("ffn", 1), "decode") as w:
        def carried(t: Tensor) -> Tensor | None:
            return t if arch.hp.carried_size else None

        whole, = computed(backend, [x, logits], lambda g, x, logits: [arch.ffn(g, 1, w, x, carried(logits))])

        def router(g: Graph, x: Tensor, logits: Tensor) -> list[Tensor]:
            routing = arch.router(g, 1, w, x, carried(logits))
            return [routing.x, routing.weights, g.contiguous(routing.ids)]

        routing = computed(backend, [x, logits], router)
        chosen = routing[2].view(np.int32)
        assert ((chosen >= 0) & (chosen < 8)).all()
        halves, = computed(backend, [*routing[:2], chosen], lambda g, x, weights, ids: [
            moe.weigh(g, arch.experts(g, 1, w, x, ids), weights)])
    np.testing.assert_array_equal(whole, halves)
    source.close()
    backend.close()


def computed(backend: Backend, arrays: list[NDArray[Any]],
             function: Callable[..., list[Tensor]]) -> list[NDArray[np.float32]]:
    """What a graph over these arrays gives; dimensions of ggml reversed."""
    g, allocator = Graph(128), Allocator(backend)
    given = [g.input("x", TYPE_I32 if a.dtype == np.int32 else TYPE_F32, a.shape[::-1]) for a in arrays]
    for tensor in given:
        g.expand(tensor)
    wanted = [g.output(t) for t in function(g, *given)]
    allocator.alloc(g)
    for tensor, array in zip(given, arrays, strict=True):
        backend.array(tensor)[:] = array
    backend.compute(g)
    results = [backend.array(t).copy() for t in wanted]
    g.close()
    allocator.close()
    return results
