"""What a file is that should have been a GGUF and is not: the usual mix-ups, by their first bytes.

Knows only enough to name the mistake to the user; opens nothing and parses nothing.
"""

from __future__ import annotations

GGUF_MAGIC = b"GGUF"

_BY_PREFIX: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer: the model itself was never fetched (`git lfs pull`)"),
    (b"PK\x03\x04", "a zip archive (PyTorch checkpoints are zip archives too)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x80\x02", "a Python pickle (an old PyTorch checkpoint)"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x7fELF", "a program, not a model"),
    (b"%PDF", "a PDF document"),
    (b"FUGG", "a GGUF with its bytes swapped"),
    (b"lmgg", "a GGML file from before GGUF"),
    (b"tjgg", "a GGML file from before GGUF"),
    (b"algg", "a GGML adapter from before GGUF"),
    (b"fmgg", "a GGML file from before GGUF"),
)
_BY_TEXT: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype", "an HTML page (a download that met a log-in or an error page)"),
    (b"<html", "an HTML page (a download that met a log-in or an error page)"),
    (b"<?xml", "an XML document"),
    (b"{", "a JSON text (a configuration or an error message)"),
)


def looks_like(head: bytes) -> str:
    """Name the format that the first bytes of a file (64 suffice) suggest, in words for an error message."""
    for prefix, name in _BY_PREFIX:
        if head.startswith(prefix):
            return name
    # safetensors: eight bytes of header length, then a JSON object
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "a safetensors file"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for prefix, name in _BY_TEXT:
        if text.startswith(prefix):
            return name
    if not head.strip(b"\0"):
        return "zeros (a download that was never finished)"
    return "something else"
