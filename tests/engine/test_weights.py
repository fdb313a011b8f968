"""The contract of every WeightSource: the right bytes under a lease, typed errors, and memory given back."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from seams import WEIGHT_SOURCES
from settling import check_settles, descriptors_and_threads

from edgert.architectures.base import EMBEDDING, Architecture, Block, TensorSpec
from edgert.architectures.registry import open_architecture
from edgert.engine.batch import Phase
from edgert.engine.layouts import repack_buffer_type
from edgert.engine.weights import Experts, WeightSource
from edgert.errors import ModelFileError
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Tensor
from edgert.gguf.model_file import ModelFile

MIB = 2**20
EVERY_SOURCE = pytest.mark.parametrize("kind", WEIGHT_SOURCES)
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@contextmanager
def opened(kind: str, path: Path) -> Iterator[tuple[WeightSource, ModelFile, Architecture]]:
    model = ModelFile.open(path)
    arch, backend = open_architecture(model), Backend(1)
    source = WEIGHT_SOURCES[kind](backend, model, arch)
    try:
        yield source, model, arch
    finally:
        source.close()
        backend.close()


def blocks(source: WeightSource, arch: Architecture) -> list[Block]:
    """Every block but the embedding, in the order of a step."""
    layers = [Block(kind, layer) for layer in range(arch.hp.n_layers) for kind in ("attention", "ffn")]
    return [*layers, *(Block("output", part=part) for part in range(source.n_output_parts))]


def in_memory(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data, tensor.n_bytes)


def in_file(model: ModelFile, name: str) -> bytes:
    info = model.tensors[name]
    with model.parts[info.part].open("rb") as file:
        file.seek(info.offset)
        return file.read(info.n_bytes)


def check_block(source: WeightSource, model: ModelFile, arch: Architecture, block: Block, phase: Phase) -> int:
    """Every tensor of the block that lies as in the file has the file's bytes. The number of those that do not."""
    n_repacked = 0
    specs = [s for s in arch.specs(Block(block.kind, 0 if block.kind == "output" else block.layer))
             if s.name in model.tensors]
    with source.lease(block, phase) as weights:
        if source.experts is not None:
            if block.kind == "ffn":
                check_experts(source.experts, model, block.layer, [s for s in specs if len(s.shape) == 3])
            specs = [s for s in specs if len(s.shape) != 3]
        assert set(weights) == {spec.key for spec in specs}
        for spec in specs:
            tensor = weights[spec.key]
            assert tensor.type == model.tensors[spec.name].type.id
            if tensor.struct.extra:
                n_repacked += 1
            else:
                assert in_memory(tensor) == in_file(model, spec.name), spec.name
    return n_repacked


def check_experts(experts: Experts, model: ModelFile, layer: int, specs: list[TensorSpec]) -> None:
    """Every expert comes once, and lies in its slot as in the file."""
    weights, n_experts = experts.weights(layer), specs[0].shape[2]
    assert set(weights) == {spec.key for spec in specs}
    wanted, seen = dict.fromkeys(range(n_experts), layer), list[int]()
    experts.request(layer, {0: layer})
    for slots in experts.waves(layer, wanted):
        assert len(set(slots.values())) == len(slots) > 0
        seen += slots
        for spec in specs:
            whole, tensor = in_file(model, spec.name), weights[spec.key]
            n_bytes = len(whole) // n_experts
            assert tensor.type == model.tensors[spec.name].type.id
            for expert, slot in slots.items():
                in_slot = ctypes.string_at(tensor.data + slot * tensor.nb[2], n_bytes)
                assert in_slot == whole[expert * n_bytes:(expert + 1) * n_bytes], (spec.name, expert)
    assert sorted(seen) == list(range(n_experts))
    experts.release()


@EVERY_SOURCE
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3moe", "smallthinker"])
def test_a_leased_block_has_the_files_bytes(kind: str, architecture: str, tiny_model: Callable[..., Path]) -> None:
    with opened(kind, tiny_model(architecture, quantisation="MIXED", n_layers=3)) as (source, model, arch):
        for phase in (*PHASES, *PHASES):  # round and round, as decoding goes
            for block in blocks(source, arch):
                check_block(source, model, arch, block, phase)


@EVERY_SOURCE
def test_a_tied_output_has_the_embeddings_bytes(kind: str, tiny_model: Callable[..., Path]) -> None:
    with opened(kind, tiny_model("llama", tied=True)) as (source, model, arch):
        check_block(source, model, arch, Block("output"), "decode")


@EVERY_SOURCE
def test_a_pass_may_break_off_and_begin_again(kind: str, tiny_model: Callable[..., Path]) -> None:
    with opened(kind, tiny_model("llama", n_layers=4)) as (source, model, arch):
        everything = blocks(source, arch)
        for n_done in (1, 4, 2, len(everything), 3):  # cancelled steps
            for block in everything[:n_done]:
                check_block(source, model, arch, block, "prefill")


@EVERY_SOURCE
def test_an_error_under_a_lease_ends_the_lease(kind: str, tiny_model: Callable[..., Path]) -> None:
    with opened(kind, tiny_model("llama")) as (source, model, arch):
        with pytest.raises(RuntimeError, match="compute failed"), source.lease(Block("attention", 0), "decode"):
            raise RuntimeError("compute failed")
        for block in blocks(source, arch):
            check_block(source, model, arch, block, "decode")


