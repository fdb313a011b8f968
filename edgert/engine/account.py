"""Where the time of an answer goes: computing, waiting for weights, and the rest. Every moment counts once."""

from __future__ import annotations

import time
from dataclasses import dataclass

from edgert.engine.weights import WeightSource


@dataclass(slots=True)
class Account:
    """Sums over a part of an answer. `wait_ms` is what reading took beyond what computing hid; `rest_ms` is sampling,
    text and whoever reads it. Bytes are counted when they have come from disk, often ahead of their use."""

    compute_ms: float = 0.0
    wait_ms: float = 0.0
    rest_ms: float = 0.0
    read_bytes: int = 0


class Laps:
    """Divides the time since it was made between accounts, without gaps."""

    def __init__(self, weights: WeightSource) -> None:
        self._weights = weights
        self._mark_s = time.perf_counter()
        self._waited_s, self._read_bytes = weights.waited_s, weights.streamed_bytes

    def step(self, account: Account) -> float:
        """What passed since the last lap was a pass through the model. Seconds."""
        lap_s, waited_s = self._lap(account)
        account.wait_ms += waited_s * 1000
        account.compute_ms += (lap_s - waited_s) * 1000
        return lap_s

    def rest(self, account: Account) -> None:
        """What passed since the last lap was anything else."""
        account.rest_ms += self._lap(account)[0] * 1000

    def _lap(self, account: Account) -> tuple[float, float]:
        """Seconds that passed, and how many of them leases have waited."""
        before = self._mark_s, self._waited_s, self._read_bytes
        self._mark_s, self._waited_s, self._read_bytes = (
            time.perf_counter(), self._weights.waited_s, self._weights.streamed_bytes)
        account.read_bytes += self._read_bytes - before[2]
        return self._mark_s - before[0], self._waited_s - before[1]
