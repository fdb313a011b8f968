"""Writing an answer to standard output: exact bytes into a pipe, nothing that commands a terminal onto a terminal.

A model can say ESC and, with it, retitle the window, move the cursor or hide text. Knows characters and streams only.
"""

from __future__ import annotations

from typing import TextIO

from edgert.errors import EdgertError

# C0, DEL and C1, but for newline and tab. A carriage return vanishes: models that write CRLF mean a newline, and
# alone it would let later text cover earlier text.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0))
             if chr(code) not in "\n\t"} | {ord("\r"): ""}


def without_controls(text: str) -> str:
    """`text` as a terminal may have it: control characters other than newline and tab become U+FFFD."""
    return text.translate(_CONTROLS)


class AnswerStream:
    """Standard output for a model's text, flushed with every piece."""

    def __init__(self, stream: TextIO | None) -> None:
        if stream is None:
            raise EdgertError("standard output is closed", "Send it to a file, a pipe or a terminal.")
        self._stream = stream
        self.is_terminal = stream.isatty()
        self._encoding = stream.encoding if self.is_terminal else "utf-8"
        self._in_line = False

    def write(self, text: str) -> None:
        """Show `text` now. Raises BrokenPipeError when the reader has gone, EdgertError when it cannot be written."""
        if not text:
            return
        shown = without_controls(text) if self.is_terminal else text
        self._in_line = not text.endswith("\n")
        try:
            self._stream.flush()
            self._stream.buffer.write(shown.encode(self._encoding, errors="replace"))
            self._stream.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise EdgertError(f"the answer cannot be written: {error.strerror}",
                              "Look at where standard output goes.") from error

    def end_line(self) -> None:
        """On a terminal, go to the next line unless it has just begun."""
        if self.is_terminal and self._in_line:
            self.write("\n")
