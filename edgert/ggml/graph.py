"""A ggml graph: tensors and the operations on them, each checked here before ggml could abort the process.

ggml answers a wrong shape with GGML_ASSERT, which ends the process; the checks here raise AssertionError instead,
because a file's shapes are validated before (edgert/architectures): what arrives here wrong is our own mistake.
Shapes are in ggml's order: `ne[0]` is the contiguous dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from edgert.ggml.abi import TYPE_F16, TYPE_F32, TYPE_I32, TYPE_I64, InitParams, TensorStruct
from edgert.ggml.checks import (
    CACHE_TYPES,
    FLOATS,
    check,
    check_shape,
    has_whole_rows,
    is_contiguous,
    is_float,
    is_float32,
    is_matrix_for_product,
)
from edgert.ggml.functions import ggml
from edgert.ggml.types import readable_types
from edgert.gguf.types import TENSOR_TYPES

_HINT_HADAMARD = 1
_PREC_F32 = 10
ROPE_NORMAL, ROPE_NEOX = 0, 2
Activation = Literal["silu", "gelu", "relu"]
_GATED = {"silu": "ggml_swiglu_split", "gelu": "ggml_geglu_split", "relu": "ggml_reglu_split"}


class Tensor:
    """A handle on a `struct ggml_tensor`. Valid as long as the context that made it."""

    __slots__ = ("_form", "_ne", "address", "struct")

    def __init__(self, address: int) -> None:
        self.address = address
        self.struct = TensorStruct.from_address(address)
        self._form: tuple[int, bool, int] | None = None
        self._ne: tuple[int, int, int, int] | None = None

    @property
    def form(self) -> tuple[int, bool, int]:
        """Type, whether it is repacked, and ne[1]: what graphs over tensors of one role differ by. Of a tensor that
        was placed: asked once, for reading a C structure costs 0.2 us, and a layer asks ten tensors."""
        if self._form is None:
            self._form = self.type, bool(self.struct.extra), int(self.struct.ne[1])
        return self._form

    @property
    def ne(self) -> tuple[int, int, int, int]:
        if self._ne is None:  # a shape never changes
            self._ne = tuple(self.struct.ne)
        return self._ne

    @property
    def nb(self) -> tuple[int, int, int, int]:
        return tuple(self.struct.nb)

    @property
    def type(self) -> int:
        return int(self.struct.type)

    @property
    def n_bytes(self) -> int:
        return int(ggml().base.ggml_nbytes(self.address))

    @property
    def data(self) -> int:
        return int(self.struct.data or 0)


class Context:
    """A pool of tensor headers. Data never lies here."""

    def __init__(self, n_tensors: int, extra_bytes: int = 0) -> None:
        self._base = ggml().base
        size_bytes = n_tensors * self._base.ggml_tensor_overhead() + extra_bytes
        self._context: int = self._base.ggml_init(InitParams(size_bytes, None, True))
        self._n_free = n_tensors

    def tensor(self, type_id: int, shape: tuple[int, ...], name: str = "") -> Tensor:
        """A new tensor without data. `shape` has one to four dimensions."""
        check_shape(type_id, shape)
        self._take()
        new = getattr(self._base, f"ggml_new_tensor_{len(shape)}d")
        tensor = Tensor(new(self._context, type_id, *shape))
        if name:
            self._base.ggml_set_name(tensor.address, name.encode()[:63])
        return tensor

    def input(self, name: str, type_id: int, shape: tuple[int, ...]) -> Tensor:
        """A tensor that is written before every computation."""
        tensor = self.tensor(type_id, shape, name)
        self._base.ggml_set_input(tensor.address)
        return tensor

    def _take(self) -> None:
        # A full pool is a GGML_ASSERT.
        self._n_free -= 1
        if self._n_free < 0:
            raise AssertionError("the context is full of tensors")

    def close(self) -> None:
        if self._context:
            self._base.ggml_free(self._context)
            self._context = 0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding as `ggml_rope_ext` takes it (YaRN: arXiv 2309.00071)."""

    n_dims: int
    mode: int = ROPE_NORMAL
    original_context: int = 0
    freq_base: float = 10000.0
    freq_scale: float = 1.0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class Graph(Context):
    """A graph under construction or ready to compute. At most `n_nodes` tensors."""

    def __init__(self, n_nodes: int) -> None:
        overhead = ggml().base.ggml_graph_overhead_custom(n_nodes, False)
        super().__init__(n_nodes, overhead)
        self.handle: int = self._base.ggml_new_graph_custom(self._context, n_nodes, False)
        self._views: dict[int, list[TensorStruct]] = {}

    # -- making and keeping -----------------------------------------------------------------------------------
    def placeholder(self, like: Tensor) -> Tensor:
        """A tensor that stands for `like` and others of its type and shape: `rebind` says which, before computing."""
        n_dims = max(d for d in range(1, 5) if d == 1 or like.ne[d - 1] > 1)
        tensor = self.tensor(like.type, like.ne[:n_dims])
        tensor.struct.nb = like.struct.nb
        self._views[tensor.address] = []
        self.rebind(tensor, like)
        return tensor

    def rebind(self, placeholder: Tensor, source: Tensor) -> None:
        """Let `placeholder`, and every view of it in this graph, mean the memory of `source`."""
        stand_in, real = placeholder.struct, source.struct
        stand_in.data, stand_in.buffer, stand_in.extra = real.data, real.buffer, real.extra
        for view in self._views[placeholder.address]:
            view.data, view.buffer = real.data + view.view_offs, real.buffer

    def output(self, tensor: Tensor) -> Tensor:
        """Compute this tensor, and keep its memory until the graph has ended."""
        self._base.ggml_set_output(tensor.address)
        return self.expand(tensor)

    def expand(self, tensor: Tensor) -> Tensor:
        """Append the tensor and what it needs to the order of computation."""
        self._base.ggml_build_forward_expand(self.handle, tensor.address)
        return tensor

    # -- arithmetic -------------------------------------------------------------------------------------------
    def _op(self, name: str, *arguments: object) -> Tensor:
        self._take()
        raw = [a.address if isinstance(a, Tensor) else a for a in arguments]
        result = Tensor(getattr(self._base, name)(self._context, *raw))
        views = self._views.get(result.struct.view_src or 0)
        if views is not None:
            views.append(result.struct)
        return result

    def _elementwise(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        check(all(x % y == 0 for x, y in zip(a.ne, b.ne, strict=True)) and is_float(a) and b.type in (a.type, TYPE_F32),
              name, a, b)
        return self._op(name, a, b)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._elementwise("ggml_add", a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._elementwise("ggml_mul", a, b)

    def mul_in_place(self, a: Tensor, b: Tensor) -> Tensor:
        """The products take the place of a, which nothing may read afterwards."""
        return self._elementwise("ggml_mul_inplace", a, b)

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        return self._elementwise("ggml_div", a, b)

    def scale(self, a: Tensor, factor: float) -> Tensor:
        check(is_float32(a) and is_contiguous(a), "scale", a)
        return self._op("ggml_scale", a, factor)

    def clamp(self, a: Tensor, low: float, high: float) -> Tensor:
        check(is_float(a), "clamp", a)
        return self._op("ggml_clamp", a, low, high)

    def sigmoid(self, a: Tensor) -> Tensor:
        check(is_float(a), "sigmoid", a)
        return self._op("ggml_sigmoid", a)

    def tanh(self, a: Tensor) -> Tensor:
        check(is_float(a), "tanh", a)
        return self._op("ggml_tanh", a)

    def soft_max(self, a: Tensor) -> Tensor:
        check(is_float32(a) and is_contiguous(a), "soft_max", a)
        return self._op("ggml_soft_max", a)

    def masked_soft_max(self, a: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Softmax of scale * a + mask over each row of a (n, n_rows, ...), with an f16 mask (n, n_rows)."""
        check(is_float32(a) and is_contiguous(a) and mask.type == TYPE_F16 and is_contiguous(mask)
              and mask.ne[0] == a.ne[0] and mask.ne[1] >= a.ne[1] and mask.ne[2] == mask.ne[3] == 1,
              "masked_soft_max", a, mask)
        return self._op("ggml_soft_max_ext", a, mask, scale, 0.0)

    def sum_rows(self, a: Tensor) -> Tensor:
        check(is_float32(a), "sum_rows", a)
        return self._op("ggml_sum_rows", a)

    def top_k(self, a: Tensor, k: int) -> Tensor:
        """Indices of the k largest of each row, in descending order. (k, ...) int32, a view of an argsort."""
        check(0 < k <= a.ne[0] and is_float32(a), f"top_k of {k}", a)
        self._take()  # the argsort and its view
        return self._op("ggml_argsort_top_k", a, k)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        check(is_float32(x) and eps >= 0, f"rms_norm with {eps}", x)
        normed = self._op("ggml_rms_norm", x, eps)
        return self.mul(normed, weight) if weight is not None else normed

    def mul_mat(self, weight: Tensor, x: Tensor) -> Tensor:
        """(n_out, n_tokens) float32 of weight (n_in, n_out) and x (n_in, n_tokens)."""
        w, b = weight.ne, x.ne
        check(w[0] == b[0] and b[2] % w[2] == 0 and b[3] % w[3] == 0 and is_matrix_for_product(weight)
              and is_float32(x), "mul_mat", weight, x)
        return self._op("ggml_mul_mat", weight, x)

    def mul_mat_id(self, experts: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        """(n_out, n_used, n_tokens) of experts (n_in, n_out, n_experts), x (n_in, 1 | n_used, n_tokens), ids (n_used,
        n_tokens) int32. The ids' values must lie below n_experts: ggml does not bound them."""
        e, b, i = experts.ne, x.ne, ids.ne
        check(e[0] == b[0] and e[3] == b[3] == i[2] == i[3] == 1 and i[1] == b[2] and i[0] % b[1] == 0
              and ids.type == TYPE_I32 and has_whole_rows(ids) and is_matrix_for_product(experts) and is_float32(x),
              "mul_mat_id", experts, x, ids)
        return self._op("ggml_mul_mat_id", experts, x, ids)

    def gated(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up, in one operation."""
        check(gate.ne == up.ne and gate.type == up.type and all(t.type in FLOATS and is_contiguous(t)
              for t in (gate, up)), "gated", gate, up)
        return self._op(_GATED[activation], gate, up)

    def hadamard(self, rotation: Tensor, x: Tensor) -> Tensor:
        """Rotate blocks of rotation.ne[0] values by an orthonormal Hadamard matrix; the shape stays. It spreads
        outliers before a cache of 8-bit values rounds them."""
        n, shape = rotation.ne[0], x.ne
        check(rotation.ne[:2] == (n, n) and n & (n - 1) == 0 and shape[0] % n == 0, "hadamard", rotation, x)
        n_elements = shape[0] * shape[1] * shape[2]
        rows = self.reshape(x, n, n_elements // n)
        rotated = self.mul_mat(rotation, rows)
        self._base.ggml_mul_mat_set_hint(rotated.address, _HINT_HADAMARD)
        return self.reshape(rotated, *shape[:3])

    def custom(self, name: str, *arguments: object) -> Tensor:
        """An operation that only measurements need: its C function is declared, and its arguments checked, by whoever
        calls it."""
        return self._op(name, *arguments)

    # -- rows and shapes --------------------------------------------------------------------------------------
    def get_rows(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of `table` by number, as float32. The numbers must lie below table.ne[1]."""
        check(ids.type == TYPE_I32 and table.ne[2] == ids.ne[1] and table.ne[3] == ids.ne[2] and ids.ne[3] == 1
              and table.type in readable_types() and has_whole_rows(table) and has_whole_rows(ids),
              "get_rows", table, ids)
        return self._op("ggml_get_rows", table, ids)

    def set_rows(self, table: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """Write `rows` (n, n_rows) float32 into `table` at row numbers `ids` (n_rows,) int64; gives `table`."""
        check(table.ne[0] == rows.ne[0] and table.ne[2:] == rows.ne[2:] and ids.ne == (rows.ne[1], 1, 1, 1)
              and ids.type == TYPE_I64 and is_float32(rows) and table.type in CACHE_TYPES and has_whole_rows(table),
              "set_rows", table, rows, ids)
        return self._op("ggml_set_rows", table, rows, ids)

    def reshape(self, a: Tensor, *shape: int) -> Tensor:
        n_old = a.ne[0] * a.ne[1] * a.ne[2] * a.ne[3]
        n_new = 1
        for n in shape:
            n_new *= n
        check(n_old == n_new and min(shape) > 0 and len(shape) in (2, 3) and is_contiguous(a), f"reshape to {shape}", a)
        return self._op(f"ggml_reshape_{len(shape)}d", a, *shape)

    def view(self, a: Tensor, shape: tuple[int, ...], strides_bytes: tuple[int, ...], offset_bytes: int = 0) -> Tensor:
        """A window on `a`: `strides_bytes` for every dimension but the first."""
        check_shape(a.type, shape)
        row_bytes = TENSOR_TYPES[a.type].row_bytes(shape[0])
        extent = row_bytes + sum((n - 1) * stride for n, stride in zip(shape[1:], strides_bytes, strict=True))
        # ggml itself bounds what the view would take without its strides.
        extent = max(extent, row_bytes * prod(shape[1:]))
        check(len(shape) < 4 and min((offset_bytes, *strides_bytes)) >= 0 and offset_bytes + extent <= a.n_bytes,
              f"view {shape} at {offset_bytes}", a)
        return self._op(f"ggml_view_{len(shape)}d", a, *shape, *strides_bytes, offset_bytes)

    def copy(self, source: Tensor, target: Tensor) -> Tensor:
        """Write `source` into the memory of `target`, which has the same shape."""
        as_it_is = source.type == target.type == TYPE_I32 and has_whole_rows(source) and has_whole_rows(target)
        check(source.ne == target.ne and (as_it_is or (is_float(source) and is_float(target))), "copy", source, target)
        return self._op("ggml_cpy", source, target)

    def permute(self, a: Tensor, *axes: int) -> Tensor:
        check(sorted(axes) == [0, 1, 2, 3], f"permute to {axes}", a)
        return self._op("ggml_permute", a, *axes)

    def contiguous(self, a: Tensor) -> Tensor:
        check(TENSOR_TYPES[a.type].block_size == 1 or is_contiguous(a), "contiguous", a)
        return self._op("ggml_cont", a)

    # -- attention --------------------------------------------------------------------------------------------
    def rope(self, x: Tensor, positions: Tensor, rope: Rope, factors: Tensor | None = None) -> Tensor:
        """Rotate x (head_dim, n_heads, n_tokens) by its positions (n_tokens,) int32."""
        check(positions.type == TYPE_I32 and positions.ne == (x.ne[2], 1, 1, 1) and 0 < rope.n_dims <= x.ne[0]
              and rope.n_dims % 2 == 0 and rope.mode in (ROPE_NORMAL, ROPE_NEOX) and is_float(x), "rope", x, positions)
        if factors is not None:
            check(is_float32(factors) and factors.ne[0] >= rope.n_dims // 2, "rope's factors", factors)
        return self._op("ggml_rope_ext", x, positions, factors, rope.n_dims, rope.mode, rope.original_context,
                        rope.freq_base, rope.freq_scale, rope.ext_factor, rope.attn_factor, rope.beta_fast,
                        rope.beta_slow)

    def flash_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """(head_dim, n_heads, n_tokens) of q, k, v (head_dim, n_heads | n_kv_heads, n_tokens | n_kv) and an f16 mask
        (n_kv, n_tokens) that holds 0 or -inf."""
        q, k, v = (self.permute(t, 0, 2, 1, 3) for t in (q, k, v))
        check(q.ne[0] == k.ne[0] and k.ne == v.ne and q.ne[2] % k.ne[2] == 0 and q.ne[3] == k.ne[3]
              and is_float32(q) and all(t.type in CACHE_TYPES and has_whole_rows(t) for t in (k, v))
              and mask.type == TYPE_F16 and mask.ne[0] == k.ne[1] and mask.ne[1] >= q.ne[1]
              and mask.ne[2] == mask.ne[3] == 1 and is_contiguous(mask),
              "flash_attention", q, k, v, mask)
        result = self._op("ggml_flash_attn_ext", q, k, v, mask, scale, 0.0, 0.0)
        self._base.ggml_prec_set_acc(result.address, _PREC_F32)
        return result
