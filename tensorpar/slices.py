"""Which bytes of a model file a shard consists of: rows of some matrices, column blocks of others, all of the rest.

A slice is itself a model: fewer heads, a thinner FFN and, where it does not lead, a vocabulary of one token or of
those whose rows of the output head it has: they are its embedding table, to which its head is tied. So everything
that opens, checks, repacks and streams a model does so with a slice. Reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from edgert.architectures.base import HEAD_ROWS_KEY, Hyperparameters
from edgert.gguf.model_file import ModelFile
from edgert.gguf.reader import TensorInfo
from edgert.gguf.values import ArrayRef, Value
from tensorpar.shares import Range, Shard, length

WHOLE_HEADS_KEY = "edgert.shard.whole_head_count"
_ROWS, _COLUMNS = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"), ("attn_output", "ffn_down")


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A part of one tensor, seen as `n_matrices` of `n_rows` rows of `row_bytes` bytes: the rows in `rows`, and of
    each the bytes in `columns`. `shape` is what comes out, in ggml's order."""

    info: TensorInfo
    shape: tuple[int, ...]
    n_matrices: int
    n_rows: int
    row_bytes: int
    rows: tuple[Range, ...]
    columns: tuple[Range, ...]

    @property
    def n_bytes(self) -> int:
        return self.n_matrices * length(self.rows) * length(self.columns)


def tensor_slices(model: ModelFile, hp: Hyperparameters, shard: Shard) -> Iterator[TensorSlice]:
    """The tensors of a slice, in the file's order."""
    for info in model.tensors.values():
        one = _slice(model, hp, shard, info)
        if one is not None:
            yield one
    yield from _head_slices(model, hp, shard)


def _head_slices(model: ModelFile, hp: Hyperparameters, shard: Shard) -> Iterator[TensorSlice]:
    """The embedding table and the output head, which may be the same."""
    table, bias = model.tensors["token_embd.weight"], model.tensors.get("output.bias")
    head = model.tensors.get("output.weight", table)
    if shard.leads:
        yield _rows(table, ((0, hp.vocab_size),))
        if head is not table or length(shard.head_rows) < hp.vocab_size:
            yield _rows(replace(head, name="output.weight"), shard.head_rows)
    else:
        yield _rows(replace(head, name=table.name), shard.head_rows or ((0, 1),))
    if bias is not None and shard.head_rows:
        yield _rows(bias, shard.head_rows)


def _slice(model: ModelFile, hp: Hyperparameters, shard: Shard, info: TensorInfo) -> TensorSlice | None:
    name, _, suffix = info.name.split(".", 2)[-1].partition(".")
    stem = name.removesuffix("_exps")
    heads, kv_heads = (_scaled(r, hp.head_dim) for r in (shard.heads, shard.kv_heads))
    if info.name in ("token_embd.weight", "output.weight", "output.bias"):
        return None
    if not shard.leads and stem in _COLUMNS and suffix == "bias":
        return None  # what is added once is the leader's alone
    if info.name.startswith("blk.") and stem in _ROWS and name != "ffn_gate_inp":
        of_heads = {"attn_q": heads, "attn_k": kv_heads, "attn_v": kv_heads}
        ranges = of_heads.get(stem, shard.ffn)
        return _rows(info, _own_first(ranges, info) if _normed_as_one(model, hp, info.name, stem) else ranges)
    if stem in _COLUMNS and suffix == "weight":
        return _columns(info, heads if stem == "attn_output" else shard.ffn)
    if stem in ("attn_q_norm", "attn_k_norm") and info.shape[0] != hp.head_dim:
        return _rows(info, _own_first(heads if stem == "attn_q_norm" else kv_heads, info))
    return _rows(info, ((0, _n_rows(info)),))


def _normed_as_one(model: ModelFile, hp: Hyperparameters, name: str, stem: str) -> bool:
    """Whether a norm spans all heads of this projection (OLMoE): then every rank computes all, its own first."""
    norm = model.tensors.get(f"{name.rsplit('.', 2)[0]}.{stem}_norm.weight")
    return norm is not None and norm.shape[0] != hp.head_dim


def _own_first(ranges: tuple[Range, ...], info: TensorInfo) -> tuple[Range, ...]:
    """All rows of the tensor, those in `ranges` before the others."""
    others, position = [], 0
    for start, end in ranges:
        others.append((position, start))
        position = end
    others.append((position, _n_rows(info)))
    return (*ranges, *(one for one in others if one[0] < one[1]))


def _n_rows(info: TensorInfo) -> int:
    """Rows of a matrix; a vector has a row for each element."""
    return info.shape[0] if len(info.shape) == 1 else info.shape[1]


def _rows(info: TensorInfo, rows: tuple[Range, ...]) -> TensorSlice:
    n = length(rows)
    if len(info.shape) == 1:
        return TensorSlice(info, (n,), 1, info.shape[0], info.type.type_bytes, rows, ((0, info.type.type_bytes),))
    n_in, n_rows, *more = info.shape
    row_bytes = info.type.row_bytes(n_in)
    return TensorSlice(info, (n_in, n, *more), _product(more), n_rows, row_bytes, rows, ((0, row_bytes),))


def _columns(info: TensorInfo, columns: tuple[Range, ...]) -> TensorSlice:
    n_in, n_rows, *more = info.shape
    in_bytes = tuple((info.type.row_bytes(start), info.type.row_bytes(end)) for start, end in columns)
    return TensorSlice(info, (length(columns), n_rows, *more), _product(more), n_rows, info.type.row_bytes(n_in),
                       ((0, n_rows),), in_bytes)


def _product(extents: list[int]) -> int:
    product = 1
    for extent in extents:
        product *= extent
    return product


def _scaled(ranges: tuple[Range, ...], factor: int) -> tuple[Range, ...]:
    return tuple((start * factor, end * factor) for start, end in ranges)


def slice_metadata(model: ModelFile, hp: Hyperparameters, shard: Shard) -> Mapping[str, Value]:
    """The keys of a slice: the architecture's own, with the sizes of the shard. No vocabulary and no names."""
    arch = model.architecture
    kept = {key: value for key, value in model.metadata.items()
            if key.startswith(f"{arch}.") and not isinstance(value, ArrayRef)}
    width = "expert_feed_forward_length" if hp.n_experts else "feed_forward_length"
    sizes = {"attention.head_count": length(shard.heads), "attention.head_count_kv": length(shard.kv_heads),
             "attention.key_length": hp.head_dim, "attention.value_length": hp.head_dim, width: length(shard.ffn)}
    rows = {HEAD_ROWS_KEY: length(shard.head_rows)} if shard.leads else {}
    return {"general.architecture": arch, WHOLE_HEADS_KEY: hp.n_heads, **rows,
            **kept, **{f"{arch}.{key}": value for key, value in sizes.items()}}
