"""What is asked of a measurement, and who watches it. Values only; session.py does what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from apps.bench.contenders import EngineName, Setup
from apps.bench.speed import SpeedTest

if TYPE_CHECKING:
    from edgert.engine.layouts import LayoutChoice


@dataclass(frozen=True, slots=True)
class Peer:
    """A contender to be opened: `name` in rows and messages, and the layout, where it is not the setup's."""

    name: str
    engine: EngineName
    layout: LayoutChoice | None = None

    def of(self, setup: Setup) -> Setup:
        """The setup with this contender's layout."""
        return replace(setup, layout=self.layout or setup.layout)


OURS = Peer("edgert", "edgert")


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be measured, and how."""

    path: Path
    parts: tuple[Path, ...]
    setups: tuple[Setup, ...]
    tests: tuple[SpeedTest, ...]
    repetitions: int
    peers: tuple[Peer, ...] = (OURS,)
    is_limited: bool = False
    is_cold: bool = False
    delay_s: float = 0.0
    cool_to_c: float | None = None
    cluster: Mapping[str, Any] | None = None
    predicts: bool = True
    verbosity: int = 0
    log_json: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work whose time can be guessed: tokens at once, and tokens one by one."""

    key: str
    n_prompt: int
    n_gen: int


class Watcher(Protocol):
    """Who shows how far it is."""

    def planned(self, works: Sequence[Work]) -> None: ...

    def doing(self, what: str) -> None: ...

    def done(self, work: Work, seconds: float) -> None: ...

    def warn(self, message: str) -> None: ...
