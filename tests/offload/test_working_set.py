"""The curve that ages tell is that of the pool's own policy, replayed at every size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest

from benchmarks.expert_cache import Trace, Visit, hit_rate
from edgert.memory.hits import expected_hit_rate
from offload.working_set import WorkingSet

N_LAYERS, N_EXPERTS, N_USED = 6, 32, 4


def visits(n_tokens: int, stay: float, seed: int = 0) -> Iterator[Visit]:
    """Tokens whose experts stay with a probability, and else are drawn anew, some more often than others."""
    numbers = random.Random(seed)
    chosen = [[*range(N_USED)] for _ in range(N_LAYERS)]
    for token in range(n_tokens):
        for layer in range(N_LAYERS):
            kept = [expert for expert in chosen[layer] if numbers.random() < stay]
            while len(kept) < N_USED:
                expert = int(N_EXPERTS * numbers.random() ** 2)
                if expert not in kept:
                    kept.append(expert)
            chosen[layer] = kept
            yield Visit(token, layer, token >= 50, tuple(kept))


@pytest.mark.parametrize("stay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("residency", [0.15, 0.3, 0.5, 0.75])
def test_the_curve_is_that_of_a_replay(stay: float, residency: float) -> None:
    working_set, trace = WorkingSet(N_LAYERS * N_EXPERTS, N_LAYERS * N_USED), [*visits(400, stay)]
    for visit in trace:
        working_set.use(visit.layer, visit.experts, visit.step, counts=visit.counts)
    curve = working_set.curve()
    assert curve is not None
    replayed = hit_rate(Trace(N_LAYERS, N_EXPERTS, tuple(trace)), int(residency * N_LAYERS * N_EXPERTS))
    assert expected_hit_rate(residency, curve) == pytest.approx(replayed, abs=0.06)


def test_a_curve_rises_from_nothing_to_all() -> None:
    working_set = WorkingSet(N_LAYERS * N_EXPERTS, N_LAYERS * N_USED)
    for visit in visits(200, 0.3):
        working_set.use(visit.layer, visit.experts, visit.step, counts=True)
    curve = working_set.curve() or []
    assert (curve[0], curve[-1]) == ((0.0, 0.0), (1.0, 1.0))
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(curve))


def test_few_tokens_and_prompts_tell_nothing() -> None:
    working_set = WorkingSet(N_LAYERS * N_EXPERTS, N_LAYERS * N_USED)
    for visit in visits(31, 0.3):
        working_set.use(visit.layer, visit.experts, visit.step, counts=True)
    for visit in visits(200, 0.3):
        working_set.use(visit.layer, visit.experts, 31 + visit.step, counts=False)
    assert working_set.curve() is None
