"""Who wants to see the residual stream of a step's tokens, and of which layers. Where nobody does, none is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.engine.batch import Batch


class FeatureSink(Protocol):
    @property
    def feature_layers(self) -> frozenset[int]:
        """The layers behind which the stream is kept, all below n_layers - 1; the embedding's rows always are."""
        ...

    def take(self, batch: Batch, streams: Sequence[NDArray[np.float32]]) -> None:
        """The batch's embedding rows, then the stream after each layer in rising order, each (n_tokens, hidden_size).
        Called once they are all known: layers beyond may still have to be computed, and may fail. The memory is the
        next computation's: what is to last must be copied."""
        ...
