"""What travels is what arrives: exactly, or within half a step of the encoding."""

from __future__ import annotations

import numpy as np
import pytest

from tensorpar.wire import WIRES

SIZES = pytest.mark.parametrize("n", [1, 31, 32, 33, 576, 4096])


def through(name: str, values: np.ndarray) -> np.ndarray:
    wire = WIRES[name]
    raw = wire.encode(values)
    assert len(raw) == wire.n_bytes(len(values))
    return wire.decode(raw, len(values))


@SIZES
def test_float32_is_exact(n: int) -> None:
    values = np.random.default_rng(n).standard_normal(n, dtype=np.float32)
    np.testing.assert_array_equal(through("f32", values), values)


@SIZES
def test_shorter_encodings_are_near(n: int) -> None:
    values = np.random.default_rng(n).standard_normal(n, dtype=np.float32)
    assert np.abs(through("f16", values) - values).max() < 2e-3
    assert np.abs(through("q8", values) - values).max() <= np.abs(values).max() / 127 * 0.51
    assert WIRES["q8"].n_bytes(n) == -(-n // 32) * 34


@pytest.mark.parametrize("name", ["f16", "q8"])
def test_what_was_decoded_once_stays(name: str) -> None:
    once = through(name, np.random.default_rng(0).standard_normal(256, dtype=np.float32))
    np.testing.assert_allclose(through(name, once), once, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["f16", "q8"])
def test_values_beyond_float16_and_zeros_stay_finite(name: str) -> None:
    values = np.array([0.0] * 32 + [1e30, -1e30] + [0.0] * 30, np.float32)
    out = through(name, values)
    assert np.isfinite(out).all() and not out[:32].any() and out[32] > 60000 > -60000 > out[33]
