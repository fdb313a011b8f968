"""gemma3: Gemma 3. Most layers see a sliding window, with a RoPE base of their own; norms before and after each block.

Source: arXiv 2503.19786, section 2. The norms' weights in a file include the 1 that Gemma adds to them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import final

from edgert.architectures import layers
from edgert.architectures.base import (
    MAX_CONTEXT,
    MAX_HEADS,
    Architecture,
    Block,
    StepInputs,
    TensorSpec,
    Weights,
    read_hyperparameters,
)
from edgert.architectures.rope import read_frequency_base
from edgert.architectures.rounding import inverse_sqrt
from edgert.architectures.windows import window_layers
from edgert.errors import ModelFileError
from edgert.ggml.graph import ROPE_NEOX, Graph, Tensor
from edgert.gguf.model_file import ModelFile

_PERIOD = 6  # five layers with a window, then one that sees everything
_N_LAYERS_27B = 62
_MAX_SOFTCAP = 1e6


@final
class Gemma3(Architecture):
    def __init__(self, model: ModelFile) -> None:
        hp = read_hyperparameters(model, ROPE_NEOX, partial_rope=True)
        window = model.get_int("{arch}.attention.sliding_window", 0, maximum=MAX_CONTEXT)
        windowed = window_layers(model, hp.n_layers, _PERIOD) if window else frozenset[int]()
        self.hp = replace(hp, window=window, window_layers=windowed)
        local_base = read_frequency_base(model, "{arch}.rope.freq_base_swa", 10000.0)
        self._local_rope = replace(hp.rope, freq_base=local_base, freq_scale=1.0)
        # The 27B model divides by the width that its heads would have if they shared the hidden state out. (A rank of
        # a cluster has some of the heads, and a file that says how many there are in all.)
        n_heads = model.get_int("edgert.shard.whole_head_count", hp.n_heads, minimum=1, maximum=MAX_HEADS)
        self._q_scale = inverse_sqrt(hp.hidden_size // n_heads if hp.n_layers == _N_LAYERS_27B else hp.head_dim)
        self._softcap = model.get_float("{arch}.final_logit_softcapping", 0.0)
        if not 0 <= self._softcap <= _MAX_SOFTCAP:
            raise ModelFileError(str(model.path), f"final_logit_softcapping is {self._softcap}, which is impossible")
        self._tied = "output.weight" not in model.tensors

    def specs(self, block: Block) -> tuple[TensorSpec, ...]:
        hp, layer = self.hp, block.layer
        match block.kind:
            case "embedding":
                return layers.embedding_specs(hp)
            case "attention":
                return (*layers.attention_specs(hp, layer), layers.vector(layer, "attn_q_norm", hp.head_dim),
                        layers.vector(layer, "attn_k_norm", hp.head_dim),
                        layers.vector(layer, "post_attention_norm", hp.hidden_size))
            case "ffn":
                return (*layers.ffn_specs(hp, layer), layers.vector(layer, "post_ffw_norm", hp.hidden_size))
            case "output":
                return layers.output_specs(hp, tied=self._tied)

    def layer_kind(self, layer: int) -> str:
        return "gemma3/window" if layer in self.hp.window_layers else "gemma3/full"

    def embed(self, g: Graph, w: Weights, token_ids: Tensor) -> Tensor:
        return g.scale(g.get_rows(w["token_embd.weight"], token_ids), math.sqrt(self.hp.hidden_size))

    def attention(self, g: Graph, layer: int, w: Weights, x: Tensor, inputs: StepInputs) -> Tensor:
        x = g.rms_norm(x, w["attn_norm.weight"], self.hp.rms_eps)
        q, k, v = layers.project_heads(g, w, x, self.hp.head_dim)
        q = g.rms_norm(q, w["attn_q_norm.weight"], self.hp.rms_eps)
        k = g.rms_norm(k, w["attn_k_norm.weight"], self.hp.rms_eps)
        rope = self._local_rope if layer in self.hp.window_layers else self.hp.rope
        q, k = (g.rope(t, inputs.positions, rope) for t in (q, k))
        return layers.attend(g, layer, w, g.scale(q, self._q_scale), k, v, inputs, scale=1.0)

    def add_attention(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        return g.add(g.rms_norm(summed, w["post_attention_norm.weight"], self.hp.rms_eps), x)

    def ffn_hidden(self, g: Graph, w: Weights, x: Tensor) -> Tensor:
        return layers.gated(g, w, g.rms_norm(x, w["ffn_norm.weight"], self.hp.rms_eps), "gelu")

    def ffn_down(self, g: Graph, w: Weights, hidden: Tensor) -> Tensor:
        return layers.linear(g, w, "ffn_down", hidden)

    def add_ffn(self, g: Graph, layer: int, w: Weights, x: Tensor, summed: Tensor) -> Tensor:
        return g.add(g.rms_norm(summed, w["post_ffw_norm.weight"], self.hp.rms_eps), x)

    def output(self, g: Graph, w: Weights, x: Tensor) -> Tensor:
        logits = layers.output_head(g, w, x, self.hp.rms_eps)
        if not self._softcap:
            return logits
        return g.scale(g.tanh(g.scale(logits, 1.0 / self._softcap)), self._softcap)
