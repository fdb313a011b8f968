"""The arena: aligned, resident at once, carved without overlap, given back whole."""

from __future__ import annotations

import ctypes
import mmap

import psutil
import pytest

from edgert.errors import OutOfMemory
from offload.arena import HUGE_PAGE_BYTES, PAGE_BYTES, Arena

MIB = 2**20


def test_it_begins_on_a_huge_page_and_is_zero() -> None:
    arena = Arena(3 * MIB + 5)
    assert arena.base % HUGE_PAGE_BYTES == 0
    assert arena.size_bytes == 3 * MIB + PAGE_BYTES
    assert not any(ctypes.string_at(arena.base, arena.size_bytes))
    arena.close()


def test_carved_parts_are_page_aligned_and_follow_each_other() -> None:
    arena = Arena(5 * PAGE_BYTES)
    assert [arena.carve(n) - arena.base for n in (1, PAGE_BYTES, PAGE_BYTES + 1)] == [0, PAGE_BYTES, 2 * PAGE_BYTES]
    assert arena.free_bytes == PAGE_BYTES
    with pytest.raises(AssertionError, match="left in the arena"):
        arena.carve(PAGE_BYTES + 1)
    arena.close()


def test_all_of_it_is_resident_from_the_start_and_gone_after_close() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    arena = Arena(64 * MIB)
    held = process.memory_info().rss - before
    assert 64 * MIB <= held <= 66 * MIB
    arena.close()
    assert process.memory_info().rss - before < MIB


def test_an_impossible_size_is_a_typed_error() -> None:
    with pytest.raises(OutOfMemory):
        Arena(1 << 60)


def test_a_kernel_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    arena = Arena(MIB)
    assert arena.carve(MIB) == arena.base
    arena.close()
