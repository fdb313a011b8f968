from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served import Served


@pytest.fixture(scope="session")
def tiny(tiny_model: Callable[..., Path]) -> Path:
    """A small model with a vocabulary and ChatML, whose context is long enough to be slow."""
    return tiny_model("llama", context_length=8192)


@pytest.fixture(scope="session")
def slow(tiny_model: Callable[..., Path]) -> Path:
    """A model that takes seconds for a prompt of some thousand tokens."""
    return tiny_model("llama", context_length=8192, n_layers=16, hidden_size=512, n_heads=8)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Served]:
    """One server over the tiny model, for every test that leaves it as it was."""
    with Served(tmp_path_factory.mktemp("served"), tiny, "--context", "8k") as server:
        yield server


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory, slow: Path) -> Iterator[Served]:
    """One server over the slow model, with a short queue."""
    with Served(tmp_path_factory.mktemp("busy"), slow, "--context", "8k", "--queue", 3) as server:
        yield server
