"""Trains a head on what the teacher has shown, and keeps the one that retrieves best on held-out sequences.

Knows epochs and checkpoints. Same seed and same examples: same head, on the same build of torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from retrieval.distillation.examples import Example
from retrieval.distillation.network import Lesson, Network
from retrieval.distillation.quality import Quality, quality_of

_WARM_UP_STEPS, _LEAST_RATE_SHARE, _MAX_NORM = 50, 0.05, 1.0
_GAP_TOKENS, _GAP_SHARE = 4096, 0.5  # PoSE, arXiv 2309.10400: positions jump, so far distances are seen
_N_COUNTED, _LEAST_SPREAD = 16, 0.05  # examples; of a token's features the root mean square is 1
QUALITY_BUDGET = 128


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. Rates fall until the last epoch, which is often the best: nothing stops early."""

    dim: int = 64
    n_epochs: int = 12
    rate: float = 1e-3
    seed: int = 7


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one pass over the examples gave. `is_best` of all so far."""

    number: int
    loss: float
    quality: Quality
    is_best: bool


class Training:
    """The epochs of one head, from where a checkpoint left them. Examples are read from disk one by one."""

    def __init__(self, train: Sequence[Path], held_out: Sequence[Path], recipe: Recipe, checkpoint: Path) -> None:
        self._train, self._recipe, self._checkpoint = list(train), recipe, checkpoint
        self.held_out = [Lesson(Example.load(path)) for path in held_out]
        mean, spread = _statistics(self._train)
        self.network = Network(len(mean), recipe.dim, recipe.seed, mean, spread)
        self._optimiser = torch.optim.AdamW(self.network.parameters(), recipe.rate, betas=(0.9, 0.98),
                                            weight_decay=1e-4)
        self._done, self._best_score = 0, -math.inf
        self._best = {name: value.clone() for name, value in self.network.state_dict().items()}
        if checkpoint.exists():
            self._resume()

    @property
    def n_epochs_done(self) -> int:
        return self._done

    def run(self, deadline_s: float, on_epoch: Callable[[Epoch], None]) -> Quality:
        """Train until the recipe's end, or `deadline_s` of the monotonic clock at the end of an epoch. The network then
        holds the best parameters; their quality."""
        while self._done < self._recipe.n_epochs:
            loss = self._epoch(self._done)
            quality = quality_of(self.network, self.held_out, QUALITY_BUDGET)
            is_early = self._done < self._recipe.n_epochs // 2  # at high rates a better figure is luck: the last counts
            is_best = is_early or quality.score > self._best_score
            if is_best:
                self._best_score = quality.score
                self._best = {name: value.clone() for name, value in self.network.state_dict().items()}
            self._done += 1
            self._save()
            on_epoch(Epoch(self._done, loss, quality, is_best))
            if time.monotonic() > deadline_s:
                break
        self.network.load_state_dict(self._best)
        return quality_of(self.network, self.held_out, QUALITY_BUDGET)

    def _epoch(self, number: int) -> float:
        rng, total = np.random.default_rng((self._recipe.seed, number)), 0.0
        n_steps = self._recipe.n_epochs * len(self._train)
        for index, which in enumerate(rng.permutation(len(self._train))):
            lesson = Lesson(Example.load(self._train[which]))
            step = number * len(self._train) + index
            for group in self._optimiser.param_groups:
                group["lr"] = self._recipe.rate * _rate_share(step, n_steps)
            loss = lesson.loss(self.network, _positions(lesson.n_tokens, rng))
            self._optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), _MAX_NORM)
            self._optimiser.step()
            total += float(loss.detach())
        return total / len(self._train)

    def _plan(self) -> dict[str, float]:
        return {**asdict(self._recipe), "n_examples": len(self._train)}

    def _save(self) -> None:
        partial = self._checkpoint.with_suffix(".partial")
        torch.save({"network": self.network.state_dict(), "optimiser": self._optimiser.state_dict(), "best": self._best,
                    "done": self._done, "best_score": self._best_score,
                    "of": self._plan()}, partial)
        partial.replace(self._checkpoint)

    def _resume(self) -> None:
        saved = torch.load(self._checkpoint, weights_only=True)
        if saved["of"] != self._plan():  # another recipe, or more was captured since: the schedule is another
            return
        self.network.load_state_dict(saved["network"])
        self._optimiser.load_state_dict(saved["optimiser"])
        self._done, self._best, self._best_score = saved["done"], saved["best"], saved["best_score"]


def _statistics(paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread of each feature, over some examples."""
    features = np.concatenate([Example.load(path).features for path in paths[:_N_COUNTED]]).astype(np.float32)
    spread = np.maximum(features.std(0), _LEAST_SPREAD)
    return torch.from_numpy(features.mean(0)), torch.from_numpy(spread)


def _rate_share(step: int, n_steps: int) -> float:
    """Up from nothing, then down along a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / n_steps))
    return min(1.0, (step + 1) / _WARM_UP_STEPS) * (_LEAST_RATE_SHARE + (1 - _LEAST_RATE_SHARE) * cosine)


def _positions(n_tokens: int, rng: np.random.Generator) -> torch.Tensor:
    """Consecutive, or with one or two gaps as long as whole contexts."""
    positions = torch.arange(n_tokens, dtype=torch.float32)
    if rng.random() < _GAP_SHARE:
        for _ in range(rng.integers(1, 3)):
            positions[rng.integers(1, n_tokens):] += float(rng.integers(0, _GAP_TOKENS))
    return positions
