"""Run as a program: pulls argv[1] into the home argv[2] and says on standard output what its progress is told."""

from __future__ import annotations

import sys
from pathlib import Path

from edgert.models.catalog import Catalog
from edgert.models.pull import pull
from edgert.paths import Paths


class Telling:
    def start(self, total_bytes: int) -> None:
        pass

    def advance(self, n_bytes: int) -> None:
        pass

    def message(self, text: str) -> None:
        print(text, flush=True)

    def finish(self) -> None:
        pass


home = Path(sys.argv[2])
print(pull(sys.argv[1], Catalog(Paths(home / "models", home / "config", home / "cache"), environ={"HOME": str(home)}),
           Telling()), flush=True)
