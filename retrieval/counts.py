"""What steps over a set of tokens have cost, for who asks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """Of all steps that attended to a set."""

    n_steps: int = 0
    n_whole: int = 0  # steps that looked at everything
    n_selected: int = 0
    n_fetched: int = 0
    n_late: int = 0  # were not there when the step's first layer was to begin
    n_reads: int = 0
    read_bytes: int = 0
    select_s: float = 0.0
    fetch_s: float = 0.0
    aside_s: float = 0.0  # choosing beside the step before
