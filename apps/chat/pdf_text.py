"""Takes the text out of a PDF: bytes on standard input, UTF-8 on standard output, status 3 with a reason in one line.

A process of its own (attachments.py starts it): a hostile file may loop for ever or ask for all memory.
"""

from __future__ import annotations

import io
import logging
import resource
import sys

MAX_TEXT_CHARS = 8 * 2**20
MAX_PAGES = 5000
REFUSED_STATUS = 3
_MAX_MEMORY_BYTES = 2**30


def text_of(data: bytes) -> str:
    """The text of every page. Raises ValueError in words for the user."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("the PDF is encrypted")
        parts: list[str] = []
        for page in reader.pages[:MAX_PAGES]:
            parts.append(page.extract_text())
            if sum(map(len, parts)) > MAX_TEXT_CHARS:
                raise ValueError("the PDF holds more text than any model reads")
    except PyPdfError as error:
        raise ValueError(f"the PDF is damaged: {error}") from error
    text = "\n\n".join(parts).strip()
    if not text:
        raise ValueError("the PDF holds no text, perhaps only pictures of it")
    return text


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    logging.disable()  # pypdf comments on every oddity of a file
    try:
        text = text_of(sys.stdin.buffer.read())
    except Exception as error:  # whatever a hostile file provokes
        print(" ".join(str(error).split())[:300] or type(error).__name__, file=sys.stderr)
        return REFUSED_STATUS
    sys.stdout.buffer.write(text.encode("utf-8", errors="replace"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
