"""What ggml would end the process over is an AssertionError here: shapes, types, strides, and a full pool.

Every case was seen to abort (or to read beyond a tensor) without the check that it tests.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgert.ggml.abi import TYPE_F16, TYPE_F32, TYPE_I32, TYPE_I64, TYPE_Q8_0
from edgert.ggml.graph import Context, Graph, Rope, Tensor

F32, F16, Q8, I32, I64 = TYPE_F32, TYPE_F16, TYPE_Q8_0, TYPE_I32, TYPE_I64
Q4_K, IQ2_XXS, REMOVED_TYPE = 12, 16, 4
_POSITIONS, _HEADS = (3,), (8, 2, 3)


def f32(g: Graph, *shape: int) -> Tensor:
    return g.tensor(F32, shape)


def f16(g: Graph, *shape: int) -> Tensor:
    return g.tensor(F16, shape)


def i32(g: Graph, *shape: int) -> Tensor:
    return g.tensor(I32, shape)


def i64(g: Graph, *shape: int) -> Tensor:
    return g.tensor(I64, shape)


def q8(g: Graph, *shape: int) -> Tensor:
    return g.tensor(Q8, shape)


def turned(g: Graph, tensor: Tensor) -> Tensor:
    """The tensor with its first two dimensions exchanged: strides that few operations take."""
    return g.permute(tensor, 1, 0, 2, 3)


def attention(g: Graph, *, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None,
              mask: Tensor | None = None) -> Tensor:
    """Sound operands (head_dim 8, 2 heads, 3 tokens, 16 cells) but for those that are given."""
    return g.flash_attention(q or f32(g, 8, 2, 3), k or f16(g, 8, 2, 16), v or f16(g, 8, 2, 16),
                             mask or f16(g, 16, 3), 1.0)


_WRONG: dict[str, Callable[[Graph], object]] = {
    # tensors
    "tensor without dimensions": lambda g: g.tensor(F32, ()),
    "tensor of five dimensions": lambda g: g.tensor(F32, (1, 1, 1, 1, 1)),
    "tensor of a type that ggml removed": lambda g: g.tensor(REMOVED_TYPE, (32,)),
    "tensor of a type that does not exist": lambda g: g.tensor(99, (32,)),
    "tensor of a negative type": lambda g: g.tensor(-1, (32,)),
    "tensor of half a block": lambda g: q8(g, 16),
    "tensor with a dimension of 0": lambda g: f32(g, 0, 4),
    "tensor with a negative dimension": lambda g: f32(g, -4, 4),
    "tensor beyond 64 bits": lambda g: f32(g, 2**40, 2**40),
    "tensor with a dimension that C would wrap": lambda g: f32(g, 2**64 + 4),
    # element by element
    "add of shapes that do not repeat": lambda g: g.add(f32(g, 4, 4), f32(g, 3, 4)),
    "add of whole numbers": lambda g: g.add(i32(g, 4), i32(g, 4)),
    "add of whole numbers to floats": lambda g: g.add(f32(g, 4), i32(g, 4)),
    "add of floats to halves turned": lambda g: g.add(turned(g, f32(g, 4, 4)), f32(g, 4, 4)),
    "mul of quantised values": lambda g: g.mul(q8(g, 32, 4), f32(g, 32, 4)),
    "div of shapes that do not repeat": lambda g: g.div(f32(g, 4, 4), f32(g, 8, 4)),
    "scale of whole numbers": lambda g: g.scale(i32(g, 4), 2.0),
    "scale of a turned tensor": lambda g: g.scale(turned(g, f32(g, 4, 4)), 2.0),
    "clamp of whole numbers": lambda g: g.clamp(i32(g, 4), 0.0, 1.0),
    "clamp of a turned tensor": lambda g: g.clamp(turned(g, f32(g, 4, 4)), 0.0, 1.0),
    "sigmoid of whole numbers": lambda g: g.sigmoid(i32(g, 4)),
    "sigmoid of a turned tensor": lambda g: g.sigmoid(turned(g, f32(g, 4, 4))),
    "tanh of a turned tensor": lambda g: g.tanh(turned(g, f32(g, 4, 4))),
    "gated of two shapes": lambda g: g.gated(f32(g, 4, 4), f32(g, 4, 3), "silu"),
    "gated of two types": lambda g: g.gated(f32(g, 4, 4), f16(g, 4, 4), "silu"),
    "gated of whole numbers": lambda g: g.gated(i32(g, 4, 4), i32(g, 4, 4), "gelu"),
    "gated of a turned tensor": lambda g: g.gated(turned(g, f32(g, 4, 4)), f32(g, 4, 4), "relu"),
    # by rows
    "soft_max of halves": lambda g: g.soft_max(f16(g, 4, 4)),
    "soft_max of a turned tensor": lambda g: g.soft_max(turned(g, f32(g, 4, 4))),
    "sum_rows of whole numbers": lambda g: g.sum_rows(i32(g, 4, 4)),
    "sum_rows of a turned tensor": lambda g: g.sum_rows(turned(g, f32(g, 4, 4))),
    "top_k of none": lambda g: g.top_k(f32(g, 4, 4), 0),
    "top_k of more than there are": lambda g: g.top_k(f32(g, 4, 4), 5),
    "top_k of halves": lambda g: g.top_k(f16(g, 4, 4), 2),
    "rms_norm of halves": lambda g: g.rms_norm(f16(g, 4, 4), None, 1e-5),
    "rms_norm of a turned tensor": lambda g: g.rms_norm(turned(g, f32(g, 4, 4)), None, 1e-5),
    "rms_norm with a negative epsilon": lambda g: g.rms_norm(f32(g, 4, 4), None, -1e-5),
    "rms_norm with weights of another width": lambda g: g.rms_norm(f32(g, 4, 4), f32(g, 3), 1e-5),
    # products
    "mul_mat of other widths": lambda g: g.mul_mat(f32(g, 4, 4), f32(g, 3, 4)),
    "mul_mat of more matrices than inputs": lambda g: g.mul_mat(f32(g, 4, 4, 2), f32(g, 4, 4, 3)),
    "mul_mat by a turned matrix": lambda g: g.mul_mat(turned(g, f32(g, 4, 4)), f32(g, 4, 4)),
    "mul_mat of turned inputs": lambda g: g.mul_mat(f32(g, 4, 4), turned(g, f32(g, 4, 4))),
    "mul_mat by whole numbers": lambda g: g.mul_mat(i32(g, 4, 4), f32(g, 4, 4)),
    "mul_mat of whole numbers": lambda g: g.mul_mat(f32(g, 4, 4), i32(g, 4, 4)),
    "mul_mat_id of other widths": lambda g: g.mul_mat_id(f32(g, 4, 4, 2), f32(g, 3, 1, 2), i32(g, 1, 2)),
    "mul_mat_id with ids for other tokens": lambda g: g.mul_mat_id(f32(g, 4, 4, 2), f32(g, 4, 1, 2), i32(g, 1, 3)),
    "mul_mat_id with inputs for other ids": lambda g: g.mul_mat_id(f32(g, 4, 4, 2), f32(g, 4, 2, 2), i32(g, 3, 2)),
    "mul_mat_id with float ids": lambda g: g.mul_mat_id(f32(g, 4, 4, 2), f32(g, 4, 1, 2), f32(g, 1, 2)),
    "mul_mat_id with stacked ids": lambda g: g.mul_mat_id(f32(g, 4, 4, 2), f32(g, 4, 1, 2), i32(g, 1, 2, 3)),
    "mul_mat_id of halves": lambda g: g.mul_mat_id(f32(g, 4, 4, 2), f16(g, 4, 1, 2), i32(g, 1, 2)),
    "hadamard of an oblong rotation": lambda g: g.hadamard(f32(g, 4, 2), f32(g, 8, 4)),
    "hadamard of a size that is no power of two": lambda g: g.hadamard(f32(g, 3, 3), f32(g, 6, 4)),
    "hadamard across rows": lambda g: g.hadamard(f32(g, 4, 4), f32(g, 6, 4)),
    "hadamard of a turned tensor": lambda g: g.hadamard(f32(g, 4, 4), turned(g, f32(g, 4, 4))),
    # rows
    "get_rows by float ids": lambda g: g.get_rows(f32(g, 4, 4), f32(g, 2)),
    "get_rows of other stacks": lambda g: g.get_rows(f32(g, 4, 4, 3), i32(g, 2, 2)),
    "get_rows of a fourth dimension": lambda g: g.get_rows(f32(g, 4, 4, 1, 2), i32(g, 2)),
    "get_rows by ids of four dimensions": lambda g: g.get_rows(f32(g, 4, 4), i32(g, 2, 1, 1, 2)),
    "get_rows of whole numbers": lambda g: g.get_rows(i64(g, 4, 4), i32(g, 2)),
    "set_rows of another width": lambda g: g.set_rows(f32(g, 4, 4), f32(g, 3, 2), i64(g, 2)),
    "set_rows by 32-bit ids": lambda g: g.set_rows(f32(g, 4, 4), f32(g, 4, 2), i32(g, 2)),
    "set_rows by more ids than rows": lambda g: g.set_rows(f32(g, 4, 4), f32(g, 4, 2), i64(g, 3)),
    "set_rows by ids of two dimensions": lambda g: g.set_rows(f32(g, 4, 4), f32(g, 4, 2), i64(g, 2, 3)),
    "set_rows of halves": lambda g: g.set_rows(f32(g, 4, 4), f16(g, 4, 2), i64(g, 2)),
    "set_rows of a stack into a matrix": lambda g: g.set_rows(f32(g, 4, 4), f32(g, 4, 2, 3), i64(g, 2)),
    "set_rows of a matrix into a stack": lambda g: g.set_rows(f32(g, 4, 4, 3), f32(g, 4, 2), i64(g, 2)),
    "set_rows of a turned tensor": lambda g: g.set_rows(f32(g, 4, 4), turned(g, f32(g, 4, 4)), i64(g, 4)),
    "set_rows into a type that is only read": lambda g: g.set_rows(g.tensor(IQ2_XXS, (256, 4)), f32(g, 256, 2),
                                                                  i64(g, 2)),
    # shapes
    "reshape to more elements": lambda g: g.reshape(f32(g, 4, 4), 4, 5),
    "reshape to negative dimensions": lambda g: g.reshape(f32(g, 4, 4), -4, -4),
    "reshape to one dimension": lambda g: g.reshape(f32(g, 4, 4), 16),
    "reshape to four dimensions": lambda g: g.reshape(f32(g, 4, 4), 2, 2, 2, 2),
    "reshape of a turned tensor": lambda g: g.reshape(turned(g, f32(g, 4, 4)), 16, 1),
    "view beyond the extent": lambda g: g.view(f32(g, 4, 4), (4, 2), (16,), 48),
    "view with strides beyond the extent": lambda g: g.view(f32(g, 4, 4), (4, 2), (64,)),
    "view of rows on top of each other": lambda g: g.view(f32(g, 4, 4), (4, 8), (4,)),
    "view at a negative offset": lambda g: g.view(f32(g, 4, 4), (4, 2), (16,), -16),
    "view with a negative stride": lambda g: g.view(f32(g, 4, 4), (4, 2), (-16,), 16),
    "view of half a block": lambda g: g.view(q8(g, 64, 4), (16, 2), (68,)),
    "view of nothing": lambda g: g.view(f32(g, 4, 4), (0, 2), (16,)),
    "view of four dimensions": lambda g: g.view(f32(g, 2, 2, 2, 2), (2, 2, 2, 2), (8, 16, 32)),
    "copy to another shape": lambda g: g.copy(f32(g, 4, 4), f32(g, 2, 8)),
    "copy of quantised values to others": lambda g: g.copy(g.tensor(Q4_K, (256, 4)), f16(g, 256, 4)),
    "copy of halves to whole numbers": lambda g: g.copy(f16(g, 4, 4), i64(g, 4, 4)),
    "permute to one axis twice": lambda g: g.permute(f32(g, 4, 4), 1, 1, 2, 3),
    "permute to an axis that is not there": lambda g: g.permute(f32(g, 4, 4), 1, 0, 2, 4),
    "permute of two axes": lambda g: g.permute(f32(g, 4, 4), 1, 0),
    "contiguous of turned quantised blocks": lambda g: g.contiguous(turned(g, q8(g, 32, 4))),
    # attention
    "rope with positions for other tokens": lambda g: g.rope(f32(g, *_HEADS), i32(g, 4), Rope(8)),
    "rope with positions of two dimensions": lambda g: g.rope(f32(g, *_HEADS), i32(g, 3, 2), Rope(8)),
    "rope with float positions": lambda g: g.rope(f32(g, *_HEADS), f32(g, 3), Rope(8)),
    "rope of more dimensions than a head has": lambda g: g.rope(f32(g, *_HEADS), i32(g, 3), Rope(10)),
    "rope of an odd number of dimensions": lambda g: g.rope(f32(g, *_HEADS), i32(g, 3), Rope(7)),
    "rope of negative dimensions": lambda g: g.rope(f32(g, *_HEADS), i32(g, 3), Rope(-2)),
    "rope in an unknown mode": lambda g: g.rope(f32(g, *_HEADS), i32(g, 3), Rope(8, 1)),
    "rope in a mode for images": lambda g: g.rope(f32(g, *_HEADS), i32(g, 3), Rope(8, 24)),
    "rope with too few factors": lambda g: g.rope(f32(g, *_HEADS), i32(g, 3), Rope(8), f32(g, 3)),
    "rope with halves for factors": lambda g: g.rope(f32(g, *_HEADS), i32(g, 3), Rope(8), f16(g, 4)),
    "rope of quantised values": lambda g: g.rope(q8(g, 32, 2, 3), i32(g, 3), Rope(8)),
    "rope of a turned tensor": lambda g: g.rope(turned(g, f32(g, 8, 8, 3)), i32(g, 3), Rope(8)),
    "attention with keys of another width": lambda g: attention(g, k=f16(g, 4, 2, 16)),
    "attention with values of another width": lambda g: attention(g, v=f16(g, 4, 2, 16)),
    "attention with fewer values than keys": lambda g: attention(g, v=f16(g, 8, 2, 8)),
    "attention with heads that do not share": lambda g: attention(g, q=f32(g, 8, 3, 3)),
    "attention with half-precision queries": lambda g: attention(g, q=f16(g, 8, 2, 3)),
    "attention with whole numbers for keys": lambda g: attention(g, k=i32(g, 8, 2, 16)),
    "attention with whole numbers for values": lambda g: attention(g, v=i32(g, 8, 2, 16)),
    "attention with a mask for other cells": lambda g: attention(g, mask=f16(g, 8, 3)),
    "attention with a mask for fewer tokens": lambda g: attention(g, mask=f16(g, 16, 2)),
    "attention with a float mask": lambda g: attention(g, mask=f32(g, 16, 3)),
    "attention with stacked masks": lambda g: attention(g, mask=f16(g, 16, 3, 3)),
    "attention with a turned mask": lambda g: attention(g, mask=turned(g, f16(g, 3, 16))),
    "attention with transposed keys": lambda g: attention(g, k=g.permute(f16(g, 16, 2, 8), 2, 1, 0, 3)),
    "attention over several sequences": lambda g: attention(g, q=f32(g, 8, 2, 3, 2)),
}


@pytest.mark.parametrize("wrong", _WRONG.values(), ids=_WRONG.keys())
def test_what_would_abort_raises(wrong: Callable[[Graph], object]) -> None:
    graph = Graph(64)
    with pytest.raises(AssertionError):
        wrong(graph)
    graph.close()


def test_sound_operands_pass() -> None:
    graph = Graph(64)
    assert attention(graph).ne == (8, 2, 3, 1)
    assert graph.rope(f32(graph, *_HEADS), i32(graph, *_POSITIONS), Rope(8), f32(graph, 4)).ne == (8, 2, 3, 1)
    graph.close()


def test_a_full_context_raises() -> None:
    context = Context(2)
    context.tensor(F32, (4,))
    context.tensor(F32, (4,))
    with pytest.raises(AssertionError, match="full"):
        context.tensor(F32, (4,))
    context.close()


@pytest.mark.parametrize("operation", [
    lambda g, x: g.add(x, x), lambda g, x: g.top_k(x, 2), lambda g, x: g.view(x, (2,), ()),
    lambda g, x: g.placeholder(x), lambda g, x: g.input("x", F32, (4,)),
], ids=["operation", "operation of two tensors", "view", "placeholder", "input"])
def test_a_full_graph_raises(operation: Callable[[Graph, Tensor], object]) -> None:
    graph = Graph(8)
    x = f32(graph, 4, 1)
    with pytest.raises(AssertionError, match="full"):
        for _ in range(8):
            operation(graph, x)
    graph.close()


def test_an_overlong_name_is_cut() -> None:
    context = Context(1)
    tensor = context.tensor(F32, (4,), "é" * 100)
    assert len(tensor.struct.name) == 63
    context.close()
