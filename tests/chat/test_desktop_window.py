"""`edgert chat` with pywebview and GTK on a screen of its own: the page is drawn, and Ctrl-C closes it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from screen import Screen
from served import DEADLINE_S

_SYSTEMS_GI = Path("/usr/lib/python3/dist-packages/gi")
# The badge beside the model's name (style.css): the page's script draws it, once the server has told the models.
_BADGE = (0xd9, 0xef, 0xec)


@pytest.fixture
def gtk(tmp_path: Path) -> list[str]:
    """What PYTHONPATH needs so that pywebview finds GTK, as an environment with the system's packages would."""
    is_ours = find_spec("gi") is not None
    if not is_ours and next(_SYSTEMS_GI.glob(f"_gi.{sys.implementation.cache_tag}-*.so"), None) is None:
        pytest.skip("there is no GTK for this Python (Debian's python3-gi)")
    if not list(Path("/usr/lib").glob("*/girepository-1.0/WebKit2-4.?.typelib")):
        pytest.skip("there is no WebKit (Debian's gir1.2-webkit2-4.1)")
    if find_spec("webview") is None or shutil.which("Xvfb") is None:
        pytest.skip("there is no pywebview, or no Xvfb")
    if is_ours:
        return []
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / "gi").symlink_to(_SYSTEMS_GI)
    return [str(tmp_path / "system")]


def test_a_window_shows_the_page(gtk: list[str], tmp_path: Path, tiny_model: Callable[..., Path],
                                 shots_directory: Path) -> None:
    environment: dict[str, Any] = {
        **os.environ, "EDGERT_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_DATA_HOME": str(tmp_path / "data"), "PYTHONPATH": os.pathsep.join([*gtk, *filter(None, sys.path)])}
    with Screen(tmp_path) as screen:
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys; from apps.cli.main import main; sys.exit(main(sys.argv[1:]))", "chat",
             str(tiny_model("llama")), "--threads", "1"], env={**environment, "DISPLAY": screen.display})
        try:
            deadline = time.monotonic() + DEADLINE_S
            while screen.count(*_BADGE) < 100:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            screen.save(shots_directory / "window.png")
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
            process.wait()
