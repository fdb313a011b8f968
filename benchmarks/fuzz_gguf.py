"""Feeds truncated, bit-flipped and lying GGUF files to the header reader and keeps the score.

Every case must end in an EdgertError or in a header that keeps its promises, within a bounded number of steps and a
bounded allocation. Case number i of a seed is always the same file. The tests run some thousand cases of this; run
it at length with `python benchmarks/fuzz_gguf.py --cases 100000 --seed 1`.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from edgert.errors import EdgertError
from edgert.gguf.model_file import ModelFile
from edgert.gguf.values import ArrayRef, ValueType

# What one case may cost: a constant and a multiple of the file's size. The worst of 100,000 cases took about half.
_STEPS, _STEPS_PER_BYTE = 1000, 2
_ALLOCATION_BYTES, _ALLOCATION_PER_BYTE = 128 * 1024, 4

FieldKind = Literal["magic", "version", "count", "length", "text", "type", "value", "extent", "offset"]
_INTERESTING = (0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 33, 63, 64, 255, 256, 1023, 1024, 1025, 2**15, 2**16, 2**20,
                2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
_TEXTS = (b"", b"\xff\xfe", b"\xc3", b"\0", b"\x1b[2J", b"blk.0.attn_q.weight", b"general.alignment",
          b"general.architecture", b"split.no", b"\xed\xa0\x80", "\u202e".encode())


@dataclass(frozen=True, slots=True)
class Field:
    """A place in a file about which one can lie."""

    kind: FieldKind
    offset: int
    n_bytes: int


@dataclass(slots=True)
class Sheet:
    """A sound GGUF file under construction, with the places of all its fields."""

    data: bytearray = field(default_factory=bytearray)
    fields: list[Field] = field(default_factory=list)

    def put(self, kind: FieldKind, layout: str, *values: int | float) -> None:
        for value in values:
            self.raw(kind, struct.pack(f"<{layout}", value))

    def raw(self, kind: FieldKind, data: bytes) -> None:
        self.fields.append(Field(kind, len(self.data), len(data)))
        self.data += data

    def text(self, text: str) -> None:
        raw = text.encode()
        self.put("length", "Q", len(raw))
        self.raw("text", raw)

    def key(self, name: str, value_type: ValueType, layout: str = "", *values: int | float | str) -> None:
        """A key with one value, or with an array where `layout` starts with a star."""
        self.text(name)
        if layout.startswith("*"):
            self.put("type", "I", ValueType.ARRAY)
        self.put("type", "I", value_type)
        if layout.startswith("*"):
            self.put("length", "Q", len(values))
        for text in (one for one in values if isinstance(one, str)):
            self.text(text)
        if numbers := [one for one in values if not isinstance(one, str)]:
            self.raw("value", struct.pack(f"<{len(numbers)}{layout.lstrip('*')}", *numbers))

    def tensor(self, name: str, shape: Sequence[int], type_id: int, offset: int) -> None:
        self.text(name)
        self.put("count", "I", len(shape))
        self.put("extent", "Q", *shape)
        self.put("type", "I", type_id)
        self.put("offset", "Q", offset)

    def start(self, version: int, n_tensors: int, n_keys: int) -> None:
        self.raw("magic", b"GGUF")
        self.put("version", "I", version)
        self.put("count", "Q", n_tensors, n_keys)

    def finish(self, alignment: int, n_data_bytes: int) -> Sheet:
        self.data += b"\0" * (-len(self.data) % alignment) + bytes(range(256)) * (n_data_bytes // 256 + 1)
        return self


def _all_value_types() -> Sheet:
    sheet = Sheet()
    sheet.start(3, 0, 17)
    sheet.key("general.architecture", ValueType.STRING, "", "llama")
    for number, layout in enumerate("BbHhIif"):
        sheet.key(f"one.{number}", ValueType(number), layout, 1)
    sheet.key("llama.truth", ValueType.BOOL, "B", 1)
    for number, layout in zip((10, 11, 12), "Qqd", strict=True):
        sheet.key(f"wide.{number}", ValueType(number), layout, 1)
    sheet.key("general.name", ValueType.STRING, "", "Käse ✓")
    sheet.key("heads", ValueType.INT32, "*i", 4, 4, 2, 2)
    sheet.key("truths", ValueType.BOOL, "*B", 1, 0, 1)
    sheet.key("scores", ValueType.FLOAT32, "*f", *([0.5] * 1100))
    sheet.key("tokens", ValueType.STRING, "*", *(f"token{number}" for number in range(9)))
    return sheet


def _with_tensors(version: int = 3, alignment: int = 32, split: tuple[int, int] | None = None) -> Sheet:
    sheet = Sheet()
    sheet.start(version, 4, 3 + (3 if split else 0))
    sheet.key("general.architecture", ValueType.STRING, "", "llama")
    sheet.key("general.alignment", ValueType.UINT32, "I", alignment)
    sheet.key("llama.block_count", ValueType.UINT32, "I", 1)
    suffix = ""
    if split:
        suffix = f".{split[0]}"
        sheet.key("split.no", ValueType.UINT16, "H", split[0])
        sheet.key("split.count", ValueType.UINT16, "H", split[1])
        sheet.key("split.tensors.count", ValueType.INT32, "i", 4 * split[1])
    offset = 0
    for name, shape, type_id, n_bytes in (("norm", (8,), 0, 32), ("q8", (32, 3), 8, 102), ("q4k", (256, 1, 2), 12, 288),
                                          ("f16", (4, 2, 2, 2), 1, 64)):
        sheet.tensor(f"blk.0.{name}{suffix}", shape, type_id, offset)
        offset += -(-n_bytes // alignment) * alignment
    return sheet.finish(alignment, offset)


SHEETS: tuple[Sheet, ...] = (_all_value_types(), _with_tensors(), _with_tensors(2, 64))
SPLIT_SHEETS: tuple[Sheet, ...] = (_with_tensors(split=(0, 2)), _with_tensors(split=(1, 2)))


def _pick(sheet: Sheet, rng: random.Random) -> Field:
    """Any kind of field with equal chance, so that few extents are lied about as often as many texts."""
    kind = rng.choice(sorted({one.kind for one in sheet.fields}))
    return rng.choice([one for one in sheet.fields if one.kind == kind])


def _truncate(sheet: Sheet, data: bytearray, rng: random.Random) -> None:
    at_field = rng.random() < 0.5
    end = rng.choice(sheet.fields).offset + rng.randint(-1, 1) if at_field else rng.randrange(len(data))
    del data[max(0, end):]


def _flip_bits(sheet: Sheet, data: bytearray, rng: random.Random) -> None:
    header_end = sheet.fields[-1].offset + sheet.fields[-1].n_bytes
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[rng.randrange(header_end)] ^= 1 << rng.randrange(8)


def _lie(sheet: Sheet, data: bytearray, rng: random.Random) -> None:
    """Change one to three fields to values that readers have stumbled over, keeping everything else in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        target = _pick(sheet, rng)
        end = target.offset + target.n_bytes
        if target.kind in ("text", "magic"):
            lie = rng.choice((*_TEXTS, rng.randbytes(target.n_bytes)))[:target.n_bytes]
            data[target.offset:target.offset + len(lie)] = lie
            continue
        old = int.from_bytes(data[target.offset:end], "little")
        near = (old + 1, old - 1, old * 2, len(data), len(data) - end, len(data) - end + 1, rng.getrandbits(64))
        data[target.offset:end] = (rng.choice((*_INTERESTING, *near)) % 2**(8 * target.n_bytes)).to_bytes(
            target.n_bytes, "little")


