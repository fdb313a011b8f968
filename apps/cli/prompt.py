"""Where a prompt comes from: the command line, a file, standard input, or two of them.

Knows bytes, not text: a prompt file is passed on byte for byte. Does not know the model.
"""

from __future__ import annotations

import logging
import os
import select
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from edgert.errors import UsageError

# As much as the tokenizer takes (edgert/text/tokenizer.py); an endless file must not fill the memory.
MAX_PROMPT_BYTES = 16 * 2**20
# Programs that start edgert often leave its standard input open without ever writing to it.
PATIENCE_S = 2.0
_log = logging.getLogger(__name__)


def read_prompt(argument: str | None, file: str | None, stdin: TextIO | None) -> bytes | None:
    """The prompt, or None when there is none and a person sits at a terminal.

    What standard input holds follows the argument, after an empty line. With `file` (`-` is standard input),
    standard input is left alone. Raises UsageError when the prompt is empty, too long, or given twice.
    """
    if file is not None and argument is not None:
        raise UsageError("a prompt and --prompt-file exclude each other", "Give one of them.")
    if file is not None:
        prompt = _read_file(file, stdin)
    elif stdin is None or stdin.isatty():
        if argument is None and stdin is not None:
            return None
        prompt = os.fsencode(argument or "")
    else:
        piped = _read(stdin.buffer, "standard input", patience_s=None if argument is None else PATIENCE_S)
        prompt = b"\n\n".join(part for part in (os.fsencode(argument or ""), piped) if part)
    if not prompt:
        raise UsageError("the prompt is empty", "Give a text as argument, with --prompt-file or on standard input.")
    return prompt


def _read_file(name: str, stdin: TextIO | None) -> bytes:
    if name == "-":
        if stdin is None:
            raise UsageError("standard input is closed", "Name a file with --prompt-file.")
        return _read(stdin.buffer, "standard input")
    try:
        with Path(name).open("rb") as file:
            return _read(file, name)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--prompt-file {name}: {reason}", "Name a file that can be read.") from error


def _read(stream: BinaryIO, name: str, patience_s: float | None = None) -> bytes:
    if patience_s is not None:
        with suppress(OSError, ValueError):  # no file descriptor to wait for
            if not select.select([stream], [], [], patience_s)[0]:
                _log.warning("waiting for the end of standard input, which is added to the prompt; "
                             "start with `< /dev/null` to add nothing")
    data = stream.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError(f"{name} has more than {MAX_PROMPT_BYTES // 2**20} MiB", "No model takes a prompt so long.")
    return data
