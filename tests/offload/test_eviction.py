"""The policy never loses an expert or gives one slot twice, evicts by whole-token age, and does not fall below LRU."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.expert_cache import Trace, Visit, belady_hit_rate, hit_rate, lru_hit_rate, read_trace, replay
from offload.eviction import ExpertSlots, Key

N_LAYERS = 4


def use(slots: ExpertSlots, step: int, layer: int, expert: int) -> Key | None:
    """One visit; the expert that gave way."""
    key, victim = (layer, expert), None
    if slots.hold(key) is None:
        claimed = slots.claim(key, step)
        assert claimed is not None
        victim = claimed[1]
    slots.release(key, step)
    return victim


def test_the_oldest_by_whole_tokens_gives_way_first() -> None:
    slots = ExpertSlots(3, N_LAYERS)
    use(slots, 0, 3, 0)
    use(slots, 2, 1, 0)
    use(slots, 5, 0, 0)
    assert use(slots, 9, 0, 1) == (3, 0)
    assert use(slots, 9, 1, 1) == (1, 0)


def test_among_equally_old_ones_the_layer_that_is_visited_last_gives_way() -> None:
    slots = ExpertSlots(N_LAYERS, N_LAYERS)
    for layer in range(N_LAYERS):
        use(slots, 0, layer, 0)
    # At layer 2 of the next token, layers 0 to 2 are a token old, and 2 comes again last. LRU would evict layer 0, and
    # then layer 3, which comes next.
    assert [use(slots, 1, 2, expert) for expert in (1, 2, 3)] == [(2, 0), (1, 0), (0, 0)]
    # All that is left is younger than a token: what has just been used is wanted again last.
    assert use(slots, 1, 2, 4) in {(2, 1), (2, 2), (2, 3)}
    assert (3, 0) in slots


def test_what_is_held_stays() -> None:
    slots = ExpertSlots(2, N_LAYERS)
    assert slots.claim((0, 0), 0) and slots.claim((0, 1), 0)
    assert slots.claim((0, 2), 0) is None
    slots.release((0, 1), 0)
    claimed = slots.claim((0, 2), 0)
    assert claimed is not None and claimed[1] == (0, 1)


def test_what_is_forgotten_leaves_a_free_slot() -> None:
    slots = ExpertSlots(2, N_LAYERS)
    slot, _ = slots.claim((0, 0), 0) or (None, None)
    slots.forget((0, 0))
    assert slots.claim((1, 0), 0) == (slot, None)
    assert (0, 0) not in slots and slots.hold((0, 0)) is None


def test_fewer_slots_keep_what_lies_in_them_and_more_are_free() -> None:
    slots = ExpertSlots(4, N_LAYERS)
    for expert in range(4):
        use(slots, 0, 0, expert)
    gone = slots.resize(2)
    assert sorted(slot for _, slot in gone) == [2, 3]
    assert len(slots) == 2 and not any(key in slots for key, _ in gone)
    assert use(slots, 1, 1, 0) is not None  # both are taken
    assert slots.resize(3) == []
    assert use(slots, 2, 1, 1) is None
    assert use(slots, 3, 1, 2) is not None


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 5), st.lists(st.tuples(
    st.integers(0, 4), st.integers(0, 7), st.sampled_from(["use", "hold", "forget"]), st.integers(0, 9)), max_size=120))
def test_every_slot_has_one_expert_whatever_happens(n_slots: int, n_layers: int,
                                                    events: list[tuple[int, int, str, int]]) -> None:
    """Also where steps go back, as after a common beginning."""
    slots, held = ExpertSlots(n_slots, n_layers), dict[Key, int]()
    here: dict[Key, int] = {}
    for layer, expert, what, step in events:
        key = layer % n_layers, expert
        if what == "forget" and key in here:
            slots.forget(key)
            held.pop(key, None)
            del here[key]
        elif what != "forget" and key not in held:
            slot = slots.hold(key)
            assert slot == here.get(key)
            if slot is None:
                claimed = slots.claim(key, step)
                assert (claimed is None) == (len(held) == n_slots)
                if claimed is None:
                    continue
                slot, victim = claimed
                assert victim not in held
                if victim is not None:
                    assert here.pop(victim) == slot
                here[key] = slot
            held[key] = slot
            if what == "use":
                slots.release(key, step)
                del held[key]
        assert len(set(here.values())) == len(here) == len(slots) <= n_slots


# -------------------------------------------------------------------------------------------------------------- traces


def synthetic(kind: str, n_layers: int, n_experts: int, n_used: int, n_steps: int = 120) -> Trace:
    """A trace in which experts are chosen as `kind` says; the first 20 steps are prefill."""
    rng = np.random.default_rng(0)
    order = [rng.permutation(n_experts) for _ in range(n_layers)]
    visits = []
    for step in range(n_steps):
        for layer in range(n_layers):
            rank = np.arange(n_experts)
            weight = {"uniform": np.ones(n_experts), "zipf": 1 / (rank + 1),
                      "drift": np.exp(-((rank - step // 2) % n_experts) / (n_experts / 8)),
                      "phases": np.where((rank + 17 * (step // 25)) % n_experts < 2 * n_used, 50.0, 1.0),
                      "cyclic": ((rank - step * n_used) % n_experts < n_used).astype(float)}[kind]
            chosen = order[layer][rng.choice(n_experts, n_used, replace=False, p=weight / weight.sum())]
            visits.append(Visit(step, layer, step >= 20, tuple(chosen.tolist())))
    return Trace(n_layers, n_experts, tuple(visits))


@pytest.mark.parametrize("sizes", [(12, 32, 4), (1, 64, 4), (4, 8, 2), (6, 16, 1)], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "zipf", "drift", "phases", "cyclic"])
def test_it_is_not_below_lru(kind: str, sizes: tuple[int, int, int]) -> None:
    trace = synthetic(kind, *sizes)
    for percent in (4, 12.5, 25, 50, 75):
        result = replay(trace, percent)
        assert result["belady"] >= result["hit"] >= result["lru"] - 0.005, percent


def test_there_is_no_cliff_where_a_token_does_not_fit() -> None:
    trace = synthetic("zipf", 12, 32, 4)
    assert lru_hit_rate(trace, 40) < 0.02  # a token uses 48
    assert hit_rate(trace, 40) > 0.2


def brute_force_best(uses: list[tuple[Key, bool]], n_slots: int) -> int:
    """The most hits that any policy gets, by trying every one."""
    best = {frozenset[Key](): 0}
    for key, counts in uses:
        following: dict[frozenset[Key], int] = {}
        for cache, hits in best.items():
            n_hits = hits + (counts and key in cache)
            choices = [cache] if key in cache else [cache | {key}] if len(cache) < n_slots else \
                [cache - {victim} | {key} for victim in cache]
            for choice in choices:
                following[choice] = max(following.get(choice, 0), n_hits)
        best = following
    return max(best.values())


def test_belady_is_the_optimum_and_lru_is_lru() -> None:
    rng = random.Random(0)
    for _ in range(20):
        visits = tuple(Visit(step, layer, True, (rng.randrange(4),)) for step in range(8) for layer in range(2))
        trace = Trace(2, 4, visits)
        assert belady_hit_rate(trace, 3) == brute_force_best(list(trace.uses()), 3) / len(visits)
        assert lru_hit_rate(trace, 3) <= belady_hit_rate(trace, 3) >= hit_rate(trace, 3)
    cyclic = Trace(1, 3, tuple(Visit(step, 0, True, (step % 3,)) for step in range(9)))
    assert (lru_hit_rate(cyclic, 2), lru_hit_rate(cyclic, 3)) == (0.0, 6 / 9)


def test_a_trace_is_read_in_the_order_of_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("# route_trace v1\n# n_layer=3 n_expert=16\nturn,phase,step,layer,slot,expert,weight\n"
                    "0,0,0,0,0,5,0.5\n0,0,1,0,0,6,0.5\n0,0,0,1,0,7,0.5\n0,1,2,0,0,5,0.6\n0,1,2,0,1,9,0.4\n")
    trace = read_trace(path)
    assert (trace.n_layers, trace.n_experts) == (3, 16)
    assert trace.visits == (Visit(0, 0, False, (5,)), Visit(0, 1, False, (7,)), Visit(1, 0, False, (6,)),
                            Visit(2, 0, True, (5, 9)))


@pytest.fixture
def real_trace() -> Trace:
    path = Path(__file__).parents[3] / "shared/traces/qwen3-30b-a3b-routing.csv"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return read_trace(path)


@pytest.mark.parametrize(("percent", "share"), [(4, 0.55), (12.5, 0.75), (25, 0.87), (50, 0.99)])
def test_a_real_trace_hits_near_the_optimum(real_trace: Trace, percent: float, share: float) -> None:
    result = replay(real_trace, percent)
    assert result["hit"] >= share * result["belady"]
    assert result["hit"] >= result["lru"]
