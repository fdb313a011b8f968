"""A model file's typed getters, its split parts, its fingerprint, and what is said about files that are none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import MetaValue, TinyTensor, Typed, write_gguf, write_split_gguf

from edgert.errors import ModelFileError, ModelNotFound
from edgert.gguf import split as split_module
from edgert.gguf.model_file import ModelFile
from edgert.gguf.types import TENSOR_TYPES_BY_NAME
from edgert.gguf.values import ValueType

F32 = TENSOR_TYPES_BY_NAME["F32"]


def tensors(count: int) -> list[TinyTensor]:
    return [TinyTensor(f"blk.{number}.weight", F32, (8, 2), bytes([number]) * 64) for number in range(count)]


@pytest.fixture
def model(tmp_path: Path) -> ModelFile:
    metadata: dict[str, MetaValue] = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.rope.freq_base": 10000.5, "llama.flag": True,
        "llama.heads": [4, 2], "llama.pattern": [True, False], "llama.negative": Typed(ValueType.INT32, -1),
        "llama.huge": Typed(ValueType.UINT64, 2**40), "llama.nan": float("nan"), "llama.inf": float("inf"),
        "llama.fractions": [0.5], "tokenizer.ggml.tokens": ["a", "b"]}
    return ModelFile.open(write_gguf(tmp_path / "tiny.gguf", metadata, tensors(3)))


def test_a_model_knows_its_size_and_names(model: ModelFile) -> None:
    assert (model.architecture, model.name) == ("llama", "tiny")
    assert (model.parts, model.file_bytes) == ((model.path,), model.path.stat().st_size)
    assert (len(model.tensors), model.n_parameters) == (3, 48)


def test_getters_give_values_of_their_type_and_expand_the_architecture(model: ModelFile) -> None:
    assert model.get_int("{arch}.block_count") == 2
    assert model.get_float("{arch}.rope.freq_base") == 10000.5
    assert model.get_float("{arch}.block_count") == 2.0
    assert model.get_bool("llama.flag") is True
    assert model.get_str("general.architecture") == "llama"
    assert model.get_ints("{arch}.heads") == (4, 2)
    assert model.get_ints("{arch}.block_count") == (2,)
    assert model.get_ints("{arch}.pattern") == (1, 0)
    assert model.get_int("{arch}.negative", minimum=-1) == -1
    assert model.get_int("{arch}.huge", maximum=2**64) == 2**40
    assert model.has("{arch}.flag") and not model.has("{arch}.absent")


def test_defaults_stand_in_for_missing_keys_only(model: ModelFile) -> None:
    assert model.get_int("{arch}.absent", 0) == 0
    assert model.get_float("{arch}.absent", 0.0) == 0.0
    assert model.get_bool("{arch}.absent", False) is False
    assert model.get_str("{arch}.absent", "") == ""
    assert model.get_ints("{arch}.absent", ()) == ()
    with pytest.raises(ModelFileError, match="truth value"):
        model.get_int("{arch}.flag", 5)


@pytest.mark.parametrize(("getter", "key", "problem"), [
    ("get_int", "{arch}.absent", "'llama.absent' is missing"),
    ("get_float", "{arch}.absent", "missing"), ("get_bool", "{arch}.absent", "missing"),
    ("get_str", "{arch}.absent", "missing"), ("get_ints", "{arch}.absent", "missing"),
    ("get_int", "llama.flag", "truth value, a whole number"), ("get_int", "llama.rope.freq_base", "fraction"),
    ("get_int", "general.architecture", "a text, a whole number"), ("get_int", "llama.heads", "an array"),
    ("get_int", "llama.negative", "is -1"), ("get_int", "llama.huge", "1099511627776"),
    ("get_float", "llama.nan", "nan"), ("get_float", "llama.inf", "inf"), ("get_float", "llama.flag", "truth value"),
    ("get_bool", "llama.block_count", "whole number"), ("get_str", "llama.block_count", "whole number"),
    ("get_str", "tokenizer.ggml.tokens", "long array"), ("get_ints", "tokenizer.ggml.tokens", "long array"),
    ("get_ints", "llama.fractions", "array"), ("get_ints", "llama.negative", "is -1"),
])
def test_a_wrong_or_missing_value_is_an_error_that_names_the_key(model: ModelFile, getter: str, key: str,
                                                                 problem: str) -> None:
    with pytest.raises(ModelFileError, match=problem) as error:
        getattr(model, getter)(key)
    assert key.replace("{arch}", "llama") in error.value.message
    assert str(model.path) == error.value.path


@pytest.mark.parametrize("architecture", ["", "a\x1b[2Jb", "x" * 65, 7])
def test_an_architecture_that_is_no_name_is_refused(tmp_path: Path, architecture: Any) -> None:
    model = ModelFile.open(write_gguf(tmp_path / "m.gguf", {"general.architecture": architecture}))
    with pytest.raises(ModelFileError, match="architecture"):
        _ = model.architecture


def test_a_name_is_shown_without_control_characters(tmp_path: Path) -> None:
    model = ModelFile.open(write_gguf(tmp_path / "m.gguf", {"general.name": "Tiny\x1b]0;evil\x07 1B"}))
    assert model.name == "Tiny]0;evil 1B"


def test_a_fingerprint_notices_another_header_and_other_weights(tmp_path: Path) -> None:
    def written(**changes: Any) -> str:
        path = write_gguf(tmp_path / "m.gguf", {"general.architecture": changes.get("architecture", "llama")},
                          [TinyTensor("a", F32, (65536,), changes.get("data", bytes(262144)))])
        return ModelFile.open(path).fingerprint()

    assert written() == written()
    assert len(written()) == 64
    assert written() != written(architecture="qwen2")
    assert written() != written(data=b"\1" + bytes(262143))
    assert written() != written(data=bytes(262143) + b"\1")
    assert written() != written(data=bytes(131072) + b"\1" * 131072)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    first = write_split_gguf(tmp_path / "big.gguf", {"general.architecture": "llama"}, tensors(7), 3)
    return sorted(first.parent.glob("big-*.gguf"))


def test_a_split_model_is_one_model(parts: list[Path]) -> None:
    model = ModelFile.open(parts[0])
    assert model.parts == tuple(parts)
    assert model.file_bytes == sum(one.stat().st_size for one in parts)
    assert len(model.tensors) == 7
    for number in range(7):
        info = model.tensors[f"blk.{number}.weight"]
        content = model.parts[info.part].read_bytes()
        assert content[info.offset:info.offset + info.n_bytes] == bytes([number]) * 64
    whole = model.fingerprint()
    last = parts[2].read_bytes()
    parts[2].write_bytes(last[:-1] + bytes([last[-1] ^ 1]))
    assert ModelFile.open(parts[0]).fingerprint() != whole


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(ModelFileError, match=r"big-00002-of-00003\.gguf is missing") as error:
        ModelFile.open(parts[0])
    assert "big-00002-of-00003.gguf" in error.value.next_step


def test_opening_a_later_part_names_the_first(parts: list[Path]) -> None:
    with pytest.raises(ModelFileError, match="part 2 of 3") as error:
        ModelFile.open(parts[1])
    assert "big-00001-of-00003.gguf" in error.value.next_step
    parts[0].unlink()
    with pytest.raises(ModelFileError, match=r"big-00001-of-00003\.gguf, which is missing"):
        ModelFile.open(parts[1])


def test_renamed_and_exchanged_parts_are_refused(parts: list[Path], tmp_path: Path) -> None:
    renamed = tmp_path / "model.gguf"
    shutil.copy(parts[0], renamed)
    with pytest.raises(ModelFileError, match=r"not named NAME-00001-of-00003\.gguf"):
        ModelFile.open(renamed)
    shutil.copy(parts[2], parts[1])
    with pytest.raises(ModelFileError, match="says that it is part 3 of 3"):
        ModelFile.open(parts[0])


@pytest.mark.parametrize(("split", "problem"), [
    ({"split.tensors.count": 9}, "promises 9 tensors"), ({"split.tensors.count": "x"}, "split.tensors.count"),
    ({"split.count": 60000}, "at most 1024"), ({"split.count": Typed(ValueType.INT32, -3)}, "split.count"),
    ({"split.no": "x"}, "split.no"),
])
def test_a_first_part_that_lies_is_refused(parts: list[Path], split: dict[str, MetaValue], problem: str) -> None:
    honest: dict[str, MetaValue] = {"split.no": 0, "split.count": 3, "split.tensors.count": 7}
    write_gguf(parts[0], {**honest, **split}, tensors(2))
    with pytest.raises(ModelFileError, match=problem):
        ModelFile.open(parts[0])


def test_a_tensor_in_two_parts_is_refused(parts: list[Path]) -> None:
    write_gguf(parts[2], {"split.no": 2, "split.count": 3}, tensors(3))
    with pytest.raises(ModelFileError, match="in two of its parts"):
        ModelFile.open(parts[0])


def test_all_parts_together_have_bounded_tensors(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module, "MAX_TENSORS", 6)
    with pytest.raises(ModelFileError, match="over 6 tensors"):
        ModelFile.open(parts[0])


def test_a_whole_model_may_be_named_like_a_part(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00009.gguf", {"split.no": 0, "split.count": 1}, tensors(1))
    assert ModelFile.open(path).parts == (path,)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    (b"PK\x03\x04" + bytes(60), "zip archive"),
    (b"\x40\x01\0\0\0\0\0\0" + b'{"__metadata__":{"format":"pt"}}', "safetensors"),
    (b"\n<!DOCTYPE html><html><body>404", "HTML"), (b"<HTML><head>", "HTML"),
    (b'{"error":"Repository not found"}', "JSON"), (b"\x80\x02\x8a\nl\xfc", "pickle"),
    (b"tjgg" + bytes(60), "before GGUF"), (bytes(4096), "zeros"), (b"\x01\x02\x03 whatever", "something else"),
    (b"GGU", "something else"), (b"GGUF", "version"),
])
def test_a_file_that_is_no_gguf_is_named_for_what_it_is(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=words):
        ModelFile.open(path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as error:
        ModelFile.open(tmp_path / "absent.gguf")
    assert error.value.model == str(tmp_path / "absent.gguf")


def test_directories_and_pipes_are_refused_without_waiting(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="directory"):
        ModelFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        ModelFile.open(tmp_path / "pipe.gguf")


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    if os.geteuid() == 0:  # root reads everything; a loop of links fails for root too
        path = tmp_path / "loop.gguf"
        path.symlink_to(path)
    else:
        path = write_gguf(tmp_path / "secret.gguf", {})
        path.chmod(0)
    with pytest.raises(ModelFileError, match="cannot be read"):
        ModelFile.open(path)
