"""What every architecture gives the engine: its sizes, the tensors of its blocks, and its block functions.

A *block* is the unit that moves between disk and memory: the embedding, one layer's attention, one layer's FFN,
the output head. An architecture's functions only add operations to a graph. When weights are in memory and when
devices talk is the engine's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from edgert.architectures.rope import read_rope
from edgert.errors import ModelFileError
from edgert.ggml.graph import ROPE_NORMAL, Graph, Rope, Tensor
from edgert.gguf.model_file import ModelFile

BlockKind = Literal["embedding", "attention", "ffn", "output"]
# Bounds on what a file may claim, far above every published model: they keep sizes within 64 bits and loops finite.
MAX_LAYERS, MAX_HEADS, MAX_WIDTH, MAX_EXPERTS = 1024, 1024, 1 << 20, 1024
MAX_CONTEXT = 1 << 26
# What the slice of a cluster's leader says (tensorpar/slices.py) where other devices have rows of the head too.
HEAD_ROWS_KEY = "edgert.shard.head_rows"


@dataclass(frozen=True, slots=True)
class Block:
    """One unit of weights. `layer` is 0 for the embedding and the output head; where a block is cut, `part` counts."""

    kind: BlockKind
    layer: int = 0
    part: int = 0


EMBEDDING, OUTPUT = Block("embedding"), Block("output")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a block needs: its name in the file, its shape in ggml's order, and its use.

    `matrix` may have any type that ggml multiplies, `table` any type that it reads rows of, `vector` is float32.
    """

    name: str
    shape: tuple[int, ...]
    use: Literal["matrix", "table", "vector"] = "matrix"
    optional: bool = False

    @property
    def key(self) -> str:
        """The name without its layer: `attn_q.weight` of `blk.3.attn_q.weight`."""
        return self.name.split(".", 2)[2] if self.name.startswith("blk.") else self.name


Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The sizes of a model, from its metadata (GGUF keys in `read_hyperparameters`)."""

    architecture: str
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    rms_eps: float
    rope: Rope
    head_rows: int
    """Logits that the output head gives per token: `vocab_size`, but in a slice that has some rows of the head."""
    n_experts: int = 0
    n_experts_used: int = 0
    expert_ffn_size: int = 0
    window: int = 0
    """Tokens that a layer of `window_layers` sees, itself included; 0 where every layer sees everything."""
    window_layers: frozenset[int] = frozenset()
    carried_size: int = 0
    """Values per token that `Architecture.carry` hands from a layer's attention block to its FFN block."""

    @property
    def kv_size(self) -> int:
        """Values of K (and of V) per token and layer."""
        return self.n_kv_heads * self.head_dim


