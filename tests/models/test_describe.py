"""What `edgert show` tells: by hand-made headers, and by real models whose figures are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tiny_gguf import MetaValue, TinyTensor, write_gguf

from edgert.errors import ModelFileError, ModelNotFound
from edgert.gguf.types import TENSOR_TYPES_BY_NAME
from edgert.models.describe import block_kind, describe
from edgert.models.quantisation import quantisation_name


@pytest.mark.parametrize(("tensor", "kind"), [
    ("token_embd.weight", "embedding"), ("output.weight", "output head"), ("output_norm.weight", "output head"),
    ("blk.0.attn_q.weight", "attention"), ("blk.11.attn_output.weight", "attention"),
    ("blk.0.attn_norm.weight", "attention"), ("blk.3.post_attention_norm.weight", "attention"),
    ("blk.0.ffn_up.weight", "ffn"), ("blk.0.ffn_norm.weight", "ffn"), ("blk.0.post_ffw_norm.weight", "ffn"),
    ("blk.0.ffn_gate_inp.weight", "ffn"), ("blk.0.ffn_up_shexp.weight", "ffn"),
    ("blk.0.ffn_up_exps.weight", "experts"), ("blk.0.ffn_gate_up_exps.weight", "experts"),
    ("rope_freqs.weight", "other"), ("blk.0.ssm_in.weight", "other"), ("v.blk.0.attn_q.weight", "other"), ("", "other"),
])
def test_tensors_belong_to_kinds_of_blocks(tensor: str, kind: str) -> None:
    assert block_kind(tensor) == kind


@pytest.mark.parametrize(("file_type", "name"), [(15, "Q4_K_M"), (1024 + 7, "Q8_0"), (999, "Q6_K"), (None, "Q6_K")])
def test_a_quantisation_that_the_file_does_not_name_is_the_one_of_most_bytes(file_type: int | None,
                                                                            name: str) -> None:
    assert quantisation_name(file_type, {"Q4_K": 10, "Q6_K": 20, "F32": 5}) == name


def test_no_tensors_have_no_quantisation() -> None:
    assert quantisation_name(None, {}) == "unknown"


BASE: Mapping[str, MetaValue] = {
    "general.architecture": "llama", "llama.block_count": 3, "llama.embedding_length": 64,
    "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}


def write(directory: Path, metadata: Mapping[str, MetaValue]) -> Path:
    f32 = TENSOR_TYPES_BY_NAME["F32"]
    return write_gguf(directory / "m.gguf", metadata, [TinyTensor("token_embd.weight", f32, (64, 10), bytes(2560))])


@pytest.mark.parametrize(("keys", "f16_bytes", "q8_0_bytes"), [
    ({}, 3 * 2 * 2 * 16 * 2, 3 * 2 * 34),
    ({"llama.attention.head_count_kv": [1, 0, 3]}, 4 * 2 * 16 * 2, (34 + 34 + 68 + 68)),  # rows padded to 32 values
    ({"llama.attention.key_length": 64, "llama.attention.value_length": 32}, 3 * 2 * 96 * 2, 3 * 2 * 3 * 34),
])
def test_kv_bytes_follow_heads_and_their_lengths(tmp_path: Path, keys: dict[str, MetaValue], f16_bytes: int,
                                                 q8_0_bytes: int) -> None:
    described = describe(write(tmp_path, {**BASE, **keys}))
    assert described.kv_bytes_per_token == {"f16": f16_bytes, "q8_0": q8_0_bytes}


def test_without_kv_heads_every_head_has_its_own(tmp_path: Path) -> None:
    described = describe(write(tmp_path, {k: v for k, v in BASE.items() if not k.endswith("_kv")}))
    assert described.n_kv_heads == (4,)
    assert described.kv_bytes_per_token == {"f16": 3 * 4 * 2 * 16 * 2, "q8_0": 3 * 2 * 68}


def test_a_file_that_tells_little_is_described_with_gaps(tmp_path: Path) -> None:
    described = describe(write(tmp_path, {"general.architecture": "strange"}))
    assert (described.architecture, described.n_layers, described.kv_bytes_per_token) == ("strange", None, None)
    assert (described.licence, described.has_chat_template, described.quantisation) == (None, False, "F32")
    assert described.vocabulary_size == 10


@pytest.mark.parametrize("keys", [{"llama.block_count": 2**31 - 1}, {"llama.attention.head_count": 0},
                                  {"llama.embedding_length": 0}])
def test_absurd_numbers_cost_nothing(tmp_path: Path, keys: dict[str, MetaValue]) -> None:
    describe(write(tmp_path, {**BASE, **keys}))


def test_a_key_of_the_wrong_type_is_an_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="block_count"):
        describe(write(tmp_path, {**BASE, "llama.block_count": "many"}))


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        describe(tmp_path / "m.gguf")


def test_experts_are_counted_apart(tiny_model: Callable[..., Path]) -> None:
    described = describe(tiny_model("qwen3moe"))
    assert described.n_experts == 8
    assert described.block_bytes["experts"] > described.block_bytes["ffn"] > 0


def test_the_bytes_of_all_kinds_are_the_bytes_of_all_tensors(tiny_model: Callable[..., Path]) -> None:
    described = describe(tiny_model("gemma3", quantisation="MIXED"))
    assert sum(described.block_bytes.values()) == sum(use.n_bytes for use in described.tensor_types.values())
    assert described.sliding_window == 32


def test_a_split_model_is_described_as_one(tiny_model: Callable[..., Path]) -> None:
    whole, split = describe(tiny_model("llama")), describe(tiny_model("llama", split_parts=3))
    assert len(split.parts) == 3
    assert (split.n_parameters, split.block_bytes) == (whole.n_parameters, whole.block_bytes)


def test_smollm2_is_what_its_authors_say(real_model: Callable[[str], Path]) -> None:
    described = describe(real_model("smollm2-135m"))
    assert (described.architecture, described.quantisation, described.licence) == ("llama", "Q4_1", "apache-2.0")
    assert (described.n_layers, described.n_heads, described.n_kv_heads) == (30, (9,), (3,))
    assert (described.context_length, described.vocabulary_size, described.has_chat_template) == (8192, 49152, True)
    assert described.n_parameters == 134_515_008
    assert described.kv_bytes_per_token == {"f16": 30 * 2 * 3 * 64 * 2, "q8_0": 30 * 2 * 3 * 64 * 34 // 32}
    assert described.tied_output
