"""smallthinker: SmallThinker-4BA0.6B and -21BA3B. The router reads a layer's input before attention, ReLU experts.

So a layer's experts are known while attention still computes. With a sliding window, every fourth layer sees
everything and has no RoPE. Source: arXiv 2507.20984, sections 2 and 3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

from edgert.architectures import layers, moe
from edgert.architectures.base import (
    MAX_CONTEXT,
    Architecture,
    Block,
    StepInputs,
    TensorSpec,
    Weights,
    read_hyperparameters,
)
from edgert.architectures.rope import read_frequency_base, read_frequency_scale
from edgert.architectures.windows import window_layers
from edgert.errors import ModelFileError
from edgert.ggml.graph import ROPE_NEOX, Graph, Tensor
from edgert.gguf.model_file import ModelFile

# The published models' window; llama.cpp takes it for any window that a file names.
_WINDOW = 4096
_PERIOD = 4
_GATINGS: dict[int, moe.Gating] = {1: "softmax", 2: "sigmoid", 3: "softmax_chosen"}


@final
class SmallThinker(Architecture):
    def __init__(self, model: ModelFile) -> None:
        hp = read_hyperparameters(model, ROPE_NEOX)
        moe.check_experts(model, hp)
        has_window = model.get_int("{arch}.attention.sliding_window", 0, maximum=MAX_CONTEXT) > 0
        windowed = window_layers(model, hp.n_layers, _PERIOD, full_first=True) if has_window else frozenset[int]()
        self.hp = replace(hp, window=_WINDOW * has_window, window_layers=windowed, carried_size=hp.n_experts)
        self._local_rope = replace(hp.rope, freq_scale=read_frequency_scale(model), freq_base=read_frequency_base(
            model, "{arch}.rope.freq_base_swa", hp.rope.freq_base))
        gating = model.get_int("{arch}.expert_gating_func")
        if gating not in _GATINGS:
            raise ModelFileError(str(model.path), f"expert_gating_func is {gating}, expected one of {sorted(_GATINGS)}")
        self._gating = _GATINGS[gating]
        self._tied = "output.weight" not in model.tensors

    def specs(self, block: Block) -> tuple[TensorSpec, ...]:
        hp, layer = self.hp, block.layer
        match block.kind:
            case "embedding":
                return layers.embedding_specs(hp)
            case "attention":
                return (*layers.attention_specs(hp, layer), moe.router_spec(hp, layer))
            case "ffn":
                return (layers.vector(layer, "ffn_norm", hp.hidden_size), *moe.expert_specs(hp, layer))
            case "output":
                return layers.output_specs(hp, tied=self._tied)

    def layer_kind(self, layer: int) -> str:
        window = "window" if layer in self.hp.window_layers else "full"
        return f"smallthinker/{window}/{'rope' if self._has_rope(layer) else 'nope'}"

    def _has_rope(self, layer: int) -> bool:
        # A model of four layers has RoPE everywhere, as llama.cpp reads it: there, a step of n_layers means "always".
        return not self.hp.window or self.hp.n_layers == _PERIOD or layer % _PERIOD != 0

    def embed(self, g: Graph, w: Weights, token_ids: Tensor) -> Tensor:
        return g.get_rows(w["token_embd.weight"], token_ids)

    def carry(self, g: Graph, layer: int, w: Weights, x: Tensor) -> Tensor:
        """The router's logits (n_experts, n_tokens), of the layer's input as it comes."""
        return g.mul_mat(w["ffn_gate_inp.weight"], x)

    def foresee(self, g: Graph, layer: int, carried: Tensor) -> Tensor:
        return moe.route(g, carried, carried, self.hp.n_experts_used, self._gating, normalise=True).ids

    def attention(self, g: Graph, layer: int, w: Weights, x: Tensor, inputs: StepInputs) -> Tensor:
        x = g.rms_norm(x, w["attn_norm.weight"], self.hp.rms_eps)
        q, k, v = layers.project_heads(g, w, x, self.hp.head_dim)
        if self._has_rope(layer):
            rope = self._local_rope if layer in self.hp.window_layers else self.hp.rope
            q, k = (g.rope(t, inputs.positions, rope) for t in (q, k))
        return layers.attend(g, layer, w, q, k, v, inputs)

    def add_attention(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        return g.add(summed, x)

    def ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, carried: Tensor | None) -> Tensor:
        return moe.ffn(g, self, layer, w, x, carried)

    def router(self, g: Graph, layer: int, w: Weights, x: Tensor, carried: Tensor | None) -> moe.Routing:
        assert carried is not None  # `carry` gives it for every layer
        x = g.rms_norm(x, w["ffn_norm.weight"], self.hp.rms_eps)
        return moe.route(g, x, carried, self.hp.n_experts_used, self._gating, normalise=True)

    def experts(self, g: Graph, layer: int, w: Weights, x: Tensor, ids: Tensor) -> Tensor:
        return moe.outputs(g, w, x, ids, "relu")

    def add_ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        return g.add(summed, x)

    def output(self, g: Graph, w: Weights, x: Tensor) -> Tensor:
        return layers.output_head(g, w, x, self.hp.rms_eps)
