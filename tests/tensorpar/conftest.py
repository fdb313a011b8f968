"""A leader's home for the command and for `Runtime.load`, as EDGERT_HOME; and a leader that is patient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine any process may be slow for a while: here nobody is left behind for that."""
    monkeypatch.setattr("tensorpar.pace._SLOW", 1e9)


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`at_home(directory)`: everything of the user's lies there from now on."""
    return lambda home: monkeypatch.setenv("EDGERT_HOME", str(home))
