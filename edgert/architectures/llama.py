"""llama: SmolLM2, Llama 2 and 3, Mistral, TinyLlama, and with experts Mixtral. Pre-norm, RoPE on pairs, SwiGLU.

Source: arXiv 2302.13971; frequency factors of Llama 3 (`rope_freqs.weight`): arXiv 2407.21783; experts: arXiv
2401.04088.
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
from edgert.ggml.graph import Graph, Tensor
from edgert.gguf.model_file import ModelFile


@final
class Llama(Architecture):
    def __init__(self, model: ModelFile) -> None:
        self.hp = read_hyperparameters(model)
        self._tied = "output.weight" not in model.tensors
        if self.hp.n_experts:
            moe.check_experts(model, self.hp)

    def specs(self, block: Block) -> tuple[TensorSpec, ...]:
        match block.kind:
            case "embedding":
                return layers.embedding_specs(self.hp)
            case "attention":
                factors = TensorSpec("rope_freqs.weight", (self.hp.rope.n_dims // 2,), "vector", optional=True)
                return (*layers.attention_specs(self.hp, block.layer), factors)
            case "ffn" if self.hp.n_experts:
                return moe.ffn_specs(self.hp, block.layer)
            case "ffn":
                return layers.ffn_specs(self.hp, block.layer)
            case "output":
                return layers.output_specs(self.hp, tied=self._tied)

    def layer_kind(self, layer: int) -> str:
        return "llama"

    def embed(self, g: Graph, w: Weights, token_ids: Tensor) -> Tensor:
        return g.get_rows(w["token_embd.weight"], token_ids)

    def attention(self, g: Graph, layer: int, w: Weights, x: Tensor, inputs: StepInputs) -> Tensor:
        x = g.rms_norm(x, w["attn_norm.weight"], self.hp.rms_eps)
        q, k, v = layers.project_heads(g, w, x, self.hp.head_dim)
        factors = w.get("rope_freqs.weight")
        q, k = (g.rope(t, inputs.positions, self.hp.rope, factors) for t in (q, k))
        return layers.attend(g, layer, w, q, k, v, inputs)

    def add_attention(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        return g.add(summed, x)

    def ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, carried: Tensor | None) -> Tensor:
        if self.hp.n_experts:
            return moe.ffn(g, self, layer, w, x, carried)
        return super().ffn(g, layer, w, x, carried)

    def ffn_hidden(self, g: Graph, w: Weights, x: Tensor) -> Tensor:
        return layers.gated(g, w, g.rms_norm(x, w["ffn_norm.weight"], self.hp.rms_eps), "silu")

    def ffn_down(self, g: Graph, w: Weights, hidden: Tensor) -> Tensor:
        return layers.linear(g, w, "ffn_down", hidden)

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
