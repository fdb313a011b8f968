"""The page in a real browser against a real server: what a user does, and what a hostile model cannot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pdfs import pdf_with_text
from served import Served

SHORT = {"max_tokens": 12, "temperature": 0}
LONG = {"max_tokens": 1500, "temperature": 0.9, "repeat_penalty": 1.1}


def new_chat(server: Served, title: str, settings: dict[str, Any] | None = None, system: str = "") -> str:
    chat: str = server.ask("POST", "/edgert/chats", {"title": title, "settings": settings or SHORT,
                                                     "system": system})[1]["id"]
    return chat


def import_chat(server: Served, *turns: tuple[str, str], title: str = "imported", **more: Any) -> str:
    """A chat with these turns, which no model has made."""
    messages = [{"id": str(i), "parent_id": str(i - 1) if i else None, "role": role, "content": text, **more}
                for i, (role, text) in enumerate(turns)]
    chat = {"title": title, "settings": SHORT, "messages": messages}
    body = {"format": "edgert-chats", "version": 1, "chats": [chat]}
    status, told = server.ask("POST", "/edgert/import", body)
    assert status == 201
    chat_id: str = told["chats"][0]["id"]
    return chat_id


def say(page: Any, text: str) -> None:
    page.fill("#composer-text", text)
    page.press("#composer-text", "Enter")


def wait_finished(page: Any, n_answers: int = 1) -> None:
    page.wait_for_function(
        "n => document.querySelectorAll('.message.assistant').length === n && document.querySelector('#stop').hidden"
        " && document.querySelector('.message.assistant:last-child .tools [aria-label=Copy]')", arg=n_answers,
        polling=100)  # tabs behind others have no animation frames


def wait_said(page: Any, n_chars: int) -> None:
    """Until the last answer, which is being written, has more than `n_chars`."""
    page.wait_for_function("n => { const text = document.querySelector('.message.assistant:last-child .text');"
                           "return text && !text.querySelector('.waiting') && text.innerText.length > n"
                           " && !document.querySelector('#stop').hidden; }", arg=n_chars)


def texts(page: Any, role: str = "assistant") -> list[str]:
    return [text.strip() for text in page.locator(f".message.{role} .text").all_inner_texts()]


def test_a_first_conversation(new_page: Callable[..., Any], chatting: Served,
                              shots: Callable[[Any, str], None]) -> None:
    page = new_page()
    assert page.locator("#welcome h2").inner_text() == "What shall we work on?"
    shots(page, "welcome")
    page.click("#panel-button")
    page.click("#panel summary")
    page.fill("#panel label:has-text('Longest answer') input", "40")
    page.locator("#panel label:has-text('Longest answer') input").blur()
    page.wait_for_selector(".plan-bar")
    page.locator("#panel h2").scroll_into_view_if_needed()
    shots(page, "settings")
    page.click("[aria-label='Close settings']")
    say(page, "Name three colours.")
    wait_finished(page)
    page.click(".meta summary")
    assert "1,024 tokens" in page.locator(".meta").inner_text() and "Peak memory" in page.locator(".meta").inner_text()
    shots(page, "answer")
    chat_id = re.search(r"#/chat/(\w+)", page.url)
    assert chat_id is not None
    chat = chatting.ask("GET", f"/edgert/chats/{chat_id[1]}")[1]
    assert [one["role"] for one in chat["messages"]] == ["user", "assistant"]
    assert chat["title"] == "Name three colours." and chat["settings"] == {"max_tokens": 40}
    answer = chat["messages"][1]
    assert answer["figures"]["completion_tokens"] <= 40 and answer["content"]
    assert f"{answer['figures']['completion_tokens']} tokens" in page.locator(".meta").inner_text()
    assert page.locator("#context-text").inner_text().endswith("of 1,024 tokens")
    assert page.locator(".chat-link[aria-current]").inner_text() == "Name three colours."


def test_stop_in_decode_keeps_what_was_said(new_page: Callable[..., Any], chatting: Served,
                                            shots: Callable[[Any, str], None]) -> None:
    page = new_page(f"/#/chat/{new_chat(chatting, 'stop', LONG)}")
    say(page, "Write a very long story about a lighthouse.")
    wait_said(page, 20)
    page.wait_for_selector("#status-text:has-text('tok/s')")
    shots(page, "writing")
    page.keyboard.press("Escape")
    wait_finished(page)
    assert len(texts(page)[0]) > 20
    chatting.until(lambda state: not state["running"], "the model is free")


def test_stop_in_prefill(new_page: Callable[..., Any], chatting: Served, shots: Callable[[Any, str], None]) -> None:
    page = new_page(f"/#/chat/{new_chat(chatting, 'prefill', SHORT)}")
    say(page, "Summarise: " + "the quick brown fox jumps over the lazy dog. " * 90)
    page.wait_for_selector(".waiting progress")
    shots(page, "reading")
    page.click("#stop")
    page.wait_for_selector("text=Stopped before the first word.")
    chatting.until(lambda state: not state["running"], "the model is free")


def test_regenerate_and_edit_make_branches_and_nothing_is_lost(new_page: Callable[..., Any], chatting: Served) -> None:
    chat_id = new_chat(chatting, "branches", {**SHORT, "temperature": 1.5})
    page = new_page(f"/#/chat/{chat_id}")
    say(page, "Say a word.")
    wait_finished(page)
    first = texts(page)[0]
    page.click("[aria-label='Answer again']")
    page.wait_for_selector(".branch:has-text('2/2')")
    wait_finished(page)
    page.click("[aria-label='Previous version']")
    page.wait_for_selector(".branch:has-text('1/2')")
    assert texts(page)[0] == first
    page.hover(".message.user")
    page.click(".message.user [aria-label='Edit']")
    page.fill(".edit textarea", "Say another word.")
    page.press(".edit textarea", "Enter")
    page.wait_for_selector(".message.user:has-text('Say another word.')")
    wait_finished(page)
    page.click(".message.user [aria-label='Previous version']")
    assert texts(page, "user") == ["Say a word."] and len(texts(page)) == 1
    page.hover(".message.assistant")
    page.click(".message.assistant [aria-label='Edit']")
    page.fill(".edit textarea", "My own words.")
    page.click(".edit .button.main")
    page.wait_for_selector(".message.assistant:has-text('My own words.')")
    messages = chatting.ask("GET", f"/edgert/chats/{chat_id}")[1]["messages"]
    assert len(messages) == 6 and first in [one["content"].strip() for one in messages]


def test_a_reload_in_the_middle_finds_the_answer_going_on(new_page: Callable[..., Any], chatting: Served) -> None:
    page = new_page(f"/#/chat/{new_chat(chatting, 'reload', LONG)}")
    say(page, "Write a very long story about a mountain.")
    wait_said(page, 10)
    before = texts(page)[0][:10]
    page.reload()
    wait_said(page, 60)
    assert texts(page)[0].startswith(before)
    page.click("#stop")
    wait_finished(page)


def test_two_tabs_see_the_same_conversation(new_page: Callable[..., Any], chatting: Served) -> None:
    chat_id = new_chat(chatting, "tabs")
    one, other = new_page(f"/#/chat/{chat_id}"), new_page(f"/#/chat/{chat_id}")
    say(one, "From the first tab.")
    other.wait_for_selector(".message.user:has-text('From the first tab.')")
    wait_finished(one)
    wait_finished(other)
    assert texts(one) == texts(other)
    say(other, "From the second tab.")
    wait_finished(other, 2)
    wait_finished(one, 2)
    assert texts(one) == texts(other)


def test_search_finds_words_and_opens_their_message(new_page: Callable[..., Any], chatting: Served,
                                                    shots: Callable[[Any, str], None]) -> None:
    import_chat(chatting, ("user", "Where do quokkas live?"), ("assistant", "Quokkas live on Rottnest Island."),
                title="Animals <b>of</b> Australia")
    page = new_page()
    page.keyboard.press("Control+k")
    page.keyboard.type("quokk isl")
    page.click(".hit:has-text('Rottnest')")
    assert page.locator(".hit mark").all_inner_texts() == ["Quokkas", "Island"]
    page.wait_for_selector(".message.assistant:has-text('Rottnest Island')")
    assert "Animals <b>of</b> Australia" in page.locator("#chat-list").inner_text()
    shots(page, "search")


def test_export_and_import(new_page: Callable[..., Any], chatting: Served, tmp_path: Path) -> None:
    chat_id = import_chat(chatting, ("user", "A question"), ("assistant", "```py\nprint(1)\n```"), title="To take away")
    page = new_page(f"/#/chat/{chat_id}")
    for label, suffix in (("Export as Markdown", "md"), ("Export as JSON", "json")):
        page.click("#chat-menu-button")
        with page.expect_download() as download:
            page.click(f"text={label}")
        assert download.value.suggested_filename == f"To take away.{suffix}"
        download.value.save_as(tmp_path / f"out.{suffix}")
    markdown = (tmp_path / "out.md").read_text()
    assert markdown.startswith("# To take away\n") and "```py\nprint(1)\n```" in markdown
    exported = json.loads((tmp_path / "out.json").read_text())
    exported["chats"][0]["title"] = "Brought back"
    (tmp_path / "in.json").write_text(json.dumps(exported))
    page.set_input_files("#import-file", tmp_path / "in.json")
    page.wait_for_selector(".chat-link[aria-current]:has-text('Brought back')")
    assert texts(page, "user") == ["A question"] and chat_id not in page.url
    (tmp_path / "bad.json").write_text("{}")
    page.set_input_files("#import-file", tmp_path / "bad.json")
    page.wait_for_selector("#notice:has-text('no chats of edgert')")


def test_files_are_attached_with_their_token_counts(new_page: Callable[..., Any], chatting: Served, tmp_path: Path,
                                                    shots: Callable[[Any, str], None]) -> None:
    (tmp_path / "report.pdf").write_bytes(pdf_with_text("The password is swordfish."))
    (tmp_path / "<img src=x onerror=alert(1)>.txt").write_text("a note")
    (tmp_path / "picture.bin").write_bytes(b"\x00\x01\x02")
    page = new_page(f"/#/chat/{new_chat(chatting, 'files')}")
    page.set_input_files("#attach-file", [tmp_path / "report.pdf", tmp_path / "<img src=x onerror=alert(1)>.txt",
                                          tmp_path / "picture.bin"])
    page.wait_for_selector("#chips .file:has-text('report.pdf'):has-text('tokens')")
    page.wait_for_selector("#chips .file:has-text('<img src=x onerror=alert(1)>.txt'):has-text('tokens')")
    page.wait_for_selector("#chips .file.bad:has-text('is not text')")
    assert page.locator("#chips img").count() == 0
    shots(page, "attachments")
    page.click("[aria-label='Remove picture.bin']")
    say(page, "What is the password?")
    wait_finished(page)
    assert page.locator(".message.user .file").count() == 2
    figures = page.locator("#context-text").inner_text()
    assert int(figures.split()[0].replace(",", "")) > 40  # the files' text was in the prompt


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><a href=javascript:alert(1)>x</a></svg>",
    "[click](javascript:alert(1))",
    "[click](  JaVaScRiPt:alert(1))",
    "![x](javascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:alert(1) \"<img src=x onerror=alert(1)>\")",
    "[x](https://example.org \"' onmouseover=alert(1) x='\")",
    "```html\n<img src=x onerror=alert(1)>\n```",
    "```<img src=x onerror=alert(1)>\nx\n```",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='x' onmouseover=alert(1)>hover</a>",
    "<style>body{display:none}</style>",
    "<math><mtext></p><style><img src=x onerror=alert(1)>",
    "![pixel](http://127.0.0.1:9/track.png)",
    "<form action=/edgert/export><button>go</button></form>",
    "| <script>alert(1)</script> |\n|---|\n| <b onclick=alert(1)>x</b> |",
    "<think><img src=x onerror=alert(1)></think>done",
    "<base href='http://evil.example/'>",
]
_DANGEROUS = ":is(script, img, svg:not([aria-hidden]), iframe, style, form, base, math, object, embed)"


def test_hostile_output_is_shown_as_text(new_page: Callable[..., Any], chatting: Served,
                                         shots: Callable[[Any, str], None]) -> None:
    turns = [(role, text) for text in HOSTILE for role in ("user", "assistant")]
    page = new_page(f"/#/chat/{import_chat(chatting, *turns, title='<img src=x onerror=alert(1)>')}")
    page.wait_for_selector(".message:nth-child(20)")
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    assert page.locator(f"#messages {_DANGEROUS}").count() == 0
    links = page.eval_on_selector_all("#messages a", "all => all.map(one => one.protocol)")
    assert set(links) <= {"http:", "https:", "mailto:"}
    handlers = page.evaluate("[...document.querySelectorAll('#layout *')].flatMap(one => [...one.attributes])"
                             ".filter(one => one.name.startsWith('on')).map(one => one.name)")
    assert handlers == []
    shown = "\n".join(texts(page))
    for text in ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<style>body{display:none}</style>"):
        assert text in shown
    assert page.locator("#sidebar img").count() == 0 and page.locator("body").is_visible()
    shots(page, "hostile")


def test_markdown_is_shown_with_tables_code_and_lists(new_page: Callable[..., Any], chatting: Served,
                                                      shots: Callable[[Any, str], None]) -> None:
    text = ("Here is **what** you asked for:\n\n| Name | Size |\n|:--|--:|\n| small | 1 |\n| large | 22 |\n\n"
            "```python\ndef twice(x: int) -> int:\n    \"\"\"Double it.\"\"\"\n    return 2 * x  # quick\n```\n\n"
            "1. first\n2. second\n   - nested\n\n> quoted, with `code` and [a link](https://example.org)\n")
    thought = "<think>\nThe user wants a table.\n</think>\n\n" + text
    chat_id = import_chat(chatting, ("user", "Show me everything."), ("assistant", thought), title="Markdown")
    page = new_page(f"/#/chat/{chat_id}")
    assert page.locator(".prose td").all_inner_texts() == ["small", "1", "large", "22"]
    assert page.locator(".hljs-keyword").first.inner_text() == "def"
    assert page.locator(".think summary").inner_text() == "Thought"
    page.click(".code-head button")
    page.wait_for_selector(".code-head button:has-text('Copied')")
    link = page.locator(".prose a")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow" and link.get_attribute("target") == "_blank"
    shots(page, "markdown")
    page.click("#theme-button")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    shots(page, "markdown-dark")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 26, 25)"
    page.click("#theme-button")


def test_a_full_context_offers_two_ways_on(new_page: Callable[..., Any], chatting: Served,
                                           shots: Callable[[Any, str], None]) -> None:
    filler = "the quick brown fox jumps over the lazy dog. " * 55
    chat_id = import_chat(chatting, ("user", filler), ("assistant", "one"), ("user", filler), ("assistant", "two"),
                          title="Long")
    page = new_page(f"/#/chat/{chat_id}")
    say(page, "And now?")
    page.wait_for_selector(".trouble:has-text('longer than the model can read')")
    shots(page, "context-full")
    page.click("text=Go on without the oldest turns")
    page.wait_for_selector("text=The 2 oldest messages were left out")
    wait_finished(page, 3)
    assert page.locator(".branch:has-text('2/2')").count() == 1
    say(page, "And then?")  # who was asked once is not asked again
    wait_finished(page, 4)
    assert page.locator("text=oldest messages were left out").count() == 2
    page.click("[aria-label='Previous version']")
    page.click("text=New chat with a summary")
    page.wait_for_selector(".chat-link[aria-current]:has-text('Long (continued)')")
    wait_finished(page)
    assert texts(page)[0]


def test_presets_and_the_system_prompt(new_page: Callable[..., Any], chatting: Served) -> None:
    chat_id = new_chat(chatting, "system")
    page = new_page(f"/#/chat/{chat_id}")
    page.keyboard.press("Control+.")
    page.fill("#panel textarea", "You are a pirate.")
    page.locator("#panel textarea").blur()
    page.click("text=Save as…")
    page.fill("dialog input", "Pirate")
    page.press("dialog input", "Enter")
    page.wait_for_selector("#panel option:has-text('Pirate')", state="attached")
    chatting_system = chatting.ask("GET", f"/edgert/chats/{chat_id}")[1]["system"]
    assert chatting_system == "You are a pirate."
    page.keyboard.press("Control+Shift+O")
    page.wait_for_selector("#welcome:visible")
    page.select_option("#presets", label="Pirate")
    page.wait_for_function("() => document.querySelector('#panel textarea').value === 'You are a pirate.'")
    page.click("text=Use for new chats")
    page.wait_for_selector("#panel option:has-text('Default')", state="attached")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.click("#panel-button")
    page.wait_for_function("() => document.querySelector('#panel textarea').value === 'You are a pirate.'")
    page.select_option("#presets", label="Default")
    page.click("text=Delete this preset")
    page.wait_for_selector("#panel option:has-text('Default')", state="detached")


def test_the_memory_slider_foretells_and_sets_a_budget(new_page: Callable[..., Any], chatting: Served,
                                                       shots: Callable[[Any, str], None]) -> None:
    page = new_page()
    page.click("#panel-button")
    page.wait_for_selector(".speed:has-text('fits in memory')")
    page.press("#memory", "Home")
    page.wait_for_selector(".speed:has-text('too slow')")
    for _ in range(100):  # what the plan needs is the machine's: go on until it has room
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(50)
        if page.locator(".speed:has-text('streams from disk')").count():
            break
    page.wait_for_selector(".speed:has-text('streams from disk')")
    shots(page, "memory")
    page.select_option("#context", "512")
    page.click("#panel button:has-text('Apply')")
    chatting.until(lambda state: state["budget_bytes"] and not state["loading"] and state["plan"], "the budget is set")
    assert chatting.state()["context_length"] == 512
    page.select_option("#context", "1024")
    page.wait_for_selector("#panel button:has-text('All that is free'):not(:disabled)")
    page.click("#panel button:has-text('All that is free')")
    chatting.until(lambda state: state["budget_bytes"] is None and not state["loading"], "the budget is free")


def test_keys_do_what_the_list_of_keys_says(new_page: Callable[..., Any], chatting: Served) -> None:
    page = new_page(f"/#/chat/{import_chat(chatting, ('user', 'mine'), ('assistant', 'yours'), title='Keys')}")
    page.press("#composer-text", "ArrowUp")
    assert page.input_value(".edit textarea") == "mine"
    page.keyboard.press("Escape")
    page.locator("#scroll").focus()
    page.keyboard.press("?")
    page.wait_for_selector("dialog:has-text('Keyboard')")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+E")
    page.fill("dialog input", "Renamed")
    page.press("dialog input", "Enter")
    page.wait_for_selector(".chat-link[aria-current]:has-text('Renamed')")
    page.keyboard.press("Control+b")
    assert not page.locator("#chat-list").is_visible()
    page.keyboard.press("Control+b")
    page.keyboard.press("Control+Shift+D")
    page.click("dialog .button.bad")
    page.wait_for_selector("#welcome:visible")
    page.wait_for_selector(".chat-link:has-text('Renamed')", state="detached")


def test_a_conversation_needs_no_pointer(new_page: Callable[..., Any], chatting: Served) -> None:
    """Every step by keys alone, each button reached with Tab."""

    def tab_to(selector: str, *, back: bool = False) -> None:
        for _ in range(60):
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            page.keyboard.press("Shift+Tab" if back else "Tab")
        raise AssertionError(f"{selector} is not reached")

    page = new_page()
    page.keyboard.type("Say a word.")  # the box has the focus when the page opens
    tab_to("[aria-label='Settings']", back=True)
    page.keyboard.press("Enter")
    tab_to("#panel summary")
    page.keyboard.press("Enter")
    tab_to("#panel input[type=number]")
    page.keyboard.type("8")
    page.keyboard.press("Control+.")
    tab_to("#composer-text")
    page.keyboard.press("Enter")
    wait_finished(page)
    tab_to(".message.assistant [aria-label='Answer again']", back=True)
    page.keyboard.press("Enter")
    page.wait_for_selector(".branch:has-text('2/2')")
    wait_finished(page)
    tab_to(".branch [aria-label='Previous version']", back=True)
    page.keyboard.press("Enter")
    page.wait_for_selector(".branch:has-text('1/2')")
    assert page.evaluate("document.activeElement.closest('.branch') !== null")  # the focus is not lost
    tab_to("#chat-menu-button", back=True)
    page.keyboard.press("Enter")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog:has-text('Delete this conversation?')")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#welcome:visible")


def test_the_devices_of_a_cluster_and_their_shares_are_shown(new_page: Callable[..., Any], chatting: Served,
                                                             shots: Callable[[Any, str], None]) -> None:
    """The server's part is in tests/server/test_served_cluster.py."""
    devices = [{"name": name, "bytes": round(share * 2**30), "share": share}
               for name, share in (("laptop", 0.5), ("pi<b>", 0.3), ("phone", 0.2))]
    told = {**chatting.state(), "cluster": {"devices": devices, "reason": "three are 2.1 times as fast as one"}}
    page = new_page(wait=False)
    page.route("**/edgert/state", lambda route: route.fulfill(json=told))
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.click("#panel-button")
    page.wait_for_selector(".devices")
    assert page.locator(".devices").inner_text().split("\n") == [
        "laptop", "50 % · 512 MiB", "pi<b>", "30 % · 307 MiB", "phone", "20 % · 205 MiB"]
    page.locator("#facts").scroll_into_view_if_needed()
    shots(page, "devices")


