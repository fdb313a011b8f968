"""The chat app's edges: the first run, a key, a server that is killed, a window."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from served import DEADLINE_S, Served
from test_page import LONG, SHORT, new_chat, say, texts, wait_finished, wait_said

FAKE_WEBVIEW = '''
"""Stands in for pywebview: opens nothing, but loads the page as a window would, and is closed by its user."""
import pathlib, types, urllib.request
class WebViewException(Exception):
    pass
errors = types.SimpleNamespace(WebViewException=WebViewException)
settings = {}
def create_window(title, url, **options):
    page = urllib.request.urlopen(url).read().decode()
    pathlib.Path(__file__).with_name("shown").write_text(f"{settings} {title} {page}")
def start(**options):
    START
'''


def test_without_a_model_three_are_offered_that_suit(new_page: Callable[..., Any], tmp_path: Path,
                                                     real_model: Callable[[str], Path],
                                                     shots: Callable[[Any, str], None]) -> None:
    empty = {"HOME": str(tmp_path), "EDGERT_MODELS_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with Served(tmp_path / "home", "--context", "1k", **empty) as server:
        page = new_page(url=server.url)
        page.wait_for_selector("#welcome .card:nth-child(3)")
        assert page.locator("#welcome .card .badge").count() == 3
        assert "smollm2" not in page.locator("#model-name").inner_text() and page.is_disabled("#send")
        shots(page, "first-run")
        (tmp_path / "home" / "models").mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / "models" / "mine.gguf").symlink_to(real_model("smollm2-135m"))
        page.click("text=Look again")
        page.wait_for_selector("#model-name:has-text('mine')")
        page.wait_for_selector("#welcome h2:has-text('What shall we work on?')")
        say(page, "Hello")
        wait_finished(page)
        assert texts(page)[0]


def test_a_killed_server_loses_no_message_and_the_page_finds_it_again(
        new_page: Callable[..., Any], tmp_path: Path, real_model: Callable[[str], Path]) -> None:
    model = real_model("smollm2-135m")
    with Served(tmp_path, model, "--context", "1k") as server:
        chat_id, port = new_chat(server, "survives", LONG), server.port
        server.ask("PATCH", f"/edgert/chats/{chat_id}", {"settings": SHORT})
        page = new_page(f"/#/chat/{chat_id}", url=server.url)
        say(page, "First question.")
        wait_finished(page)
        first = texts(page)[0]
        server.ask("PATCH", f"/edgert/chats/{chat_id}", {"settings": LONG})
        say(page, "Tell me a very long story.")
        wait_said(page, 30)
        server.kill()
        page.wait_for_selector("#notice.bad:visible")
    with Served(tmp_path, model, "--context", "1k", port=port) as server:
        page.wait_for_selector("text=The server ended before this answer did.")
        page.wait_for_selector("#notice", state="hidden")
        assert texts(page)[0] == first
        messages = server.ask("GET", f"/edgert/chats/{chat_id}")[1]["messages"]
        assert [(one["role"], one["status"]) for one in messages] == [
            ("user", "done"), ("assistant", "done"), ("user", "done"), ("assistant", "interrupted")]
        page.close()


def test_a_page_asks_for_the_key_and_keeps_it_in_a_cookie(new_page: Callable[..., Any], tmp_path: Path,
                                                          tiny_model: Callable[..., Path]) -> None:
    with Served(tmp_path, tiny_model("llama"), EDGERT_API_KEY="open sesame") as server:
        assert server.ask("GET", "/edgert/chats")[0] == 401
        page = new_page(url=server.url, wait=False)
        page.wait_for_selector("dialog:has-text('API key')")
        page.fill("dialog input", "wrong")
        page.press("dialog input", "Enter")
        page.wait_for_function("() => document.querySelector('dialog input')?.value === ''")
        page.fill("dialog input", "open sesame")
        page.press("dialog input", "Enter")
        page.wait_for_selector("html[data-ready]")
        page.wait_for_selector("#welcome h2:visible")
        assert page.evaluate("document.cookie") == ""  # scripts cannot read it
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.locator("dialog").count() == 0


def start_chat(tmp_path: Path, model: Path, *words: str, webview: str = "pass") -> subprocess.Popen[str]:
    """`edgert chat` where a screen is claimed, pywebview is the fake, and a browser leaves a note."""
    (tmp_path / "webview.py").write_text(FAKE_WEBVIEW.replace("START", webview))
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\necho \"$1\" > {tmp_path / 'opened'}\n")
    browser.chmod(0o755)
    search_path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from apps.cli.main import main; sys.exit(main(sys.argv[1:]))", "chat",
         str(model), "--threads", "1", *words], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": search_path, "DISPLAY": ":0", "BROWSER": str(browser),
             "EDGERT_HOME": str(tmp_path / "home")})


def test_edgert_chat_shows_a_window_and_ends_with_it(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    with start_chat(tmp_path, tiny_model("llama")) as process:
        assert process.communicate(timeout=DEADLINE_S) == (None, "")
    assert process.returncode == 0
    assert (tmp_path / "shown").read_text().startswith("{'ALLOW_DOWNLOADS': True} edgert <!doctype html>")


@pytest.mark.parametrize(("words", "webview"), [
    (("--browser",), "pass"), ((), "raise WebViewException('neither GTK nor QT')")])
def test_edgert_chat_opens_the_browser_and_ends_with_ctrl_c(words: tuple[str, ...], webview: str, tmp_path: Path,
                                                            tiny_model: Callable[..., Path]) -> None:
    with start_chat(tmp_path, tiny_model("llama"), *words, webview=webview) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        if webview != "pass":
            assert said == "edgert: warning: no window: neither GTK nor QT\n"
            said = process.stderr.readline()
        assert re.search(r"http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)", said)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0


def test_a_second_chat_finds_a_port_of_its_own(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    ports = set()
    with ExitStack() as stack:
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            process = stack.enter_context(start_chat(tmp_path / name, tiny_model("llama"), "--browser"))
            stack.callback(process.kill)
            assert process.stderr is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stderr.readline())
            assert found is not None
            ports.add(found[1])
    assert len(ports) == 2
