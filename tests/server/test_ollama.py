from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from served import Served

HELLO = [{"role": "user", "content": "hello"}]
QUICK = {"temperature": 0, "num_predict": 6}


def lines(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    status, text = served.ask("POST", path, body)
    assert status == 200
    return [json.loads(line) for line in text.splitlines()]


def test_a_chat_streams_lines_and_ends_with_figures(served: Served, tiny: Path) -> None:
    body = {"model": f"{tiny.stem}:latest", "messages": HELLO, "options": QUICK}
    told = lines(served, "/api/chat", body)
    assert all(not one["done"] for one in told[:-1]) and told[-1]["done"]
    text = "".join(one["message"]["content"] for one in told)
    last = told[-1]
    assert last["eval_count"] == 6 and last["eval_duration"] > 0 and last["done_reason"] == "length"
    status, whole = served.ask("POST", "/api/chat", {**body, "stream": False})
    assert status == 200 and whole["message"]["content"] == text and whole["eval_count"] == 6


def test_generate_takes_a_system_prompt_or_raw_text(served: Served) -> None:
    body = {"model": "", "prompt": "hello", "options": QUICK, "stream": False}
    answers = {served.ask("POST", "/api/generate", {**body, **more})[1]["response"]
               for more in ({}, {"system": "be kind"}, {"raw": True})}
    assert len(answers) == 3
    assert served.ask("POST", "/api/generate", {"model": ""})[1]  # only loads


def test_formats_and_tools_are_obeyed(served: Served) -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"enum": [7]}}, "additionalProperties": False}
    told = served.ask("POST", "/api/chat", {"messages": HELLO, "format": schema, "stream": False,
                                            "options": {"temperature": 0, "num_predict": 50}})[1]
    assert json.loads(told["message"]["content"]) == {"a": 7}
    tool = {"type": "function", "function": {"name": "now"}}
    told = served.ask("POST", "/api/chat", {"messages": HELLO, "tools": [tool], "tool_choice": "required",
                                            "stream": False, "options": {"temperature": 0}})[1]
    assert told["message"]["tool_calls"] == [{"function": {"name": "now", "arguments": {}}}]


def test_models_are_told_in_ollamas_words(served: Served, tiny: Path) -> None:
    (model,) = served.ask("GET", "/api/tags")[1]["models"]
    assert model["name"] == tiny.stem and model["size"] == tiny.stat().st_size
    assert model["details"]["format"] == "gguf" and model["details"]["family"] == "llama"
    shown = served.ask("POST", "/api/show", {"model": tiny.stem})[1]
    assert shown["model_info"]["llama.context_length"] == 8192
    assert served.ask("GET", "/api/ps")[1]["models"] and served.ask("GET", "/api/version")[1]["version"]
    assert served.ask("POST", "/api/show", {"model": "nosuch"})[0] == 404
    assert served.ask("POST", "/api/chat", {"messages": HELLO, "options": {"temperature": "x"}})[0] == 400