def _copy_field(sheet: Sheet, data: bytearray, rng: random.Random) -> None:
    """Give one field the bytes of another of its kind: doubled names, overlapping tensors, exchanged types."""
    target = _pick(sheet, rng)
    others = [one for one in sheet.fields if one.kind == target.kind and one.n_bytes == target.n_bytes]
    source = rng.choice(others)
    data[target.offset:target.offset + target.n_bytes] = data[source.offset:source.offset + source.n_bytes]


def _replace_text(sheet: Sheet, data: bytearray, rng: random.Random) -> None:
    """Put another text in place of one, with an honest length: what follows moves."""
    target = rng.choice([one for one in sheet.fields if one.kind == "text"])
    lie = rng.choice((*_TEXTS, b"x" * rng.choice((63, 64, 65, 1024, 1025, 5000)), rng.randbytes(20)))
    data[target.offset - 8:target.offset + target.n_bytes] = struct.pack("<Q", len(lie)) + lie


def _move_bytes(_: Sheet, data: bytearray, rng: random.Random) -> None:
    """Delete or double a stretch, or overwrite it with noise."""
    start = rng.randrange(len(data))
    stretch = data[start:start + rng.choice((1, 4, 8, 32, 200))]
    replacement = rng.choice((b"", bytes(stretch) * 2, rng.randbytes(len(stretch)), b"\xff" * len(stretch)))
    data[start:start + len(stretch)] = replacement


MUTATIONS: tuple[Callable[[Sheet, bytearray, random.Random], None], ...] = (
    _truncate, _flip_bits, _lie, _lie, _lie, _copy_field, _replace_text, _move_bytes)


def mutated(sheet: Sheet, rng: random.Random) -> bytes:
    """A damaged copy of the sheet's file. Mutations that need fields in place come first and alone, mostly."""
    data = bytearray(sheet.data)
    rng.choice(MUTATIONS)(sheet, data, rng)
    if rng.random() < 0.2 and data:
        _move_bytes(sheet, data, rng)
    return bytes(data)


