"""Files that lie: each kind of lie ends in an error that names it, and thousands of damaged files end in some error.

The damage comes from benchmarks/fuzz_gguf.py, which also bounds the steps and the memory that a case may take.
"""

from __future__ import annotations

import importlib.util
import struct
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from tiny_gguf import MetaValue, TinyTensor, Typed, gguf_bytes, string_bytes

from edgert.errors import ModelFileError
from edgert.gguf import reader, values
from edgert.gguf.reader import read_header
from edgert.gguf.types import TENSOR_TYPES_BY_NAME
from edgert.gguf.values import ValueType

F32, Q8_0, Q4_K = (TENSOR_TYPES_BY_NAME[name] for name in ("F32", "Q8_0", "Q4_K"))
N_FUZZ_CASES, FUZZ_SEED = 3000, 20240


def key(name: str | bytes, value: bytes) -> bytes:
    return string_bytes(name) + value


def scalar(value_type: int, data: bytes = b"\0\0\0\0") -> bytes:
    return struct.pack("<I", value_type) + data


def array(element_type: int, length: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ValueType.ARRAY, element_type, length) + data


def tensor(name: str | bytes = "t", shape: Sequence[int] = (8,), type_id: int = 0, offset: int = 0,
           n_dimensions: int | None = None) -> bytes:
    n_stored = len(shape) if n_dimensions is None else n_dimensions
    return string_bytes(name) + struct.pack(f"<I{len(shape)}QIQ", n_stored, *shape, type_id, offset)


def raw(keys: Sequence[bytes] = (), tensors: Sequence[bytes] = (), *, n_keys: int | None = None,
        n_tensors: int | None = None, version: int = 3, n_data_bytes: int = 4096) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors,
                                   len(keys) if n_keys is None else n_keys) + b"".join((*keys, *tensors))
    return header + bytes(-len(header) % 32 + n_data_bytes)


