"""Book-keeping of the hot buffer: every wanted token has a slot of its own, and nothing else moves."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retrieval.slots import Positions, Slots


def at(*positions: int) -> Positions:
    return np.array(positions, np.int64)


def test_what_was_there_stays_where_it_was_and_only_the_difference_is_missing() -> None:
    slots = Slots(8, 100)
    first = slots.assign(at(3, 5, 7), 10, 1)
    assert first.missing.tolist() == [3, 5, 7]
    second = slots.assign(at(3, 7, 9, 10), 11, 1)
    assert second.missing.tolist() == [9]
    assert second.selected[:2].tolist() == [first.selected[0], first.selected[2]]
    assert second.selected[3] == first.new[0]


def test_a_token_that_one_step_leaves_out_is_still_there_for_the_next() -> None:
    slots = Slots(8, 100)
    slots.assign(at(3, 5, 7), 10, 1)
    slots.assign(at(3, 7), 11, 1)
    assert slots.assign(at(3, 5, 7), 12, 1).missing.tolist() == []


def test_what_was_used_longest_ago_makes_room() -> None:
    slots = Slots(4, 100)
    slots.assign(at(1, 2), 10, 1)
    slots.assign(at(2), 11, 1)
    assert slots.assign(at(2, 3), 12, 1).missing.tolist() == [3]
    assert slots.where(at(1)).tolist() == [-1]


def test_tokens_that_are_forgotten_or_did_not_come_have_no_slot() -> None:
    slots = Slots(8, 100)
    slots.assign(at(3, 5), 10, 2)
    slots.forget(11)
    assert (slots.where(at(3, 5, 10)) >= 0).all()
    assert slots.where(at(11)).tolist() == [-1]
    slots.drop(at(5, 99))
    assert slots.assign(at(3, 5), 11, 1).missing.tolist() == [5]


def test_a_step_that_is_taken_again_finds_its_own_tokens_gone() -> None:
    slots = Slots(8, 100)
    slots.assign(at(3), 10, 4)
    again = slots.assign(at(3), 10, 1)
    assert again.missing.tolist() == []
    assert slots.where(at(11, 12, 13)).tolist() == [-1, -1, -1]


def test_looking_ahead_brings_what_the_next_step_lacks_and_takes_nothing_from_the_running_one() -> None:
    slots = Slots(8, 100)
    slots.assign(at(1, 2, 3), 10, 1)
    running = slots.assign(at(2, 4), 11, 1)
    missing, into = slots.look_ahead(at(1, 2, 5, 6, 11))
    assert missing.tolist() == [5, 6]
    assert not {*into.tolist()} & {*running.selected.tolist(), *running.new.tolist(), *slots.where(at(1)).tolist()}
    assert slots.assign(at(1, 2, 5, 6, 11), 12, 1).missing.tolist() == []


def test_looking_ahead_leaves_to_the_step_what_finds_no_slot() -> None:
    slots = Slots(6, 100)
    running = slots.assign(at(1, 2, 3), 10, 1)
    missing, into = slots.look_ahead(at(4, 5, 6, 10))
    assert missing.tolist() == [4, 5]
    assert not {*into.tolist()} & {*running.selected.tolist(), *running.new.tolist()}
    assert slots.assign(at(4, 5, 6, 10), 11, 1).missing.tolist() == [6]


@given(seed=st.integers(0, 200), n_slots=st.integers(20, 40), n_steps=st.integers(1, 12))
def test_every_wanted_token_has_exactly_one_slot_and_it_holds_what_was_put_there(seed: int, n_slots: int,
                                                                                n_steps: int) -> None:
    rng, slots, content, length = np.random.default_rng(seed), Slots(n_slots, 400), dict[int, int](), 60
    for _ in range(n_steps):
        if rng.random() < 0.2:
            length -= int(rng.integers(1, 10))
            slots.forget(length)
        n_new = int(rng.integers(1, 5))
        chosen = np.sort(rng.choice(length, int(rng.integers(1, n_slots - n_new)), replace=False)).astype(np.int64)
        step = slots.assign(chosen, length, n_new)
        content.update(zip(step.missing_slots.tolist(), step.missing.tolist(), strict=True))
        content.update(zip(step.new.tolist(), range(length, length + n_new), strict=True))
        assert [content[slot] for slot in step.selected.tolist()] == chosen.tolist()
        assert len({*step.selected.tolist(), *step.new.tolist()}) == len(chosen) + n_new
        running = {*step.selected.tolist(), *step.new.tolist()}
        length += n_new
        if rng.random() < 0.5:
            wanted = np.sort(rng.choice(length, int(rng.integers(1, n_slots - 4)), replace=False)).astype(np.int64)
            missing, into = slots.look_ahead(wanted)
            assert not running & {*into.tolist()}
            content.update(zip(into.tolist(), missing.tolist(), strict=True))
