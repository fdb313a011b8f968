from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served

playwright = pytest.importorskip("playwright.sync_api")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")
# A busy machine may freeze for minutes; a page that hangs is found all the same.
DEADLINE_MS = 200_000


@pytest.fixture(scope="session")
def chatting(tmp_path_factory: pytest.TempPathFactory, real_model: Callable[[str], Path]) -> Iterator[Served]:
    """A server over the real default model, for all tests of the page."""
    with Served(tmp_path_factory.mktemp("chatting"), real_model("smollm2-135m"), "--context", "1k") as server:
        yield server


@pytest.fixture(scope="module")  # its event loop, as long as it is there, is in the way of other tests' own
def browser(tmp_path_factory: pytest.TempPathFactory, require: Callable[[object, str], None]) -> Iterator[Any]:
    """Chromium as a user has it: one profile, which starts empty."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    require(path, "there is no chromium")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=path, args=list(FLAGS), accept_downloads=True,
            viewport={"width": 1280, "height": 800})
        context.set_default_timeout(DEADLINE_MS)
        yield context
        context.close()


@pytest.fixture
def new_page(browser: Any, chatting: Served) -> Iterator[Callable[..., Any]]:
    """`new_page(path="/")`: a tab on the page, once it is interactive. No tab may log an error."""
    pages: list[Any] = []
    troubles: list[str] = []

    def is_trouble(message: Any) -> bool:
        # A server that was killed on purpose, and requests that are refused on purpose, are logged by the browser.
        return message.type == "error" and "Failed to load resource" not in message.text

    def open_page(path: str = "/", url: str = chatting.url, *, wait: bool = True) -> Any:
        page = browser.new_page()
        pages.append(page)
        page.on("console", lambda message: troubles.append(message.text) if is_trouble(message) else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(f"{url}{path}")
        if wait:
            page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert troubles == []


@pytest.fixture
def page(new_page: Callable[..., Any]) -> Any:
    return new_page()


@pytest.fixture(scope="session")
def shots_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: EDGERT_TEST_SHOTS if that names a directory."""
    directory = Path(os.environ.get("EDGERT_TEST_SHOTS") or tmp_path_factory.mktemp("shots"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def shots(shots_directory: Path) -> Callable[[Any, str], None]:
    """`shots(page, name)` writes a screenshot."""

    def shoot(page: Any, name: str) -> None:
        path = shots_directory / f"{name}.png"
        page.screenshot(path=path)
        assert path.stat().st_size > 10_000  # not an empty page

    return shoot
