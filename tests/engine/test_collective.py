"""The contract of every Collective: each rank gets the sum over all ranks, added in rank order, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray
from seams import COLLECTIVES

from edgert.engine.collective import Collective
from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Tensor

EVERY_COLLECTIVE = pytest.mark.parametrize("kind", COLLECTIVES)
_DEADLINE_S = 60.0


def all_reduce(ranks: list[Collective], parts: list[list[NDArray[np.float32]]]) -> list[list[NDArray[np.float32]]]:
    """Every rank's results, for every rank's parts in order; each rank in a thread of its own."""
    results: list[list[NDArray[np.float32]]] = [[] for _ in ranks]

    def run(rank: int) -> None:
        with tensor_of(parts[rank][0]) as tensor:
            for part in parts[rank]:
                Backend.array(tensor)[...] = part
                results[rank].append(np.array(Backend.array(ranks[rank].all_reduce(tensor))))

    in_threads(run, len(ranks))
    return results


@contextmanager
def tensor_of(values: NDArray[np.float32]) -> Iterator[Tensor]:
    """A tensor in memory of its own, with these values."""
    backend, context = Backend(1), Context(1)
    buffer = backend.alloc("partial", values.nbytes)
    tensor = context.tensor(TYPE_F32, values.shape[::-1])
    buffer.place(tensor, buffer.base)
    Backend.array(tensor)[...] = values
    try:
        yield tensor
    finally:
        for resource in (buffer, context, backend):
            resource.close()


def in_threads(run: Callable[[int], None], n_ranks: int) -> None:
    """`run(rank)` for every rank at once."""
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_DEADLINE_S)
        assert not thread.is_alive()


@EVERY_COLLECTIVE
@pytest.mark.parametrize("shape", [(2, 64), (7, 576), (300, 64)])
def test_every_rank_holds_the_sum_in_rank_order(kind: str, shape: tuple[int, int]) -> None:
    ranks = COLLECTIVES[kind]()
    rng = np.random.default_rng(0)
    parts = [[rng.standard_normal(shape, dtype=np.float32) for _ in range(4)] for _ in ranks]
    results = all_reduce(ranks, parts)
    for step in range(4):
        expected = parts[0][step].copy()
        for rank in range(1, len(ranks)):
            expected += parts[rank][step]
        for rank in range(len(ranks)):
            np.testing.assert_array_equal(results[rank][step], expected)


@EVERY_COLLECTIVE
def test_a_pass_begins_with_rank_0s_values_and_ends_with_a_sum_for_it(kind: str) -> None:
    ranks = COLLECTIVES[kind]()
    parts = np.random.default_rng(0).standard_normal((len(ranks), 3, 64), dtype=np.float32)
    seen: list[list[NDArray[np.float32]]] = [[] for _ in ranks]

    def run(rank: int) -> None:
        with tensor_of(parts[rank]) as tensor:
            for _ in range(2):  # two batches of a step
                Backend.array(tensor)[...] = parts[rank]
                follow = getattr(ranks[rank], "follow", None)
                if rank and follow and not seen[rank]:
                    follow()
                ranks[rank].broadcast(tensor)
                seen[rank].append(np.array(Backend.array(tensor)))
            Backend.array(tensor)[...] = parts[rank]
            seen[rank].append(np.array(Backend.array(ranks[rank].reduce(tensor))))

    in_threads(run, len(ranks))
    for values in seen:
        np.testing.assert_array_equal(values[0], parts[0])
        np.testing.assert_array_equal(values[1], parts[0])
    np.testing.assert_array_equal(seen[0][2], np.add.reduce(parts))


@EVERY_COLLECTIVE
def test_ranks_are_numbered(kind: str) -> None:
    ranks = COLLECTIVES[kind]()
    assert [one.rank for one in ranks] == list(range(len(ranks)))
    assert {one.world_size for one in ranks} == {len(ranks)}
