"""What is timed, and what the times say: from a run's timestamps to tokens per second. Pure functions.

Tests and their names are llama-bench's. The rate of an answer counts from its first token to its last, (n-1) / (t_last
- t_first), so that what a first step does besides (graphs, a window that is empty) is not part of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

_NS = 1e9


@dataclass(frozen=True, slots=True)
class SpeedTest:
    """`n_prompt` tokens at once and then `n_gen` one by one, after `n_depth` tokens that nobody times."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        """`pp512`, `tg128`, `pp512+tg128`, `pp512 @ d512`."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_timed(self) -> int:
        return self.n_prompt + self.n_gen

    @property
    def n_tokens(self) -> int:
        """What the context must hold."""
        return self.n_depth + self.n_timed


@dataclass(frozen=True, slots=True)
class Counters:
    """What an engine has counted until some moment: bytes read, time that computing waited for them, and of the
    experts that were asked for, those that were in memory and those that were not."""

    read_bytes: int = 0
    wait_ns: int = 0
    expert_hits: int = 0
    expert_misses: int = 0

    def since(self, before: Counters) -> Counters:
        return Counters(self.read_bytes - before.read_bytes, self.wait_ns - before.wait_ns,
                        self.expert_hits - before.expert_hits, self.expert_misses - before.expert_misses)


@dataclass(frozen=True, slots=True)
class Run:
    """One repetition, in nanoseconds of the system's monotonic clock, which all processes share: its beginning, the
    end of its prompt (its beginning, where it has none), and when each token of its answer was there."""

    start_ns: int
    prompt_end_ns: int
    token_ns: tuple[int, ...] = ()
    prompt: Counters = field(default_factory=Counters)
    answer: Counters = field(default_factory=Counters)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Self:
        return cls(told["start_ns"], told["prompt_end_ns"], tuple(told["token_ns"]), Counters(**told["prompt"]),
                   Counters(**told["answer"]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def end_ns(self) -> int:
        return self.token_ns[-1] if self.token_ns else self.prompt_end_ns

    @property
    def total_ns(self) -> int:
        return max(1, self.end_ns - self.start_ns)

    @property
    def gaps_ns(self) -> list[int]:
        """Between one token of the answer and the next."""
        return [after - before for before, after in zip(self.token_ns, self.token_ns[1:], strict=False)]


def prompt_rate(test: SpeedTest, run: Run) -> float | None:
    """Tokens/s of the prompt; None where there is none."""
    return test.n_prompt * _NS / max(1, run.prompt_end_ns - run.start_ns) if test.n_prompt else None


def steady_rate(times: Sequence[float], tick: float = 1e-9) -> float:
    """Tokens per unit of `times`, each the moment of a token: (n-1) / (t_last - t_first). At least two of them; `tick`
    is the least time that the clock can tell."""
    return (len(times) - 1) / max(times[-1] - times[0], tick)


def answer_rate(run: Run) -> float | None:
    """Tokens/s of the answer: (n-1) / (t_last - t_first), or of its only token; None where there is none."""
    n_tokens = len(run.token_ns)
    if n_tokens < 2:
        return _NS / max(1, run.token_ns[0] - run.prompt_end_ns) if n_tokens else None
    return steady_rate(run.token_ns, 1) * _NS


def rate(test: SpeedTest, run: Run) -> float:
    """Tokens/s of the test: of its prompt, of its answer, or of both together by the time that both took."""
    if test.n_prompt and test.n_gen:
        return test.n_timed * _NS / run.total_ns
    alone = prompt_rate(test, run) if test.n_prompt else answer_rate(run)
    assert alone is not None  # a test has tokens
    return alone


def deviation(samples: Sequence[float]) -> float:
    """Of a sample (n - 1); 0 for a single one."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over repetitions of ours over theirs: what was measured in turn is compared with its neighbour, so
    that a slow minute moves it least."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def combinations(prompts: Sequence[int], gens: Sequence[int], pairs: Sequence[tuple[int, int]],
                 depths: Sequence[int]) -> list[SpeedTest]:
    """Every combination, in llama-bench's order; a size of 0 is no test."""
    return [SpeedTest(n_prompt, n_gen, depth) for depth in depths
            for n_prompt, n_gen in [*((p, 0) for p in prompts), *((0, n) for n in gens), *pairs] if n_prompt or n_gen]