class TooMuchWork(Exception):
    """A case took more steps than its size allows: what would be a hang with a larger file."""


@dataclass(slots=True)
class StepCounter:
    """Counts calls of functions through the interpreter's profiling hook, and stops a case that makes too many."""

    limit: int
    steps: int = 0
    _previous: object = None

    def __call__(self, _frame: FrameType, event: str, _argument: object) -> None:
        if event in ("call", "c_call"):
            self.steps += 1
            if self.steps > self.limit:
                raise TooMuchWork(f"over {self.limit} steps")

    def __enter__(self) -> StepCounter:
        self._previous = sys.getprofile()
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._previous)  # type: ignore[arg-type]  # whatever getprofile gave


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one case ended; `verdict` is "valid" or the error's class."""

    verdict: str
    steps: int
    peak_bytes: int
    file_bytes: int

    def broken_promises(self) -> list[str]:
        promises = (("steps", self.steps, _STEPS + _STEPS_PER_BYTE * self.file_bytes),
                    ("allocated bytes", self.peak_bytes, _ALLOCATION_BYTES + _ALLOCATION_PER_BYTE * self.file_bytes))
        return [f"{value} {what}, {bound} are allowed" for what, value, bound in promises if value > bound]


def read_everything(path: Path) -> None:
    """Open the model and use all of it. Raises EdgertError, or AssertionError where a valid header lies."""
    model = ModelFile.open(path)
    ends = dict.fromkeys(range(len(model.parts)), 0)
    for info in sorted(model.tensors.values(), key=lambda one: (one.part, one.offset)):
        assert info.offset >= ends[info.part], f"{info.name} overlaps"
        assert 0 < info.n_bytes == info.type.row_bytes(info.shape[0]) * info.n_elements // info.shape[0]
        ends[info.part] = info.offset + info.n_bytes
    for part, end in ends.items():
        assert end <= model.parts[part].stat().st_size, "a tensor beyond the end"
    model.fingerprint()
    for value in model.metadata.values():
        if isinstance(value, ArrayRef):
            read = value.read_strings if value.element_type is ValueType.STRING else value.read_numbers
            assert len(read(path)) == value.length
    assert model.name
    model.get_int("{arch}.block_count", 0)


def run_case(directory: Path, seed: int, number: int) -> Outcome:
    """Write case `number` of `seed` into `directory`, read it, and say how it ended. tracemalloc must be on."""
    rng = random.Random(f"{seed}:{number}")
    if number % 8:
        path = damaged = directory / "case.gguf"
        sheet = rng.choice(SHEETS)
    else:
        part = rng.randrange(2)
        paths = [directory / f"case-{one:05}-of-00002.gguf" for one in (1, 2)]
        path, damaged, sheet = paths[0], paths[part], SPLIT_SHEETS[part]
        paths[1 - part].write_bytes(SPLIT_SHEETS[1 - part].data)
    damaged.write_bytes(mutated(sheet, rng))
    file_bytes = sum(one.stat().st_size for one in {path, damaged})
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    with StepCounter(2 * (_STEPS + _STEPS_PER_BYTE * file_bytes)) as counter:
        try:
            read_everything(path)
            verdict = "valid"
        except EdgertError as error:
            verdict = type(error).__name__
            assert error.next_step, "an error without advice"
            str(error).encode()  # a lone surrogate could not be printed
    _, peak = tracemalloc.get_traced_memory()
    return Outcome(verdict, counter.steps, peak - before, file_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    verdicts: Counter[str] = Counter()
    failures: list[str] = []
    worst_ms = worst_peak = worst_steps = 0.0
    started = time.perf_counter()
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as directory:
        for number in range(options.cases):
            begun = time.perf_counter()
            try:
                outcome = run_case(Path(directory), options.seed, number)
            except Exception as error:  # whatever it is, it is the finding that this program looks for
                failures.append(f"case {number}: {type(error).__name__}: {error}")
                continue
            verdicts[outcome.verdict] += 1
            failures += [f"case {number}: {problem}" for problem in outcome.broken_promises()]
            worst_ms = max(worst_ms, 1000 * (time.perf_counter() - begun))
            worst_peak, worst_steps = max(worst_peak, outcome.peak_bytes), max(worst_steps, outcome.steps)
    print(json.dumps({
        "cases": options.cases, "seed": options.seed, "outcomes": dict(verdicts), "n_failures": len(failures),
        "failures": failures[:20], "worst_ms_traced": round(worst_ms, 1), "worst_peak_bytes": int(worst_peak),
        "worst_steps": int(worst_steps), "total_s": round(time.perf_counter() - started, 1)}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
