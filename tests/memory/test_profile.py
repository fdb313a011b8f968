"""What was measured while others computed is doubted, and improved, for a few starts; then believed."""

from __future__ import annotations

from dataclasses import replace

from shapes import profile

from edgert.memory.profile import DeviceProfile, DiskSpeed, Rehearsal


def test_of_disturbed_measurements_the_best_figures_are_kept() -> None:
    first = DeviceProfile({"2/plain": {1: 3.0, 8: 4.0}, "8/plain": {1: 7.0}}, {64: {1: 2.0}}, 5.0, DiskSpeed(1.0, 0.1))
    again = DeviceProfile({"2/plain": {1: 2.0, 8: 5.0}}, {64: {1: 1.0}, 128: {1: 9.0}}, 4.0, DiskSpeed(3.0, 0.2))
    found = again.disturbed(first.disturbed(None))
    assert found.multiply_s == {"2/plain": {1: 2.0, 8: 4.0}, "8/plain": {1: 7.0}}
    assert found.attend_s == {64: {1: 1.0}, 128: {1: 9.0}}
    assert (found.memory_bytes_s, found.disk, found.n_disturbed) == (5.0, DiskSpeed(3.0, 0.2), 2)


def test_a_device_that_is_never_idle_is_believed_after_a_few_measurements() -> None:
    found, doubts = profile(), []
    for _ in range(4):
        doubts.append(found.is_doubtful)
        found = profile().disturbed(found)
    assert doubts == [False, True, True, False]


def test_of_disturbed_rehearsals_the_quickest_is_kept() -> None:
    slow, quick = Rehearsal(0.2, 0.3, {0: 0.0, 255: 0.1}), Rehearsal(0.1, 0.2, {0: 0.0, 255: 0.05})
    for before, after in ((slow, quick), (quick, slow)):
        first = before.disturbed(None)
        assert first == replace(before, n_disturbed=1) and first.is_doubtful
        assert after.disturbed(first) == replace(quick, n_disturbed=2)
        assert not after.disturbed(after.disturbed(first)).is_doubtful
