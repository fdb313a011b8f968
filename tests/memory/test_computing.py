"""How long computing takes, term by term, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from shapes import KEY, MIB, profile, shape

from edgert.memory.model import predict
from edgert.memory.profile import Rehearsal
from edgert.memory.sizes import Sizes

STREAMED = Sizes("streamed", 401 * MIB, 94 * MIB)


def test_what_was_rehearsed_takes_the_place_of_parts() -> None:
    rehearsal = Rehearsal(0.12, 0.15, {0: 0.0, 255: 0.02, 1023: 0.05})
    device = replace(profile(), rehearsals={KEY: rehearsal})
    for sizes, pass_s in ((STREAMED, 0.15), (Sizes("resident"), 0.12)):
        for n_cached, attend_s in ((0, 0), (255, 0.02), (639, 0.035), (1023, 0.05), (1791, 0.08)):
            found = predict(shape(), device, sizes, 1, n_cached)
            assert found.attend_s == pytest.approx(attend_s)
            assert found.multiply_s + found.overhead_s == pytest.approx(pass_s)
    repacked = predict(shape(), device, Sizes("resident", repacked={"decode": frozenset({2})}), 1)
    assert repacked.total_s == pytest.approx(0.12 - 900 * MIB * 1e-10 / 2)  # faster by what its products gain


def test_products_attention_and_overhead() -> None:
    found = predict(shape(), profile(), STREAMED, 1, 1000)
    assert found.multiply_s == pytest.approx(960 * MIB * 1e-10)
    assert found.attend_s == pytest.approx(2 * 16 * 32 * 64 * 1001 * 1.5e-10)
    assert found.overhead_s == pytest.approx(16 * 24 * 4e-6 + 33 * 6e-5)
    resident = predict(shape(), profile(), Sizes("resident", repacked={"decode": frozenset({2})}), 1, 1000)
    assert resident.multiply_s == pytest.approx((900 / 2 + 60) * MIB * 1e-10)
    assert resident.overhead_s == pytest.approx(16 * 24 * 4e-6)


def test_layers_with_a_window_see_no_more_than_it() -> None:
    windowed = shape(window=100, n_window_layers=12)
    found = predict(windowed, profile(), STREAMED, 1, 999)
    assert found.attend_s == pytest.approx(2 * 32 * 64 * (4 * 1000 + 12 * 100) * 1.5e-10)


def test_a_prompt_passes_in_batches() -> None:
    found = predict(shape(), profile(), STREAMED, 300, batch_size=128)
    whole, rest = 900 * MIB * 4e-9, 900 * MIB * (3e-10 + (4e-9 - 3e-10) * (44 - 8) / 120)
    products = 2 * whole + rest + 60 * MIB * 1e-10
    assert found.multiply_s == pytest.approx(1.02 * products)  # in parts of 256, as measured
    small, resident = (predict(shape(), profile(), sizes, 300, batch_size=128).multiply_s
                       for sizes in (replace(STREAMED, part_tokens=128), Sizes("resident")))
    assert (small, resident) == (pytest.approx(1.09 * products), pytest.approx(products))


def test_each_value_of_a_prompt_takes_its_time() -> None:
    none, some, threads = (predict(shape(hidden_size=size), replace(profile(), n_threads=n), STREAMED, 300)
                           for size, n in ((0, 1), (2048, 1), (2048, 2)))
    assert some.overhead_s - none.overhead_s == pytest.approx(299 * 16 * 2048 * 25e-9)
    assert some.overhead_s - none.overhead_s == pytest.approx(2 * (threads.overhead_s - none.overhead_s))
