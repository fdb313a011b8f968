"""What a retrieval head sees of a token: its embedding and its hidden states after some layers, each normed.

Source: shared/design's measurements: a head that sees embeddings alone finds nothing, one that sees hidden states
in its queries and in its keys does. Knows no head and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# As in every model's own norm: keeps a token of zeros finite.
_EPS = 1e-6


def feature_layers_of(n_layers: int) -> tuple[int, ...]:
    """The layers whose residual stream a head sees: early, in the middle, and the last but one."""
    last = n_layers - 2  # after the last layer, only tokens whose logits are wanted are left
    return tuple(sorted({min(layer, last) for layer in (2, n_layers // 2, last) if last >= 0}))


def rms(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row of (n, size) divided by its root mean square."""
    normed: NDArray[np.float32] = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + _EPS)
    return normed


def features_of(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """(n, n_features) float32 of the embeddings (n, hidden_size) and of the residual streams of each feature layer."""
    return np.concatenate([rms(part) for part in parts], axis=-1, dtype=np.float32)
