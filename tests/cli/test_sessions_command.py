"""`edgert run --session`, `edgert list --sessions` and `edgert rm --session`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Outcome

Command = Callable[..., Outcome]
QUICK = ("--threads", 1, "--layout", "plain", "--context", "1k", "--max-tokens", 12, "--temp", 0, "--json")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    yield tmp_path


def ask(edgert: Command, model: Path, *words: object) -> dict[str, Any]:
    outcome = edgert("run", model, *words, *QUICK)
    assert (outcome.status, outcome.err) == (0, "")
    answered: dict[str, Any] = json.loads(outcome.out)
    return answered


@pytest.mark.parametrize("form", [(), ("--raw",)])
def test_the_next_start_goes_on_without_computing_what_was_said(edgert: Command, model: Path,
                                                                form: tuple[str, ...]) -> None:
    first = ask(edgert, model, "a long story " * 20, *form, "--session", "book")
    assert first["timings"]["cache_n"] == 0
    second = ask(edgert, model, "and then", *form, "--session", "book")
    n_first = len(first["prompt_token_ids"])
    assert second["prompt_token_ids"][:n_first] == first["prompt_token_ids"]
    assert second["timings"]["cache_n"] >= n_first
    assert second["timings"]["prompt_n"] < n_first
    other = ask(edgert, model, "and then", *form, "--session", "other")
    assert other["timings"]["cache_n"] == 0


def test_sessions_are_listed_and_removed(edgert: Command, model: Path) -> None:
    assert "No sessions yet" in edgert("list", "--sessions").err
    ask(edgert, model, "hello", "--session", "book")
    assert "book" in edgert("list", "--sessions").out
    listed = json.loads(edgert("list", "--sessions", "--json").out)["sessions"]
    assert [one["name"] for one in listed] == ["book"]
    assert listed[0]["model"] == model.name and listed[0]["n_tokens"] > 4
    assert edgert("rm", "--session", "book").status == 0
    assert json.loads(edgert("list", "--sessions", "--json").out) == {"sessions": []}
    assert edgert("rm", "--session", "book").status == 2


@pytest.mark.parametrize("words", [("rm",), ("rm", "a", "--session", "b"), ("run", "MODEL", "x", "--session", "../b"),
                                   ("run", "MODEL", "x", "--session", "b", "--kv-type", "q8_0")])
def test_what_makes_no_sense_is_refused(edgert: Command, model: Path, words: tuple[str, ...]) -> None:
    assert edgert(*(model if word == "MODEL" else word for word in words)).status == 2


def test_another_models_session_is_refused(edgert: Command, model: Path, tiny_model: Callable[..., Path]) -> None:
    ask(edgert, model, "hello", "--session", "book")
    outcome = edgert("run", tiny_model("qwen2"), "hello", "--session", "book", *QUICK)
    assert outcome.status == 2
    assert model.name in outcome.err