LIES: Mapping[str, tuple[bytes, str]] = {
    "version 1": (raw(version=1), "version 1"),
    "version 4": (raw(version=4), "version 4"),
    "version 0": (raw(version=0), "version 0"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "more keys than bytes": (raw(n_keys=2000), "2000 keys"),
    "absurdly many keys": (raw(n_keys=2**64 - 1), "claims 18446744073709551615 keys"),
    "more tensors than bytes": (raw(n_tensors=500), "500 tensors"),
    "absurdly many tensors": (raw(n_tensors=2**40), "claims 1099511627776 tensors"),
    "one key too few": (raw([key("a", scalar(4))], n_keys=2, n_data_bytes=0), "a key has 0 bytes"),
    "an endless key": (raw([struct.pack("<Q", 2**63)]), "9223372036854775808 bytes"),
    "an empty key": (raw([key("", scalar(4))]), "0 bytes"),
    "a key of 1,025 bytes": (raw([key("k" * 1025, scalar(4))]), "1025 bytes"),
    "a key that is not UTF-8": (raw([key(b"\xff\xfe", scalar(4))]), "not UTF-8"),
    "a key with a surrogate": (raw([key(b"\xed\xa0\x80", scalar(4))]), "not UTF-8"),
    "a key that moves the cursor": (raw([key("a\x1b[2J", scalar(4))]), "unprintable"),
    "a key with a NUL": (raw([key("a\0", scalar(4))]), "unprintable"),
    "a key twice": (raw([key("a", scalar(4)), key("a", scalar(5))]), "'a' occurs twice"),
    "value type 13": (raw([key("a", scalar(13))]), "unknown value type 13"),
    "value type -1": (raw([key("a", scalar(2**32 - 1))]), "unknown value type 4294967295"),
    "truth value 2": (raw([key("a", scalar(7, b"\2"))]), "neither 0 nor 1"),
    "truth value 2 in an array": (raw([key("a", array(7, 2, b"\1\2"))]), "neither 0 nor 1"),
    "an endless text": (raw([key("a", scalar(8, struct.pack("<Q", 2**64 - 1)))]), "a text needs"),
    "a text one byte too long": (raw([key("a", scalar(8, struct.pack("<Q", 5) + b"text"))], n_data_bytes=0)[:49],
                                 "a text needs"),
    "an array of arrays": (raw([key("a", array(9, 1, array(4, 0)))]), "array of arrays"),
    "a deep nest of arrays": (raw([key("a", b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000)))]), "'a'"),
    "an array of no type": (raw([key("a", array(99, 1))]), "unknown value type 99"),
    "an endless numeric array": (raw([key("a", array(4, 2**62))]), "the array 'a'"),
    "an array that overflows": (raw([key("a", array(10, 2**61 + 1))]), "the array 'a'"),
    "a short array beyond the end": (raw([key("a", array(4, 1024))], n_data_bytes=100), "1024 numbers"),
    "an endless string array": (raw([key("a", array(8, 2**64 - 1))]), "the array 'a'"),
    "a string array with an endless string": (raw([key("a", array(8, 2, struct.pack("<QQ", 0, 2**63)))]), "'a'"),
    "alignment 0": (raw([key("general.alignment", scalar(4))]), "power of two"),
    "alignment 48": (raw([key("general.alignment", scalar(4, struct.pack("<I", 48)))]), "power of two"),
    "alignment 4 GiB": (raw([key("general.alignment", scalar(10, struct.pack("<Q", 2**32)))]), "power of two"),
    "alignment as a text": (raw([key("general.alignment", scalar(8, string_bytes("32")))]), "power of two"),
    "alignment as a truth value": (raw([key("general.alignment", scalar(7, b"\1"))]), "power of two"),
    "a tensor without a name": (raw(tensors=[tensor("")]), "0 bytes"),
    "a name of 64 bytes": (raw(tensors=[tensor("n" * 64)]), "64 bytes"),
    "a name that is not UTF-8": (raw(tensors=[tensor(b"\xc3")]), "not UTF-8"),
    "a name with a NUL": (raw(tensors=[tensor("a\0b")]), "unprintable"),
    "a tensor twice": (raw(tensors=[tensor("t"), tensor("t", offset=32)]), "'t' occurs twice"),
    "five dimensions": (raw(tensors=[tensor(shape=(1,) * 5)]), "5 dimensions"),
    "4 billion dimensions": (raw(tensors=[tensor(n_dimensions=2**32 - 1)]), "4294967295 dimensions"),
    "an empty dimension": (raw(tensors=[tensor(shape=(8, 0))]), "impossible shape"),
    "an empty row": (raw(tensors=[tensor(shape=(0,))]), "impossible shape"),
    "a negative dimension": (raw(tensors=[tensor(shape=(8, 2**64 - 1))]), "impossible shape"),
    "elements that overflow": (raw(tensors=[tensor(shape=(2**32, 2**32))]), "impossible shape"),
    "elements that wrap to few": (raw(tensors=[tensor(shape=(2**33, 2**31, 2, 1))]), "impossible shape"),
    "bytes that overflow": (raw(tensors=[tensor(shape=(2**62,))]), "cut short"),
    "a removed type": (raw(tensors=[tensor(type_id=4)]), "type 4"),
    "a repacked type": (raw(tensors=[tensor(type_id=31)]), "type 31"),
    "a type of the future": (raw(tensors=[tensor(type_id=43)]), "type 43"),
    "type -1": (raw(tensors=[tensor(type_id=2**32 - 1)]), "type 4294967295"),
    "half a block": (raw(tensors=[tensor(shape=(48,), type_id=Q8_0.id)]), "rows of 48 elements"),
    "a row below a K-block": (raw(tensors=[tensor(shape=(128, 2), type_id=Q4_K.id)]), "rows of 128 elements"),
    "an offset out of step": (raw(tensors=[tensor(offset=8)]), "not a multiple of 32"),
    "an offset beyond the end": (raw(tensors=[tensor(offset=2**40)]), "cut short"),
    "an offset that wraps": (raw(tensors=[tensor(offset=2**64 - 32)]), "cut short"),
    "data beyond the end": (raw(tensors=[tensor(shape=(1024,), offset=32)]), "cut short"),
    "two tensors in one place": (raw(tensors=[tensor("a"), tensor("b")]), "'b' overlaps"),
    "a tensor across the next": (raw(tensors=[tensor("a", offset=32), tensor("b", (9,))]), "'a' overlaps"),
    "no data section": (raw(tensors=[tensor()], n_data_bytes=0)[:60], "cut short"),
}


@pytest.mark.parametrize("lie", LIES)
def test_every_kind_of_lie_is_named(tmp_path: Path, lie: str) -> None:
    content, problem = LIES[lie]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=problem) as error:
        read_header(path)
    assert error.value.path == str(path)
    assert error.value.next_step
    assert len(str(error.value)) < 500 + len(str(path))


def test_the_lies_start_from_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(raw([key("a", scalar(4))], [tensor("a", (32, 4), Q8_0.id), tensor("b", offset=160)]))
    assert list(read_header(path).tensors) == ["a", "b"]
    # the extremes that are still allowed
    path.write_bytes(raw([key("k" * 1024, scalar(4))], [tensor("n" * 63, (1, 1, 1, 1024))]))
    assert next(iter(read_header(path).tensors.values())).shape == (1, 1, 1, 1024)


