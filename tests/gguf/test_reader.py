"""Sound files are read right: against what was written, against the gguf package, and at the size of real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_gguf import Array, MetaValue, TinyTensor, Typed, write_gguf

from edgert.gguf.reader import TensorInfo, read_header
from edgert.gguf.types import TENSOR_TYPES_BY_NAME
from edgert.gguf.values import ArrayRef, ValueType

F32, Q8_0 = TENSOR_TYPES_BY_NAME["F32"], TENSOR_TYPES_BY_NAME["Q8_0"]


def test_every_scalar_type_is_read_with_its_sign_and_width(tmp_path: Path) -> None:
    scalars: dict[str, tuple[MetaValue, object]] = {
        "u8": (Typed(ValueType.UINT8, 255), 255), "i8": (Typed(ValueType.INT8, -128), -128),
        "u16": (Typed(ValueType.UINT16, 65535), 65535), "i16": (Typed(ValueType.INT16, -2), -2),
        "u32": (2**32 - 1, 2**32 - 1), "i32": (Typed(ValueType.INT32, -(2**31)), -(2**31)),
        "f32": (0.25, 0.25), "f64": (Typed(ValueType.FLOAT64, 0.1), 0.1),
        "u64": (Typed(ValueType.UINT64, 2**64 - 1), 2**64 - 1), "i64": (Typed(ValueType.INT64, -1), -1),
        "yes": (True, True), "no": (False, False), "text": ("Käse ✓", "Käse ✓"), "empty": ("", ""),
        "latin-1": (b"caf\xe9", "caf\ufffd"),
    }
    header = read_header(write_gguf(tmp_path / "m.gguf", {key: one[0] for key, one in scalars.items()}))
    assert header.metadata == {key: one[1] for key, one in scalars.items()}
    assert [type(header.metadata[key]) for key in ("yes", "u8", "f32")] == [bool, int, float]


def test_short_numeric_arrays_become_tuples_and_long_ones_stay_in_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {
        "heads": [4, 4, 2], "truths": [True, False], "longest": list(range(1024)), "none": Array(ValueType.INT32, ()),
        "long": list(range(1025)), "scores": [0.5] * 2000, "after": 7})
    metadata = read_header(path).metadata
    assert metadata["heads"] == (4, 4, 2)
    assert metadata["truths"] == (True, False)
    assert metadata["longest"] == tuple(range(1024))
    assert metadata["none"] == ()
    assert metadata["after"] == 7
    long, scores = metadata["long"], metadata["scores"]
    assert isinstance(long, ArrayRef) and isinstance(scores, ArrayRef)
    assert (long.element_type, long.length, long.n_bytes) == (ValueType.INT32, 1025, 4100)
    assert long.read_numbers(path) == tuple(range(1025))
    assert scores.read_numbers(path) == (0.5,) * 2000


def test_string_arrays_stay_in_the_file_and_are_read_when_wanted(tmp_path: Path) -> None:
    tokens: list[str | bytes] = ["a", "", "Ġthe", b"\xff\x00 not text"]
    path = write_gguf(tmp_path / "m.gguf", {"tokens": Array(ValueType.STRING, tokens), "after": 7})
    metadata = read_header(path).metadata
    ref = metadata["tokens"]
    assert isinstance(ref, ArrayRef)
    assert (ref.element_type, ref.length) == (ValueType.STRING, 4)
    assert ref.read_strings(path) == (b"a", b"", "Ġthe".encode(), b"\xff\x00 not text")
    assert metadata["after"] == 7


def test_a_text_beyond_the_allowance_is_left_in_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"tokenizer.huggingface.json": "x" * 3_000_000, "after": "short"})
    metadata = read_header(path).metadata
    ref = metadata["tokenizer.huggingface.json"]
    assert isinstance(ref, ArrayRef)
    assert ref.read_strings(path) == (b"x" * 3_000_000,)
    assert metadata["after"] == "short"


def test_tensors_have_absolute_offsets_in_the_tables_order(tmp_path: Path) -> None:
    first, second = bytes(range(34 * 3)), b"\1\2\3\4"
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, [
        TinyTensor("b", Q8_0, (32, 3), first), TinyTensor("a", F32, (1,), second),
        TinyTensor("scalar", F32, (), second)], alignment=64)
    header = read_header(path, part=5)
    assert list(header.tensors) == ["b", "a", "scalar"]
    content = path.read_bytes()
    for name, expected in (("b", first), ("a", second)):
        info = header.tensors[name]
        assert content[info.offset:info.offset + info.n_bytes] == expected
        assert info.offset % 64 == 0
    offset = header.tensors["b"].offset
    assert header.tensors["b"] == TensorInfo("b", Q8_0, (32, 3), offset, 102, 5)
    assert header.tensors["b"].n_elements == 96
    assert header.tensors["scalar"].shape == (1,)
    assert (header.alignment, header.data_start) == (64, offset)


@pytest.mark.parametrize("version", [2, 3])
def test_both_current_versions_are_read(tmp_path: Path, version: int) -> None:
    header = read_header(write_gguf(tmp_path / "m.gguf", {"key": 1}, version=version))
    assert (header.version, dict(header.metadata), dict(header.tensors)) == (version, {"key": 1}, {})


def compare_with_the_gguf_package(path: Path) -> None:
    import gguf

    theirs, ours = gguf.GGUFReader(path), read_header(path)
    assert [(one.name, one.tensor_type.value, tuple(map(int, one.shape)), one.data_offset, one.n_bytes)
            for one in theirs.tensors] == [
        (one.name, one.type.id, one.shape, one.offset, one.n_bytes) for one in ours.tensors.values()]
    fields = {name: one for name, one in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == list(ours.metadata)
    for name, entry in fields.items():
        value = ours.metadata[name]
        if isinstance(value, ArrayRef):
            assert (value.length, int(value.element_type)) == (len(entry.data), int(entry.types[-1]))
        else:
            expected = entry.contents()
            assert value == (tuple(expected) if isinstance(expected, list) else expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "smallthinker"])
def test_the_gguf_package_reads_the_same(tiny_model: Callable[..., Path], architecture: str) -> None:
    compare_with_the_gguf_package(tiny_model(architecture, quantisation="Q4_0"))


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"])
def test_real_models_are_read_without_parsing_their_vocabulary(real_model: Callable[[str], Path], name: str) -> None:
    header = read_header(real_model(name))
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, ArrayRef)
    assert tokens.length == header.tensors["token_embd.weight"].shape[1]
    assert max(one.offset + one.n_bytes for one in header.tensors.values()) <= header.file_bytes
    if name == "smollm2-135m":  # the gguf package needs seconds for the larger vocabularies
        compare_with_the_gguf_package(real_model(name))
        read = tokens.read_strings(real_model(name))
        assert (read[0], len(set(read))) == (b"<|endoftext|>", tokens.length)
