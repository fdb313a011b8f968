"""Graphs compute what numpy computes: order of operands, layout of shapes, and meaning of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.engine.kv_cache import _hadamard
from edgert.ggml.graph import ROPE_NEOX, ROPE_NORMAL, Activation, Graph, Rope, Tensor

Compute = Callable[..., NDArray[Any]]
Floats = NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_mul_mat_multiplies_rows_of_both(compute: Compute) -> None:
    weight, x = normal(48, 64), normal(5, 64, seed=1)  # (n_out, n_in), (n_tokens, n_in)
    np.testing.assert_allclose(compute(lambda g, w, x: g.mul_mat(w, x), weight, x), x @ weight.T, atol=1e-4)


def test_mul_mat_repeats_a_matrix_over_groups(compute: Compute) -> None:
    weight, x = normal(2, 8, 16), normal(4, 3, 16, seed=1)
    expected = np.stack([x[i] @ weight[i // 2].T for i in range(4)])
    np.testing.assert_allclose(compute(lambda g, w, x: g.mul_mat(w, x), weight, x), expected, atol=1e-5)


def test_mul_mat_id_takes_the_experts_that_the_ids_name(compute: Compute) -> None:
    experts, x = normal(4, 8, 16), normal(3, 1, 16, seed=1)
    ids = np.array([[3, 0], [1, 1], [2, 3]], np.int32)
    expected = np.einsum("tuoi,ti->tuo", experts[ids], x[:, 0])
    np.testing.assert_allclose(compute(lambda g, w, x, i: g.mul_mat_id(w, x, i), experts, x, ids), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "expected"), [("add", np.add), ("mul", np.multiply), ("div", np.divide)])
def test_elementwise_operations_repeat_the_second_operand(name: str, expected: Callable[..., Floats],
                                                          compute: Compute) -> None:
    a, b = normal(3, 8), normal(8, seed=1) + 3
    np.testing.assert_allclose(compute(lambda g, a, b: getattr(g, name)(a, b), a, b), expected(a, b), rtol=1e-6)


@pytest.mark.parametrize(("build", "expected"), [
    (lambda g, x: g.scale(x, -2.5), lambda x: -2.5 * x),
    (lambda g, x: g.clamp(x, -0.5, 0.25), lambda x: np.clip(x, -0.5, 0.25)),
    (lambda g, x: g.sigmoid(x), lambda x: 1 / (1 + np.exp(-x))),
    (lambda g, x: g.tanh(x), np.tanh),
    (lambda g, x: g.soft_max(x), lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
    (lambda g, x: g.sum_rows(x), lambda x: x.sum(-1, keepdims=True)),
    (lambda g, x: g.contiguous(g.permute(x, 1, 0, 2, 3)), lambda x: x.T),
    (lambda g, x: g.reshape(x, 4, 2, 3), lambda x: x.reshape(3, 2, 4)),
    (lambda g, x: g.contiguous(g.view(x, (2, 3), (32,), 8)), lambda x: x[:, 2:4]),
], ids=["scale", "clamp", "sigmoid", "tanh", "soft_max", "sum_rows", "permute", "reshape", "view"])
def test_operations_on_one_tensor(build: Callable[[Graph, Tensor], Tensor], expected: Callable[[Floats], Floats],
                                  compute: Compute) -> None:
    x = normal(3, 8)
    np.testing.assert_allclose(compute(build, x), expected(x), rtol=1e-5, atol=1e-6)


def test_top_k_gives_the_largest_first(compute: Compute) -> None:
    x = normal(4, 16)
    np.testing.assert_array_equal(compute(lambda g, x: g.contiguous(g.top_k(x, 3)), x), np.argsort(-x, -1)[:, :3])


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_divides_by_the_root_of_the_mean_square(eps: float, compute: Compute) -> None:
    x, weight = normal(3, 64), normal(64, seed=1)
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    np.testing.assert_allclose(compute(lambda g, x: g.rms_norm(x, None, eps), x), normed, rtol=1e-5)
    np.testing.assert_allclose(compute(lambda g, x, w: g.rms_norm(x, w, eps), x, weight), normed * weight, rtol=1e-5)


def silu(x: Floats) -> Floats:
    return np.asarray(x / (1 + np.exp(-x)))


def gelu(x: Floats) -> Floats:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.asarray(np.float32(0.5) * x * (1 + np.tanh(inner)))


def relu(x: Floats) -> Floats:
    return np.maximum(x, 0)


@pytest.mark.parametrize(("activation", "expected"), [("silu", silu), ("gelu", gelu), ("relu", relu)])
def test_gated_activates_the_first_and_multiplies(activation: Activation, expected: Callable[[Floats], Floats],
                                                  compute: Compute) -> None:
    gate, up = normal(3, 64), normal(3, 64, seed=1)
    # ggml looks gelu up in a table of half-precision values
    np.testing.assert_allclose(compute(lambda g, a, b: g.gated(a, b, activation), gate, up), expected(gate) * up,
                               atol=5e-3 if activation == "gelu" else 1e-5)


def test_get_rows_reads_and_set_rows_writes_the_rows_that_are_named(compute: Compute) -> None:
    table, rows = normal(6, 8), normal(2, 8, seed=1)
    read = compute(lambda g, t, i: g.get_rows(t, i), table, np.array([5, 0, 5], np.int32))
    np.testing.assert_array_equal(read, table[[5, 0, 5]])

    expected = table.copy()
    expected[[4, 1]] = rows
    written = compute(lambda g, t, r, i: g.set_rows(t, r, i), table, rows, np.array([4, 1], np.int64))
    np.testing.assert_array_equal(written, expected)


def test_copy_converts_between_floats(compute: Compute) -> None:
    x = normal(3, 8)
    halves = compute(lambda g, x, into: g.copy(x, into), x, np.zeros((3, 8), np.float16))
    np.testing.assert_array_equal(halves, x.astype(np.float16))


def rotated(x: Floats, positions: NDArray[np.int32], rope: Rope, factors: Floats | float = 1.0) -> Floats:
    """RoPE of x (n_tokens, n_heads, head_dim): pairs (2i, 2i+1), or (i, i + n/2) in the NeoX order."""
    n = rope.n_dims
    frequencies = rope.freq_scale * rope.freq_base ** (-np.arange(0, n, 2) / n) / factors
    angle = positions[:, None, None] * frequencies
    cos, sin = np.cos(angle), np.sin(angle)
    pairs = (slice(0, n, 2), slice(1, n, 2)), (slice(0, n // 2), slice(n // 2, n))
    first, second = pairs[rope.mode == ROPE_NEOX]
    result = x.copy()
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., first] * sin + x[..., second] * cos
    return result


@pytest.mark.parametrize("mode", [ROPE_NORMAL, ROPE_NEOX])
@pytest.mark.parametrize("n_dims", [32, 16])
def test_rope_turns_pairs_by_their_position(mode: int, n_dims: int, compute: Compute) -> None:
    x, positions = normal(4, 3, 32), np.array([0, 1, 7, 100], np.int32)
    rope = Rope(n_dims, mode, freq_base=10_000.0, freq_scale=0.5)
    np.testing.assert_allclose(compute(lambda g, x, p: g.rope(x, p, rope), x, positions), rotated(x, positions, rope),
                               atol=2e-4)


def test_rope_divides_frequencies_by_their_factors(compute: Compute) -> None:
    x, positions, factors = normal(4, 3, 32), np.arange(4, dtype=np.int32), np.geomspace(1, 8, 16, dtype=np.float32)
    rope = Rope(32)
    np.testing.assert_allclose(compute(lambda g, x, p, f: g.rope(x, p, rope, f), x, positions, factors),
                               rotated(x, positions, rope, factors), atol=1e-5)


def attended(q: Floats, k: Floats, v: Floats, mask: Floats, scale: float) -> Floats:
    """(n_tokens, n_heads, head_dim) of q (n_tokens, n_heads, head_dim), k and v (n_cells, n_kv_heads, head_dim)."""
    share = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, share, 1), np.repeat(v, share, 1)
    scores = np.einsum("thd,chd->htc", q, k) * scale + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(np.einsum("htc,chd->thd", weights / weights.sum(-1, keepdims=True), v), np.float32)


# 600 cells: beyond 512, one token's cells are shared out between threads. 64 tokens: ggml's tiled path.
@pytest.mark.parametrize(("n_tokens", "n_cells"), [(1, 16), (3, 16), (1, 600), (64, 256)])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_flash_attention_is_a_softmax_over_what_the_mask_shows(n_tokens: int, n_cells: int, n_kv_heads: int,
                                                               compute: Compute) -> None:
    q, k, v = normal(n_tokens, 4, 32), normal(n_cells, n_kv_heads, 32, seed=1), normal(n_cells, n_kv_heads, 32, seed=2)
    k, v = k.astype(np.float16), v.astype(np.float16)
    seen = np.arange(n_cells) <= np.arange(n_cells - n_tokens, n_cells)[:, None] - 2
    mask = np.where(seen, 0, -np.inf).astype(np.float16)
    computed = compute(lambda g, *tensors: g.flash_attention(*tensors, 0.25), q, k, v, mask)
    expected = attended(q, k.astype(np.float32), v.astype(np.float32), mask.astype(np.float32), 0.25)
    np.testing.assert_allclose(computed.reshape(expected.shape), expected, atol=5e-3)  # ggml adds up in half precision


@pytest.mark.parametrize("n", [4, 64])
def test_hadamard_turns_blocks_and_turns_them_back(n: int, compute: Compute) -> None:
    x, rotation = normal(3, 2, 128), _hadamard(n)
    once = compute(lambda g, r, x: g.hadamard(r, x), rotation, x)
    np.testing.assert_allclose(once, (x.reshape(-1, n) @ rotation).reshape(x.shape), atol=1e-5)
    np.testing.assert_allclose(compute(lambda g, r, x: g.hadamard(r, x), rotation, once), x, atol=1e-5)
