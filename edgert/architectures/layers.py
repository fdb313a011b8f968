"""The pieces that transformer families share, as operations on a graph. Shapes in ggml's order."""

from __future__ import annotations

from edgert.architectures.base import Hyperparameters, StepInputs, TensorSpec, Weights
from edgert.architectures.rounding import inverse_sqrt
from edgert.ggml.graph import Activation, Graph, Tensor


def embedding_specs(hp: Hyperparameters) -> tuple[TensorSpec, ...]:
    return (TensorSpec("token_embd.weight", (hp.hidden_size, hp.vocab_size), "table"),)


def output_specs(hp: Hyperparameters, *, tied: bool) -> tuple[TensorSpec, ...]:
    """The final norm and the head; a file without `output.weight` uses the embedding table as its head."""
    head = "token_embd.weight" if tied else "output.weight"
    return (TensorSpec("output_norm.weight", (hp.hidden_size,), "vector"),
            TensorSpec(head, (hp.hidden_size, hp.head_rows)),
            TensorSpec("output.bias", (hp.head_rows,), "vector", optional=True))


def attention_specs(hp: Hyperparameters, layer: int) -> tuple[TensorSpec, ...]:
    """Norm, Q, K, V and output projections, each with a bias where the file has one."""
    q_size = hp.n_heads * hp.head_dim
    specs = [vector(layer, "attn_norm", hp.hidden_size)]
    for name, n_in, n_out in (("attn_q", hp.hidden_size, q_size), ("attn_k", hp.hidden_size, hp.kv_size),
                              ("attn_v", hp.hidden_size, hp.kv_size), ("attn_output", q_size, hp.hidden_size)):
        specs += _linear_specs(layer, name, n_in, n_out)
    return tuple(specs)


def ffn_specs(hp: Hyperparameters, layer: int) -> tuple[TensorSpec, ...]:
    """Norm and a gated FFN: gate, up, down, each with a bias where the file has one."""
    specs = [vector(layer, "ffn_norm", hp.hidden_size)]
    for name, n_in, n_out in (("ffn_gate", hp.hidden_size, hp.ffn_size), ("ffn_up", hp.hidden_size, hp.ffn_size),
                              ("ffn_down", hp.ffn_size, hp.hidden_size)):
        specs += _linear_specs(layer, name, n_in, n_out)
    return tuple(specs)


def vector(layer: int, name: str, size: int) -> TensorSpec:
    """A norm's weights."""
    return TensorSpec(f"blk.{layer}.{name}.weight", (size,), "vector")


def _linear_specs(layer: int, name: str, n_in: int, n_out: int) -> tuple[TensorSpec, TensorSpec]:
    return (TensorSpec(f"blk.{layer}.{name}.weight", (n_in, n_out)),
            TensorSpec(f"blk.{layer}.{name}.bias", (n_out,), "vector", optional=True))


def linear(g: Graph, w: Weights, name: str, x: Tensor) -> Tensor:
    """x times `{name}.weight`, plus `{name}.bias` where the file has one."""
    y = g.mul_mat(w[f"{name}.weight"], x)
    bias = w.get(f"{name}.bias")
    return g.add(y, bias) if bias is not None else y


def project_heads(g: Graph, w: Weights, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V of x, which is normed already: each (head_dim, its heads, n_tokens).

    The heads that count are those whose weights are here: a rank of a cluster holds some.
    """
    q, k, v = (heads(g, linear(g, w, name, x), head_dim) for name in ("attn_q", "attn_k", "attn_v"))
    return q, k, v


def heads(g: Graph, x: Tensor, head_dim: int) -> Tensor:
    """(head_dim, n_heads, n_tokens) of (n_heads * head_dim, n_tokens)."""
    return g.reshape(x, head_dim, x.ne[0] // head_dim, x.ne[1])


def attend(g: Graph, layer: int, w: Weights, q: Tensor, k: Tensor, v: Tensor, inputs: StepInputs,
           scale: float | None = None) -> Tensor:
    """Append k and v to the cache, attend, project back. (hidden_size, n_tokens)."""
    attended = inputs.kv.attend(g, layer, q, k, v, inverse_sqrt(q.ne[0]) if scale is None else scale)
    return linear(g, w, "attn_output", attended)


def gated(g: Graph, w: Weights, x: Tensor, activation: Activation) -> Tensor:
    """activation(gate(x)) * up(x). (ffn_size, n_tokens)."""
    up = linear(g, w, "ffn_up", x)
    gate = linear(g, w, "ffn_gate", x)
    return g.gated(gate, up, activation)


def output_head(g: Graph, w: Weights, x: Tensor, eps: float) -> Tensor:
    """Logits (head_rows, n_outputs): final norm, then the head or the tied embedding table."""
    x = g.rms_norm(x, w["output_norm.weight"], eps)
    head = w.get("output.weight")
    logits = g.mul_mat(head if head is not None else w["token_embd.weight"], x)
    bias = w.get("output.bias")
    return g.add(logits, bias) if bias is not None else logits
