"""A hub on the loopback, a home with nothing in it, and a client whose waiting takes no time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, running
from recorder import Recorder

from edgert.models.catalog import Catalog
from edgert.models.hub import Hub, HubSettings
from edgert.paths import Paths


@pytest.fixture
def hub_server() -> Iterator[FakeHub]:
    with running(FakeHub()) as server:
        yield server


@pytest.fixture
def cdn_server(hub_server: FakeHub) -> Iterator[FakeHub]:
    """A second server, to which the hub redirects every file."""
    with running(FakeHub()) as server:
        hub_server.cdn = server
        yield server


@pytest.fixture
def waits() -> list[float]:
    """How long the client would have slept, wait by wait."""
    return []


@pytest.fixture
def hub(hub_server: FakeHub, waits: list[float]) -> Hub:
    return Hub(HubSettings(hub_server.url), waits.append)


@pytest.fixture
def progress() -> Recorder:
    return Recorder()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def catalog(home: Path) -> Catalog:
    """A catalog of a user who has nothing yet; edgert's own models go to home/edgert/models."""
    return Catalog(Paths(home / "edgert/models", home / "edgert/config", home / "edgert/cache"),
                   environ={"HOME": str(home)})
