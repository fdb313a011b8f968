"""Moves weights between two steps: out of the way of a growing context, and of other programs.

As the context crosses a threshold of the plan, weights make room for KV; as a prompt comes, experts make room for what
it computes in. When memory runs short around the process, weights are given back, the least worth first, and taken
again once there is plenty for a while: experts before what is pinned, for every token needs all of the one and few of
the other. What is given back is read meanwhile, so an answer in progress goes on with the same tokens. Knows no files
and no tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from edgert.memory.planner import Plan

_log = logging.getLogger(__name__)
# Looking costs some 100 us of reading /proc and /sys: 0.2 % of the time.
_LOOK_EVERY_S = 0.05
# Kept free for others, of the budget: what a neighbour may take between two tokens without anybody being killed.
_RESERVE_SHARE = 0.05
# Given back when less than one reserve is free, until one and a half are; taken again when more than three are, down
# to two. Between them nothing moves: reading weights back only to drop them again would cost more than it brings.
_GIVE_BELOW, _GIVE_UNTIL, _TAKE_ABOVE, _TAKE_DOWN_TO = 1.0, 1.5, 3.0, 2.0
# Of what is free beside the plan: twice what taking everything again needs, for a process is never exactly as planned.
_SHARE_OF_SPARE = 1 / (2 * _TAKE_ABOVE)
_CALM_S = 2.0
# Share of the last 10 s in which some task waited for memory (PSI): above it a step is given back, whatever is free.
_STALLED_PERCENT, _CALM_PERCENT = 10.0, 1.0
# The average moves slowly: another step only after what the one before did can be seen.
_STALL_STEP_EVERY_S = 2.0


class Pinned(Protocol):
    """Weights that can be told how much of them may stay."""

    @property
    def pinned_bytes(self) -> int: ...

    def pin(self, n_bytes: int) -> None: ...

    def spare_expert_bytes(self, n_slots: int) -> int:
        """What so many slots of experts could give back."""
        ...

    def keep_experts(self, n_slots: int, less_bytes: int) -> None:
        """Let experts have `n_slots`, less those that `less_bytes` are worth."""
        ...


class Cells(Protocol):
    """A KV cache that can give back what lies beyond its length."""

    length: int

    def give_back(self) -> None: ...


class Buffers(Protocol):
    """What prompts compute in; the next one makes it anew."""

    def give_back(self) -> None: ...


class Surroundings(Protocol):
    """What the machine says (edgert/memory/probe.py)."""

    def process_bytes(self) -> int: ...

    def available_bytes(self) -> int: ...

    def stalled_percent(self) -> float: ...


class Governor:
    """`before_step` is called between two steps, and only there."""

    def __init__(self, plan: Plan, weights: Pinned, kv: Cells, buffers: Buffers, surroundings: Surroundings,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._weights, self._kv, self._buffers = plan, weights, kv, buffers
        self._surroundings, self._clock = surroundings, clock
        self._n_tokens = 0  # the most that the cache's memory holds
        self._looked_s = self._calm_since_s = clock()
        self._stall_step_s = self._looked_s - _STALL_STEP_EVERY_S
        self.given_bytes = 0
        # What the plan will still take is no reserve: compute buffers are touched by the first prompt.
        to_come = max(0, plan.peak_bytes - surroundings.process_bytes())
        spare = max(0, surroundings.available_bytes() - to_come)
        self.reserve_bytes = min(int(plan.budget_bytes * _RESERVE_SHARE), int(spare * _SHARE_OF_SPARE))

    def before_step(self, n_tokens: int, leaves_buffers: bool) -> None:
        """Make room for a cache of `n_tokens`, and for a prompt's buffers, unless the step leaves them alone. Raises
        what reading weights back raises, Cancelled."""
        if self._plan.stage(n_tokens) != self._plan.stage(self._n_tokens) and n_tokens < self._n_tokens:
            self._kv.give_back()  # another text has begun
            self._n_tokens = 0
        self._n_tokens = max(self._n_tokens, n_tokens)
        now = self._clock()
        if now - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now
            self._look(now)
        stage = self._plan.stage(self._n_tokens)
        n_slots = stage.token_slots if leaves_buffers else stage.prompt_slots
        if n_slots > stage.prompt_slots:
            self._buffers.give_back()
        of_experts = min(self.given_bytes, self._weights.spare_expert_bytes(n_slots))
        self._weights.keep_experts(n_slots, of_experts)
        self._weights.pin(max(0, stage.pinned_bytes - (self.given_bytes - of_experts)))

    def _look(self, now: float) -> None:
        free, stalled = self._surroundings.available_bytes(), self._surroundings.stalled_percent()
        reserve = self.reserve_bytes
        stalls = stalled > _STALLED_PERCENT and now - self._stall_step_s >= _STALL_STEP_EVERY_S
        if free < _GIVE_BELOW * reserve or stalls:
            self._calm_since_s = now
            self._stall_step_s = now if stalls else self._stall_step_s
            step = max(int(_GIVE_UNTIL * reserve) - free, reserve if stalls else 0)
            stage = self._plan.stage(self._n_tokens)
            most = stage.pinned_bytes + self._weights.spare_expert_bytes(stage.token_slots)
            self.given_bytes = min(self.given_bytes + step, most)
            _log.info("memory runs short: %d MiB of weights given back", self.given_bytes >> 20)
        elif free <= _TAKE_ABOVE * reserve or stalled > _CALM_PERCENT:
            self._calm_since_s = now
        elif self.given_bytes and now - self._calm_since_s >= _CALM_S:
            self.given_bytes = max(0, self.given_bytes - (free - int(_TAKE_DOWN_TO * reserve)))
            _log.info("memory is free again: %d MiB of weights still given back", self.given_bytes >> 20)
