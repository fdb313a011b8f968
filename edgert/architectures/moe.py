"""The expert FFN: a router picks a few experts for each token, and their outputs are added by weight.

In two steps, because whoever holds experts on disk must read the router's choice before the experts.
Source: arXiv 2401.04088, section 2.1. Shapes in ggml's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from edgert.architectures.base import Hyperparameters, TensorSpec, Weights
from edgert.architectures.layers import vector
from edgert.errors import ModelFileError
from edgert.ggml.graph import Activation, Graph, Tensor
from edgert.gguf.model_file import ModelFile

# softmax: over all experts, then choose; softmax_chosen: choose by logit, then softmax over the chosen.
Gating = Literal["softmax", "sigmoid", "softmax_chosen"]
# llama.cpp keeps the divisor of normalised weights above the smallest normal float16.
_MIN_WEIGHT_SUM = 6.103515625e-5
_LARGEST_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Routing:
    """What the router has decided, and the tokens that it is about."""

    x: Tensor  # (hidden_size, n_tokens): the experts' input, normed
    weights: Tensor  # (1, n_experts_used, n_tokens)
    ids: Tensor  # (n_experts_used, n_tokens) int32, best first


class ExpertArchitecture(Protocol):
    """What a family with experts gives beside what every family does (edgert/architectures/base.py)."""

    def router(self, g: Graph, layer: int, w: Weights, x: Tensor, carried: Tensor | None) -> Routing:
        """The choice for the hidden state x; of the FFN block's weights, it reads the norm and the router."""
        ...

    def experts(self, g: Graph, layer: int, w: Weights, x: Tensor, ids: Tensor) -> Tensor:
        """The chosen experts' outputs, as `outputs` gives them; it reads the experts alone."""
        ...


def check_experts(model: ModelFile, hp: Hyperparameters) -> None:
    """Raises ModelFileError where the file has no experts, or chooses them in a way that is not computed here."""
    if not hp.n_experts:
        raise ModelFileError(str(model.path), f"{hp.architecture} without experts is not supported")
    if model.get_int("{arch}.expert_group_count", 0) > 1:
        raise ModelFileError(str(model.path), "experts in groups (expert_group_count) are not supported")


def router_spec(hp: Hyperparameters, layer: int) -> TensorSpec:
    return TensorSpec(f"blk.{layer}.ffn_gate_inp.weight", (hp.hidden_size, hp.n_experts))


def ffn_specs(hp: Hyperparameters, layer: int) -> tuple[TensorSpec, ...]:
    """Norm, router and experts."""
    return vector(layer, "ffn_norm", hp.hidden_size), router_spec(hp, layer), *expert_specs(hp, layer)


def expert_specs(hp: Hyperparameters, layer: int) -> tuple[TensorSpec, ...]:
    """Gate, up and down matrices of all experts, each expert's in one piece."""
    hidden, ffn = hp.hidden_size, hp.expert_ffn_size
    sizes = (("ffn_gate", hidden, ffn), ("ffn_up", hidden, ffn), ("ffn_down", ffn, hidden))
    return tuple(TensorSpec(f"blk.{layer}.{name}_exps.weight", (n_in, n_out, hp.n_experts))
                 for name, n_in, n_out in sizes)


def route(g: Graph, x: Tensor, logits: Tensor, n_used: int, gating: Gating, *, normalise: bool) -> Routing:
    """Choose `n_used` experts for each token of x by the router's logits (n_experts, n_tokens)."""
    n_experts, n_tokens = logits.ne[:2]
    match gating:
        case "softmax":
            scores = g.soft_max(logits)
        case "sigmoid":
            scores = _ordered(g, g.sigmoid(logits))
        case "softmax_chosen":
            scores = _ordered(g, logits)
    ids = g.top_k(scores, n_used)
    chosen = g.get_rows(g.reshape(scores, 1, n_experts, n_tokens), ids)  # (1, n_used, n_tokens)
    weights = g.reshape(chosen, n_used, n_tokens)
    if gating == "softmax_chosen":
        weights = g.soft_max(weights)
    if normalise:
        total = g.clamp(g.sum_rows(weights), _MIN_WEIGHT_SUM, float("inf"))
        weights = g.div(weights, total)
    return Routing(x, g.reshape(weights, 1, n_used, n_tokens), ids)


def _ordered(g: Graph, scores: Tensor) -> Tensor:
    """The scores, with NaN made the largest number: ggml sorts with std::sort, whose behaviour is undefined where some
    scores do not compare. A damaged file must not reach that. (After a softmax, all of a token's are NaN or none.)"""
    return g.clamp(scores, -_LARGEST_FLOAT32, _LARGEST_FLOAT32)


def ffn(g: Graph, arch: ExpertArchitecture, layer: int, w: Weights, x: Tensor, carried: Tensor | None) -> Tensor:
    """Both steps at once, for weights that are all in memory. (hidden_size, n_tokens)."""
    routing = arch.router(g, layer, w, x, carried)
    return weigh(g, arch.experts(g, layer, w, routing.x, routing.ids), routing.weights)


def outputs(g: Graph, w: Weights, x: Tensor, ids: Tensor, activation: Activation) -> Tensor:
    """(hidden_size, n_used, n_tokens): what each token's experts `ids` (n_used, n_tokens) say of x (hidden_size,
    n_tokens). An id counts along the last dimension of the weights, whatever lies there."""
    x = g.reshape(x, x.ne[0], 1, x.ne[1])
    up = g.mul_mat_id(w["ffn_up_exps.weight"], x, ids)  # (expert_ffn_size, n_used, n_tokens)
    gate = g.mul_mat_id(w["ffn_gate_exps.weight"], x, ids)
    return g.mul_mat_id(w["ffn_down_exps.weight"], g.gated(gate, up, activation), ids)


def weigh(g: Graph, outputs: Tensor, weights: Tensor) -> Tensor:
    """(hidden_size, n_tokens) of outputs (hidden_size, n_used, n_tokens), which are lost, and weights (1, n_used,
    n_tokens)."""
    hidden_size, n_used, n_tokens, _ = outputs.ne
    weighted = g.mul_in_place(outputs, weights)
    rows = [g.view(weighted, (hidden_size, n_tokens), (weighted.nb[2],), i * weighted.nb[1]) for i in range(n_used)]
    total = rows[0]
    for row in rows[1:]:
        total = g.add(total, row)
    return total if n_used > 1 else g.contiguous(total)
