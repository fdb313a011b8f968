from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

import pytest

from apps.cli.terminal import AnswerStream, without_controls
from edgert.errors import EdgertError


class FakeStdout(io.TextIOWrapper):
    def __init__(self, terminal: bool, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def written(self) -> bytes:
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue()


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "\x1b[2J", "\x9b2J", "\x00", "\x7f", "\b\b", "\x85"])
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    shown = without_controls(text)
    assert "\N{REPLACEMENT CHARACTER}" in shown
    assert not any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in shown)


def test_text_of_any_language_is_left_alone() -> None:
    text = "naïve 日本語 👩‍👩‍👧 العربية\n\tindented\n"
    assert without_controls(text) == text
    assert without_controls("one\r\ntwo\rthree") == "one\ntwothree"


def test_a_pipe_gets_exact_bytes_and_a_terminal_does_not() -> None:
    pipe, terminal = FakeStdout(False, "latin-1"), FakeStdout(True)
    for stream in (pipe, terminal):
        AnswerStream(stream).write("é\x1b[2J\r\n")
    assert pipe.written == "é\x1b[2J\r\n".encode()
    assert terminal.written == "é\ufffd[2J\n".encode()


def test_a_terminal_without_the_character_shows_another() -> None:
    terminal = FakeStdout(True, "ascii")
    AnswerStream(terminal).write("café")
    assert terminal.written == b"caf?"


def test_a_line_is_ended_on_terminals_and_only_when_it_has_begun() -> None:
    for text, ended in (("word", b"word\n"), ("word\n", b"word\n"), ("", b"")):
        terminal, pipe = FakeStdout(True), FakeStdout(False)
        for stream in (terminal, pipe):
            answer = AnswerStream(stream)
            answer.write(text)
            answer.end_line()
        assert terminal.written == ended
        assert pipe.written == text.encode()


def test_a_full_disk_and_a_closed_output_are_said_in_words() -> None:
    with pytest.raises(EdgertError, match="closed"):
        AnswerStream(None)
    with (suppress(OSError), Path("/dev/full").open("w") as full,  # closing it fails as well
          pytest.raises(EdgertError, match="No space left")):
        AnswerStream(full).write("word")
