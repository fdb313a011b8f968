"""qwen3moe: Qwen3-30B-A3B and Qwen3-235B-A22B. As qwen3, with experts for the FFN.

Source: arXiv 2505.09388, section 2.
"""

from __future__ import annotations

from dataclasses import replace
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
class Qwen3Moe(Architecture):
    def __init__(self, model: ModelFile) -> None:
        hp = read_hyperparameters(model, ROPE_NEOX)
        moe.check_experts(model, hp)
        if not model.has("{arch}.expert_feed_forward_length"):
            hp = replace(hp, expert_ffn_size=max(1, hp.ffn_size // hp.n_experts_used))
        self.hp = hp
        self._tied = "output.weight" not in model.tensors

    def specs(self, block: Block) -> tuple[TensorSpec, ...]:
        match block.kind:
            case "embedding":
                return layers.embedding_specs(self.hp)
            case "attention":
                norms = (layers.vector(block.layer, name, self.hp.head_dim) for name in ("attn_q_norm", "attn_k_norm"))
                return (*layers.attention_specs(self.hp, block.layer), *norms)
            case "ffn":
                return moe.ffn_specs(self.hp, block.layer)
            case "output":
                return layers.output_specs(self.hp, tied=self._tied)

    def layer_kind(self, layer: int) -> str:
        return "qwen3moe"

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

    def ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, carried: Tensor | None) -> Tensor:
        return moe.ffn(g, self, layer, w, x, carried)

    def router(self, g: Graph, layer: int, w: Weights, x: Tensor, carried: Tensor | None) -> moe.Routing:
        x = g.rms_norm(x, w["ffn_norm.weight"], self.hp.rms_eps)
        logits = g.mul_mat(w["ffn_gate_inp.weight"], x)
        return moe.route(g, x, logits, self.hp.n_experts_used, "softmax", normalise=True)

    def experts(self, g: Graph, layer: int, w: Weights, x: Tensor, ids: Tensor) -> Tensor:
        return moe.outputs(g, w, x, ids, "silu")

    def add_ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        return g.add(summed, x)

    def output(self, g: Graph, w: Weights, x: Tensor) -> Tensor:
        return layers.output_head(g, w, x, self.hp.rms_eps)
