"""`edgert rm` deletes what is edgert's, all of it, and never anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from recorder import Recorder

from edgert.errors import ModelNotFound, UsageError
from edgert.models.catalog import Catalog
from edgert.models.partial import locked, partial_path, sidecar_path
from edgert.models.remove import remove
from edgert.paths import Paths


def put(path: Path, content: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def own(home: Path) -> Path:
    models = home / "edgert/models"
    models.mkdir(parents=True)
    return models


@pytest.fixture
def look(home: Path, own: Path) -> Callable[..., Catalog]:
    return lambda *models_dirs: Catalog(Paths(own, home, home), models_dirs, {"HOME": str(home)})


def test_a_model_goes_with_its_empty_directories(own: Path, look: Callable[..., Catalog]) -> None:
    path, other = put(own / "u/r/m.gguf", b"x" * 100), put(own / "u/other/o.gguf")
    removal = remove("M", look())
    assert (removal.paths, removal.freed_bytes) == ((path,), 100)
    assert not path.parent.exists()
    assert other.exists()
    remove("o", look())
    assert own.exists() and list(own.iterdir()) == []


def test_all_parts_of_a_split_model_go(own: Path, look: Callable[..., Catalog]) -> None:
    parts = [put(own / f"u/r/Q6/m-0000{n}-of-00003.gguf", b"x" * n) for n in (1, 2, 3)]
    keep = put(own / "u/r/m-Q4.gguf")
    assert remove("u/r:m", look()).freed_bytes == 6
    assert [path for path in [*parts, keep] if path.exists()] == [keep]


@pytest.mark.parametrize("name", ["path", "name", "reference"])
def test_the_name_may_be_of_any_kind(own: Path, look: Callable[..., Catalog], name: str) -> None:
    path = put(own / "u/r/m-Q8_0.gguf")
    remove({"path": str(path), "name": "m-q8_0", "reference": "u/r:Q8_0"}[name], look())
    assert not path.exists()


def test_a_path_to_one_part_means_all_parts(own: Path, look: Callable[..., Catalog]) -> None:
    parts = [put(own / f"u/r/m-0000{n}-of-00002.gguf") for n in (1, 2)]
    remove(str(parts[1]), look())
    assert not any(part.exists() for part in parts)


def test_an_unfinished_download_goes_with_what_is_known_of_it(own: Path, look: Callable[..., Catalog]) -> None:
    target = own / "u/r/m-Q4.gguf"
    put(partial_path(target), b"x" * 50)
    put(sidecar_path(target), b"{}")
    assert remove("u/r:Q4", look()).freed_bytes == 52
    assert list(own.iterdir()) == []


def test_the_finished_model_takes_its_leftovers_with_it(own: Path, look: Callable[..., Catalog]) -> None:
    target = put(own / "u/r/m.gguf")
    put(partial_path(target), b"newer version")
    remove("m", look())
    assert list(own.iterdir()) == []


def test_an_interrupted_pull_of_parts_goes_as_one(own: Path, look: Callable[..., Catalog]) -> None:
    put(own / "u/r/m-Q6-00001-of-00003.gguf")
    put(own / "u/r/m-Q6-00002-of-00003.gguf.partial", b"x")
    remove("u/r:Q6", look())
    assert list(own.iterdir()) == []


def test_a_download_in_progress_is_left_alone(own: Path, look: Callable[..., Catalog], progress: Recorder) -> None:
    target = own / "u/r/m.gguf"
    with locked(target, progress) as partial:
        partial.write(b"bytes", 10)
        with pytest.raises(UsageError, match="being fetched"):
            remove("m", look())
    assert partial_path(target).read_bytes() == b"bytes"


def test_files_elsewhere_are_refused_with_the_place(own: Path, look: Callable[..., Catalog], tmp_path: Path) -> None:
    path = put(tmp_path / "theirs/m.gguf")
    for model in (str(path), "m"):
        with pytest.raises(UsageError) as caught:
            remove(model, look(tmp_path / "theirs"))
        assert str(path) in caught.value.message
        assert str(own) in caught.value.message
    assert path.exists()


def test_edgerts_own_copy_is_meant_where_there_are_two(own: Path, look: Callable[..., Catalog],
                                                       tmp_path: Path) -> None:
    ours, theirs = put(own / "u/r/m.gguf"), put(tmp_path / "theirs/m.gguf")
    remove("m", look(tmp_path / "theirs"))
    assert (ours.exists(), theirs.exists()) == (False, True)


def test_a_path_that_climbs_out_is_refused(own: Path, look: Callable[..., Catalog], tmp_path: Path) -> None:
    path = put(tmp_path / "home/m.gguf")
    with pytest.raises(UsageError, match="outside"):
        remove(f"{own}/../../m.gguf", look())
    assert path.exists()


def test_a_link_to_a_file_outside_is_refused(own: Path, look: Callable[..., Catalog], tmp_path: Path) -> None:
    precious = put(tmp_path / "precious.gguf")
    link = own / "u/r/m.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(precious)
    for model in ("m", str(link)):
        with pytest.raises(UsageError, match="is a link"):
            remove(model, look())
    assert precious.exists() and link.is_symlink()


def test_a_link_to_a_directory_outside_is_refused(own: Path, look: Callable[..., Catalog], tmp_path: Path) -> None:
    precious = put(tmp_path / "disk/r/m.gguf")
    (own / "u").symlink_to(tmp_path / "disk")
    for model in ("m", "u/r", str(own / "u/r/m.gguf")):
        with pytest.raises(UsageError, match="outside"):
            remove(model, look())
    assert precious.exists()


def test_one_part_that_is_a_link_saves_all(own: Path, look: Callable[..., Catalog], tmp_path: Path) -> None:
    first = put(own / "u/r/m-00001-of-00002.gguf")
    second = first.with_name("m-00002-of-00002.gguf")
    second.symlink_to(put(tmp_path / "precious.gguf", b"other"))
    with pytest.raises(UsageError, match="is a link"):
        remove("m", look())
    assert first.exists()


def test_a_models_directory_that_is_a_link_itself_is_fine(home: Path, own: Path, tmp_path: Path) -> None:
    path = put(own / "u/r/m.gguf")
    (tmp_path / "linked").symlink_to(own)
    remove("m", Catalog(Paths(tmp_path / "linked", home, home), environ={"HOME": str(home)}))
    assert not path.exists() and own.exists()


def test_other_files_in_the_models_directory_are_refused(own: Path, look: Callable[..., Catalog]) -> None:
    path = put(own / "notes.txt")
    with pytest.raises(UsageError, match="no model"):
        remove(str(path), look())
    assert path.exists()


def test_ambiguous_and_unknown_names_delete_nothing(own: Path, look: Callable[..., Catalog]) -> None:
    paths = [put(own / f"u/{repo}/m.gguf") for repo in "ab"]
    with pytest.raises(UsageError, match="u/a/m, u/b/m"):
        remove("m", look())
    with pytest.raises(ModelNotFound):
        remove("n", look())
    assert all(path.exists() for path in paths)
