"""What a cache file holds is taken for what it is, whatever stands there; and losing one is no error."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgert.cache_file import read_cache, write_cache


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache.json"
    write_cache(path, {"a": 1})
    write_cache(path, {"b": [2.5]})
    assert read_cache(path) == {"b": [2.5]}
    assert [one.name for one in path.parent.iterdir()] == ["cache.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000,
                                     b'{"a": "' + b"x" * 2**20 + b'"}'], ids=range(7))
def test_anything_else_counts_as_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cache.json").write_bytes(content)
    assert read_cache(tmp_path / "cache.json") == {}


def test_a_place_that_cannot_be_written_to_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    write_cache(tmp_path / "file" / "cache.json", {"a": 1})
    (tmp_path / "taken.json").mkdir()
    write_cache(tmp_path / "taken.json", {"a": 1})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "taken.json"]
    assert read_cache(tmp_path / "taken.json") == {}
