"""What a model and its surroundings are to the memory manager: bytes and counts, all known before a weight is read.

Plain values, filled in by edgert/model_shape.py from a file's header and from what was measured without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from edgert.memory.kv import KVSizes

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model's sizes. Tensors that lie in memory as pieces of the file count with the blocks that enclose them."""

    file_bytes: int
    small_bytes: int  # tensors that always stay: norms, biases, small matrices
    large_bytes: int  # tensors that stay or stream, as the plan says; experts apart
    largest_block_bytes: int  # of these, what must be in memory at once
    largest_piece_bytes: int
    matrix_bytes: Mapping[int, int]  # by ggml type: what every token is multiplied with, experts and head apart
    head_bytes: Mapping[int, int]  # by ggml type: the output head, for tokens whose logits are wanted
    expert_bytes: Mapping[int, int]  # by ggml type: all experts of all layers
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    kv_bytes_per_token: int
    hidden_size: int = 0
    hidden_bytes_per_token: int = 0  # where a whole prompt passes layer by layer, each token's state waits
    n_experts: int = 0
    n_experts_used: int = 0
    window: int = 0  # tokens that a layer with a window sees
    n_window_layers: int = 0
    context_length: int = 0  # what the model was trained for
    repackable_bytes: Mapping[int, int] = field(default_factory=dict)  # by ggml type: matrices that ggml can repack
    slot_bytes: int = 0  # one expert in a pool of slots, where weights stream
    least_slots: int = 0
    kept_bytes_per_token: int = 0  # experts' outputs, where a pool holds less than a layer
    kv: KVSizes | None = None  # where steps attend to a set of tokens
    foresees: bool = False  # a layer's experts are known, and read, before its attention computes
    key: str = ""  # what tells the model's shapes and types from others

    @property
    def n_slots(self) -> int:
        """A slot for every expert of every layer."""
        return self.n_layers * self.n_experts


@dataclass(frozen=True, slots=True)
class Overheads:
    """What comes beside weights and KV, in bytes, at one context length and batch size. Measured, not guessed."""

    process_bytes: int  # interpreter, libraries, vocabulary: what the process holds now
    growth_bytes: int  # what it grows by while it answers: graphs, stacks of threads, allocators
    compute_bytes: Mapping[int, int]  # ggml's buffers, blocks one by one: by how many tokens are computed at once
    fused_compute_bytes: int  # ggml's buffers, the whole model in one graph
    embedding_bytes: int  # rows of the embedding table, where the table itself is on disk
    batch_size: int = 512
    prompt_bytes: int = 0  # of the compute buffers, what single tokens do without, and is free between prompts

    def filled(self, share: float) -> Overheads:
        """With so much of the compute buffers touched: all but logits grows with the tokens computed at once."""
        return replace(self, fused_compute_bytes=int(share * self.fused_compute_bytes),
                       compute_bytes={part: int(share * n_bytes) for part, n_bytes in self.compute_bytes.items()},
                       prompt_bytes=int(share * self.prompt_bytes))

    def between_prompts(self) -> Overheads:
        """Without the compute buffers that only prompts need."""
        return replace(self, prompt_bytes=0, compute_bytes={part: n_bytes - self.prompt_bytes
                                                            for part, n_bytes in self.compute_bytes.items()})

    def streamed_bytes(self, part_tokens: int) -> int:
        """All of it, where weights stream and batches are computed in parts."""
        return self.process_bytes + self.growth_bytes + self.compute_bytes[part_tokens] + self.embedding_bytes

    @property
    def resident_bytes(self) -> int:
        """All of it, where the file is mapped whole."""
        return self.process_bytes + self.growth_bytes + self.fused_compute_bytes
