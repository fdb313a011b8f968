"""A leader's home for the command and for `Runtime.load`, as EDGERT_HOME."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`at_home(directory)`: everything of the user's lies there from now on."""
    return lambda home: monkeypatch.setenv("EDGERT_HOME", str(home))
