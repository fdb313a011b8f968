"""The head as torch sees it: two linear maps, a rotation, and the loss that makes their product look like attention."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.distillation.examples import Example
from retrieval.distillation.synthetic import ANSWER, FACT
from retrieval.head_graphs import HeadParameters

N_SINKS, N_RECENT = 4, 32  # always in the set (retrieval/selection.py), so nobody has to find them
_LEAST_LOG = -30.0  # a token that the head rules out costs no more than this
_BASE = 10000.0  # of the rotation's frequencies; gaps in training's positions make it hold for longer contexts
_PEAK_SHARE = 0.3
_SHARP_WEIGHT, _ANSWER_WEIGHT = 2.0, 2.0


class Network(torch.nn.Module):
    """Scores of every cached token for every query.

    It learns from features less their `mean` and over their `spread` (n_features,): in a residual stream's few huge
    values, constant over tokens, lies most of its norm and nothing to learn. A head's file has them in its weights.
    """

    def __init__(self, n_features: int, dim: int, seed: int, mean: torch.Tensor | None = None,
                 spread: torch.Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.dim = dim
        self.register_buffer("mean", torch.zeros(n_features) if mean is None else mean)
        self.register_buffer("spread", torch.ones(n_features) if spread is None else spread)
        self.query, self.key = torch.nn.Linear(n_features, dim), torch.nn.Linear(n_features, dim)
        n_pairs = dim // 2
        self.register_buffer("frequencies", _BASE ** (-torch.arange(n_pairs) / n_pairs))

    def forward(self, queries: torch.Tensor, at: torch.Tensor, keys: torch.Tensor,
                positions: torch.Tensor) -> torch.Tensor:
        """(n_queries, n_tokens) of features (n_queries, n_features) and (n_tokens, n_features) and their positions."""
        q = self._rotated(self._linear(self.query, queries), at)
        k = self._rotated(self._linear(self.key, keys), positions)
        scores: torch.Tensor = q @ k.T / self.dim ** 0.5
        return scores

    def _linear(self, linear: torch.nn.Linear, features: torch.Tensor) -> torch.Tensor:
        mean, spread = self._buffer("mean"), self._buffer("spread")
        # The features stay as they are: there are far more of them than weights.
        weight = linear.weight / spread
        return features @ weight.T + (linear.bias - weight @ mean)

    def _buffer(self, name: str) -> torch.Tensor:
        buffer: torch.Tensor = getattr(self, name)
        return buffer

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        frequencies = self._buffer("frequencies")
        n, angles = len(frequencies), positions[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        a, b = x[:, :n], x[:, n:2 * n]
        return torch.cat([a * cos - b * sin, a * sin + b * cos, x[:, 2 * n:]], 1)

    def parameters_of_head(self) -> HeadParameters:
        """As they are written to a file: mean and spread in the weights, scores' scale in the query's."""
        weights, biases = dict[str, NDArray[np.float16]](), dict[str, NDArray[np.float32]]()
        for name, linear, scale in (("query", self.query, self.dim ** -0.5), ("key", self.key, 1.0)):
            weight = (linear.weight.detach() / self._buffer("spread") * scale).T.numpy().astype(np.float16)
            shift = self._buffer("mean").numpy() @ weight.astype(np.float32)  # of the rounded weights
            weights[name] = weight
            biases[name] = (linear.bias.detach().numpy() * scale - shift).astype(np.float32)
        return HeadParameters(weights, biases, self._buffer("frequencies").numpy().astype(np.float32))


class Lesson:
    """An example as tensors. The query of the step that reads token t is made of token t - 1."""

    def __init__(self, example: Example) -> None:
        self.features = torch.from_numpy(example.features.astype(np.float32))
        self.n_tokens = len(self.features)
        self.steps = torch.from_numpy(example.queries.astype(np.int64))
        self.tokens = torch.from_numpy(example.tokens.astype(np.int64))
        may_be_chosen = (self.tokens >= N_SINKS) & (self.tokens < self.steps[:, None] - N_RECENT)
        self.mean = torch.from_numpy(example.mean.astype(np.float32)) * may_be_chosen
        self.peak = torch.from_numpy(example.peak.astype(np.float32)) * may_be_chosen
        roles = torch.from_numpy(example.roles.astype(np.int64))
        self.is_fact = roles == FACT
        self.answers = roles[(self.steps + 1).clamp(max=self.n_tokens - 1)] == ANSWER

    def log_shares(self, network: Network, positions: torch.Tensor) -> torch.Tensor:
        """(n_queries, n_tokens): how the head divides attention, sinks and recent tokens left out."""
        before = self.steps - 1
        scores = network(self.features[before], positions[before], self.features, positions)
        tokens = torch.arange(self.n_tokens)
        closed = (tokens < N_SINKS) | (tokens >= self.steps[:, None] - N_RECENT)
        shares: torch.Tensor = scores.masked_fill(closed, -torch.inf).log_softmax(-1)
        return shares

    def loss(self, network: Network, positions: torch.Tensor) -> torch.Tensor:
        """Cross entropy of attention, its mean mixed with its peaks; queries count by how much they look far back, by
        how sharply, and more where an answer begins."""
        mean, peak = (part / (part.sum(-1, keepdim=True) + 1e-9) for part in (self.mean, self.peak))
        target = (1 - _PEAK_SHARE) * mean + _PEAK_SHARE * peak
        logs = self.log_shares(network, positions).gather(1, self.tokens).clamp(min=_LEAST_LOG)
        weight = self.mean.sum(-1).clamp(min=1e-3) * (1 + _SHARP_WEIGHT * self.peak.amax(-1))
        weight = torch.where(self.answers, _ANSWER_WEIGHT * weight, weight)
        loss: torch.Tensor = -(weight * (target * logs).sum(-1)).sum() / weight.sum()
        return loss
