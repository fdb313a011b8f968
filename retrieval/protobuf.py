"""The part of protobuf's wire format that ONNX files need: written as it is, read without believing it.

Source: protobuf's encoding guide: a field is a varint `number << 3 | kind`, then a varint (kind 0) or a length and
bytes (kind 2). Knows no message type.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _BYTES = 0, 2
_MAX_VARINT_BYTES = 10  # of 64 bits
_MAX_FIELD_NUMBER = 100  # ONNX uses none above


class Malformed(ValueError):
    """The bytes are no message; the text says why."""


def varint(value: int) -> bytes:
    """A whole number, not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """A field that holds a whole number."""
    return varint(field << 3 | _VARINT) + varint(value)


def data(field: int, value: bytes | str) -> bytes:
    """A field that holds bytes, a text or a message."""
    raw = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | _BYTES) + varint(len(raw)) + raw


def fields(message: memoryview, max_fields: int) -> Iterator[tuple[int, int | memoryview]]:
    """Each field's number and value: no copies are made. Raises Malformed."""
    at, n_fields = 0, 0
    while at < len(message):
        n_fields += 1
        if n_fields > max_fields:
            raise Malformed(f"more than {max_fields} fields")
        tag, at = _read_varint(message, at)
        field, kind = tag >> 3, tag & 7
        if not 0 < field <= _MAX_FIELD_NUMBER or kind not in (_VARINT, _BYTES):
            raise Malformed(f"field {field} of kind {kind}")
        value, at = _read_varint(message, at)
        if kind == _VARINT:
            yield field, value
            continue
        if value > len(message) - at:
            raise Malformed(f"field {field} claims {value} bytes, {len(message) - at} are left")
        yield field, message[at:at + value]
        at += value


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if at + index >= len(message):
            raise Malformed("the file ends inside a number")
        byte = message[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise Malformed("a number of more than 64 bits")
