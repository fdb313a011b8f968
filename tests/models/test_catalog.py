"""What is found where, under which name, and what a MODEL on the command line means."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgert.errors import ModelNotFound, UsageError
from edgert.models import scan
from edgert.models.catalog import Catalog
from edgert.models.known import KNOWN_MODELS, KnownModel
from edgert.paths import Paths

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(path: Path, content: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names(catalog: Catalog) -> list[str]:
    return [entry.name for entry in catalog.entries]


@pytest.fixture
def look(home: Path) -> Callable[..., Catalog]:
    """A fresh catalog with --models-dir and environment variables."""

    def make(*models_dirs: Path, **environ: str) -> Catalog:
        return Catalog(Paths(home / "edgert/models", home, home), models_dirs, {"HOME": str(home), **environ})

    return make


def test_a_path_is_found_whatever_its_name(look: Callable[..., Catalog], tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "weights without ending")
    assert look().find(str(path)) == path
    monkeypatch.chdir(tmp_path)
    assert look().find("weights without ending").samefile(path)


def test_a_later_part_means_the_first(look: Callable[..., Catalog], tmp_path: Path) -> None:
    first = put(tmp_path / "m-00001-of-00002.gguf")
    second = put(tmp_path / "m-00002-of-00002.gguf")
    assert look().find(str(second)) == first
    first.unlink()
    assert look().find(str(second)) == second  # ModelFile tells what is missing


@pytest.mark.parametrize("model", ["my-model-q4_k_m", "MY-MODEL-Q4_K_M", "My-Model-Q4_K_M.gguf"])
def test_names_are_found_in_any_case(look: Callable[..., Catalog], tmp_path: Path, model: str) -> None:
    path = put(tmp_path / "deep/er/My-Model-Q4_K_M.gguf")
    assert look(tmp_path).find(model) == path


def test_an_ambiguous_name_names_the_candidates_which_then_are_found(look: Callable[..., Catalog],
                                                                     tmp_path: Path) -> None:
    one, other = put(tmp_path / "a/m.gguf"), put(tmp_path / "b/m.gguf")
    catalog = look(tmp_path)
    with pytest.raises(UsageError) as caught:
        catalog.find("m")
    assert caught.value.next_step == "Say which one: a/m, b/m."
    assert (catalog.find("a/m"), catalog.find("B/M")) == (one, other)


def test_models_of_one_relative_name_in_two_directories_go_by_their_path(look: Callable[..., Catalog],
                                                                         tmp_path: Path) -> None:
    paths = [put(tmp_path / place / "m.gguf") for place in ("x", "y")]
    catalog = look(tmp_path / "x", tmp_path / "y")
    assert names(catalog) == [str(path) for path in paths]
    assert [catalog.find(str(path)) for path in paths] == paths


@pytest.mark.parametrize(("model", "near"), [
    ("quen2.5-coder", "qwen2.5-coder-q4"), ("coder", "qwen2.5-coder-q4"), ("smollm-135m", "smollm2-135m")])
def test_a_slip_names_what_is_near(look: Callable[..., Catalog], tmp_path: Path, model: str, near: str) -> None:
    put(tmp_path / "qwen2.5-coder-q4.gguf")
    with pytest.raises(ModelNotFound) as caught:
        look(tmp_path).find(model)
    assert near in caught.value.near


@pytest.mark.parametrize("model", ["", ".", "/", "\0", "x" * 5000, "~nobody/x", "no/such/file.gguf", "../x", "\udcff"])
def test_strange_names_are_not_found(look: Callable[..., Catalog], model: str) -> None:
    with pytest.raises(ModelNotFound):
        look().find(model)


@pytest.mark.parametrize("model", ["smollm2-135m", "user/repo", "user/repo:Q8_0"])
def test_what_could_be_pulled_says_how(look: Callable[..., Catalog], model: str) -> None:
    with pytest.raises(ModelNotFound, match=f"edgert pull {model}"):
        look().find(model)


def test_references_choose_among_a_repositorys_files(look: Callable[..., Catalog], home: Path) -> None:
    repo = home / "edgert/models/User/Model-Q8_0-GGUF"
    small, large = put(repo / "m-Q4_0.gguf"), put(repo / "sub/m-Q8_0-00001-of-00001.gguf")
    catalog = look()
    assert catalog.find("user/model-q8_0-gguf:q4_0") == small
    assert catalog.find("User/Model-Q8_0-GGUF:Q8_0") == large
    assert catalog.find("User/Model-Q8_0-GGUF") == large  # no Q4_K_M is here
    with pytest.raises(ModelNotFound):
        catalog.find("User/Model-Q8_0-GGUF:Q5_K_M")


def test_other_programs_models_are_found_where_they_lie(look: Callable[..., Catalog], home: Path,
                                                        tmp_path: Path) -> None:
    blob = put(home / ".cache/huggingface/hub/models--user--repo/blobs/abc")
    snapshot = home / f".cache/huggingface/hub/models--user--repo/snapshots/{COMMIT}"
    snapshot.mkdir(parents=True)
    (snapshot / "hub-Q4_K_M.gguf").symlink_to(blob)
    studio = put(home / ".lmstudio/models/u/r/studio-Q8_0.gguf")
    flat = put(home / ".cache/llama.cpp/u_r_flat.gguf")
    listed = put(tmp_path / "listed/m.gguf")
    catalog = look(EDGERT_MODELS_DIR=os.pathsep.join([str(tmp_path / "listed"), str(tmp_path / "absent"), ""]))
    assert names(catalog) == ["m", "hub-Q4_K_M", "studio-Q8_0", "u_r_flat"]
    assert catalog.find("user/repo") == snapshot / "hub-Q4_K_M.gguf"
    assert catalog.find("u/r:q8_0") == studio
    assert catalog.find("u_r_flat") == flat
    assert catalog.find("m") == listed
    assert not any(entry.ours for entry in catalog.entries)


@pytest.mark.parametrize(("variable", "below"), [
    ("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"),
    ("LLAMA_CACHE", "")])
def test_the_hubs_cache_is_where_the_environment_says(look: Callable[..., Catalog], tmp_path: Path, variable: str,
                                                      below: str) -> None:
    path = put(tmp_path / below / f"models--u--r/snapshots/{COMMIT}/m.gguf")
    assert look(**{variable: str(tmp_path)}).find("u/r") == path


def test_of_several_snapshots_the_one_that_main_points_at_is_shown(look: Callable[..., Catalog], home: Path) -> None:
    repo = home / ".cache/huggingface/hub/models--u--r"
    put(repo / "snapshots" / ("f" * 40) / "m.gguf")
    new = put(repo / "snapshots" / COMMIT / "m.gguf")
    put(repo / "refs/main", f"{COMMIT}\n".encode())
    assert look().find("m") == new


@pytest.mark.parametrize("pointer", [b"../../../..", b"/", b"\xff\xfe", b"", b"absent"])
def test_a_pointer_that_makes_no_sense_shows_every_snapshot(look: Callable[..., Catalog], home: Path,
                                                            pointer: bytes) -> None:
    repo = home / ".cache/huggingface/hub/models--u--r"
    path = put(repo / "snapshots" / COMMIT / "m.gguf")
    put(repo / "refs/main", pointer)
    assert look().find("m") == path


def test_split_models_are_listed_once_with_the_size_of_all_parts(look: Callable[..., Catalog],
                                                                 tmp_path: Path) -> None:
    parts = [put(tmp_path / f"m-Q4-0000{n}-of-00003.gguf", b"x" * n) for n in (1, 2, 3)]
    catalog = look(tmp_path)
    (entry,) = catalog.entries
    assert (entry.name, entry.size_bytes, entry.parts, entry.problem) == ("m-Q4", 6, tuple(parts), "")
    assert catalog.find("M-q4") == catalog.find("m-q4-00001-of-00003.gguf") == parts[0]
    parts[1].unlink()
    (entry,) = look(tmp_path).list()
    assert entry.problem == "1 of 3 parts missing: m-Q4-00002-of-00003.gguf"


def test_one_file_under_two_names_is_listed_once(look: Callable[..., Catalog], home: Path, tmp_path: Path) -> None:
    path = put(home / "edgert/models/u/r/m.gguf")
    (tmp_path / "link.gguf").symlink_to(path)
    (tmp_path / "hard.gguf").hardlink_to(path)
    assert [entry.path for entry in look(tmp_path).entries] == [path]


def test_loops_of_links_are_walked_once(look: Callable[..., Catalog], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(scan, "MAX_VISITED", 10)
    directory = tmp_path / "models"
    put(directory / "a/m.gguf")
    (directory / "a/loop").symlink_to(directory)
    (directory / "self.gguf").symlink_to(directory / "self.gguf")
    (directory / "dangling.gguf").symlink_to(directory / "nowhere")
    assert names(look(directory)) == ["m"]
    assert caplog.text == ""


def test_depth_is_bounded_and_hidden_directories_are_left_out(look: Callable[..., Catalog], tmp_path: Path) -> None:
    put(tmp_path / "/".join("12345678") / "in.gguf")
    put(tmp_path / "/".join("123456789") / "too-deep.gguf")
    put(tmp_path / ".trash/hidden.gguf")
    assert names(look(tmp_path)) == ["in"]


def test_a_directory_with_too_much_in_it_is_searched_in_part_and_said(
        look: Callable[..., Catalog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(scan, "MAX_VISITED", 10)
    for number in range(30):
        put(tmp_path / f"m{number:02}.gguf")
    with caplog.at_level(logging.WARNING):
        assert len(names(look(tmp_path))) == 10
    assert "more than 10 entries" in caplog.text


def test_what_is_no_model_is_not_listed(look: Callable[..., Catalog], tmp_path: Path) -> None:
    for name in ("mmproj-m.gguf", "imatrix.gguf", "m.gguf.partial", "m.safetensors", "README.md"):
        put(tmp_path / name)
    (tmp_path / "directory.gguf").mkdir()
    assert names(look(tmp_path)) == []


def test_a_models_dir_that_is_not_there_is_an_error(look: Callable[..., Catalog], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--models-dir"):
        look(tmp_path / "absent")


def test_listing_tells_architectures_and_problems(look: Callable[..., Catalog], tmp_path: Path,
                                                  tiny_model: Callable[..., Path]) -> None:
    (tmp_path / "good.gguf").symlink_to(tiny_model("qwen2"))
    put(tmp_path / "bad.gguf", b"GGUF\x03\0\0\0")
    bad, good = look(tmp_path).list()
    assert (good.architecture, good.problem) == ("qwen2", "")
    assert (bad.architecture, bool(bad.problem)) == ("", True)


def test_finding_opens_no_file(look: Callable[..., Catalog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "m.gguf")
    path.chmod(0)
    monkeypatch.setattr("edgert.gguf.model_file.ModelFile.open", None)
    assert look(tmp_path).find("m") == path


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    tiny = KnownModel("tiny", "package", "1", 1, "Tiny.Q4_1.gguf", 4, "0" * 64)
    for module in ("known", "catalog"):
        monkeypatch.setattr(f"edgert.models.{module}.KNOWN_MODELS", {"tiny": tiny})
    return tiny


def test_the_first_of_a_known_models_copies_has_its_short_name(look: Callable[..., Catalog], home: Path,
                                                               tmp_path: Path, known: KnownModel) -> None:
    own = put(home / "edgert/models/pypi/package/Tiny.Q4_1.gguf")
    copy = put(tmp_path / "Tiny.Q4_1.gguf")
    catalog = look(tmp_path)
    assert names(catalog) == ["tiny", "Tiny.Q4_1"]
    assert catalog.find("TINY") == own
    assert catalog.find("tiny.q4_1") == copy
    own.unlink()
    assert look(tmp_path).find("tiny") == copy


def test_a_file_of_another_size_is_not_the_known_model(look: Callable[..., Catalog], tmp_path: Path,
                                                       known: KnownModel) -> None:
    put(tmp_path / "Tiny.Q4_1.gguf", b"longer")
    catalog = look(tmp_path)
    assert names(catalog) == ["Tiny.Q4_1"]
    with pytest.raises(ModelNotFound, match="edgert pull tiny"):
        catalog.find("tiny")


def test_a_users_own_file_keeps_a_name_that_a_known_model_has_too(look: Callable[..., Catalog], tmp_path: Path,
                                                                  known: KnownModel) -> None:
    put(tmp_path / "Tiny.Q4_1.gguf")
    own = put(tmp_path / "tiny.gguf", b"something else")
    assert look(tmp_path).find("tiny") == own


def test_the_default_model_is_known() -> None:
    assert KNOWN_MODELS["smollm2-135m"].size_bytes == 98_362_432
