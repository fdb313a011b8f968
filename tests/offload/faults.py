"""A prompt of three batches, and steps that are stopped: what tests of faults share. Fixtures are in conftest.py."""

from __future__ import annotations

import numpy as np
import pytest
from engine.engines import random_tokens
from numpy.typing import NDArray

from edgert.engine.engine import Engine
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Graph

PROMPT, NEXT = random_tokens(150), [7]
BATCH = 64  # the prompt is three batches


def step(engine: Engine, token_ids: list[int]) -> NDArray[np.float32]:
    return engine.step(np.array(token_ids, np.int32))[0]


def stop_at(engine: Engine, monkeypatch: pytest.MonkeyPatch, n_graphs: int) -> None:
    """Cancel while graph number `n_graphs` of the next step computes."""
    compute, count = Backend.compute, iter(range(n_graphs + 1))

    def computes(backend: Backend, graph: Graph) -> None:
        if next(count, -1) == n_graphs:
            engine.cancel()
        compute(backend, graph)

    monkeypatch.setattr(Backend, "compute", computes)