class AttentionCache(Protocol):
    """The KV cache as one graph sees it (the seam's contract is in edgert/engine/kv_cache.py)."""

    def attend(self, g: Graph, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append k and v of `layer`, attend over what that layer sees, and give (n_heads * head_dim, n_tokens)."""
        ...


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the blocks of one step read besides weights and hidden states."""

    positions: Tensor  # (n_tokens,) int32
    kv: AttentionCache


class Architecture(Protocol):
    """One model family. Every function takes the graph `g`, the layer, and the block's weights `w` by key."""

    hp: Hyperparameters

    def specs(self, block: Block) -> tuple[TensorSpec, ...]:
        """The tensors of a block."""
        ...

    def layer_kind(self, layer: int) -> str:
        """Layers of one kind and equal tensor types have the same graph."""
        ...

    def embed(self, g: Graph, w: Weights, token_ids: Tensor) -> Tensor:
        """(hidden_size, n_tokens) of token_ids (n_tokens,) int32."""
        ...

    def carry(self, g: Graph, layer: int, w: Weights, x: Tensor) -> Tensor | None:
        """(carried_size, n_tokens) of the layer's input x and the attention block's weights, for `ffn` of the same
        layer: a router that comes before attention, so that its experts can be fetched meanwhile. None for most."""
        return None

    def foresee(self, g: Graph, layer: int, carried: Tensor) -> Tensor:
        """(n_experts_used, n_tokens) int32: the experts that `ffn` will choose, of what `carry` gave alone."""
        raise AssertionError(f"{self.hp.architecture} carries nothing that names its experts")

    def attention(self, g: Graph, layer: int, w: Weights, x: Tensor, inputs: StepInputs) -> Tensor:
        """This rank's part of the attention block's output, to be summed over ranks."""
        ...

    def add_attention(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        """The hidden state after attention: the residual connection, and norms that come after the sum."""
        ...

    def ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, carried: Tensor | None) -> Tensor:
        """This rank's part of the FFN block's output, to be summed over ranks. `carried` is what `carry` gave."""
        return self.ffn_down(g, w, self.ffn_hidden(g, w, x))

    def ffn_hidden(self, g: Graph, w: Weights, x: Tensor) -> Tensor:
        """(rows, n_tokens): the hidden values of a dense FFN, for the rows of gate and up that `w` holds."""
        raise AssertionError(f"{self.hp.architecture} has experts")

    def ffn_down(self, g: Graph, w: Weights, hidden: Tensor) -> Tensor:
        """(rows, n_tokens) of what `ffn` gives, for the rows of the down projection that `w` holds."""
        raise AssertionError(f"{self.hp.architecture} has experts")

    def add_ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        """The hidden state after the layer."""
        ...

    def output(self, g: Graph, w: Weights, x: Tensor) -> Tensor:
        """Logits (head_rows, n_outputs), or those of the head's rows that `w` holds."""
        ...


def blocks_of(hp: Hyperparameters) -> tuple[Block, ...]:
    """Every block in the order in which a step needs it."""
    layers = [Block(kind, layer) for layer in range(hp.n_layers) for kind in ("attention", "ffn")]
    return (EMBEDDING, *layers, OUTPUT)


def read_hyperparameters(model: ModelFile, rope_mode: int = ROPE_NORMAL, *,
                         partial_rope: bool = False) -> Hyperparameters:
    """The sizes that all families share. Raises ModelFileError for a missing key or an impossible value.

    `partial_rope` admits files in which RoPE turns only a part of each head.
    """

    def size(key: str, limit: int, default: int | None = None) -> int:
        return model.get_int(key, default, minimum=1, maximum=limit)

    path = str(model.path)
    n_heads = size("{arch}.attention.head_count", MAX_HEADS)
    hidden_size = size("{arch}.embedding_length", MAX_WIDTH)
    head_dim = size("{arch}.attention.key_length", MAX_WIDTH, max(1, hidden_size // n_heads))
    n_kv_heads = size("{arch}.attention.head_count_kv", MAX_HEADS, n_heads)
    if size("{arch}.attention.value_length", MAX_WIDTH, head_dim) != head_dim:
        raise ModelFileError(path, "keys and values of different lengths are not supported")
    if n_heads % n_kv_heads:
        raise ModelFileError(path, f"{n_heads} heads do not share {n_kv_heads} KV heads evenly")
    context_length = size("{arch}.context_length", MAX_CONTEXT)
    rope = read_rope(model, rope_mode, head_dim, context_length)
    if rope.n_dims != head_dim and not partial_rope:
        raise ModelFileError(path, f"{model.architecture} with RoPE on a part of each head is not supported")
    n_experts = model.get_int("{arch}.expert_count", 0, maximum=MAX_EXPERTS)
    expert_width = "{arch}.expert_feed_forward_length"
    ffn_size = size("{arch}.feed_forward_length", MAX_WIDTH,
                    size(expert_width, MAX_WIDTH) if n_experts and model.has(expert_width) else None)
    return Hyperparameters(
        architecture=model.architecture, n_layers=size("{arch}.block_count", MAX_LAYERS), hidden_size=hidden_size,
        n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, ffn_size=ffn_size, vocab_size=_vocab_size(model),
        head_rows=model.get_int(HEAD_ROWS_KEY, _vocab_size(model), minimum=1, maximum=_vocab_size(model)),
        context_length=context_length, rms_eps=_epsilon(model), rope=rope, n_experts=n_experts,
        n_experts_used=size("{arch}.expert_used_count", n_experts) if n_experts else 0,
        expert_ffn_size=size(expert_width, MAX_WIDTH, ffn_size) if n_experts else 0)


def _epsilon(model: ModelFile) -> float:
    value = model.get_float("{arch}.attention.layer_norm_rms_epsilon")
    if not 0 < value < 1:
        raise ModelFileError(str(model.path), f"attention.layer_norm_rms_epsilon is {value}, expected 0 to 1")
    return value


def _vocab_size(model: ModelFile) -> int:
    """Rows of the embedding table: what the file holds decides, whatever it claims elsewhere."""
    table = model.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelFileError(str(model.path), "the embedding table token_embd.weight is missing or not a matrix")
    return table.shape[1]


def check_tensors(arch: Architecture, model: ModelFile, multipliable: frozenset[int], readable: frozenset[int]) -> None:
    """Every needed tensor is there, of the shape that the sizes demand and of a type that ggml computes with.

    `multipliable` and `readable` are type numbers for matrices and tables. A tensor that no block uses (a scale, a
    bias, another layer) would change the answer if it were understood, so it is refused too. Raises ModelFileError.
    """
    unused = set(model.tensors)
    for block in blocks_of(arch.hp):
        for spec in arch.specs(block):
            unused.discard(spec.name)
            info = model.tensors.get(spec.name)
            if info is None:
                if spec.optional:
                    continue
                raise ModelFileError(str(model.path), f"tensor {spec.name} is missing")
            stored = (*info.shape, 1, 1, 1, 1)[:4]
            if stored != (*spec.shape, 1, 1, 1, 1)[:4]:
                raise ModelFileError(str(model.path), f"tensor {spec.name} is {info.shape}, expected {spec.shape}")
            allowed = {"matrix": multipliable, "table": readable, "vector": frozenset((0,))}[spec.use]
            if info.type.id not in allowed:
                raise ModelFileError(str(model.path), f"tensor {spec.name} has type {info.type.name}, "
                                     f"with which ggml does not compute as a {spec.use}")
    if unused:
        raise ModelFileError(str(model.path), f"tensor {min(unused)} (and {len(unused) - 1} more) is none that "
                             f"edgert's {model.architecture} computes with")
