"""What tests of faults ask for, over the `path` and the `engine` of their own module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine.engines import open_engine
from faults import BATCH, NEXT, PROMPT
from faulty_disk import FaultyDisk
from numpy.typing import NDArray
from streaming import logits_of

from edgert.engine.engine import Engine


@pytest.fixture
def expected(path: Path) -> list[NDArray[np.float32]]:
    """Logits of the prompt and two tokens, from resident weights."""
    with open_engine(path, batch_size=BATCH) as engine:
        return logits_of(engine, [PROMPT, NEXT, NEXT])


@pytest.fixture
def disk(path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyDisk]:
    disk = FaultyDisk(path).install(monkeypatch)
    yield disk
    disk.fails_with = None
    disk.answer()
