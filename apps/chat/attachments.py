"""Turns a file that a user attaches into text: UTF-8 as it is, PDFs through pdf_text.py, nothing else."""

from __future__ import annotations

import asyncio
import os
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

from apps.chat.pdf_text import MAX_TEXT_CHARS, REFUSED_STATUS
from apps.server.replies import Refusal

_PDF_DEADLINE_S = 60.0
_MAX_NAME_CHARS = 120


def safe_name(name: str) -> str:
    """A file's name to show and to tell the model: no directories, no control characters, not endless."""
    last = name.replace("\\", "/").rpartition("/")[2]
    shown = "".join(char for char in unicodedata.normalize("NFC", last)
                    if unicodedata.category(char)[0] != "C").strip()[:_MAX_NAME_CHARS]
    return shown or "file"


async def text_of(name: str, data: bytes) -> str:
    """The text in a file. Raises Refusal (415, 422) for a file without any."""
    if data.startswith(b"%PDF-") or name.lower().endswith(".pdf"):
        return await _pdf_text(data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = _utf16(data)
    if "\0" in text:
        raise Refusal(415, f"{name} is not text", "Attach text, code or a PDF.", "not_text")
    if len(text) > MAX_TEXT_CHARS:
        raise Refusal(413, f"{name} holds more text than any model reads", "Attach a part of it.", "too_large")
    if not text.strip():
        raise Refusal(422, f"{name} is empty", "Attach a file with text.", "no_text")
    return text


def _utf16(data: bytes) -> str:
    """Text as Windows writes it, with a byte order mark; a zero where it is none."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        with suppress(UnicodeDecodeError):
            return data.decode("utf-16")
    return "\0"


async def _pdf_text(data: bytes) -> str:
    search_path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "apps.chat.pdf_text", stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": search_path})
    try:
        async with asyncio.timeout(_PDF_DEADLINE_S):
            out, said = await process.communicate(data)
    except TimeoutError:
        raise Refusal(422, f"reading the PDF takes more than {_PDF_DEADLINE_S:.0f} s", "Attach its text instead.",
                      "no_text") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return out.decode("utf-8")
    reason = said.decode("utf-8", errors="replace").strip() if process.returncode == REFUSED_STATUS else ""
    raise Refusal(422, reason or "the PDF cannot be read", "Attach its text instead.", "no_text")
