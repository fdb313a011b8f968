"""Which heads and which part of the FFN each rank computes: where a model may be cut, and what its parts weigh.

Attention is divided by whole KV groups, or within a group when there are more ranks than groups (K and V are then on
several ranks); the FFN, and each expert's, by whole quantisation blocks; the output head by rows, if at all. Nothing is
quantised anew. Knows no bytes of a file (tensorpar/slices.py); who gets what is decided in tensorpar/division.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgert.architectures.base import Architecture
from edgert.engine.kv_cache import KVType, kv_bytes_per_token
from edgert.errors import ModelFileError
from edgert.gguf.model_file import ModelFile
from edgert.gguf.reader import TensorInfo

Range = tuple[int, int]  # from, up to and without
Bytes = Mapping[int, float]  # by ggml type
# Rows of the output head are cut where a repacked layout may be: it takes 4 to 16 rows together.
ROWS_UNIT = 64


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank computes of every layer, and its rows of the output head. `leads` is rank 0, which also holds the
    embedding and the biases that are added once."""

    heads: tuple[Range, ...]
    kv_heads: tuple[Range, ...]
    ffn: tuple[Range, ...]
    head_rows: tuple[Range, ...] = ()
    leads: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a model may be cut, and what its parts weigh. Bytes are those that a decoded token reads."""

    n_heads: int
    n_kv_heads: int
    head_unit: int
    """Heads that a quantisation block of the output projection spans: they stay together."""
    ffn_size: int
    ffn_unit: int
    n_head_rows: int
    attention: Bytes
    ffn: Bytes
    head: Bytes
    replicated_bytes: int
    stored_ffn_bytes: int
    """All experts', where a token reads some."""
    kv_bytes: int = 0
    """A full cache's keys and values, of all KV heads."""
    hidden_bytes: int = 0
    """A full context's hidden states: where weights may stream, a prompt passes layer by layer."""

    @classmethod
    def of(cls, model: ModelFile, arch: Architecture, context_length: int = 0, kv_type: KVType = "f16") -> Cut:
        """The cut of a model whose tensors are checked. Raises ModelFileError where no whole block fits."""
        hp, tensors = arch.hp, model.tensors
        block = _largest_block(tensors.values(), "attn_output.weight")
        ffn_size = hp.expert_ffn_size or hp.ffn_size
        ffn_unit = _largest_block((*tensors.values(),), "ffn_down.weight", "ffn_down_exps.weight")
        if hp.n_heads * hp.head_dim % block or ffn_size % ffn_unit:
            raise ModelFileError(str(model.path), "its rows are no whole number of quantisation blocks")
        used = hp.n_experts_used / hp.n_experts if hp.n_experts else 1.0
        groups: dict[str, Counter[int]] = {kind: Counter() for kind in ("attention", "ffn", "head", "replicated")}
        for info in tensors.values():
            groups[_kind(info.name)][info.type.id] += int(info.n_bytes * (used if "_exps" in info.name else 1.0))
        if "output.weight" not in tensors:
            table = tensors["token_embd.weight"]
            groups["head"][table.type.id] += table.n_bytes
        stored = sum(info.n_bytes for info in tensors.values() if _kind(info.name) == "ffn")
        return cls(hp.n_heads, hp.n_kv_heads, block // math.gcd(block, hp.head_dim), ffn_size, ffn_unit,
                   hp.vocab_size, groups["attention"], groups["ffn"], groups["head"], groups["replicated"].total(),
                   stored, context_length * kv_bytes_per_token(hp, kv_type),
                   context_length * 4 * (hp.hidden_size + hp.carried_size))

    @property
    def attention_bytes(self) -> int:
        return int(sum(self.attention.values()))

    @property
    def ffn_bytes(self) -> int:
        return int(sum(self.ffn.values()))

    @property
    def head_bytes(self) -> int:
        return int(sum(self.head.values()))

    @property
    def bytes_per_head(self) -> float:
        """Weights and cache."""
        return (self.attention_bytes + self.kv_bytes) / self.n_heads

    @property
    def group_unit(self) -> int:
        """Heads of the smallest cut at which every rank has KV heads of its own."""
        return math.lcm(self.head_unit, self.n_heads // self.n_kv_heads)

    @property
    def max_ranks(self) -> int:
        """More ranks than this have nothing to compute."""
        per_group = self.n_heads // self.n_kv_heads
        finest = self.head_unit if per_group % self.head_unit == 0 else self.group_unit
        return min(self.n_heads // finest, self.ffn_size // self.ffn_unit)

    @property
    def max_head_ranks(self) -> int:
        """Among more ranks than this the rows of the output head cannot be divided."""
        return self.n_head_rows // ROWS_UNIT

    @property
    def total_bytes(self) -> int:
        return self.attention_bytes + self.ffn_bytes + self.head_bytes

    def read_bytes(self, one: Shard) -> int:
        """What a rank with this shard reads for each token."""
        own = (self.attention_bytes * length(one.heads) // self.n_heads
               + self.ffn_bytes * length(one.ffn) // self.ffn_size)
        return own + self.head_bytes * length(one.head_rows) // self.n_head_rows

    def stored_bytes(self, one: Shard) -> int:
        """A rank's part of the model. The embedding table is a part of the replicated bytes."""
        own = (self.attention_bytes * length(one.heads) // self.n_heads
               + self.stored_ffn_bytes * length(one.ffn) // self.ffn_size
               + self.head_bytes * length(one.head_rows) // self.n_head_rows)
        return own + (self.replicated_bytes if one.leads else 0)

    def kept_bytes(self, one: Shard) -> int:
        """What a rank must keep so that nothing streams: weights and cache. The embedding table's rows are read as
        they are needed."""
        own = self.stored_bytes(one) - (self.replicated_bytes if one.leads else 0)
        return own + self.kv_bytes * length(one.kv_heads) // self.n_kv_heads

    def whole(self) -> Shard:
        """Everything, on the leader."""
        return Shard(((0, self.n_heads),), ((0, self.n_kv_heads),), ((0, self.ffn_size),), ((0, self.n_head_rows),),
                     leads=True)


def _kind(name: str) -> str:
    """Which part of the work a tensor belongs to."""
    if name in ("token_embd.weight", "output_norm.weight"):
        return "replicated"  # of the table a token reads one row
    if name.startswith("output."):
        return "head"
    key = name.split(".", 2)[-1]
    if key.startswith(("attn_q.", "attn_k.", "attn_v.", "attn_output.")):
        return "attention"
    return "ffn" if key.startswith(("ffn_gate", "ffn_up", "ffn_down")) and "inp" not in key else "replicated"


def _largest_block(tensors: Iterable[TensorInfo], *keys: str) -> int:
    """Elements of the largest block among the layers' tensors of these names; sizes are powers of two."""
    return max((info.type.block_size for info in tensors if info.name.endswith(keys)), default=1)


def covers(cut: Cut, shards: Sequence[Shard]) -> bool:
    """Whether the shards, each of whole units, compute every head and every part of the FFN exactly once."""
    per_kv = cut.n_heads // cut.n_kv_heads
    return (sorted(n for one in shards for n in numbers(one.heads)) == list(range(cut.n_heads))
            and sorted(n for one in shards for n in numbers(one.ffn)) == list(range(cut.ffn_size))
            and (splits_head(shards) or not any(one.head_rows for one in shards[1:]))
            and sum(length(one.head_rows) for one in shards) == cut.n_head_rows
            and _union(r for one in shards for r in one.head_rows) == ((0, cut.n_head_rows),)
            and all(edge % cut.head_unit == 0 for one in shards for r in one.heads for edge in r)
            and all(edge % cut.ffn_unit == 0 for one in shards for r in one.ffn for edge in r)
            and all({head // per_kv for head in numbers(one.heads)} == set(numbers(one.kv_heads))
                    and list(_pairs(one)) == [(head, head // per_kv) for head in numbers(one.heads)]
                    for one in shards))


def splits_head(shards: Sequence[Shard]) -> bool:
    """Whether every rank has rows of the output head, rather than the leader all."""
    return len(shards) > 1 and all(one.head_rows for one in shards)


def merge(shards: Sequence[Shard]) -> Shard | None:
    """One shard that computes what these do together; None where its heads would not share KV heads evenly."""
    heads, kv_heads, ffn, head_rows = (_union(r for one in shards for r in getattr(one, field))
                                       for field in ("heads", "kv_heads", "ffn", "head_rows"))
    n_heads, n_kv_heads = length(heads), length(kv_heads)
    if n_heads % n_kv_heads:
        return None
    # The merged rank lets its first heads use its first KV head, and so on: does that name the right ones?
    pairs = sorted((head, kv) for one in shards for head, kv in _pairs(one))
    q_numbers, kv_numbers = numbers(heads), numbers(kv_heads)
    per_kv = n_heads // n_kv_heads
    expected = [(head, kv_numbers[index // per_kv]) for index, head in enumerate(q_numbers)]
    return Shard(heads, kv_heads, ffn, head_rows, any(one.leads for one in shards)) if pairs == expected else None


def _pairs(one: Shard) -> Iterable[Range]:
    """Each head with the KV head that it uses."""
    kv = numbers(one.kv_heads)
    heads = numbers(one.heads)
    return ((head, kv[index * len(kv) // len(heads)]) for index, head in enumerate(heads))


def _union(ranges: Iterable[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def length(ranges: Iterable[Range]) -> int:
    return sum(end - start for start, end in ranges)


def numbers(ranges: Iterable[Range]) -> list[int]:
    """Every number in the ranges, in order."""
    return [number for start, end in ranges for number in range(start, end)]
