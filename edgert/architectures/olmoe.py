"""olmoe: OLMoE-1B-7B. Q and K are normed as a whole, not head by head; the experts' weights are not normalised.

Source: arXiv 2409.02060, sections 2 and 4.2.5.
"""

from __future__ import annotations

from typing import final

from edgert.architectures import layers, moe
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
class Olmoe(Architecture):
    def __init__(self, model: ModelFile) -> None:
        self.hp = read_hyperparameters(model, ROPE_NEOX)
        moe.check_experts(model, self.hp)
        self._tied = "output.weight" not in model.tensors

    def specs(self, block: Block) -> tuple[TensorSpec, ...]:
        match block.kind:
            case "embedding":
                return layers.embedding_specs(self.hp)
            case "attention":
                q_norm = layers.vector(block.layer, "attn_q_norm", self.hp.n_heads * self.hp.head_dim)
                k_norm = layers.vector(block.layer, "attn_k_norm", self.hp.kv_size)
                return (*layers.attention_specs(self.hp, block.layer), q_norm, k_norm)
            case "ffn":
                return moe.ffn_specs(self.hp, block.layer)
            case "output":
                return layers.output_specs(self.hp, tied=self._tied)

    def layer_kind(self, layer: int) -> str:
        return "olmoe"

    def embed(self, g: Graph, w: Weights, token_ids: Tensor) -> Tensor:
        return g.get_rows(w["token_embd.weight"], token_ids)

    def attention(self, g: Graph, layer: int, w: Weights, x: Tensor, inputs: StepInputs) -> Tensor:
        x = g.rms_norm(x, w["attn_norm.weight"], self.hp.rms_eps)
        q = g.rms_norm(layers.linear(g, w, "attn_q", x), w["attn_q_norm.weight"], self.hp.rms_eps)
        k = g.rms_norm(layers.linear(g, w, "attn_k", x), w["attn_k_norm.weight"], self.hp.rms_eps)
        v = layers.linear(g, w, "attn_v", x)
        q, k, v = (layers.heads(g, t, self.hp.head_dim) for t in (q, k, v))
        q, k = (g.rope(t, inputs.positions, self.hp.rope) for t in (q, k))
        return layers.attend(g, layer, w, q, k, v, inputs)

    def add_attention(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        return g.add(summed, x)

    def ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, carried: Tensor | None) -> Tensor:
        return moe.ffn(g, self, layer, w, x, carried)

    def router(self, g: Graph, layer: int, w: Weights, x: Tensor, carried: Tensor | None) -> moe.Routing:
        x = g.rms_norm(x, w["ffn_norm.weight"], self.hp.rms_eps)
        logits = g.mul_mat(w["ffn_gate_inp.weight"], x)
        return moe.route(g, x, logits, self.hp.n_experts_used, "softmax", normalise=False)

    def experts(self, g: Graph, layer: int, w: Weights, x: Tensor, ids: Tensor) -> Tensor:
        return moe.outputs(g, w, x, ids, "silu")

    def add_ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        return g.add(summed, x)

    def output(self, g: Graph, w: Weights, x: Tensor) -> Tensor:
        return layers.output_head(g, w, x, self.hp.rms_eps)
