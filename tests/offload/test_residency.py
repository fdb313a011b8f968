"""What is pinned and what streams: for any sizes and any memory, every piece once and never more than there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.architectures.base import OUTPUT, Block, TensorSpec, blocks_of
from edgert.architectures.registry import open_architecture
from edgert.gguf.model_file import ModelFile
from offload import residency
from offload.arena import PAGE_BYTES
from offload.loading import spare_window_bytes
from offload.readers import aligned_range
from offload.residency import Piece, always_pinned, choose, cut, n_parts

KIB, MIB = 2**10, 2**20
fuzzed = settings(derandomize=True, deadline=None, max_examples=60)


def piece(block: Block, name: str, n_bytes: int, offset: int = 0) -> Piece:
    spec = TensorSpec(name, (n_bytes,), "vector" if "norm" in name else "matrix")
    return Piece(block, spec, 0, (n_bytes,), 0, 0, offset, n_bytes)


def layers(n_layers: int, sizes: Sequence[int], norm_bytes: int = 4 * KIB) -> list[Piece]:
    """A model of equal layers: a norm and `sizes` in each, half of them attention."""
    pieces, offset = [], 0
    for layer in range(n_layers):
        for number, n_bytes in enumerate((norm_bytes, *sizes)):
            kind = "attention" if number <= len(sizes) // 2 else "ffn"
            name = "attn_norm" if number == 0 else f"matrix_{number}"
            pieces.append(piece(Block(kind, layer), f"blk.{layer}.{name}.weight", n_bytes, offset))
            offset += n_bytes
    return pieces


@st.composite
def models(draw: st.DrawFn) -> list[Piece]:
    """Layers of any sizes and an output head in parts, as they lie in a file."""
    sizes = st.one_of(st.integers(1, 256 * KIB), st.integers(64 * KIB, 40 * MIB))
    pieces, offset = [], draw(st.integers(0, 4096))
    blocks = [Block(kind, layer) for layer in range(draw(st.integers(1, 6))) for kind in ("attention", "ffn")]
    blocks += [Block("output", part=part) for part in range(draw(st.integers(1, 4)))]
    for block in blocks:
        for number in range(draw(st.integers(1, 4))):
            n_bytes = draw(sizes)
            pieces.append(piece(block, f"blk.{block.layer}.{block.kind}_{number}.weight", n_bytes, offset))
            offset += n_bytes
    return pieces


def total(pieces: Sequence[Piece]) -> int:
    return sum(p.slot_bytes for p in pieces)


def small(pieces: Sequence[Piece]) -> int:
    """The bytes that are pinned whatever happens."""
    return total([p for p in pieces if always_pinned(p)])


@fuzzed
@given(models(), st.integers(0, 10**6))
def test_every_piece_is_pinned_or_streamed_in_the_order_of_the_model(pieces: list[Piece], share: int) -> None:
    chosen = choose(pieces, small(pieces) + total(pieces) * share // 10**6, MIB)
    order = {p: number for number, p in enumerate(pieces)}
    for part in (chosen.pinned, chosen.streamed):
        assert [order[p] for p in part] == sorted(order[p] for p in part)
    assert sorted((*chosen.pinned, *chosen.streamed), key=order.__getitem__) == pieces
    assert sorted(chosen.keep, key=order.__getitem__) == [*chosen.pinned]
    assert chosen.pinned_bytes + chosen.streamed_bytes == total(pieces)


@fuzzed
@given(models(), st.lists(st.integers(0, 10**6), min_size=2, max_size=4))
def test_what_stays_when_memory_is_wanted_is_what_would_have_been_chosen_for_it(pieces: list[Piece],
                                                                                shares: list[int]) -> None:
    least, *more = sorted(small(pieces) + total(pieces) * share // 10**6 for share in shares)
    alone, chosen = choose(pieces, least, MIB), choose(pieces, more[-1], MIB, [least, *more])
    assert chosen.keep[:len(alone.keep)] == alone.keep
    assert small(pieces) <= chosen.pinned_bytes <= more[-1]


def test_memory_that_grows_by_less_than_a_block_goes_to_the_head_first() -> None:
    pieces = layers(28, [MIB, MIB, 7 * MIB, 7 * MIB, 7 * MIB])
    head = [piece(Block("output", part=part), "output.weight", residency.MAX_PIECE_BYTES)
            for part in range(182 * MIB // residency.MAX_PIECE_BYTES)]
    rooms = [small(pieces) + (12 + 8 * stage) * MIB for stage in range(8)]
    chosen = choose([*pieces, *head], rooms[-1], 64 * MIB, rooms[:-1])
    assert total([p for p in chosen.keep if p.block.kind == "output"]) > rooms[-1] / 2


@fuzzed
@given(models(), st.integers(0, 64))
def test_a_window_that_is_there_is_not_spared_for_once_more(pieces: list[Piece], window_mib: int) -> None:
    window = window_mib * MIB
    spare, alone = (spare_window_bytes(choose(pieces, total(pieces), n_bytes)) for n_bytes in (window, 0))
    assert window + spare == max(window, alone)
    if any(not always_pinned(piece) for piece in pieces):
        assert alone > 0 and spare_window_bytes(choose(pieces, small(pieces), window)) == 0


@fuzzed
@given(models(), st.integers(0, 10**6))
def test_pinned_pieces_and_window_fill_what_the_plan_gives(pieces: list[Piece], share: int) -> None:
    room, window = small(pieces) + total(pieces) * share // 10**6, 64 * MIB
    chosen = choose(pieces, room, window)
    assert chosen.pinned_bytes <= room
    assert chosen.pinned_bytes + chosen.window_bytes <= room + window
    if chosen.streamed:  # nothing lies idle: less is left than the smallest piece that streams
        assert room + window - chosen.pinned_bytes - chosen.window_bytes < PAGE_BYTES
        assert chosen.window_bytes - window < min(p.slot_bytes for p in chosen.streamed)


@fuzzed
@given(models(), st.lists(st.integers(0, 12 * 10**5), min_size=2, max_size=8))
def test_more_memory_never_streams_more(pieces: list[Piece], shares: list[int]) -> None:
    rooms = [small(pieces) + total(pieces) * share // 10**6 for share in sorted(shares)]
    streamed = [choose(pieces, room, 0).streamed_bytes for room in rooms]
    assert streamed == sorted(streamed, reverse=True)


@fuzzed
@given(models(), st.integers(0, 64))
def test_what_fits_is_pinned_whole_and_the_window_is_as_planned(pieces: list[Piece], window: int) -> None:
    chosen = choose(pieces, total(pieces) + 1, window * MIB)
    assert (chosen.pinned, chosen.streamed, chosen.window_bytes) == (tuple(pieces), (), window * MIB)


@fuzzed
@given(models(), st.integers(0, 10**6), st.integers(0, 1000))
def test_what_is_given_up_streams_and_small_tensors_are_worth_most(pieces: list[Piece], share: int, n: int) -> None:
    chosen = choose(pieces, small(pieces) + total(pieces) * share // 10**6, 0)
    n_small = sum(always_pinned(p) for p in pieces)
    assert all(always_pinned(p) for p in chosen.keep[:n_small])
    n_kept = min(n_small + n, len(chosen.keep))
    beyond = chosen.streamed_beyond(n_kept)
    assert {*chosen.keep[:n_kept]}.isdisjoint(beyond)
    assert [p for p in pieces if p in {*beyond}] == [*beyond]
    assert total(beyond) + total(chosen.keep[:n_kept]) == total(pieces)


@pytest.mark.parametrize("sizes", [(MIB,), (MIB, MIB), (2 * MIB, MIB, 8 * MIB, 8 * MIB),
                                   (1536 * KIB, 256 * KIB, 256 * KIB, 1536 * KIB, 7 * MIB, 7 * MIB, 10 * MIB)], ids=str)
@pytest.mark.parametrize("percent", [20, 35, 50, 65, 80, 90])
def test_pinned_pieces_are_spread_evenly(sizes: tuple[int, ...], percent: int) -> None:
    """So that the computation of pinned pieces hides the reads of streamed ones, wherever a step is."""
    pieces = layers(24, sizes)
    chosen = choose(pieces, total(pieces) * percent // 100, 0)
    pinned, passed, held = set(chosen.pinned), 0, 0
    share = chosen.pinned_bytes / total(pieces)
    for p in pieces:
        passed += p.slot_bytes
        held += p.slot_bytes * (p in pinned)
        # A layer and a half: what the window and its readers even out.
        assert abs(held - passed * share) <= 1.5 * sum(sizes), p


def test_small_tensors_and_norms_are_always_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = layers(4, (64 * KIB, MIB, MIB), norm_bytes=256 * KIB)  # a norm that large: 65536 wide
    chosen = choose(pieces, small(pieces), 0)
    assert {p.spec.key for p in chosen.streamed} == {"matrix_2.weight", "matrix_3.weight"}
    monkeypatch.setattr(residency, "_SMALL_BYTES", 0)
    chosen = choose(pieces, small(pieces), 0)
    assert all(p.spec.use == "vector" for p in chosen.pinned)


@fuzzed
@given(st.integers(0, 2**50), st.integers(1, 2**40))
def test_the_aligned_range_encloses_the_range_tightly(offset: int, n_bytes: int) -> None:
    start, length = aligned_range(offset, n_bytes)
    assert start % 4096 == length % 4096 == 0
    assert start <= offset < start + 4096
    assert start + length - 4096 < offset + n_bytes <= start + length


# ------------------------------------------------------------------------------------------------------------------ cut


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2", "qwen3moe"])
def test_pieces_are_the_tensors_of_every_block_in_order(tiny_model: Callable[..., Path], architecture: str) -> None:
    model = ModelFile.open(tiny_model(architecture, quantisation="MIXED"))
    arch = open_architecture(model)
    pieces = cut(model, arch)
    assert list(dict.fromkeys(p.block for p in pieces)) == [b for b in blocks_of(arch.hp) if b.kind != "embedding"]
    for p in pieces:
        info = model.tensors[p.spec.name]
        assert (p.type_id, p.shape, p.part, p.offset, p.n_bytes) == (info.type.id, info.shape, info.part, info.offset,
                                                                     info.n_bytes)
    for block in blocks_of(arch.hp)[1:]:
        assert [p.spec for p in pieces if p.block == block] == [s for s in arch.specs(block) if s.name in model.tensors]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("vocab_size", "n_parts"), [(512, 2), (513, 3), (1000, 4), (256, 1)])
def test_a_large_head_is_cut_by_rows(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tied: bool,
                                     vocab_size: int, n_parts: int) -> None:
    monkeypatch.setattr(residency, "MAX_PIECE_BYTES", 1)
    model = ModelFile.open(tiny_model("llama", vocab_size=vocab_size, tied=tied, vocabulary=False))
    arch = open_architecture(model)
    head = [p for p in cut(model, arch) if p.block.kind == "output" and len(p.shape) == 2]
    name = "token_embd.weight" if tied else "output.weight"
    info = model.tensors[name]
    assert [p.block for p in head] == [Block("output", part=part) for part in range(n_parts)]
    assert [p.first_row for p in head] == list(range(0, vocab_size, 256))
    assert sum(p.shape[1] for p in head) == vocab_size
    assert [p.offset for p in head] == [info.offset + info.type.row_bytes(info.shape[0]) * p.first_row for p in head]
    assert sum(p.n_bytes for p in head) == info.n_bytes
    assert next(p for p in cut(model, arch) if p.spec.name == "output_norm.weight").block == OUTPUT


def test_parts_of_a_head_are_as_large_as_allowed(tiny_model: Callable[..., Path],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelFile.open(tiny_model("llama", vocab_size=2000, vocabulary=False))
    row_bytes = model.tensors["output.weight"].n_bytes // 2000
    monkeypatch.setattr(residency, "MAX_PIECE_BYTES", 700 * row_bytes)
    head = [p for p in cut(model, open_architecture(model)) if p.spec.name == "output.weight"]
    assert [p.shape[1] for p in head] == [512, 512, 512, 464]


def test_a_large_ffn_is_cut_by_rows_where_its_hidden_values_take_less(tiny_model: Callable[..., Path],
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelFile.open(tiny_model("llama", hidden_size=512, ffn_size=1100, quantisation="F16"))
    arch = open_architecture(model)
    assert n_parts([p.block for p in cut(model, arch)]) == (1, 1)  # not large
    monkeypatch.setattr(residency, "MAX_BLOCK_BYTES", 2**20)
    pieces = cut(model, arch)
    layer = [(p.block.part, p.spec.key, p.first_row, p.shape[1]) for p in pieces
             if p.block.kind == "ffn" and p.block.layer == 1 and len(p.shape) == 2]
    assert layer == [(0, "ffn_gate.weight", 0, 512), (0, "ffn_up.weight", 0, 512),
                     (1, "ffn_gate.weight", 512, 512), (1, "ffn_up.weight", 512, 512),
                     (2, "ffn_gate.weight", 1024, 76), (2, "ffn_up.weight", 1024, 76),
                     (3, "ffn_down.weight", 0, 256), (4, "ffn_down.weight", 256, 256)]
    assert sum(p.n_bytes for p in pieces) == sum(t.n_bytes for name, t in model.tensors.items()
                                                 if name != "token_embd.weight")
    assert n_parts([p.block for p in cut(model, arch, is_whole=True)]) == (1, 1)
    ffn_bytes, per_token = 3 * 512 * 1100 * 2 + 512 * 4, 4 * (1100 + 512)
    assert n_parts([p.block for p in cut(model, arch, ffn_bytes // per_token)]) == (1, 5)
    assert n_parts([p.block for p in cut(model, arch, ffn_bytes // per_token + 1)]) == (1, 1)


def test_pieces_of_a_split_model_name_their_part(tiny_model: Callable[..., Path]) -> None:
    model = ModelFile.open(tiny_model("llama", split_parts=3))
    pieces = cut(model, open_architecture(model))
    assert {p.part for p in pieces} == {0, 1, 2}
    assert all(p.part == model.tensors[p.spec.name].part for p in pieces)


def test_pieces_are_values() -> None:
    one = piece(OUTPUT, "output.weight", 5000, offset=4000)
    assert one == replace(one)
    assert one.slot_bytes == 3 * PAGE_BYTES