@EVERY_SOURCE
def test_the_embedding_table_has_each_tokens_row(kind: str, tiny_model: Callable[..., Path]) -> None:
    with opened(kind, tiny_model("llama")) as (source, model, arch):
        row_bytes = model.tensors["token_embd.weight"].type.row_bytes(arch.hp.hidden_size)
        table = in_file(model, "token_embd.weight")
        for ids in ([5], [0, 319, 5, 5], list(range(60))):
            token_ids = np.array(ids, np.int32)
            with source.lease_embedding(token_ids, "prefill") as (weights, rows):
                leased = in_memory(weights["token_embd.weight"])
                assert len(rows) == len(ids)
                for token_id, row in zip(ids, rows.tolist(), strict=True):
                    expected = table[token_id * row_bytes:(token_id + 1) * row_bytes]
                    assert leased[row * row_bytes:(row + 1) * row_bytes] == expected


@EVERY_SOURCE
@pytest.mark.parametrize("n_experts", [0, 8])
def test_a_split_file_is_read_from_all_its_parts(kind: str, n_experts: int, tiny_model: Callable[..., Path]) -> None:
    with opened(kind, tiny_model("llama", split_parts=3, n_experts=n_experts)) as (source, model, arch):
        assert len(model.parts) == 3
        for block in blocks(source, arch):
            check_block(source, model, arch, block, "decode")


@EVERY_SOURCE
def test_a_resident_source_keeps_its_addresses(kind: str, tiny_model: Callable[..., Path]) -> None:
    with opened(kind, tiny_model("llama")) as (source, _, arch):
        if not source.resident:
            return
        for phase in PHASES:
            seen = []
            for _ in range(2):
                addresses = []
                for block in (EMBEDDING, *blocks(source, arch)):
                    with source.lease(block, phase) as weights:
                        addresses.append([tensor.data for tensor in weights.values()])
                seen.append(addresses)
            assert seen[0] == seen[1]


@EVERY_SOURCE
def test_the_account_is_true(kind: str, tiny_model: Callable[..., Path]) -> None:
    has_experts = kind == "experts"
    path = tiny_model("qwen3moe" if has_experts else "llama", quantisation="Q4_0")
    with opened(kind, path) as (source, model, arch):
        json.dumps(source.plan())
        assert source.pinned_bytes > 0
        before = source.streamed_bytes
        for _ in range(3):
            for block in blocks(source, arch):
                check_block(source, model, arch, block, "decode")
        if source.resident:
            assert source.pinned_bytes >= model.file_bytes
            assert source.streamed_bytes == 0
        else:
            assert source.pinned_bytes < model.file_bytes
            streams = [one.n_bytes for one in model.tensors.values()
                       if len(one.shape) > (2 if has_experts else 1) and one.name != "token_embd.weight"]
            assert source.streamed_bytes - before >= (1 if has_experts else 2) * sum(streams)


def test_the_repacked_source_repacks(tiny_model: Callable[..., Path]) -> None:
    with opened("resident, repacked", tiny_model("llama", quantisation="Q4_0")) as (source, model, arch):
        backend = Backend(1)
        possible = repack_buffer_type(backend.device) is not None
        backend.close()
        n_repacked = sum(check_block(source, model, arch, block, "decode") for block in blocks(source, arch))
        assert (n_repacked > 0) == possible
        assert source.pinned_bytes > model.file_bytes or not possible
    with opened("resident, plain", tiny_model("llama", quantisation="Q4_0")) as (source, model, arch):
        assert sum(check_block(source, model, arch, block, "decode") for block in blocks(source, arch)) == 0


# -- closing, and files that are not as they were --------------------------------------------------------------------
@EVERY_SOURCE
def test_closing_gives_everything_back(kind: str, tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama", hidden_size=512, ffn_size=2048, n_layers=2)  # some 10 MiB
    assert path.stat().st_size > 8 * MIB

    def use() -> None:
        with opened(kind, path) as (source, model, arch):
            check_block(source, model, arch, Block("ffn", 0), "decode")
            source.close()  # and once more at the end

    for _ in range(3):
        use()
    process = psutil.Process()
    rss_bytes, held = process.memory_info().rss, descriptors_and_threads()
    for _ in range(20):
        use()
    assert process.memory_info().rss - rss_bytes < 16 * MIB  # 20 times 8 MiB, had they stayed
    check_settles(*held)


def _cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


@EVERY_SOURCE
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b""), _cut_short],
                         ids=["vanished", "emptied", "cut short"])
@pytest.mark.parametrize("n_parts", [1, 2])
def test_a_file_that_is_not_as_its_header_said_is_a_typed_error(
        kind: str, harm: Callable[[Path], object], n_parts: int, tiny_model: Callable[..., Path],
        tmp_path: Path) -> None:
    original = ModelFile.open(tiny_model("llama", split_parts=n_parts)).parts
    copies = [tmp_path / part.name for part in original]
    for copy, part in zip(copies, original, strict=True):
        copy.write_bytes(part.read_bytes())
    model = ModelFile.open(copies[0])
    arch, backend = open_architecture(model), Backend(1)
    harm(copies[-1])
    before = descriptors_and_threads()
    with pytest.raises(ModelFileError) as raised:
        source = WEIGHT_SOURCES[kind](backend, model, arch)
        try:
            for block in blocks(source, arch):
                with source.lease(block, "decode"):
                    pass
        finally:
            source.close()
    assert raised.value.path == str(copies[-1])
    assert raised.value.next_step
    del raised
    check_settles(*before)
    backend.close()
