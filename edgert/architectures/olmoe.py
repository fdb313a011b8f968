"""olmoe: OLMoE-1B-7B. Q and K are normed as a whole, not head by head; the experts' weights are not normalised.

So a rank of a cluster needs Q and K of all heads for the norm, and then goes on with its own, which come first.
Source: arXiv 2409.02060, sections 2 and 4.2.5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

from edgert.architectures import layers, moe
from edgert.architectures.base import (
    MAX_WIDTH,
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
        self._q_width = self._width(model, "attn_q", self.hp.n_heads * self.hp.head_dim)
        self._k_width = self._width(model, "attn_k", self.hp.kv_size)

    @staticmethod
    def _width(model: ModelFile, name: str, own: int) -> int:
        """Values over which a norm of the first layer goes, as its file holds it: of all heads or of a rank's own."""
        info = model.tensors.get(f"blk.0.{name}_norm.weight")
        return own if info is None or not own <= info.shape[0] <= MAX_WIDTH else info.shape[0]

    def specs(self, block: Block) -> tuple[TensorSpec, ...]:
        match block.kind:
            case "embedding":
                return layers.embedding_specs(self.hp)
            case "attention":
                widths = {"attn_q": self._q_width, "attn_k": self._k_width}
                projections = (
                    replace(spec, shape=(*spec.shape[:-1], widths.get(spec.key.partition(".")[0], spec.shape[-1])))
                    for spec in layers.attention_specs(self.hp, block.layer))
                return (*projections, layers.vector(block.layer, "attn_q_norm", self._q_width),
                        layers.vector(block.layer, "attn_k_norm", self._k_width))
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
        q, k = self._own(g, q, self.hp.n_heads), self._own(g, k, self.hp.n_kv_heads)
        q, k = (g.rope(t, inputs.positions, self.hp.rope) for t in (q, k))
        return layers.attend(g, layer, w, q, k, v, inputs)

    @staticmethod
    def _own(g: Graph, x: Tensor, n_heads: int) -> Tensor:
        """The first `n_heads` of x (head_dim, heads, n_tokens)."""
        return x if x.ne[1] == n_heads else g.view(x, (x.ne[0], n_heads, x.ne[2]), (x.nb[1], x.nb[2]))

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
