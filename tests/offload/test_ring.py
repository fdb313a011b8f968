"""The ring of window slots, against a model of it: a list of the intervals that are taken, oldest first."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from offload.window import Ring

PAGE_BYTES, BASE = 4096, 1 << 21
# A number of pages to take, or None to give the oldest back.
steps = st.lists(st.one_of(st.integers(1, 12), st.none()), min_size=1, max_size=200)
fuzzed = settings(derandomize=True, deadline=None, max_examples=200)


@fuzzed
@given(st.integers(1, 40), steps)
def test_live_pieces_never_overlap_and_stay_inside(n_pages: int, actions: list[int | None]) -> None:
    ring, live = Ring(BASE, n_pages * PAGE_BYTES), deque[tuple[int, int, int]]()
    for action in actions:
        if action is None:
            if live:
                ring.free(live.popleft()[2])
            continue
        taken = ring.take(action * PAGE_BYTES)
        if taken is None:
            continue
        address, ring_bytes = taken
        end = address + action * PAGE_BYTES
        assert address >= BASE and end <= BASE + ring.size_bytes and address % PAGE_BYTES == 0
        assert all(end <= other or other_end <= address for other, other_end, _ in live)
        live.append((address, end, ring_bytes))
        assert ring.used_bytes == sum(n for _, _, n in live) <= ring.size_bytes
        assert ring.used_bytes >= sum(b - a for a, b, _ in live)


@fuzzed
@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(1, 4))
def test_the_least_window_always_has_room_for_the_next_block(pages: list[int], per_block: int) -> None:
    """The window that residency guarantees: the largest block, and the largest piece as gap. Blocks in any phase."""
    blocks = [[n * PAGE_BYTES for n in pages[i:i + per_block]] for i in range(0, len(pages), per_block)]
    ring = Ring(BASE, max(map(sum, blocks)) + max(map(max, blocks)))
    for block in blocks * 3:
        taken = [ring.take(n_bytes) for n_bytes in block]
        assert None not in taken
        for one in taken:
            assert one is not None
            ring.free(one[1])
    assert ring.used_bytes == 0


@fuzzed
@given(st.integers(1, 40), steps)
def test_a_reset_ring_is_as_new(n_pages: int, actions: list[int | None]) -> None:
    used, fresh = (Ring(BASE, n_pages * PAGE_BYTES) for _ in range(2))
    for action in actions:
        used.take((action or 1) * PAGE_BYTES)
    used.reset()
    for action in actions:
        assert used.take((action or 2) * PAGE_BYTES) == fresh.take((action or 2) * PAGE_BYTES)


def test_a_ring_is_filled_to_the_last_byte() -> None:
    ring = Ring(BASE, 4 * PAGE_BYTES)
    assert [ring.take(PAGE_BYTES) for _ in range(4)] == [(BASE + i * PAGE_BYTES, PAGE_BYTES) for i in range(4)]
    assert ring.take(PAGE_BYTES) is None
    ring.free(PAGE_BYTES)
    assert ring.take(PAGE_BYTES) == (BASE, PAGE_BYTES)


def test_a_piece_that_does_not_fit_at_the_end_starts_again_at_the_front() -> None:
    ring = Ring(BASE, 5 * PAGE_BYTES)
    ring.take(2 * PAGE_BYTES)
    ring.take(2 * PAGE_BYTES)
    ring.free(2 * PAGE_BYTES)
    assert ring.take(2 * PAGE_BYTES) == (BASE, 3 * PAGE_BYTES)  # with the page that stays empty at the end
    assert ring.take(PAGE_BYTES) is None
