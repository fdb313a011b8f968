"""What the plan promises for an answer, and what the answer teaches about the device."""

from __future__ import annotations

from dataclasses import dataclass

from edgert.engine.weights import WeightSource
from edgert.generation import Generation, Timings
from edgert.memory.governor import Governor
from edgert.memory.model import Prediction
from edgert.memory.planner import Plan, predict_pass
from edgert.planning import Planning

# Of shorter answers, single tokens say more about the moment than about the device.
_LEARN_FROM_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one engine. Silent on a device of which nothing is known; `learns` says whether answers correct what is."""

    planning: Planning
    plan: Plan
    weights: WeightSource
    governor: Governor | None
    learns: bool

    def promise(self, timings: Timings) -> None:
        """Write into `timings` what is expected of the answer that begins."""
        if self.planning.is_calibrated or self.planning.profile.corrections:
            n_prompt, n_cached = timings.prompt_n, timings.cache_n
            timings.forecast_per_second = round(1 / self.predict(1, n_cached + n_prompt).total_s, 3)
            timings.forecast_time_to_first_token_ms = round(self.predict(n_prompt, n_cached).total_s * 1000, 3)

    def learn(self, answer: Generation) -> None:
        """Correct the profile by passes of one token, unless other programs had a part in them; and by which experts
        they used."""
        if not self.learns or answer.decoded_n < _LEARN_FROM_TOKENS:
            return
        curve = self.weights.experts.hit_curve() if self.weights.experts is not None else None
        if curve is not None:
            self.planning.learn_hits(curve)
        if self.governor is not None and self.governor.given_bytes:
            return
        n_said = len(answer.prompt_token_ids) + len(answer.token_ids) // 2
        expected = self.predict(1, min(n_said, self.plan.context_length - 1))
        self.planning.learn("disk" if expected.limit == "disk" else "compute",
                            answer.decode_s / answer.decoded_n / expected.total_s)

    def predict(self, n_tokens: int, n_cached: int) -> Prediction:
        """What a pass of `n_tokens` over a cache of `n_cached` should take."""
        return predict_pass(self.planning.demand, self.planning.profile, self.plan, n_tokens, n_cached)