def test_every_truncation_of_a_small_file_is_noticed(tmp_path: Path) -> None:
    metadata: dict[str, MetaValue] = {"general.architecture": "llama", "n": Typed(ValueType.UINT64, 1),
                                      "heads": [1, 2], "tokens": ["a", "bc"]}
    content = gguf_bytes(metadata, [TinyTensor("w", F32, (8, 4), bytes(128))])
    path = tmp_path / "cut.gguf"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError):
            read_header(path)
    path.write_bytes(content)
    assert read_header(path).file_bytes == len(content)


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("keys", [
    [key("a", scalar(8, struct.pack("<Q", 2**33)))],
    [key("a", array(0, 2**33))],
    [key("a", array(8, 2**30))],
    [key("a", array(8, 1, struct.pack("<Q", 2**33)))],
    [struct.pack("<Q", 2**33)],
], ids=["text", "bytes", "strings", "one-string", "key"])
def test_a_huge_file_cannot_make_its_reader_allocate(tmp_path: Path, keys: list[bytes]) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(raw(keys))
    with path.open("r+b") as file:
        file.truncate(2**36)  # sparse: 64 GiB that take no room, so that no length is beyond the file's end
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with pytest.raises(ModelFileError):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] - before < 2**20


@pytest.mark.usefixtures("traced")
def test_what_parsed_values_take_in_memory_is_bounded(tmp_path: Path) -> None:
    # 64 KiB of small integers as a text in four-byte characters, and numbers that Python blows up twentyfold
    wide = scalar(8, string_bytes("😀" * 2**14))
    numbers = array(2, 1024, b"\xff\xff" * 1024)
    path = tmp_path / "dense.gguf"
    path.write_bytes(raw([key(f"wide.{number}", wide) for number in range(100)]
                         + [key(f"numbers.{number}", numbers) for number in range(1000)]))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    header = read_header(path)
    assert len(header.metadata) == 1100
    assert isinstance(header.metadata["wide.0"], str)
    assert isinstance(header.metadata["numbers.999"], values.ArrayRef)
    assert tracemalloc.get_traced_memory()[1] - before < 6 * 2**20


def test_counts_have_bounds_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_KEYS", 2)
    monkeypatch.setattr(reader, "MAX_TENSORS", 1)
    path = tmp_path / "many.gguf"
    path.write_bytes(raw([key(name, scalar(4)) for name in "abc"]))
    with pytest.raises(ModelFileError, match="at most 2"):
        read_header(path)
    path.write_bytes(raw(tensors=[tensor("a"), tensor("b", offset=32)]))
    with pytest.raises(ModelFileError, match="at most 1"):
        read_header(path)


def test_an_array_that_changed_since_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "changing.gguf"
    path.write_bytes(raw([key("texts", array(8, 3, string_bytes("a") * 3)),
                          key("numbers", array(4, 2000, bytes(8000)))]))
    metadata = read_header(path).metadata
    texts, numbers = metadata["texts"], metadata["numbers"]
    assert isinstance(texts, values.ArrayRef) and isinstance(numbers, values.ArrayRef)
    with pytest.raises(ModelFileError, match="texts, not numbers"):
        texts.read_numbers(path)
    with pytest.raises(ModelFileError, match="numbers, not texts"):
        numbers.read_strings(path)
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(ModelFileError):
        texts.read_strings(path)
    with pytest.raises(ModelFileError):
        numbers.read_numbers(path)


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_gguf.py"
    spec = importlib.util.spec_from_file_location("fuzz_gguf", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_gguf"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_fuzzer_starts_from_sound_files(fuzz: ModuleType, tmp_path: Path) -> None:
    for sheet in fuzz.SHEETS:
        (tmp_path / "sound.gguf").write_bytes(sheet.data)
        fuzz.read_everything(tmp_path / "sound.gguf")
    for number, sheet in enumerate(fuzz.SPLIT_SHEETS, start=1):
        (tmp_path / f"sound-{number:05}-of-00002.gguf").write_bytes(sheet.data)
    fuzz.read_everything(tmp_path / "sound-00001-of-00002.gguf")


@pytest.mark.usefixtures("traced")
def test_damaged_files_end_in_a_typed_error_or_a_valid_header(fuzz: ModuleType, tmp_path: Path) -> None:
    verdicts: Counter[str] = Counter()
    for number in range(N_FUZZ_CASES):
        outcome = fuzz.run_case(tmp_path, FUZZ_SEED, number)
        assert not outcome.broken_promises(), f"case {number} of seed {FUZZ_SEED}"
        verdicts[outcome.verdict] += 1
    assert verdicts.total() == N_FUZZ_CASES
    # Both ends must be met, or the fuzzer damages too little or too much to find anything.
    assert verdicts["ModelFileError"] > N_FUZZ_CASES // 2
    assert verdicts["valid"] > N_FUZZ_CASES // 50
