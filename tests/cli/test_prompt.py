from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from command_line import FakeStdin

from apps.cli import prompt
from apps.cli.prompt import MAX_PROMPT_BYTES, read_prompt
from edgert.errors import UsageError


def test_an_argument_is_the_prompt() -> None:
    assert read_prompt("caf\N{LATIN SMALL LETTER E WITH ACUTE}", None, FakeStdin(terminal=True)) == b"caf\xc3\xa9"
    assert read_prompt(os.fsdecode(b"not \xff UTF-8"), None, None) == b"not \xff UTF-8"


def test_standard_input_is_the_prompt_or_follows_it() -> None:
    assert read_prompt(None, None, FakeStdin(b"piped\r\n\xff")) == b"piped\r\n\xff"
    assert read_prompt("Say it in French:", None, FakeStdin(b"cat\n")) == b"Say it in French:\n\ncat\n"
    assert read_prompt("alone", None, FakeStdin(b"")) == b"alone"
    assert read_prompt("", None, FakeStdin(b"piped")) == b"piped"


def test_without_any_prompt_a_terminal_means_a_conversation() -> None:
    assert read_prompt(None, None, FakeStdin(terminal=True)) is None


def test_a_file_is_read_byte_for_byte_and_standard_input_left_alone(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf one\r\n\x00\xff\n\n"
    (tmp_path / "prompt").write_bytes(data)
    stdin = FakeStdin(b"untouched")
    assert read_prompt(None, str(tmp_path / "prompt"), stdin) == data
    assert stdin.buffer.read() == b"untouched"
    assert read_prompt(None, "-", FakeStdin(b"piped\n")) == b"piped\n"


@pytest.mark.parametrize(("argument", "stdin"), [
    ("", FakeStdin(terminal=True)), (None, FakeStdin(b"")), (None, None), ("", FakeStdin(b"")),
])
def test_an_empty_prompt_is_refused(argument: str | None, stdin: FakeStdin | None) -> None:
    with pytest.raises(UsageError, match="empty"):
        read_prompt(argument, None, stdin)


@pytest.mark.parametrize(("argument", "file", "said"), [
    ("a prompt", "file", "exclude each other"), (None, "/nonexistent/file", "No such file"), (None, "/", "directory"),
    (None, "zero\0byte", "null byte"), (None, "/dev/zero", "more than 16 MiB"),
])
def test_prompts_that_cannot_be_had_are_named(argument: str | None, file: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_prompt(argument, file, FakeStdin())


def test_too_much_standard_input_is_refused() -> None:
    with pytest.raises(UsageError, match="standard input has more than 16 MiB"):
        read_prompt(None, None, FakeStdin(bytes(MAX_PROMPT_BYTES + 1)))


def test_an_input_that_stays_open_beside_a_prompt_is_explained(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()

    def nothing_yet(*_: object) -> tuple[list[object], list[object], list[object]]:
        os.close(writer)  # the program that left it open ends at last
        return [], [], []

    monkeypatch.setattr(prompt.select, "select", nothing_yet)
    with os.fdopen(reader, "r") as stdin, caplog.at_level(logging.WARNING):
        assert read_prompt("a prompt", None, stdin) == b"a prompt"
    assert "waiting for the end of standard input" in caplog.text
