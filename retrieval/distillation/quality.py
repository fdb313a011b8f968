"""How good a head is on sequences that it did not learn from, as a set of tokens would show it: not by its loss.

A better loss on held-out text can come with worse retrieval, so what is measured is whether a set of a given budget
holds what attention needs: all of it (coverage), and the tokens of an answer's fact (recall).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from retrieval.distillation.network import N_RECENT, N_SINKS, Lesson, Network

_LEAST_PEAK = 0.3  # an answer's step looks at its fact where some head gives it so much


@dataclass(frozen=True, slots=True)
class Quality:
    """At one budget: `coverage` is the attention inside the head's set over that inside the best set; `recall` the
    share of the peaks on facts, at answers' steps, that the set holds."""

    coverage: float
    recall: float

    @property
    def score(self) -> float:
        """One number to stop by."""
        return self.coverage + self.recall


def quality_of(network: Network, lessons: Sequence[Lesson], budget: int) -> Quality:
    """Over all lessons. Recall is 1 where there is nothing to recall."""
    inside, best, recalled, to_recall = 0.0, 0.0, 0.0, 0.0
    with torch.no_grad():
        for lesson in lessons:
            logs = lesson.log_shares(network, torch.arange(lesson.n_tokens, dtype=torch.float32))
            chosen = logs.topk(min(budget - N_SINKS - N_RECENT, lesson.n_tokens)).indices
            mean, peak = (torch.zeros_like(logs).scatter_(1, lesson.tokens, part)
                          for part in (lesson.mean, lesson.peak))
            inside += float(mean.gather(1, chosen).sum())
            best += float(mean.topk(chosen.shape[1]).values.sum())
            peak = peak * lesson.is_fact
            asked = lesson.answers & (peak.amax(-1) > _LEAST_PEAK)
            recalled += float(peak.gather(1, chosen)[asked].sum())
            to_recall += float(peak[asked].sum())
    return Quality(inside / best if best else 1.0, recalled / to_recall if to_recall else 1.0)
