"""Moving through a file: windows, borders and lengths that lead outside."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from edgert.errors import ModelFileError, ModelNotFound
from edgert.gguf import cursor as cursor_module
from edgert.gguf.cursor import open_cursor

WINDOW = 2**18


def strings(*lengths: int) -> bytes:
    return b"".join(struct.pack("<Q", length) + b"s" * length for length in lengths)


@pytest.mark.parametrize("lengths", [
    (0,), (5, 0, 7), (1,) * 60_000, (WINDOW - 8, 3, 4), (WINDOW - 9, 3, 4), (WINDOW - 15, 3),
    (3 * WINDOW, 1, WINDOW, 2), (WINDOW - 16, 0, 0, 1),
], ids=["empty", "short", "many", "to-the-border", "one-short", "length-across", "longer-than-windows", "at-border"])
def test_strings_are_skipped_to_the_byte_wherever_windows_end(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    path = tmp_path / "strings"
    path.write_bytes(b"before" + strings(*lengths) + b"after")
    with open_cursor(path) as cursor:
        assert cursor.take(6, "a text") == b"before"
        cursor.skip_strings(len(lengths), "strings")
        assert cursor.take(5, "a text") == b"after"


@pytest.mark.parametrize("length", [1, 9, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_string_that_leads_outside_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "strings"
    path.write_bytes(strings(3, 3) + struct.pack("<Q", length))
    for count in (3, 4, 2**40, 2**64 - 1):
        with open_cursor(path) as cursor, pytest.raises(ModelFileError, match="strings"):
            cursor.skip_strings(count, "strings")


def test_strings_that_the_file_has_not_are_missed(tmp_path: Path) -> None:
    path = tmp_path / "strings"
    path.write_bytes(strings(30, 30) + b"\0" * 7)
    with open_cursor(path) as cursor, pytest.raises(ModelFileError, match="strings needs 8 bytes at byte 76"):
        cursor.skip_strings(4, "strings")


def test_a_value_across_two_windows_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(bytes(WINDOW - 3) + struct.pack("<Q", 0x1122334455667788) + bytes(100))
    with open_cursor(path) as cursor:
        cursor.take(WINDOW - 3, "zeros")
        assert cursor.u64("a number") == 0x1122334455667788


def test_a_header_longer_than_any_real_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor_module, "MAX_HEADER_BYTES", 1000)
    path = tmp_path / "long"
    path.write_bytes(bytes(2000))
    with open_cursor(path) as cursor:
        cursor.skip(1000, "zeros")
        with pytest.raises(ModelFileError, match="within 1000 bytes"):
            cursor.take(1, "a byte")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "shrinking"
    path.write_bytes(bytes(2 * WINDOW))
    with open_cursor(path) as cursor:
        cursor.take(WINDOW, "zeros")
        path.write_bytes(b"")
        with pytest.raises(ModelFileError, match="shrank"):
            cursor.take(8, "a number")


def test_a_failing_read_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "broken"
    path.write_bytes(bytes(100))
    with pytest.raises(ModelFileError, match="Input/output"), open_cursor(path):
        raise OSError(5, "Input/output error")


def test_paths_that_cannot_exist_are_not_found() -> None:
    for path in ("/nowhere/at/all.gguf", "nul\0byte.gguf", "/dev/null/child.gguf"):
        with pytest.raises(ModelNotFound), open_cursor(Path(path)):
            pass
