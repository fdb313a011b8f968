"""qwen3: Qwen3. As qwen2 without biases, and every head of Q and K is normed before RoPE.

Source: arXiv 2505.09388, section 2.
"""

from __future__ import annotations

from typing import final

from edgert.architectures import layers
from edgert.architectures.base import (
    Architecture,
    Block,
    StepInputs,
    TensorSpec,
    Weights,
    read_hyperparameters,
)
from edgert.ggml.graph import ROPE_NEOX, Graph, Tensor
from edgert.gguf.model_file import ModelFile


@final
class Qwen3(Architecture):
    def __init__(self, model: ModelFile) -> None:
        self.hp = read_hyperparameters(model, ROPE_NEOX)
        self._tied = "output.weight" not in model.tensors

    def specs(self, block: Block) -> tuple[TensorSpec, ...]:
        match block.kind:
            case "embedding":
                return layers.embedding_specs(self.hp)
            case "attention":
                norms = (layers.vector(block.layer, name, self.hp.head_dim) for name in ("attn_q_norm", "attn_k_norm"))
                return (*layers.attention_specs(self.hp, block.layer), *norms)
            case "ffn":
                return layers.ffn_specs(self.hp, block.layer)
            case "output":
                return layers.output_specs(self.hp, tied=self._tied)

    def layer_kind(self, layer: int) -> str:
        return "qwen3"

    def embed(self, g: Graph, w: Weights, token_ids: Tensor) -> Tensor:
        return g.get_rows(w["token_embd.weight"], token_ids)

    def attention(self, g: Graph, layer: int, w: Weights, x: Tensor, inputs: StepInputs) -> Tensor:
        x = g.rms_norm(x, w["attn_norm.weight"], self.hp.rms_eps)
        q, k, v = layers.project_heads(g, w, x, self.hp.head_dim)
        q = g.rms_norm(q, w["attn_q_norm.weight"], self.hp.rms_eps)
        k = g.rms_norm(k, w["attn_k_norm.weight"], self.hp.rms_eps)
        q, k = (g.rope(t, inputs.positions, self.hp.rope) for t in (q, k))
        return layers.attend(g, layer, w, q, k, v, inputs)

    def add_attention(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        return g.add(summed, x)

    def ffn_hidden(self, g: Graph, w: Weights, x: Tensor) -> Tensor:
        return layers.gated(g, w, g.rms_norm(x, w["ffn_norm.weight"], self.hp.rms_eps), "silu")

    def ffn_down(self, g: Graph, w: Weights, hidden: Tensor) -> Tensor:
        return layers.linear(g, w, "ffn_down", hidden)

    def add_ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        return g.add(summed, x)

    def output(self, g: Graph, w: Weights, x: Tensor) -> Tensor:
        return layers.output_head(g, w, x, self.hp.rms_eps)
