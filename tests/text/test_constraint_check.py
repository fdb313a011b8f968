"""Grammars that crash, stop or exhaust the compiler do so in a process of their own."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from edgert.errors import GrammarError, NativeLibraryError
from edgert.text import constraint_check
from edgert.text.constraint_check import GrammarCheck
from edgert.text.constraint_lark import HEADER
from edgert.text.constraint_schema import schema_to_llguidance


def problem(schema: Any) -> str:
    with pytest.raises(GrammarError) as caught, GrammarCheck(schema_to_llguidance(schema)) as check:
        check.wait()
    assert caught.value.next_step
    return caught.value.message


def test_a_sound_grammar_passes() -> None:
    with GrammarCheck(HEADER + 'start: "é" /[\\x{100}-\\x{10ffff}]/') as check:
        check.wait()
        check.wait()  # it has ended; nothing is left to wait for


# 4000 overflow any stack; 400 only one of 1 MiB, which is what a thread may have here.
@pytest.mark.parametrize("length", [400, 4000])
def test_a_chain_of_references_that_overflows_a_stack_is_refused(length: int) -> None:
    chain: dict[str, Any] = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    assert "too deep" in problem({"$ref": "#/$defs/d0", "$defs": {**chain, f"d{length}": {"type": "null"}}})


@pytest.mark.parametrize(("schema", "said"), [
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": "(a"}, "unclosed group"),
    ({"type": "strnig"}, "Invalid type: strnig"),
    ({"type": "string", "minLength": 3, "maxLength": 1}, "minLength"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "alternatives of oneOf"),
    ({"$ref": "#"}, "allows nothing"),
    ({"allOf": [{"anyOf": [{"properties": {f"k{i}": {"const": j}}} for j in (1, 2)]} for i in range(24)]}, "too large"),
])
def test_what_the_compiler_refuses_is_said_in_one_line(schema: Any, said: str) -> None:
    message = problem(schema)
    assert said in message
    assert "\n" not in message and "llguidance" not in message
    assert len(message) < 500


def test_a_grammar_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_check, "DEADLINE_S", 0.3)
    patterns = [{"type": "string", "pattern": f"a{i}.*b{i}"} for i in range(40)]  # all at once: minutes
    check = GrammarCheck(schema_to_llguidance({"allOf": patterns}))
    process = check._process
    with pytest.raises(GrammarError, match="takes more than"):
        check.wait()
    assert process is not None and process.returncode == -signal.SIGKILL


def test_leaving_early_ends_the_process() -> None:
    with GrammarCheck(HEADER + 'start: "a"') as check:
        process = check._process
    assert process is not None and process.returncode is not None


def test_a_check_that_cannot_run_is_no_verdict_on_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_check, "_PROBE_MODULE", "edgert.text.no_such_module")
    with pytest.raises(NativeLibraryError, match="no_such_module"):
        GrammarCheck(HEADER + 'start: "a"').wait()
