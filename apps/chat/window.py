"""Shows the page: in a window of pywebview where that is installed, else in the browser.

The server runs in a thread beside the window, since a window wants the main thread; without one it has the main
thread to itself.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgert.errors import EdgertError

if TYPE_CHECKING:
    import socket

    from apps.server.serving import Server

_log = logging.getLogger(__name__)
_START_DEADLINE_S = 30.0
_STOP_DEADLINE_S = 15.0
_SIZE, _MIN_SIZE = (1180, 800), (360, 480)


def show(make_server: Callable[[Callable[[], None]], Server], listening: socket.socket, url: str, *,
         browser: bool) -> int:
    """Serve on `listening` and show `url` until the window is closed, or Ctrl-C; the exit status."""
    if browser or not _has_window():
        return _in_browser(make_server, listening, url)
    ready = threading.Event()
    server = make_server(ready.set)
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), name="server", daemon=True)
    thread.start()
    if not ready.wait(_START_DEADLINE_S):
        raise EdgertError("the server does not start", "Run `edgert serve` to see why.")
    try:
        if not _open_window(url):
            _open_browser(url)
            thread.join()
    except KeyboardInterrupt:  # the ordinary end of a chat that was started on a terminal
        pass
    finally:
        server.should_exit = True
        thread.join(_STOP_DEADLINE_S)
    return 0


def _in_browser(make_server: Callable[[Callable[[], None]], Server], listening: socket.socket, url: str) -> int:
    make_server(lambda: _open_browser(url)).run(sockets=[listening])
    return 0


def _open_browser(url: str) -> None:
    print(f"edgert's chat is on {url}/ (Ctrl-C ends it)", file=sys.stderr, flush=True)
    threading.Thread(target=webbrowser.open, args=(f"{url}/",), daemon=True).start()


def _has_window() -> bool:
    if importlib.util.find_spec("webview") is None:
        return False
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _open_window(url: str) -> bool:
    """Show the window until it is closed; False where pywebview finds nothing to draw it with."""
    # On NVIDIA's drivers WebKit's faster way leaves the window blank.
    os.environ.setdefault("WEBKIT_DISABLE_DMABUF_RENDERER", "1")
    import webview

    logging.getLogger("pywebview").setLevel(logging.CRITICAL)  # each library that is missing, with its traceback
    webview.settings["ALLOW_DOWNLOADS"] = True  # exported conversations
    webview.create_window("edgert", f"{url}/", width=_SIZE[0], height=_SIZE[1], min_size=_MIN_SIZE, text_select=True)
    try:
        webview.start(private_mode=False)
    except webview.errors.WebViewException as error:
        _log.warning("no window: %s", error)
        return False
    return True