@pytest.mark.parametrize(("width", "height", "name"), [(360, 740, "phone"), (3840, 2160, "4k")])
def test_it_reads_well_on_small_and_large_screens(width: int, height: int, name: str, new_page: Callable[..., Any],
                                                  chatting: Served, shots: Callable[[Any, str], None]) -> None:
    long_word = "x" * 300
    text = f"A long word: {long_word}\n\n```\n{long_word}\n```\n\n| a | b |\n|---|---|\n| {long_word} | {long_word} |"
    chat_id = import_chat(chatting, ("user", "Tell me."), ("assistant", text), title="Sizes")
    page = new_page(f"/#/chat/{chat_id}")
    page.set_viewport_size({"width": width, "height": height})
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#composer-text", "#send", "#model-button", "#panel-button"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
    size = page.evaluate("parseFloat(getComputedStyle(document.querySelector('.prose')).fontSize)")
    assert size >= (15 if width < 400 else 22)
    shots(page, name)
    if width < 400:
        page.click("#open-sidebar")
        page.wait_for_selector("#chat-list .chat-link:visible")
        shots(page, f"{name}-list")
        page.click("#close-sidebar")


def test_axe_finds_no_serious_violation(new_page: Callable[..., Any], chatting: Served,
                                        shots: Callable[[Any, str], None]) -> None:
    axe = (Path(__file__).parent / "vendor" / "axe.min.js").read_text()
    text = "# Title\n\n```py\nx = 1\n```\n\n| a |\n|---|\n| b |\n\n- [x] done\n"
    chat_id = import_chat(chatting, ("user", "hello"), ("assistant", text), title="Axe",
                          figures={"completion_tokens": 5, "prompt_tokens": 5, "timings": {}})
    page = new_page(f"/#/chat/{chat_id}")

    def check(state: str) -> None:
        page.evaluate(axe)  # not as a script of the page's: its policy holds in the test too
        found = page.evaluate("axe.run().then(told => told.violations.filter(one => ['serious', 'critical'].includes("
                              "one.impact)).map(one => [one.id, one.nodes.map(node => node.html.slice(0, 120))]))")
        assert found == [], state

    check("a conversation")
    page.click("#panel-button")
    page.wait_for_selector(".plan-bar")
    page.click("#panel summary")
    check("settings")
    page.click("#theme-button")
    check("dark")
    page.click("#theme-button")
    page.click("[aria-label='Close settings']")
    page.click("#model-button")
    page.wait_for_selector("dialog")
    shots(page, "models")
    check("the models")
    page.keyboard.press("Escape")
    page.click("#new-chat")
    page.wait_for_selector("#welcome:visible")
    check("welcome")
